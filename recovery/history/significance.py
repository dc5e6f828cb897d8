"""Whether figures of the history differ by more than noise: rates, browsers, trends.

Plain arithmetic on counts and sums. With too few samples nothing is significant. This module must
not read the history, nor recommend anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SAMPLES_MIN = 5  # of fewer no timeout is derived, and no browser or step judged
TREND_SAMPLES_MIN = 10
TREND_T_MIN = 3.36  # two-sided p < 0.01 already with 10 samples (8 degrees of freedom)
TREND_CHANGE_MIN = 0.05  # of the mean, from the first to the last sample
FASTER_MIN = 0.1  # by which a browser's median must be shorter before another is recommended
WILSON_Z = 1.96  # of a normal distribution: Wilson intervals of 95 %


def wilson(successes: int, samples: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a rate."""
    rate, z2 = successes / samples, WILSON_Z * WILSON_Z
    centre = rate + z2 / (2 * samples)
    reach = WILSON_Z * math.sqrt((rate * (1 - rate) + z2 / (4 * samples)) / samples)
    return (centre - reach) / (1 + z2 / samples), (centre + reach) / (1 + z2 / samples)


def better(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a browser is better than another by more than noise: more reliable, or faster."""
    if one is other or one["score"] > other["reliability"]:
        return one is not other
    faster, slower = one["median_ms"], other["median_ms"]
    return faster is not None and slower is not None and faster < (1 - FASTER_MIN) * slower


def trend_direction(
    samples: int, mean: float | None, sxx: float | None, sxy: float | None, syy: float | None
) -> tuple[str, str]:
    """Whether the line through `samples` points rises or falls significantly, and why (not)."""
    if samples < TREND_SAMPLES_MIN or not mean or not sxx or sxy is None or syy is None:
        return "stable", f"{samples} durations, at least {TREND_SAMPLES_MIN} needed"
    slope = sxy / sxx
    change = slope * (samples - 1)
    noise = math.sqrt(max(0.0, syy - slope * sxy) / (samples - 2) / sxx)
    t = abs(slope) / noise if noise else math.inf
    words = f"{change:+.1f} ms over {samples} operations of {mean:.1f} ms, t = {t:.1f}"
    if abs(change) < TREND_CHANGE_MIN * mean:
        return "stable", f"{words}: less than {TREND_CHANGE_MIN:.0%}"
    if t < TREND_T_MIN:
        return "stable", f"{words}: less than {TREND_T_MIN}, which noise explains"
    return ("degrading" if slope > 0 else "improving"), words
