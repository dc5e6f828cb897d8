"""Which other browser to try for a model of each type when its own can't be repaired.

The orders are those that the project was specified with; they are not measured. This module must
not know which browsers a pool has.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from recovery.kinds import BrowserType, ModelType

_CHROME, _FIREFOX, _SAFARI, _EDGE = (
    BrowserType.CHROME,
    BrowserType.FIREFOX,
    BrowserType.SAFARI,
    BrowserType.EDGE,
)

# The best first. A model of unknown type is treated like text.
BROWSER_ORDER: Mapping[ModelType, tuple[BrowserType, ...]] = {
    ModelType.TEXT: (_EDGE, _CHROME, _FIREFOX, _SAFARI),  # Edge has the best WebNN
    ModelType.VISION: (_CHROME, _EDGE, _FIREFOX, _SAFARI),  # Chrome has the best WebGPU
    ModelType.AUDIO: (_FIREFOX, _CHROME, _EDGE, _SAFARI),  # Firefox has the best compute shaders
    ModelType.MULTIMODAL: (_CHROME, _EDGE, _FIREFOX, _SAFARI),
    ModelType.UNKNOWN: (_EDGE, _CHROME, _FIREFOX, _SAFARI),
}


def fallback_order(
    model_type: ModelType, failed: BrowserType, available: Collection[BrowserType]
) -> tuple[BrowserType, ...]:
    """The kinds of browser to try in place of one of the kind `failed`, the best first."""
    order = BROWSER_ORDER[model_type]
    return tuple(kind for kind in order if kind is not failed and kind in available)
