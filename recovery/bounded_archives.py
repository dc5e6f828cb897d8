"""Reads zip archives, and those of numpy's arrays, that somebody else may have written.

What an archive says of itself is checked before anything of it is unpacked: the number, names and
sizes of its members, and of each array dtype and shape. Nothing is written to the disk, and nothing
unpickled. This module must not know what a member means.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from recovery.bounded_files import open_regular, refusal, stays_inside, text_of, unreadable
from recovery.errors import BadInput, PoolError

Array: TypeAlias = npt.NDArray[Any]

_PIECE_BYTES = 1 << 20
_END = struct.Struct("<4s4H2LH")  # the record that ends an archive without a comment
_END_MARK, _ZIP64_MARK = b"PK\x05\x06", b"PK\x06\x07"
_ZIP64_BYTES = 20
_DIRECTORY_BYTES = 1024  # of one member in the directory, at most
# Only these: Python's bz2 and lzma unpack as much as a few bytes say, whatever was asked for.
_METHODS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
_ENCRYPTED = 0x1
# All that `zipfile` and its decompressor raise for a broken archive.
_BROKEN = (
    EOFError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)

_ARRAY_ENDING = ".npy"
_ARRAY_MAGIC = b"\x93NUMPY"
_HEADER_BYTES_MAX = 10_000  # numpy's own limit
_DIMENSIONS_MAX = 64  # also numpy's
_ELEMENTS_MAX = 1 << 40  # of a shape whose sides of length 0 are taken as 1
_LENGTHS = {b"\x01\x00": struct.Struct("<H"), b"\x02\x00": struct.Struct("<L")}  # by version
_KINDS = "biufcSU"  # of dtypes: booleans, numbers, bytes and text
# As numpy writes it for plain arrays. Its own reader evaluates the text as Python.
_HEADER = re.compile(
    rf"\{{'descr': '([<>|=]?[{_KINDS}]\d{{1,9}})', 'fortran_order': (True|False), "
    r"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\),? ?\}\s*"
)
_CODE_POINT_MAX = 0x10FFFF


@dataclass(frozen=True)
class ArchiveBounds:
    """What an archive may hold; `what` says in errors what it is to be.

    `bytes_max` bounds the archive as it is, and all its members together unpacked.
    """

    what: str
    bytes_max: int
    members_max: int
    error: type[PoolError] = BadInput


class Archive:
    """An archive within its bounds. `sizes` are the bytes of its members, unpacked, by name."""

    def __init__(
        self,
        archive: zipfile.ZipFile,
        members: Mapping[str, zipfile.ZipInfo],
        name: str,
        bounds: ArchiveBounds,
    ) -> None:
        self._archive = archive
        self._members = members
        self._name = name
        self._bounds = bounds
        self.sizes = {name: member.file_size for name, member in members.items()}

    def read(self, member: str, bytes_max: int | None = None) -> bytearray:
        """A member, unpacked. Raises the error of the bounds if it is not there, or is damaged."""
        if member not in self._members:
            raise self.refuse(f"{member} in it", "none")
        if bytes_max is not None and self.sizes[member] > bytes_max:
            got = f"{self.sizes[member]:,} bytes"
            raise self.refuse(f"{text_of(member)} of at most {bytes_max:,} bytes", got)
        with self.opened(member) as stream:
            return self.rest(stream, member, 0)

    @contextlib.contextmanager
    def opened(self, member: str) -> Iterator[IO[bytes]]:
        """A member as a stream. Whatever is wrong with it is raised as the error of the bounds."""
        try:
            with self._archive.open(self._members[member]) as stream:
                yield stream
        except _BROKEN as cause:
            raise self.refuse("members that are whole", f"{text_of(member)}: {cause}") from cause

    def rest(self, stream: IO[bytes], member: str, taken: int) -> bytearray:
        """What is left of a member of which `taken` bytes were read. Never more than it says."""
        found = bytearray()
        while piece := stream.read(_PIECE_BYTES):
            found += piece
        if taken + len(found) != self.sizes[member]:
            raise OSError("it is cut short")
        return found

    def refuse(self, expected: str, got: str) -> PoolError:
        """The error to raise for this archive."""
        what = f"{self._bounds.what} with {expected}"
        return refusal(self._name, what, text_of(got), self._bounds.error)


@contextlib.contextmanager
def open_archive(path: str | Path, bounds: ArchiveBounds) -> Iterator[Archive]:
    """The zip archive at `path`.

    Raises `bounds.error`: no regular file, no archive, a comment or zip64 (for which there is no
    need within such bounds), too many or too large members, a name twice, or one that leads out of
    a folder, encryption, a method other than stored and deflated.
    """
    try:
        stream = open_regular(path)
    except OSError as cause:
        raise unreadable(path, bounds.what, cause, bounds.error) from cause
    with stream, archive_in(stream, str(path), bounds) as archive:
        yield archive


@contextlib.contextmanager
def archive_in(
    stream: IO[bytes],
    name: str,
    bounds: ArchiveBounds,
    is_name: Callable[[str], bool] = stays_inside,
) -> Iterator[Archive]:
    """The same for an archive that is already open; `name` says in errors where it is from."""
    try:
        size = _checked_size(stream, name, bounds)
        archive = zipfile.ZipFile(stream)
    except _BROKEN as cause:
        raise refusal(name, bounds.what, text_of(cause), bounds.error) from cause
    with archive:
        members = _checked_members(archive, size, name, bounds, is_name)
        yield Archive(archive, members, name, bounds)


def read_arrays(path: str | Path, bounds: ArchiveBounds) -> dict[str, Array]:
    """The arrays in the .npz file at `path`. Raises as `open_archive` and `arrays_in`."""
    try:
        stream = open_regular(path)
    except OSError as cause:
        raise unreadable(path, bounds.what, cause, bounds.error) from cause
    with stream:
        return arrays_in(stream, str(path), bounds)


def arrays_in(stream: IO[bytes], name: str, bounds: ArchiveBounds) -> dict[str, Array]:
    """The arrays of an open .npz file, by name: numbers, booleans and text, never objects.

    Raises `bounds.error` as `archive_in`, and for an array whose dtype is another, or whose shape
    is not that of its bytes.
    """
    with archive_in(stream, name, bounds, _is_array) as archive:
        return {
            member.removesuffix(_ARRAY_ENDING): _array(archive, member) for member in archive.sizes
        }


def pack_arrays(arrays: Mapping[str, Array]) -> bytes:
    """An .npz file that `arrays_in` reads, if its bounds allow as much.

    Raises `BadInput` for what is no plain array, and for a name that none may have.
    """
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            if array.dtype.kind not in _KINDS or not _is_array(f"{name}{_ARRAY_ENDING}"):
                raise BadInput(
                    f"{text_of(name)}: an array of {text_of(array.dtype)} can't be kept."
                )
            made = io.BytesIO()
            np.lib.format.write_array(made, array, allow_pickle=False)
            archive.writestr(f"{name}{_ARRAY_ENDING}", made.getvalue())
    return packed.getvalue()


# -- archives --------------------------------------------------------------------------------------


def _checked_size(stream: IO[bytes], name: str, bounds: ArchiveBounds) -> int:
    """The archive's own size. Also checks that of its directory, which `ZipFile` reads whole."""
    size = stream.seek(0, os.SEEK_END)
    if size > bounds.bytes_max:
        expected = f"{bounds.what} of at most {bounds.bytes_max:,} bytes"
        raise refusal(name, expected, f"{size:,} bytes", bounds.error)
    stream.seek(max(size - _END.size - _ZIP64_BYTES, 0))
    tail = stream.read(_END.size + _ZIP64_BYTES)
    if len(tail) < _END.size:
        raise zipfile.BadZipFile("a file that is no zip archive")
    mark, _, _, _, members, directory_bytes, _, comment = _END.unpack(tail[-_END.size :])
    if mark != _END_MARK or comment:
        raise zipfile.BadZipFile("a file that is no zip archive, or one with a comment")
    if tail[: -_END.size].startswith(_ZIP64_MARK):
        raise zipfile.BadZipFile("a zip64 archive")
    if members > bounds.members_max or directory_bytes > bounds.members_max * _DIRECTORY_BYTES:
        expected = f"{bounds.what} of at most {bounds.members_max:,} members"
        got = f"{members:,} in a directory of {directory_bytes:,} bytes"
        raise refusal(name, expected, got, bounds.error)
    return size


