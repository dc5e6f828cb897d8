import asyncio
import errno
import json
import multiprocessing
import os
import shutil
import threading
from functools import reduce
from pathlib import Path

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recovery.control import (
    Body,
    BrowserFailed,
    BrowserReady,
    BrowserStopped,
    BrowserUnwanted,
    BrowserWanted,
    Event,
    ModelLoaded,
    ModelUnwanted,
    ModelWanted,
    PoolClosing,
    PoolOpened,
    PoolState,
    apply,
)
from recovery.errors import CallerError, IllegalTransition, SetupError
from recovery.kinds import BrowserType, Level
from recovery.log.codec import encode
from recovery.log.log import (
    CorruptLog,
    Disk,
    Log,
    LogConfig,
    LogInUse,
    LogUnavailable,
    Lost,
    show,
    verify,
)
from recovery.log.segments import Store, event_line, scan, seal
from recovery.plan import STRATEGIES
from recovery.supervision import RestartLimit
from tests.fakes import FACTS, NUMERIC, failure

SMALL = LogConfig(segment_bytes_max=400, checkpoints_kept=2)
BODIES: tuple[Body, ...] = (
    PoolOpened("p", Level.MEDIUM, STRATEGIES["progressive"], RestartLimit(), 1),
    BrowserWanted("b", BrowserType.CHROME),
    BrowserReady("b", 0, FACTS),
    ModelWanted("m", "digest"),
    ModelLoaded("b", 0, "m", NUMERIC),
    BrowserFailed("b", 0, failure(message="it broke: \u00e4\u2028")),
    BrowserReady("b", 1, FACTS),
)


def events(count: int, first: int = 1) -> list[Event]:
    """`BODIES`, and then a model wanted and unwanted for as long as it takes."""
    last = first + count - 1
    bodies = [*BODIES[:last]]
    while len(bodies) < last:
        n = len(bodies)
        bodies.append(ModelWanted(f"m{n}", "digest") if n % 2 else ModelUnwanted(f"m{n - 1}"))
    whole = [Event(seq, 1, seq / 8, body) for seq, body in enumerate(bodies, 1)]
    return whole[first - 1 :]


def state_of(count: int) -> PoolState:
    return reduce(apply, events(count), PoolState())


class NoSync(Disk):
    """A disk that syncs nothing: what a crash of the process alone would leave."""

    def __init__(self) -> None:
        self.syncs = 0

    def sync(self, fd: int) -> None:
        self.syncs += 1

    def sync_folder(self, folder: Path) -> None:
        self.syncs += 1


