"""Where pools keep what outlives their processes: the log, the model orders, the history.

One folder per pool and run, below `$TABPOOL_STATE` or the user's state directory. Folders of pools
that are over are kept for `tabpool log`, the newest of them only. This module must not read or
write what is in them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from pathlib import Path

from recovery.errors import BadInput

FOLDERS_MAX = 20  # of pools that are over
_SETTLED_SECONDS = 60.0  # a pool that is just being made may not have taken its lock yet


def state_root(given: str = "") -> Path:
    """`given`, or `$TABPOOL_STATE`, or the user's state directory."""
    if given:
        return Path(given)
    override = os.environ.get("TABPOOL_STATE")
    if override:
        return Path(override)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "tabpool"


def new_folder(root: Path, name: str, run: str) -> Path:
    """Where a pool called `name` keeps its state in this run. Old folders make room for it.

    Raises `OSError`.
    """
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    for old in folders(root)[FOLDERS_MAX - 1 :]:
        if time.time() - _changed(old) > _SETTLED_SECONDS and not _in_use(old):
            shutil.rmtree(old, ignore_errors=True)
    folder = root / f"{name}@{run}"
    folder.mkdir(mode=0o700)
    return folder


def hold(folder: Path) -> int:
    """Keep others from removing a folder, until the file descriptor that is returned is closed."""
    held = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return held


def folders(root: Path, name: str = "") -> list[Path]:
    """The folders of all pools, or of those called `name`, the newest first."""
    found = [path for path in root.glob(f"{name or '*'}@*") if path.is_dir()]
    return sorted(found, key=_changed, reverse=True)


def _changed(folder: Path) -> float:
    """When something was last made or removed in a pool's folder, a checkpoint for example.

    The beginning of time if the folder is gone, as another process may be making room as well.
    """
    seen = [0.0]
    for path in (folder, folder / "log"):
        with contextlib.suppress(OSError):  # it may also be another user's
            seen.append(path.stat().st_mtime)
    return max(seen)


def newest_folder(root: Path, name: str = "") -> Path:
    """Raises `BadInput` when there is none."""
    found = folders(root, name)
    if not found:
        which = f"a pool called {name!r}" if name else "any pool"
        raise BadInput(
            f"{root} holds no log of {which}. Pools keep one at level medium and above; "
            "TABPOOL_STATE says where.",
            got=name,
        )
    return found[0]


def _in_use(folder: Path) -> bool:
    """Whether whoever made it, a supervisor or a history holds a lock in it."""
    for name in ("lock", "log/lock", "history.duckdb.lock"):
        try:
            with open(folder / name) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            continue
        except OSError:
            return True
    return False