def _checked_members(
    archive: zipfile.ZipFile,
    size: int,
    name: str,
    bounds: ArchiveBounds,
    is_name: Callable[[str], bool],
) -> dict[str, zipfile.ZipInfo]:
    def refuse(expected: str, got: str) -> PoolError:
        return refusal(name, f"{bounds.what} with {expected}", got, bounds.error)

    found: dict[str, zipfile.ZipInfo] = {}
    total = 0
    for member in archive.infolist():
        shown = text_of(member.orig_filename)
        total += member.file_size
        if len(found) >= bounds.members_max:
            raise refuse(f"at most {bounds.members_max:,} members", "more")
        if member.filename != member.orig_filename or not is_name(member.filename):
            raise refuse("names that lead nowhere else", repr(shown))
        if member.filename in found:
            raise refuse("each name once", f"{shown} twice")
        if member.compress_type not in _METHODS or member.flag_bits & _ENCRYPTED:
            raise refuse("members stored or deflated, and not encrypted", f"{shown}, which is not")
        if member.compress_size > size:
            raise refuse("members within it", f"{shown} of {member.compress_size:,} bytes, packed")
        if total > bounds.bytes_max:
            raise refuse(f"at most {bounds.bytes_max:,} bytes unpacked", f"{total:,} or more")
        found[member.filename] = member
    return found


