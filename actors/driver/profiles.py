"""Browser profiles: each launch gets a fresh copy of a template that was warmed up once.

A template holds compiled wasm and start-up caches, never a user's data. It is keyed by the
browser's binary and by onnxruntime-web's version, so an update of either creates a new one. This
module must not launch browsers.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from tenacity import AsyncRetrying, retry_if_exception_type

from actors.assets import ort_version
from actors.driver.binaries import Binaries
from actors.driver.reaper import TEMPORARY
from recovery.errors import LaunchFailed
from recovery.policies import TEMPLATE_FREES

_TEMPLATES_MAX = 12  # three engines, a few versions each
# Files that mark a profile as in use; they must not be copied.
_LOCKS = ("SingletonLock", "SingletonCookie", "SingletonSocket", "lock", ".parentlock")
_RUN_PREFIX = "tabpool-profile-"


def cache_root() -> Path:
    """The cache directory: `$TABPOOL_CACHE`, else `tabpool` in the user's cache directory."""
    override = os.environ.get("TABPOOL_CACHE")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tabpool"


def templates_root() -> Path:
    """The folder of the templates."""
    return cache_root() / "profiles"


def template_path(binaries: Binaries, gpu: str) -> Path:
    """Where the template for this browser and runtime is, or would be."""
    stat = os.stat(os.path.realpath(binaries.browser))
    identity = f"{binaries.browser} {stat.st_size} {stat.st_mtime_ns} {ort_version()} {gpu} v1"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return templates_root() / f"{binaries.kind}-ort{ort_version()}-{digest}"


def new_profile_path() -> str:
    """A path for the profile of one launch, which the reaper creates and removes."""
    return os.path.join(tempfile.gettempdir(), f"{_RUN_PREFIX}{secrets.token_hex(6)}")


def save_template(profile: str, template: Path) -> None:
    """Make `profile` (of a browser that has closed) the template; oldest ones are dropped.

    Raises `OSError`; then no template is left, not a partial one.
    """
    template.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".new-", dir=template.parent))
    try:
        ignore = shutil.ignore_patterns(*_LOCKS, TEMPORARY)
        shutil.copytree(profile, aside, ignore=ignore, dirs_exist_ok=True, symlinks=True)
    except OSError:  # shutil.Error is one, too
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(template, ignore_errors=True)
    aside.rename(template)
    kept = sorted(
        (p for p in template.parent.iterdir() if p.is_dir() and not p.name.startswith(".")),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    for old in kept[_TEMPLATES_MAX:]:
        shutil.rmtree(old, ignore_errors=True)


@contextlib.asynccontextmanager
async def template_lock(template: Path) -> AsyncIterator[None]:
    """Lock held by the process that creates `template`; others wait. Raises `LaunchFailed`."""
    template.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(template.parent / f".{template.name}.lock", os.O_WRONLY | os.O_CREAT)
    try:
        try:
            # Polled: a thread that waits in flock could not be cancelled.
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(BlockingIOError), **TEMPLATE_FREES
            ):
                with attempt:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LaunchFailed(
                f"another process keeps the profile template {template} locked; retry later"
            ) from error
        yield
    finally:
        os.close(lock)
