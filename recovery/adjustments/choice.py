"""Which rows of the table apply to a failure, merged into one adjustment of a launch.

This module must not launch anything, and must not know a browser's other launch arguments
(`merge_arguments` joins an adjustment with those).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from recovery.adjustments.arguments import merge_arguments
from recovery.adjustments.table import ADJUSTMENTS, PreferenceValue
from recovery.failures import Category
from recovery.kinds import BrowserType, ModelType


@dataclass(frozen=True)
class LaunchAdjustment:
    """All rows that apply, merged. False if there is nothing to change: skip the rung then."""

    arguments: tuple[str, ...] = ()
    preferences: Mapping[str, PreferenceValue] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.arguments or self.preferences or self.environment)


def adjust(browser: BrowserType, model_type: ModelType, category: Category) -> LaunchAdjustment:
    """What an AGGRESSIVE restart changes, after a failure of `category` with such a model.

    Later rows win. Pass `arguments` through `merge_arguments` with those of the launch.
    """
    rows = [row for row in ADJUSTMENTS if row.applies(browser, model_type, category)]
    arguments: tuple[str, ...] = ()
    preferences: dict[str, PreferenceValue] = {}
    environment: dict[str, str] = {}
    for row in rows:
        arguments = merge_arguments(arguments, row.arguments)
        preferences |= row.preferences
        environment |= row.environment
    return LaunchAdjustment(arguments, preferences, environment, tuple(row.why for row in rows))
