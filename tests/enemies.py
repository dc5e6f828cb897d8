"""Files that somebody might make to harm whoever reads them. This module must not read one."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

_LOCAL, _CENTRAL = b"PK\x03\x04", b"PK\x01\x02"
# Where a member's method and sizes are: in its own header, and in the archive's directory.
_FIELDS = {
    "flags": (6, 8, "<H"),
    "method": (8, 10, "<H"),
    "packed": (18, 20, "<L"),
    "size": (22, 24, "<L"),
}


def archive(members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as written:
        for name, content in members.items():
            written.writestr(zipfile.ZipInfo(name), content, method)  # of no time: always the same
    return made.getvalue()


def forged(data: bytes, **fields: int) -> bytes:
    """An archive of one member that says of it what is not true."""
    changed = bytearray(data)
    central = data.rindex(_CENTRAL)
    for field, value in fields.items():
        local, in_directory, form = _FIELDS[field]
        struct.pack_into(form, changed, data.index(_LOCAL) + local, value)
        struct.pack_into(form, changed, central + in_directory, value)
    return bytes(changed)


def renamed(data: bytes, old: bytes, new: bytes) -> bytes:
    """An archive with a member's name that no library would write."""
    assert len(old) == len(new)
    assert data.count(old) == 2
    return data.replace(old, new)


def with_zip64(data: bytes) -> bytes:
    """An archive whose true directory is said, by a second record, to be of 2**40 bytes."""
    end = data.rindex(b"PK\x05\x06")
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, 1 << 40, 0)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    return data[:end] + record + locator + data[end:]


def with_directory(data: bytes, members: int, size: int) -> bytes:
    """An archive whose end says that its directory has so many members and bytes."""
    changed = bytearray(data)
    struct.pack_into("<2HL", changed, len(data) - 14, members, members, size)
    return bytes(changed)


def npy(header: str | bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """One array of an .npz file, with this text as its header."""
    text = header if isinstance(header, bytes) else header.encode("latin-1")
    length = struct.pack("<H" if version == b"\x01\x00" else "<L", len(text))
    return b"\x93NUMPY" + version + length + text + data


def npy_of(dtype: str, shape: str, data: bytes = b"") -> bytes:
    return npy(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n", data)


class Touch:
    """What unpickles to a call that makes a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self._path, "w")


def pickled_array(path: str) -> bytes:
    """An array of objects that makes a file at `path` when it is unpickled."""
    made = io.BytesIO()
    np.lib.format.write_array(made, np.array([Touch(path)], object), allow_pickle=True)
    return made.getvalue()
