"""How a model of each type likes to be run, and in which other browsers.

Orders and numbers are those of the documents ("Browser Fallback Order", "Model-Specific
Optimizations"); `why` says where they leave something open. This module must not know which
browsers a pool has.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from recovery.kinds import BrowserType, ModelType

_CHROME, _FIREFOX, _SAFARI, _EDGE = (
    BrowserType.CHROME,
    BrowserType.FIREFOX,
    BrowserType.SAFARI,
    BrowserType.EDGE,
)

Loading = Literal["parallel", "progressive", "single"]
Goal = Literal["latency", "throughput", "memory"]


@dataclass(frozen=True)
class ModelSettings:
    """What suits one type of model. `why` says where it comes from."""

    browser_order: tuple[BrowserType, ...]  # the best first; all four
    batch_size: int  # inputs that are computed at once
    warm_up: bool  # run once before the first real input, which compiles kernels and shaders
    loading: Loading  # several components at once, one after the other, or there is only one
    optimise_for: Goal
    why: str


_SETTINGS: Mapping[ModelType, ModelSettings] = {
    ModelType.TEXT: ModelSettings(
        (_EDGE, _CHROME, _FIREFOX, _SAFARI),
        batch_size=1,
        warm_up=True,
        loading="single",
        optimise_for="latency",
        why="Edge has the best WebNN; one text at a time, as somebody waits for it",
    ),
    ModelType.VISION: ModelSettings(
        (_CHROME, _EDGE, _FIREFOX, _SAFARI),
        batch_size=4,
        warm_up=True,
        loading="single",
        optimise_for="throughput",
        why="Chrome has the best WebGPU; images come in numbers, so four at once",
    ),
    ModelType.AUDIO: ModelSettings(
        (_FIREFOX, _CHROME, _EDGE, _SAFARI),
        batch_size=1,
        warm_up=True,
        loading="single",
        optimise_for="latency",
        why="Firefox has the best compute shaders. Batch and goal are ours: the documents name "
        "none, and one recording is long already",
    ),
    ModelType.MULTIMODAL: ModelSettings(
        (_CHROME, _EDGE, _FIREFOX, _SAFARI),
        batch_size=1,
        warm_up=False,
        loading="parallel",
        optimise_for="memory",
        why="Chrome loads components in parallel; memory is what runs out first. No warm-up is "
        "ours: it would fill the memory of components that may not be needed",
    ),
}


def model_settings(model_type: ModelType) -> ModelSettings:
    """The settings of a model type. An unknown one is treated like text, and `why` says so."""
    settings = _SETTINGS.get(model_type)
    if settings is None:
        return replace(_SETTINGS[ModelType.TEXT], why="type unknown: treated like text")
    return settings


def constrained(settings: ModelSettings) -> ModelSettings:
    """The same where memory is short: one input at a time, one component after the other."""
    return replace(
        settings,
        batch_size=1,
        loading="single" if settings.loading == "single" else "progressive",
        optimise_for="memory",
        why=f"{settings.why}; memory is short",
    )


def fallback_order(
    model_type: ModelType, failed: BrowserType, available: Collection[BrowserType]
) -> tuple[BrowserType, ...]:
    """The kinds of browser to try in place of one of the kind `failed`, the best first."""
    order = model_settings(model_type).browser_order
    return tuple(kind for kind in order if kind is not failed and kind in available)
