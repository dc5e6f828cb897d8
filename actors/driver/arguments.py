"""Launch settings of a browser: arguments, preferences, environment, as data.

A `LaunchSettings` holds all options of a launch; recovery derives changed ones. This module must
not look for binaries or start anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from recovery.kinds import BrowserType

PreferenceValue = bool | int | str


class Gpu(StrEnum):
    """Which GPU adapter the page may use: none, the machine's, or a software one."""

    OFF = "off"
    AUTO = "auto"
    SOFTWARE = "software"


class PrivateNetwork(StrEnum):
    """Whether driver and browser get a network of their own: if possible, never, or else fail."""

    AUTO = "auto"
    OFF = "off"
    REQUIRED = "required"


@dataclass(frozen=True)
class LaunchSettings:
    """How to launch one browser.

    `arguments` are command-line arguments, `preferences` Firefox preferences, `environment`
    extra variables of the browser's processes.
    """

    kind: BrowserType
    headless: bool = True
    gpu: Gpu = Gpu.AUTO
    arguments: tuple[str, ...] = ()
    preferences: Mapping[str, PreferenceValue] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def adjusted(
        self,
        arguments: tuple[str, ...] = (),
        preferences: Mapping[str, PreferenceValue] | None = None,
    ) -> LaunchSettings:
        """The same launch with more arguments and preferences; later ones win."""
        return replace(
            self,
            arguments=(*self.arguments, *(a for a in arguments if a not in self.arguments)),
            preferences={**self.preferences, **(preferences or {})},
        )
