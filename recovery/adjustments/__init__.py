"""What an adjusted restart changes (the AGGRESSIVE rung), and which browser to try instead.

`table` is the data, `choice` picks from it; `fallback` orders the other browsers.
Other packages import from here.
"""

from recovery.adjustments.arguments import merge_arguments
from recovery.adjustments.choice import LaunchAdjustment, adjust
from recovery.adjustments.fallback import BROWSER_ORDER, fallback_order
from recovery.adjustments.table import (
    ADJUSTMENTS,
    WITHOUT_EQUIVALENT,
    Adjustment,
    PreferenceValue,
    Unfulfilled,
)

__all__ = [
    "ADJUSTMENTS",
    "BROWSER_ORDER",
    "WITHOUT_EQUIVALENT",
    "Adjustment",
    "LaunchAdjustment",
    "PreferenceValue",
    "Unfulfilled",
    "adjust",
    "fallback_order",
    "merge_arguments",
]