# -- arrays ----------------------------------------------------------------------------------------


def _is_array(name: str) -> bool:
    """Whether it can name an array: no path, so that a graph's "/encoder/mask:0" is one too."""
    plain = name.isprintable() and len(name) <= 512 and "\\" not in name
    return plain and name.endswith(_ARRAY_ENDING) and ".." not in name.split("/")


def _array(archive: Archive, member: str) -> Array:
    with archive.opened(member) as stream:
        dtype, shape, columns_first, taken = _read_header(archive, stream, member)
        # Before anything is allocated: the array's bytes are exactly those that are there.
        count, size = math.prod(shape), archive.sizes[member] - taken
        if (
            len(shape) > _DIMENSIONS_MAX
            or math.prod(max(side, 1) for side in shape) > _ELEMENTS_MAX
            or count * dtype.itemsize != size
        ):
            got = f"{size:,} bytes for {dtype} of shape {shape}"
            raise archive.refuse(f"arrays as large as they say ({text_of(member)})", got)
        data = archive.rest(stream, member, taken)
    if not size:
        return np.empty(shape, dtype)
    array = np.frombuffer(data, dtype)
    if _is_spoilt(array):
        raise archive.refuse(f"booleans and text that are such ({text_of(member)})", "others")
    return array.reshape(shape, order="F" if columns_first else "C")


def _read_header(
    archive: Archive, stream: IO[bytes], member: str
) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """dtype, shape, whether columns come first, and how many bytes the header took."""
    magic, version = stream.read(len(_ARRAY_MAGIC)), stream.read(2)
    packed = _LENGTHS.get(version)
    if magic != _ARRAY_MAGIC or packed is None:
        raise archive.refuse("numpy's arrays in it", f"{text_of(member)}, which is none")
    (length,) = packed.unpack(stream.read(packed.size))
    if length > _HEADER_BYTES_MAX:
        expected = f"headers of at most {_HEADER_BYTES_MAX:,} bytes ({text_of(member)})"
        raise archive.refuse(expected, f"{length:,}")
    header = stream.read(length)
    match = _HEADER.fullmatch(header.decode("latin-1"))
    if match is None:
        expected = f"arrays of numbers, booleans or text ({text_of(member)})"
        raise archive.refuse(expected, text_of(header.decode("latin-1"), 100))
    try:
        dtype = np.dtype(match[1])
    except (TypeError, OverflowError) as cause:
        raise archive.refuse("dtypes that exist", f"{match[1]}: {cause}") from cause
    if dtype.hasobject or not dtype.itemsize:
        raise archive.refuse("arrays of numbers, booleans or text", str(dtype))
    shape = tuple(int(side) for side in re.findall(r"\d+", match[3]))
    return dtype, shape, match[2] == "True", len(magic) + len(version) + packed.size + length


def _is_spoilt(array: Array) -> bool:
    """Whether its bytes are none that numpy would write: a boolean of 2, a text beyond Unicode."""
    if array.dtype.kind == "b":
        return bool(array.view(np.uint8).max() > 1)
    if array.dtype.kind == "U":
        codes = array.view(np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
        return bool(codes.max() > _CODE_POINT_MAX)
    return False
