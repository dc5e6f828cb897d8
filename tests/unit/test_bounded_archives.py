"""Archives of others: checked before anything of them is unpacked."""

from __future__ import annotations

import io
import os
import tracemalloc
import zipfile

import numpy as np
import pytest

from recovery.bounded_archives import (
    ArchiveBounds,
    arrays_in,
    open_archive,
    pack_arrays,
    read_arrays,
)
from recovery.errors import BadInput, NotAModel
from tests import enemies

BOUNDS = ArchiveBounds("a parcel", 1 << 20, members_max=8)
LARGE = 200 << 20


def opened(tmp_path, data: bytes, bounds: ArchiveBounds = BOUNDS) -> dict[str, bytes]:
    """All members of an archive with this content, read within the bounds."""
    path = tmp_path / "parcel.zip"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with open_archive(path, bounds) as archive:
            return {name: bytes(archive.read(name)) for name in archive.sizes}
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20


def test_an_archive_within_its_bounds_is_read(tmp_path):
    members = {"a.json": b"{}", "b/c.bin": bytes(range(256)) * 100, "empty": b""}
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        assert opened(tmp_path, enemies.archive(members, method)) == members
    with open_archive(tmp_path / "parcel.zip", BOUNDS) as archive:
        assert archive.sizes == {name: len(content) for name, content in members.items()}
        with pytest.raises(BadInput, match=r"no\.json in it, got none"):
            archive.read("no.json")
        with pytest.raises(BadInput, match="at most 100 bytes, got 25,600"):
            archive.read("b/c.bin", 100)


ONE = enemies.archive({"a.json": b"[" + b" " * 5000 + b"]"})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no zip archive"),
        (b"PK\x05\x06", "no zip archive"),
        (ONE[:-10], "no zip archive"),
        (ONE[: len(ONE) // 2] + ONE[-22:], "a parcel"),
        (ONE[:-2] + b"\x05\x00hello", "comment"),
        (enemies.with_zip64(ONE), "zip64"),
        (enemies.with_directory(ONE, 0xFFFF, 1 << 20), "at most 8 members, got 65,535"),
        (enemies.with_directory(ONE, 1, 0xFFFFFFFF), "at most 8 members"),
        (enemies.archive({str(n): b"" for n in range(9)}), "at most 8 members"),
        (enemies.forged(ONE, size=0xFFFFFFF0), "1,048,576 bytes unpacked, got 4,294,967,280"),
        (enemies.archive({"a": bytes(2 << 20)}), "1,048,576 bytes unpacked"),
        (enemies.archive({c: bytes(300 << 10) for c in "abcd"}), "1,048,576 bytes unpacked"),
        (b"x" * (2 << 20), "of at most 1,048,576 bytes, got 2,097,152"),
        (enemies.forged(ONE, size=10), "CRC"),
        (enemies.forged(ONE, size=6000), "cut short|CRC"),
        (enemies.forged(ONE, packed=0xFFFFFFF0), "members within it"),
        (enemies.forged(ONE, flags=1), "not encrypted"),
        (enemies.forged(ONE, flags=0x20), "a parcel"),
        (enemies.forged(ONE, method=0), "CRC|cut short"),
        (enemies.forged(ONE, method=12), "stored or deflated"),
        (enemies.forged(ONE, method=93), "stored or deflated"),
        (enemies.archive({"a": b"x" * 9}, zipfile.ZIP_BZIP2), "stored or deflated"),
        (enemies.archive({"a": b"x" * 9}, zipfile.ZIP_LZMA), "stored or deflated"),
        (enemies.archive({"../a": b""}), "lead nowhere else"),
        (enemies.archive({"a/../../b": b""}), "lead nowhere else"),
        (enemies.archive({"/etc/a": b""}), "lead nowhere else"),
        (enemies.archive({"a\\b": b""}), "lead nowhere else"),
        (enemies.archive({"c:a": b""}), "lead nowhere else"),
        (enemies.archive({"a/": b""}), "lead nowhere else"),
        (enemies.archive({"\x1b[2J": b""}), "lead nowhere else"),
        (enemies.renamed(ONE, b"a.json", b"a\0json"), "lead nowhere else"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_an_archive_beyond_its_bounds_is_refused_with_file_and_bound(data, words, tmp_path):
    with pytest.raises(BadInput, match=words) as caught:
        opened(tmp_path, data)
    assert "parcel.zip" in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_name_that_comes_twice_is_refused(tmp_path):
    two = enemies.archive({"aa": b"1", "bb": b"2"})
    with pytest.raises(BadInput, match="aa twice"):
        opened(tmp_path, two.replace(b"bb", b"aa"))


def test_a_bomb_is_never_unpacked_further_than_it_says(tmp_path):
    """zlib would make 200 MB of 200 KB."""
    bomb = enemies.archive({"a": bytes(LARGE)})
    assert len(bomb) < BOUNDS.bytes_max
    with pytest.raises(BadInput, match="bytes unpacked, got 209,715,200"):
        opened(tmp_path, bomb)
    with pytest.raises(BadInput, match="CRC"):
        opened(tmp_path, enemies.forged(bomb, size=1000))


def test_the_error_is_the_one_that_was_asked_for(tmp_path):
    bounds = ArchiveBounds("a model", 1000, 8, NotAModel)
    with pytest.raises(NotAModel, match="No such file"), open_archive(tmp_path / "none", bounds):
        pass
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotAModel, match="regular"), open_archive(tmp_path / "pipe", bounds):
        pass


# -- arrays ----------------------------------------------------------------------------------------

ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "float16": np.array([1.5, np.nan, np.inf], np.float16),
    "int64": np.array(-(2**63)),
    "uint8": np.arange(256, dtype=np.uint8),
    "bool": np.array([[True, False]]),
    "complex": np.array([1 + 2j]),
    "text": np.array(["ä\U0001f600", ""]),
    "one text": np.array("what"),
    "bytes": np.array([b"ab", b""]),
    "empty": np.zeros((2, 0, 64), np.float32),
    "columns first": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "big-endian": np.array([1, 2], ">i4"),
    "text big-endian": np.array(["ab"], ">U2"),
    "/encoder/mask:0": np.zeros(3, np.int32),
}


def test_arrays_come_back_as_numpy_reads_them(tmp_path):
    path = tmp_path / "arrays.npz"
    for written in ("numpy", "ours"):
        if written == "numpy":
            np.savez_compressed(path, **ARRAYS)
        else:
            path.write_bytes(pack_arrays(ARRAYS))
        found = read_arrays(path, ArchiveBounds("arrays", 1 << 20, members_max=len(ARRAYS)))
        assert found.keys() == ARRAYS.keys()
        with np.load(path) as theirs:
            for name, array in ARRAYS.items():
                assert found[name].dtype == theirs[name].dtype == array.dtype, name
                assert found[name].shape == array.shape, name
                np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    "array",
    [
        np.array([{}], object),
        np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
        np.array(["2020-01-01"], "M8[D]"),
    ],
    ids=["object", "record", "time"],
)
def test_what_is_no_plain_array_is_neither_packed_nor_read(array):
    with pytest.raises(BadInput, match="can't be kept"):
        pack_arrays({"x": array})
    packed = io.BytesIO()
    np.savez(packed, x=array)
    with pytest.raises(BadInput, match="numbers, booleans or text"):
        arrays_in(packed, "it", BOUNDS)


