"""What a log is after a crash at any step, and what it keeps."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recovery.control import (
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
    PoolState,
    apply,
)
from recovery.errors import IllegalTransition
from recovery.kinds import BrowserType
from recovery.log.log import (
    Disk,
    LogConfig,
    Lost,
    show,
    verify,
)
from recovery.log.segments import event_line
from recovery.log.writing import Store
from tests.fakes import FACTS, NUMERIC, failure
from tests.logs import (
    SMALL,
    DyingDisk,
    NoSync,
    PowerCut,
    copied,
    events,
    recover,
    segments,
    state_of,
    write,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "log"


def test_segments_follow_each_other_by_size(folder):
    write(folder, 7)
    names = segments(folder)
    assert names[0] == "00000001.jsonl"
    assert len(names) > 2
    assert all((folder / name).stat().st_size <= 800 for name in names)
    assert recover(folder).state == state_of(7)
    assert verify(folder).segments == len(names)


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
