"""What is found in a log that was cut, flipped or robbed of a file."""

from pathlib import Path

import pytest

from recovery.control import (
    BrowserStopped,
    Event,
)
from recovery.log.log import (
    CorruptLog,
    LogConfig,
    Lost,
    show,
    verify,
)
from recovery.log.reading import scan
from recovery.log.segments import event_line, seal
from tests.logs import copied, events, recover, segments, state_of, write


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "log"


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