def test_a_name_that_is_none_is_not_packed_either():
    for name in ("../x", "a\\b", "x\n"):
        with pytest.raises(BadInput, match="can't be kept"):
            pack_arrays({name: np.ones(1)})


FLOATS = bytes(24)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (b"", "numpy's arrays"),
        (b"\x93NUMPY", "numpy's arrays"),
        (b"\x93NUMPY\x01\x00", "x.npy"),
        (b"not numpy's" * 10, "numpy's arrays"),
        (enemies.npy("", version=b"\x03\x00"), "numpy's arrays"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "at most 10,000 bytes"),
        (enemies.npy("(" * 9000), "numbers, booleans or text"),
        (enemies.npy("-" * 9999), "numbers, booleans or text"),
        (enemies.npy("__import__('os').system('true')"), "numbers, booleans or text"),
        (enemies.npy_of("|O", "(1,)", FLOATS), "numbers, booleans or text"),
        (enemies.npy_of("<M8[ns]", "(3,)", FLOATS), "numbers, booleans or text"),
        (enemies.npy_of("|V8", "(3,)", FLOATS), "numbers, booleans or text"),
        (enemies.npy_of("<f3", "(8,)", FLOATS), "dtypes that exist"),
        (enemies.npy_of("<f4", "(-6,)", FLOATS), "numbers, booleans or text"),
        (enemies.npy_of("<f4", "(6.0,)", FLOATS), "numbers, booleans or text"),
        (enemies.npy_of("<f4", f"({10**30},)", FLOATS), "numbers, booleans or text"),
        (enemies.npy_of("<f4", "(5,)", FLOATS), "as large as they say"),
        (enemies.npy_of("<f4", "(1099511627776,)", FLOATS), "as large as they say"),
        (enemies.npy_of("<f4", "(4294967296, 4294967296)", b""), "as large as they say"),
        (enemies.npy_of("<f4", "(0, 999999999999999999)", b""), "as large as they say"),
        (enemies.npy_of("<U999999999", "()", FLOATS), "x.npy|dtypes"),
        (enemies.npy_of("<U0", "(1000000000,)", b""), "numbers, booleans or text"),
        (enemies.npy_of("<f4", f"({'1, ' * 65})", bytes(4)), "as large as they say"),
        (enemies.npy_of("|b1", "(3,)", b"\x00\x01\x02"), "booleans and text"),
        (enemies.npy_of("<U1", "(1,)", b"\xff\xff\xff\x7f"), "booleans and text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_array_that_is_not_what_it_says_is_refused(array, words, tmp_path):
    path = tmp_path / "arrays.npz"
    path.write_bytes(enemies.archive({"x.npy": array}))
    with pytest.raises(BadInput, match=words) as caught:
        read_arrays(path, BOUNDS)
    assert "arrays.npz" in str(caught.value)


def test_nothing_is_unpickled(tmp_path):
    made = tmp_path / "made by the enemy"
    data = enemies.archive({"x.npy": enemies.pickled_array(str(made))})
    with pytest.raises(BadInput, match="numbers, booleans or text"):
        arrays_in(io.BytesIO(data), "it", BOUNDS)
    with np.load(io.BytesIO(data), allow_pickle=True) as arrays:
        arrays["x"][0].close()
    assert made.exists(), "the test has no teeth"


@pytest.mark.parametrize("name", ["x", "x.txt", "../x.npy", "a/../x.npy", "a\\x.npy", "\x1b.npy"])
def test_names_that_are_no_arrays_are_refused(name):
    data = enemies.archive({name: enemies.npy_of("<f4", "(6,)", FLOATS)})
    with pytest.raises(BadInput, match="lead nowhere else"):
        arrays_in(io.BytesIO(data), "it", BOUNDS)


def test_a_bomb_of_zeros_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez_compressed(path, x=np.zeros(LARGE, np.uint8))
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="1,048,576 bytes unpacked"):
            read_arrays(path, BOUNDS)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
