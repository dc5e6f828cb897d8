"""The log as a pool has it: appended to, looked at, one at a time, on a full disk."""

import asyncio
import errno
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from recovery.control import (
    PoolState,
)
from recovery.errors import CallerError, IllegalTransition, SetupError
from recovery.log.log import (
    Log,
    LogConfig,
    LogInUse,
    LogUnavailable,
    show,
    verify,
)
from tests.logs import (
    SMALL,
    FullDisk,
    GatedDisk,
    NoSync,
    events,
    recover,
    state_of,
    write,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "log"


@pytest.fixture
async def log(folder):
    log = Log(folder, SMALL)
    await log.open()
    yield log
    await log.close()


# -- in order --------------------------------------------------------------------------------------


async def test_new_log_is_empty(folder):
    log = Log(folder)
    assert not folder.exists()
    recovery = await log.open()
    await log.close()
    assert (recovery.state, recovery.last_seq, recovery.lost) == (PoolState(), 0, ())
    assert verify(folder).ok


async def test_what_was_appended_is_there_again(folder, log):
    for event in events(7):
        await log.append(event)
    await log.close()
    again = Log(folder)
    recovery = await again.open()
    await again.append(events(1, first=8)[0])
    await again.close()
    assert recovery.state == state_of(7)
    assert (recovery.last_seq, recovery.replayed, recovery.term) == (7, 7, 1)
    assert (recovery.damage, recovery.lost, recovery.cut_bytes) == ((), (), 0)
    assert [plain["seq"] for plain in show(folder)] == list(range(1, 9))


async def test_append_returns_after_the_disk_has_it(folder):
    class Disks(NoSync):
        def sync(self, fd: int) -> None:
            order.append("sync")

        def overwrite(self, fd: int, data: bytes) -> None:
            super().overwrite(fd, data)
            order.append("mark")

    order: list[str] = []
    log = Log(folder, disk=Disks())
    await log.open()
    order.clear()
    await log.append(events(1)[0])
    order.append("returned")
    assert order.index("sync") < order.index("mark") < order.index("returned")
    assert log.last_seq == 1
    await log.close()
    assert order.count("sync") == 2  # and the mark's own, for which nobody waits


async def test_concurrent_appends_share_their_syncs_and_keep_their_order(folder):
    disk = NoSync()
    log = Log(folder, disk=disk)
    await log.open()
    before = disk.syncs
    await asyncio.gather(*(log.append(event) for event in events(64)))
    assert disk.syncs - before <= 3  # one for the folder: the segment is new
    await log.close()
    assert recover(folder).state == state_of(64)


async def test_appends_wait_for_room_in_the_order_in_which_they_came(folder):
    log = Log(folder, LogConfig(queue_max=3, batch_max=2), NoSync())
    await log.open()
    await asyncio.gather(*(log.append(event) for event in events(50)))
    await log.close()
    assert recover(folder).state == state_of(50)


async def test_queue_is_bounded(folder):
    gate = threading.Event()
    log = Log(folder, LogConfig(queue_max=4, batch_max=1), GatedDisk(gate))
    gate.set()
    await log.open()
    gate.clear()
    tasks = [asyncio.create_task(log.append(event)) for event in events(20)]
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(log._queue) <= 4
    gate.set()
    await asyncio.gather(*tasks)
    assert log.last_seq == 20
    await log.close()


async def test_event_out_of_order_is_refused_and_the_log_goes_on(log):
    first, second, third = events(3)
    await log.append(first)
    for wrong in (first, third):
        with pytest.raises(IllegalTransition):
            await log.append(wrong)
    await log.append(second)
    assert log.last_seq == 2


async def test_cancelled_append_leaves_the_others_alone(folder):
    log = Log(folder, disk=NoSync())
    await log.open()
    tasks = [asyncio.create_task(log.append(event)) for event in events(3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [
        type(None),
        asyncio.CancelledError,
        type(None),
    ]
    await log.close()
    assert recover(folder).last_seq == 3


async def test_closing_writes_what_waits(folder):
    log = Log(folder, disk=NoSync())
    await log.open()
    tasks = [asyncio.create_task(log.append(event)) for event in events(5)]
    await asyncio.sleep(0)
    await log.close()
    await asyncio.gather(*tasks)
    with pytest.raises(LogUnavailable, match="not open"):
        await log.append(events(1, first=6)[0])
    assert recover(folder).last_seq == 5


async def test_log_that_was_never_opened_can_be_closed_but_not_used(folder):
    log = Log(folder)
    with pytest.raises(LogUnavailable):
        await log.append(events(1)[0])
    await log.close()


def test_show_begins_and_ends_where_told(folder):
    write(folder, 12)
    assert [plain["seq"] for plain in show(folder, since=5, limit=3)] == [5, 6, 7]
    assert [plain["seq"] for plain in show(folder, since=12)] == [12]
    assert list(show(folder, since=13)) == []
    assert next(show(folder))["body"]["name"] == "p"


def test_there_is_nothing_to_see_where_there_is_no_log(folder):
    with pytest.raises(LogUnavailable):
        verify(folder)
    with pytest.raises(LogUnavailable):
        next(show(folder))


async def test_log_in_use_can_be_looked_at_and_is_not_changed(folder, log):
    for event in events(5):
        await log.append(event)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    report = verify(folder)
    assert report.ok
    assert (report.events, report.first_seq, report.last_seq, report.acknowledged) == (5, 1, 5, 5)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    await log.append(events(1, first=6)[0])


async def test_log_can_be_looked_at_while_segments_come_and_go(folder, log):
    looks = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            looks.append(verify(folder))
            list(show(folder))

    looking = asyncio.create_task(asyncio.to_thread(look))
    for event in events(150):
        await log.append(event)
        if event.seq % 10 == 0:
            await log.checkpoint(state_of(event.seq), event.seq)
    done.set()
    await looking
    assert looks
    assert all(report.ok for report in looks), looks


async def test_log_is_opened_once(folder, log):
    with pytest.raises(IllegalTransition):
        await log.open()
    await log.append(events(1)[0])


# -- one at a time ---------------------------------------------------------------------------------


async def test_second_opener_is_refused_and_the_first_goes_on(folder, log):
    second = Log(folder)
    with pytest.raises(LogInUse, match="in use") as refused:
        await second.open()
    assert isinstance(refused.value, CallerError)
    await second.close()
    await log.append(events(1)[0])
    await log.close()
    third = Log(folder)
    assert (await third.open()).last_seq == 1
    await third.close()


def _try_to_open(folder: Path) -> str:
    try:
        recover(folder)
    except LogInUse:
        return "refused"
    return "opened"


async def test_another_process_is_refused(folder, log):
    with multiprocessing.get_context("spawn").Pool(1) as others:
        assert others.apply(_try_to_open, (folder,)) == "refused"
        await log.close()
        assert others.apply(_try_to_open, (folder,)) == "opened"


# -- checkpoints and retention ---------------------------------------------------------------------


async def test_checkpoint_is_where_the_replay_begins(folder, log):
    for event in events(5):
        await log.append(event)
    await log.checkpoint(state_of(5), 5)
    assert log.events_since_checkpoint == 0
    for event in events(2, first=6):
        await log.append(event)
    assert log.events_since_checkpoint == 2
    await log.close()
    recovery = recover(folder)
    assert (recovery.state, recovery.last_seq) == (state_of(7), 7)
    assert (recovery.checkpoint_seq, recovery.replayed) == (5, 2)


@pytest.mark.parametrize("seq", [0, 3])
async def test_checkpoint_of_what_is_not_on_disk_is_refused(log, seq):
    for event in events(2):
        await log.append(event)
    with pytest.raises(IllegalTransition):
        await log.checkpoint(state_of(3), seq)


# -- a full disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["full", "full_at_sync"])
@pytest.mark.parametrize("stuck", [False, True])
async def test_full_disk_is_reported_and_the_log_works_again_when_there_is_room(folder, how, stuck):
    disk = FullDisk()
    log = Log(folder, SMALL, disk)
    await log.open()
    for event in events(4):
        await log.append(event)
    setattr(disk, how, True)
    disk.stuck = stuck
    for _ in range(2):
        five, six = events(2, first=5)
        results = await asyncio.gather(log.append(five), log.append(six), return_exceptions=True)
        assert [type(result) for result in results] == [LogUnavailable] * 2
        assert isinstance(results[0], SetupError)
        assert stuck or "No space left" in str(results[0])
        assert results[0].fields["errno"] in {errno.ENOSPC, errno.EIO if stuck else errno.ENOSPC}
        assert log.last_seq == 4
        if not stuck:
            assert verify(folder).last_seq == 4
            assert verify(folder).ok
    setattr(disk, how, False)
    disk.stuck = False
    for event in events(4, first=5):
        await log.append(event)
    await log.close()
    assert verify(folder).ok
    recovery = recover(folder)
    assert (recovery.state, recovery.cut_bytes) == (state_of(8), 0)


async def test_mark_that_did_not_reach_the_disk_is_written_before_anything_else(folder):
    class Disks(NoSync):
        fail = -1

        def sync(self, fd: int) -> None:
            super().sync(fd)
            if self.syncs >= self.fail >= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk = Disks()
    log = Log(folder, SMALL, disk)
    await log.open()
    disk.fail = disk.syncs + 3  # after the folder's and the segment's comes the mark's
    one, two = events(2)
    await log.append(one)
    with pytest.raises(LogUnavailable):
        await log.append(two)
    assert log.last_seq == 1
    disk.fail = -1
    await log.append(two)
    await log.close()
    assert verify(folder).ok
    assert recover(folder).state == state_of(2)


async def test_what_was_appended_behind_a_failed_one_fails_with_it(folder):
    class Disks(FullDisk):
        def write(self, fd: int, data: bytes) -> None:
            gate.wait()
            super().write(fd, data)

    gate = threading.Event()
    gate.set()
    disk = Disks()
    log = Log(folder, LogConfig(batch_max=1), disk)
    await log.open()
    gate.clear()
    disk.full = True
    tasks = [asyncio.create_task(log.append(event)) for event in events(5)]
    await asyncio.sleep(0)
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {LogUnavailable}
    assert len(set(map(id, results))) == 5
    disk.full = False
    await asyncio.gather(*(log.append(event) for event in events(5)))
    await log.close()
    assert recover(folder).state == state_of(5)


async def test_checkpoint_on_a_full_disk_changes_nothing(folder):
    disk = FullDisk()
    log = Log(folder, SMALL, disk)
    await log.open()
    for event in events(4):
        await log.append(event)
    disk.full = True
    with pytest.raises(LogUnavailable):
        await log.checkpoint(state_of(4), 4)
    assert log.events_since_checkpoint == 4
    assert not [path for path in folder.iterdir() if "checkpoint" in path.name]
    disk.full = False
    await log.append(events(1, first=5)[0])
    await log.checkpoint(state_of(5), 5)
    await log.close()
    assert recover(folder).checkpoint_seq == 5


async def test_disk_that_is_full_when_the_log_opens_is_reported(folder):
    disk = FullDisk()
    disk.full = True
    log = Log(folder, SMALL, disk)
    with pytest.raises(LogUnavailable, match="opened"):
        await log.open()
    disk.full = False
    again = Log(folder, SMALL, disk)
    assert (await again.open()).last_seq == 0
    await again.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_nobody_waits_for_a_writer_that_ended(folder):
    class Mad(NoSync):
        def write(self, fd: int, data: bytes) -> None:
            if data.startswith(b'{"seq"'):
                raise ZeroDivisionError
            super().write(fd, data)

    log = Log(folder, SMALL, Mad())
    await log.open()
    results = await asyncio.gather(
        *(log.append(event) for event in events(3)), return_exceptions=True
    )
    assert {type(result) for result in results} == {LogUnavailable}
    with pytest.raises(LogUnavailable, match="ZeroDivisionError"):
        await log.append(events(1)[0])
    await log.close()