class FullDisk(NoSync):
    """Full whenever `full` says so: half of what is written arrives."""

    full = False
    full_at_sync = False
    stuck = False  # not even shorter can a file become

    def write(self, fd: int, data: bytes) -> None:
        if self.full:
            super().write(fd, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(fd, data)

    def sync(self, fd: int) -> None:
        super().sync(fd)
        if self.full_at_sync:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def truncate(self, fd: int, size: int) -> None:
        if self.stuck:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().truncate(fd, size)


class GatedDisk(NoSync):
    """Its next write waits until the gate opens."""

    def __init__(self, gate) -> None:
        super().__init__()
        self.gate = gate

    def write(self, fd: int, data: bytes) -> None:
        self.gate.wait()
        super().write(fd, data)


class PowerCut(BaseException):
    pass


class DyingDisk(NoSync):
    """Does `steps` things and then no more; the last write arrives by half."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def _step(self) -> None:
        if self.left == 0:
            raise PowerCut
        self.left -= 1

    def open(self, path: Path, *, append: bool) -> int:
        self._step()
        return super().open(path, append=append)

    def write(self, fd: int, data: bytes) -> None:
        if self.left == 0:
            super().write(fd, data[: len(data) // 2])
        self._step()
        super().write(fd, data)

    def overwrite(self, fd: int, data: bytes) -> None:
        if self.left == 0:
            super().overwrite(fd, data[: len(data) // 2])
        self._step()
        super().overwrite(fd, data)

    def truncate(self, fd: int, size: int) -> None:
        self._step()
        super().truncate(fd, size)

    def sync(self, fd: int) -> None:
        self._step()

    def sync_folder(self, folder: Path) -> None:
        self._step()

    def replace(self, old: Path, new: Path) -> None:
        self._step()
        super().replace(old, new)

    def unlink(self, path: Path) -> None:
        self._step()
        super().unlink(path)


def write(folder: Path, count: int, *, checkpoints: tuple[int, ...] = (), config=SMALL) -> None:
    """A log of `count` events, each in a write of its own."""
    store = Store(folder, config, NoSync())
    try:
        store.open(0.0)
        for event in events(count):
            store.append([event_line(event)], event.seq)
            if event.seq in checkpoints:
                store.checkpoint(event.seq, state_of(event.seq), 0.0)
    finally:
        store.close()


def recover(folder: Path, config=SMALL):
    store = Store(folder, config, NoSync())
    try:
        return store.open(0.0)
    finally:
        store.close()


def segments(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.jsonl"))


def copied(folder: Path) -> Path:
    again = folder.with_name("again")
    shutil.rmtree(again, ignore_errors=True)
    again.mkdir()
    for path in folder.iterdir():
        (again / path.name).write_bytes(path.read_bytes())
    return again


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


def test_segments_follow_each_other_by_size(folder):
    write(folder, 7)
    names = segments(folder)
    assert names[0] == "00000001.jsonl"
    assert len(names) > 2
    assert all((folder / name).stat().st_size <= 800 for name in names)
    assert recover(folder).state == state_of(7)
    assert verify(folder).segments == len(names)


def test_lines_are_what_the_codec_writes_and_duckdb_reads(folder):
    write(folder, 12)
    lines = [
        line for name in segments(folder) for line in (folder / name).read_bytes().split(b"\n")
    ]
    assert [line for line in lines if line] == [
        seal(encode(event)).rstrip(b"\n") for event in events(12)
    ]
    rows = duckdb.sql(
        f"""select seq, term, "at", type, body.browser_id
            from read_json('{folder}/*.jsonl') order by seq"""
    ).fetchall()
    assert rows[1] == (2, 1, 0.25, "browser_wanted", "b")
    assert len(rows) == 12


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


def test_old_checkpoints_and_the_segments_before_them_go(folder):
    write(folder, 40, checkpoints=(8, 16, 24, 32))
    report = verify(folder)
    assert report.ok
    assert report.checkpoints == (24, 32)
    assert 16 < report.first_seq <= 25
    assert report.events == 40 - report.first_seq + 1
    recovery = recover(folder)
    assert recovery.state == state_of(40)
    assert (recovery.replayed, recovery.checkpoint_seq) == (8, 32)


def test_damaged_checkpoint_gives_way_to_the_one_before(folder):
    write(folder, 40, checkpoints=(8, 16, 24, 32))
    (folder / "checkpoint-00000032.json").write_bytes(b"nonsense")
    recovery = recover(folder)
    assert recovery.state == state_of(40)
    assert recovery.checkpoint_seq == 24
    assert [damage.file for damage in recovery.damage] == ["checkpoint-00000032.json"]
    assert not recovery.lost
    assert (folder / "checkpoint-00000032.json.damaged").exists()
    assert not recover(folder).damage


def test_without_any_checkpoint_left_the_loss_is_named_and_the_log_goes_on(folder):
    write(folder, 40, checkpoints=(8, 16, 24, 32))
    first = verify(folder).first_seq
    for path in folder.glob("checkpoint-*"):
        path.write_bytes(b"")
    recovery = recover(folder)
    assert (recovery.state, recovery.last_seq) == (PoolState(), 40)
    assert recovery.lost == (Lost(1, 40),)
    assert Lost(1, first - 1) in [damage.events for damage in recovery.damage]
    again = recover(folder)
    assert (again.lost, again.lost_before, again.last_seq) == ((), (Lost(1, 40),), 40)


# -- crashes ---------------------------------------------------------------------------------------


def test_any_cut_of_the_unacknowledged_tail_loses_nothing(folder):
    write(folder, 4, config=LogConfig())
    (name,) = segments(folder)
    whole = (folder / name).read_bytes()
    tail = b"".join(event_line(event) for event in events(3, first=5))
    ends = [len(b"".join(event_line(e) for e in events(n, first=5))) for n in range(4)]
    for length in range(len(tail) + 1):
        again = copied(folder)
        (again / name).write_bytes(whole + tail[:length])
        report = verify(again)
        recovery = recover(again, LogConfig())
        complete = max(n for n in range(4) if ends[n] <= length)
        assert (recovery.state, recovery.last_seq) == (state_of(4 + complete), 4 + complete)
        assert report.ok
        assert recovery.cut_bytes == report.torn_bytes == length - ends[complete]
        assert (recovery.lost, recovery.damage) == ((), ())
        if length % 20:
            continue
        store = Store(again, LogConfig(), NoSync())
        store.open(0.0)
        (following,) = events(1, first=5 + complete)
        store.append([event_line(following)], following.seq)
        store.close()
        assert recover(again).state == state_of(5 + complete)
        assert segments(again) == [name]


def test_tail_whose_middle_never_reached_the_disk_is_cut_there(folder):
    write(folder, 4, config=LogConfig())
    (name,) = segments(folder)
    five, six, seven = (event_line(event) for event in events(3, first=5))
    with (folder / name).open("ab") as file:
        file.write(five + bytes(len(six)) + seven)
    recovery = recover(folder)
    assert (recovery.last_seq, recovery.cut_bytes) == (5, len(six) + len(seven))
    assert (recovery.lost, recovery.damage) == ((), ())
    assert verify(folder).ok


def test_any_cut_of_an_acknowledged_tail_is_noticed(folder):
    write(folder, 6, config=LogConfig())
    (name,) = segments(folder)
    whole = (folder / name).read_bytes()
    for length in range(len(whole)):
        again = copied(folder)
        (again / name).write_bytes(whole[:length])
        kept = whole[:length].count(b"\n")
        found = scan(again)
        assert found.lost == Lost(kept + 1, 6)
        assert (found.state, found.last_seq) == (state_of(kept), 6)
        if length % 20 == 0:
            recovery = recover(again)
            assert recovery.lost == (found.lost,)
            assert (recovery.state, recovery.last_seq) == (state_of(kept), 6)


def test_segment_that_vanished_is_noticed(folder):
    write(folder, 12)
    for index, name in enumerate(segments(folder)):
        again = copied(folder)
        (again / name).unlink()
        first = int(Path(name).stem)
        recovery = recover(again)
        assert recovery.lost == (Lost(first, 12),), index
        assert recovery.state == state_of(first - 1)
        assert recovery.last_seq == 12


def _story(folder: Path, disk: Disk, told: list[int]) -> None:
    """Everything a log does: events, rotation, checkpoints, retention; twice."""
    for _ in range(2):
        store = Store(folder, SMALL, disk)
        try:
            last = store.open(0.0).last_seq
            told.append(last)
            for event in events(14, first=last + 1):
                batch = [event_line(event)]
                store.append(batch, event.seq)
                told.append(event.seq)
                store.sync_mark()
                if event.seq % 5 == 0:
                    store.checkpoint(event.seq, state_of(event.seq), 0.0)
        finally:
            store.close()


def test_crash_at_any_step_loses_nothing_that_was_acknowledged(tmp_path):
    steps = 0
    while True:
        folder = tmp_path / str(steps)
        told: list[int] = [0]
        try:
            _story(folder, DyingDisk(steps), told)
        except PowerCut:
            pass
        else:
            break
        if folder.exists():
            report = verify(folder)
            assert not report.lost, steps
            recovery = recover(folder)
            assert recovery.last_seq in (told[-1], told[-1] + 1), steps
            assert recovery.state == state_of(recovery.last_seq)
            assert not recovery.lost
            # A mark that was half written is damage, and named as such, but no loss.
            assert all(damage.file.startswith("acknowledged") for damage in recovery.damage)
            assert not list(folder.glob("*.new"))
            assert verify(folder).ok
        shutil.rmtree(folder, ignore_errors=True)
        steps += 1
    assert steps > 150


@pytest.mark.parametrize("checkpoints", [(), (3, 6)], ids=["plain", "with checkpoints"])
def test_crash_at_any_step_of_a_recovery_comes_to_the_same_end(tmp_path, folder, checkpoints):
    write(folder, 10, checkpoints=checkpoints)
    path = folder / segments(folder)[-2]
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(bytes(data))
    first = int(path.stem)
    steps = 0
    while True:
        again = copied(folder)
        store = Store(again, SMALL, DyingDisk(steps))
        try:
            recovery = store.open(0.0)
        except PowerCut:
            recovery = recover(again)
            assert (*recovery.lost_before, *recovery.lost) == (Lost(first, 10),), steps
            assert (recovery.state, recovery.last_seq) == (state_of(first - 1), 10)
        else:
            break
        finally:
            store.close()
        steps += 1
        report = verify(again)
        assert report.ok, (steps, report)
        assert report.lost_before == (Lost(first, 10),)
    assert steps > 10


def test_files_left_by_a_checkpoint_at_each_step_do_no_harm(folder):
    write(folder, 10, checkpoints=(5,))
    done = copied(folder)
    store = Store(done, SMALL, NoSync())
    store.open(0.0)
    store.checkpoint(10, state_of(10), 0.0)
    store.close()
    whole = (done / "checkpoint-00000010.json").read_bytes()
    aside = folder / "checkpoint-00000010.json.new"
    for length in range(0, len(whole) + 1, 7):
        aside.write_bytes(whole[:length])
        recovery = recover(folder)
        assert (recovery.checkpoint_seq, recovery.state) == (5, state_of(10))
        assert not aside.exists()
    aside.write_bytes(whole)
    aside.rename(folder / "checkpoint-00000010.json")
    recovery = recover(folder)
    assert (recovery.checkpoint_seq, recovery.state) == (10, state_of(10))


# -- flipped bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0x01, 0x20, 0xFF], ids=hex)
def test_flip_of_any_byte_is_found_and_the_loss_named(folder, mask):
    write(folder, 6, config=LogConfig(segment_bytes_max=500))
    whole = {path: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    names = segments(folder)
    assert len(names) > 1
    for path, data in whole.items():
        before = sum(whole[folder / name].count(b"\n") for name in names if name < path.name)
        for position in range(len(data)):
            flipped = bytearray(data)
            flipped[position] ^= mask
            path.write_bytes(bytes(flipped))
            found = scan(folder)
            assert [damage.file for damage in found.damage] == [path.name]
            assert found.last_seq == 6
            if path.suffix == ".jsonl":
                hit = before + data[:position].count(b"\n") + 1
                assert found.lost == Lost(hit, 6)
                assert found.state == state_of(hit - 1)
                assert found.damage[0].events.first == hit
            else:  # a mark: there are two
                assert found.lost is None
                assert found.state == state_of(6)
        path.write_bytes(data)


def test_any_flip_is_survived(folder):
    """The same, now with a recovery each time, and one more event after it."""
    write(folder, 6, config=LogConfig(segment_bytes_max=500))
    for path in [path for path in folder.iterdir() if path.name != "lock"]:
        for position in range(0, path.stat().st_size, 7):
            again = copied(folder)
            flipped = bytearray(path.read_bytes())
            flipped[position] ^= 0x10
            (again / path.name).write_bytes(bytes(flipped))
            report = verify(again)
            store = Store(again, SMALL, NoSync())
            recovery = store.open(0.0)
            store.append([event_line(Event(7, 1, 1.0, ModelWanted("late", "d")))], 7)
            store.close()
            assert not report.ok
            assert (report.lost, report.damage) == (recovery.lost, recovery.damage)
            assert recovery.last_seq == 6
            last = recovery.lost[0].first - 1 if recovery.lost else 6
            assert recovery.state == state_of(last)
            after = recover(again)
            assert after.state.models.keys() == {*recovery.state.models, "late"}
            assert (after.lost, after.lost_before, after.last_seq) == ((), recovery.lost, 7)


def test_flip_of_any_byte_beside_checkpoints_is_found(folder):
    write(folder, 9, checkpoints=(3, 6))
    whole = {path: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    for path, data in whole.items():
        for position in range(0, len(data), 3 if path.suffix == ".jsonl" else 17):
            again = copied(folder)
            flipped = bytearray(data)
            flipped[position] ^= 0x04
            (again / path.name).write_bytes(bytes(flipped))
            recovery = recover(again)
            assert recovery.damage
            if recovery.lost:  # what the last checkpoint does not cover
                assert path.suffix == ".jsonl"
                ((first, last),) = [(lost.first, lost.last) for lost in recovery.lost]
                assert first > 6
                assert last == 9
                assert recovery.state == state_of(first - 1)
            else:
                assert recovery.state == state_of(9)


def test_log_goes_on_after_a_loss_and_remembers_it(folder):
    write(folder, 12)
    path = folder / segments(folder)[1]
    first = int(path.stem)
    path.write_bytes(path.read_bytes().replace(b"digest", b"DIGEST", 1).replace(b"b", b"c", 1))
    store = Store(folder, SMALL, NoSync())
    recovery = store.open(0.0)
    assert recovery.lost == (Lost(first, 12),)
    (following,) = [Event(13, 2, 99.0, ModelWanted("late", "digest"))]
    store.append([event_line(following)], 13)
    store.close()
    again = recover(folder)
    assert again.state == apply(recovery.state, following)
    assert (again.lost, again.lost_before, again.last_seq) == ((), (Lost(first, 12),), 13)
    assert again.term == 2
    assert not again.damage
    report = verify(folder)
    assert report.ok
    assert report.lost_before == (Lost(first, 12),)
    shown = [plain["seq"] for plain in show(folder)]
    assert shown == [*range(1, first), 13]
    assert list(folder.glob("*.damaged"))


def test_line_that_cannot_be_read_is_shown_as_such(folder):
    write(folder, 3, config=LogConfig())
    path = folder / segments(folder)[0]
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"c"', 1))
    shown = list(show(folder))
    assert [plain["type"] for plain in shown] == ["pool_opened", "unreadable", "browser_ready"]
    assert '"c"' in shown[1]["line"]


def test_log_without_its_marks_is_replayed_and_says_so(folder):
    write(folder, 6)
    for name in ("acknowledged-0", "acknowledged-1"):
        (folder / name).unlink()
    recovery = recover(folder)
    assert (recovery.state, recovery.lost, len(recovery.damage)) == (state_of(6), (), 2)
    assert not recover(folder).damage


def test_intact_line_that_says_nothing_known_is_never_thrown_away(folder):
    write(folder, 3, config=LogConfig())
    path = folder / segments(folder)[0]
    line = seal(b'{"seq":4,"term":1,"at":1.0,"type":"browser_married","body":{}}')
    path.write_bytes(path.read_bytes() + line)
    before = path.read_bytes()
    with pytest.raises(CorruptLog, match="browser_married"):
        recover(folder)
    assert path.read_bytes() == before
    report = verify(folder)
    assert not report.ok
    assert "browser_married" in report.damage[0].what
    assert [plain["type"] for plain in show(folder)][-1] == "browser_married"


def test_event_that_the_state_does_not_allow_is_no_log_of_ours(folder):
    write(folder, 2, config=LogConfig())
    path = folder / segments(folder)[0]
    line = event_line(Event(3, 1, 1.0, BrowserStopped("nobody")))
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(CorruptLog, match="event 3"):
        recover(folder)


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


# -- whatever happens ------------------------------------------------------------------------------

_IDS = st.sampled_from(["a", "b"])
_BODIES = st.one_of(
    st.builds(BrowserWanted, _IDS, st.sampled_from(BrowserType)),
    st.builds(BrowserReady, _IDS, st.integers(0, 2), st.just(FACTS)),
    st.builds(BrowserFailed, _IDS, st.integers(0, 2), st.builds(failure), st.booleans()),
    st.builds(BrowserUnwanted, _IDS),
    st.builds(BrowserStopped, _IDS),
    st.builds(ModelWanted, st.text(max_size=3), st.text(max_size=3)),
    st.builds(ModelUnwanted, st.text(max_size=3)),
    st.builds(ModelLoaded, _IDS, st.integers(0, 2), st.text(max_size=3), st.just(NUMERIC)),
    st.builds(PoolClosing),
)
_ACTS = st.one_of(
    st.tuples(st.floats(0, 30), _BODIES), st.sampled_from(["checkpoint", "reopen", "kill"])
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(_ACTS, max_size=40))
def test_replayed_state_is_the_live_state(tmp_path_factory, acts):
    folder = tmp_path_factory.mktemp("log")
    store = Store(folder, SMALL, NoSync())
    store.open(0.0)
    state, seq, at = PoolState(), 0, 0.0
    for act in acts:
        if act == "checkpoint":
            if seq:
                store.checkpoint(seq, state, at)
        elif act == "reopen":
            store.close()
            store = Store(folder, SMALL, NoSync())
            recovery = store.open(at)
            assert (recovery.state, recovery.last_seq) == (state, seq)
        elif act == "kill":
            # Half of an event is on its way when the process dies.
            with (folder / (segments(folder) or ["00000001.jsonl"])[-1]).open("ab") as file:
                file.write(b'{"seq":')
            store.close()
            store = Store(folder, SMALL, NoSync())
            assert store.open(at).cut_bytes == 7
        else:
            at += act[0]
            event = Event(seq + 1, 1, at, act[1])
            try:
                state = apply(state, event)
            except IllegalTransition:
                continue
            seq = event.seq
            store.append([event_line(event)], seq)
    store.close()
    recovery = recover(folder)
    assert (recovery.state, recovery.last_seq) == (state, seq)
    assert json.dumps(list(show(folder)))
    shutil.rmtree(folder)
