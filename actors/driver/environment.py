"""The environment variables of a driver and its browser.

A worker's environment holds what a browser must not see (Ray's token) or follow (a proxy, a home
folder that can't be written), so only names known to be needed are handed on. Data and one pure
function.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from actors.driver.reaper import TEMPORARY

_HANDED_ON = frozenset(
    (
        # Programs, language, time
        *("PATH", "LD_LIBRARY_PATH", "LANG", "LANGUAGE", "TZ", "USER", "LOGNAME", "SHELL"),
        # The display of a browser with a window
        *("DISPLAY", "WAYLAND_DISPLAY", "XAUTHORITY", "XDG_SESSION_TYPE"),
        # Data of the system
        *("XDG_DATA_DIRS", "XDG_CONFIG_DIRS", "FONTCONFIG_FILE", "FONTCONFIG_PATH"),
    )
)
# Locale, graphics drivers, and settings of the engines themselves.
_PREFIXES = (
    "LC_",
    "LIBGL_",
    "MESA_",
    "VK_",
    "__GL",
    "__EGL",
    "GALLIUM_",
    "NVIDIA_",
    "MOZ_",
    "GST_",
)
_TEMPORARY_NAMES = ("TMPDIR", "TMP", "TEMP")
# Below the profile and part of its template: caches in them make the next launch faster.
_FOLDERS = {"XDG_CACHE_HOME": "cache", "XDG_DATA_HOME": "data", "XDG_CONFIG_HOME": "config"}


def browser_environment(
    worker: Mapping[str, str], profile: Path, changes: Mapping[str, str], *, headless: bool
) -> dict[str, str]:
    """All variables of a driver and its browser.

    `worker` is the environment of the browser's worker, `changes` what the launch adds.
    """
    kept = {
        name: value
        for name, value in worker.items()
        if name in _HANDED_ON or name.startswith(_PREFIXES)
    }
    temporary = str(profile / TEMPORARY)
    own = {
        **dict.fromkeys((*_TEMPORARY_NAMES, "HOME", "XDG_RUNTIME_DIR"), temporary),
        **{name: str(profile / folder) for name, folder in _FOLDERS.items()},
    }
    if not headless and "XDG_RUNTIME_DIR" in worker:
        own["XDG_RUNTIME_DIR"] = worker["XDG_RUNTIME_DIR"]  # Wayland's socket is in it
    return {**kept, **own, **changes}
