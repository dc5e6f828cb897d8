"""Damaged files: how DuckDB's messages reveal them, and how they are set aside.

    history.duckdb-0001.damaged         a file, or
    history.duckdb-0001.wal.damaged     its write-ahead log

This module moves files that are not open. It must not read them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

DAMAGED_MAX = 4  # files set aside that are kept

# DuckDB tells causes apart by message only. With any other message the file is not damaged, and
# stays where it is.
_DAMAGE = re.compile(
    r"corrupt|not a valid DuckDB database|replaying WAL|could not read enough bytes", re.IGNORECASE
)
_WAL_DAMAGE = re.compile(r"replaying WAL|corrupt \w*\s?WAL", re.IGNORECASE)
_NEWER = re.compile(r"version number", re.IGNORECASE)
_LOCKED = re.compile(r"set lock on file", re.IGNORECASE)
_NOT_THE_FILE = re.compile(
    r"no space left|too many open files|cannot allocate|input/output error|permission denied"
    rf"|{_LOCKED.pattern}|{_NEWER.pattern}",
    re.IGNORECASE,
)


class SetAside(NamedTuple):
    moved: tuple[Path, ...]  # the new names
    wal_only: bool  # only the write-ahead log was moved


def is_newer(words: str) -> bool:
    """Whether a newer DuckDB made the file."""
    return _NEWER.search(words) is not None


def is_locked(words: str) -> bool:
    """Whether another process has the file open."""
    return _LOCKED.search(words) is not None


def cause(words: str, path: Path) -> str:
    """DuckDB's message without the file's names, which may contain any word."""
    for may_contain_any_word in (path, path.parent):
        words = words.replace(str(may_contain_any_word), "")
    return words


def is_damage(words: str) -> bool:
    """Whether an error's `cause` is damage to the file or to its log."""
    return _DAMAGE.search(words) is not None and _NOT_THE_FILE.search(words) is None


def set_aside(path: Path, words: str) -> SetAside:
    """Rename damaged files: only the write-ahead log, if the message names only that.

    The oldest files that were set aside before are deleted. Raises `OSError`.
    """
    name, folder = path.name, path.parent
    logs = (f"{name}.wal", f"{name}.wal.checkpoint", f"{name}.wal.recovery")
    wal_only = _WAL_DAMAGE.search(words) is not None and (folder / logs[0]).exists()
    form = re.compile(rf"{re.escape(name)}-(\d{{4,}})(\.wal.*)?\.damaged")
    found = [(form.fullmatch(path.name), path) for path in folder.iterdir()]
    aside = sorted((int(match[1]), path) for match, path in found if match)
    number = aside[-1][0] + 1 if aside else 1
    moved = []
    for old in logs if wal_only else (name, *logs):
        if (folder / old).exists():
            new = folder / f"{name}-{number:04d}{old.removeprefix(name)}.damaged"
            os.replace(folder / old, new)
            moved.append(new)
    for _, path in aside[: max(0, len(aside) + len(moved) - DAMAGED_MAX)]:
        path.unlink(missing_ok=True)
    return SetAside(tuple(moved), wal_only)
