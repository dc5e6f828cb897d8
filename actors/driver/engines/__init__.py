"""Browser engines: what each needs to be found, launched, driven and watched, in one table.

Whoever is outside asks `ENGINES` by browser type, and branches on no type.
"""

from collections.abc import Mapping

from actors.driver.arguments import Gpu, LaunchSettings
from actors.driver.engines.base import Engine, Machine
from actors.driver.engines.chromium import CHROME, EDGE
from actors.driver.engines.firefox import FIREFOX
from actors.driver.engines.webkit import SAFARI
from recovery.kinds import BrowserType

ENGINES: Mapping[BrowserType, Engine] = {
    engine.kind: engine for engine in (CHROME, FIREFOX, SAFARI, EDGE)
}


def default_settings(
    kind: BrowserType, *, headless: bool = True, gpu: Gpu = Gpu.OFF, root: bool, small_shm: bool
) -> LaunchSettings:
    """The settings that a healthy browser of this kind starts with; see `Machine`."""
    return ENGINES[kind].settings(Machine(headless, gpu, root, small_shm))


__all__ = ["ENGINES", "Engine", "Machine", "default_settings"]
