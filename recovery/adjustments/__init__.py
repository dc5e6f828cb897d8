"""What an adjusted restart changes (the AGGRESSIVE rung), and which browser to try instead.

`table` is the data, `choice` picks from it; `models` says how each type of model likes to be run.
Whoever is outside imports from here.
"""

from recovery.adjustments.arguments import merge_arguments
from recovery.adjustments.choice import LaunchAdjustment, adjust
from recovery.adjustments.models import (
    Goal,
    Loading,
    ModelSettings,
    constrained,
    fallback_order,
    model_settings,
)
from recovery.adjustments.table import (
    ADJUSTMENTS,
    WITHOUT_EQUIVALENT,
    Adjustment,
    PreferenceValue,
    Unfulfilled,
)

__all__ = [
    "ADJUSTMENTS",
    "WITHOUT_EQUIVALENT",
    "Adjustment",
    "Goal",
    "LaunchAdjustment",
    "Loading",
    "ModelSettings",
    "PreferenceValue",
    "Unfulfilled",
    "adjust",
    "constrained",
    "fallback_order",
    "merge_arguments",
    "model_settings",
]
