import random
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from recovery.history import damage
from recovery.history.damage import DAMAGED_MAX
from recovery.history.tracker import PerformanceHistoryTracker
from tests.histories import OPERATION, damaged, ids, op, opened


@pytest.fixture
def path(tmp_path):
    return tmp_path / "corrupt.duckdb"  # no name may look like an error to it


def test_garbage_is_set_aside_and_at_most_four_are_kept(path):
    for number in range(1, 6):
        path.write_bytes(b"garbage %d" % number * 1000)
        with closing(opened(path, OPERATION)) as store:
            assert ids(store) == ["op-1"]
            (note,) = store.notes
            assert "not a valid DuckDB database file" in note
            assert f"corrupt.duckdb-{number:04d}.damaged" in note
            assert PerformanceHistoryTracker(store).statistics()["notes"] == [note]
        path.unlink()
    assert damaged(path) == [f"corrupt.duckdb-{number:04d}.damaged" for number in range(2, 6)]
    assert len(damaged(path)) == DAMAGED_MAX
    assert (path.parent / "corrupt.duckdb-0005.damaged").read_bytes().startswith(b"garbage 5")


def copy_in_use(path, tmp_path):
    """A history as a killed process leaves it: 100 rows in the file, 10 more in its WAL."""
    source = tmp_path / "source.duckdb"
    opened(source, *map(op, range(100))).close()
    with closing(opened(source, *map(op, range(100, 110)))):
        # Of names that DuckDB has open only copies are read: closing one would drop its lock.
        subprocess.run(["cp", source, path], check=True)
        subprocess.run(["cp", f"{source}.wal", f"{path}.wal"], check=True)


def test_what_a_killed_process_left_is_read(path, tmp_path):
    copy_in_use(path, tmp_path)
    with closing(opened(path)) as store:
        assert ids(store) == [str(number) for number in range(110)]
        assert store.notes == ()


def test_a_damaged_wal_costs_only_what_is_in_it(path, tmp_path):
    copy_in_use(path, tmp_path)
    wal = path.with_name("corrupt.duckdb.wal")
    data = bytearray(wal.read_bytes())
    data[len(data) // 2] ^= 1
    wal.write_bytes(data)
    with closing(opened(path, op("new"))) as store:
        assert ids(store) == [*map(str, range(100)), "new"]
        (note,) = store.notes
        assert "since its last checkpoint" in note
    assert damaged(path) == ["corrupt.duckdb-0001.wal.damaged"]


def test_any_flipped_bit_and_any_cut_is_found_at_opening(path, tmp_path):
    copy_in_use(path, tmp_path)
    wal = path.with_name("corrupt.duckdb.wal")
    whole, log = path.read_bytes(), wal.read_bytes()
    rng = random.Random(0)
    for turn in range(8):
        data, tail = bytearray(whole), bytearray(log)
        hit = tail if turn % 3 == 0 else data
        place = rng.randrange(len(hit) if turn % 2 else 3 * 4096) % len(hit)
        if turn % 4 == 3 and hit is data:
            del data[place:]
        else:
            hit[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        wal.write_bytes(tail)
        with closing(opened(path)) as store:
            rows = len(ids(store))
            store.query("SELECT * FROM strategy_scores")
            assert rows == 110 if not store.notes else rows in (0, 100)
    assert len(damaged(path)) == DAMAGED_MAX


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("IO Error: /h/corrupt.duckdb is not a valid DuckDB database file!", True),
        ("Corrupt WAL file: entry at byte position 3", True),
        ("IO Error: Could not set lock on file /h/corrupt.duckdb", False),
        ("version number 99, but this is 64: corrupt?", False),
        ("IO Error: No space left on device while replaying WAL", False),
        ("IO Error: /h/corrupt.duckdb: something else", False),
    ],
)
def test_only_words_of_damage_are_damage(words, found):
    assert damage.is_damage(damage.cause(words, Path("/h/corrupt.duckdb"))) is found


def test_the_log_alone_is_set_aside_where_it_alone_is_damaged(path):
    path.write_bytes(b"file")
    assert damage.set_aside(path, "replaying WAL").moved == (path.with_name(damaged(path)[0]),)
    path.write_bytes(b"file")
    path.with_name(f"{path.name}.wal").write_bytes(b"log")
    aside = damage.set_aside(path, "replaying WAL")
    assert [new.name for new in aside.moved] == ["corrupt.duckdb-0002.wal.damaged"]
    assert aside.wal_only
    assert path.read_bytes() == b"file"
