"""The form of the files."""

from pathlib import Path

import duckdb
import pytest

from recovery.log.codec import encode
from recovery.log.segments import (
    checkpoint_name,
    checkpoints_in,
    first_seq,
    mark_line,
    seal,
    segment_name,
    segments_in,
    unseal,
)
from tests.logs import events, segments, write


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "log"


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


def test_line_with_any_bit_changed_is_none():
    line = seal(b'{"seq":7}').rstrip(b"\n")
    assert unseal(line) == b'{"seq":7}'
    for position in range(len(line)):
        for bit in range(8):
            flipped = bytearray(line)
            flipped[position] ^= 1 << bit
            assert unseal(bytes(flipped)) is None


def test_marks_are_all_of_one_length():
    assert len({len(mark_line(seq)) for seq in (0, 9, 10**6, 2**63)}) == 1


def test_files_are_found_by_their_names_in_the_order_of_their_numbers(tmp_path):
    for seq in (10**8, 57, 1):
        (tmp_path / segment_name(seq)).touch()
        (tmp_path / checkpoint_name(seq)).touch()
    for stray in ("1.jsonl", "00000001.jsonl.damaged", "checkpoint-00000001.json.new", "lock"):
        (tmp_path / stray).touch()
    assert [first_seq(path) for path in segments_in(tmp_path)] == [1, 57, 10**8]
    assert [seq for seq, _ in checkpoints_in(tmp_path)] == [1, 57, 10**8]
