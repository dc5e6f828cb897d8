"""Where text is on a page: a detector's map of probabilities made into boxes in reading order.

This is PaddleOCR's DB post-processing for boxes that stand upright, in numpy alone. This module
must not resize or cut an image, and knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recovery.errors import BadInput
from sharding.models.frames import Array

THRESHOLD = 0.3  # a pixel above it is text
SCORE_MIN = 0.6  # what a region's pixels must have on average
UNCLIP_RATIO = 1.5  # the detector was trained on shrunk regions, which are to grow again
SIDE_MIN = 3  # of a region, in pixels of the map
BOXES_MAX = 1000

_ROUNDING = 1e-3  # by which a probability may leave 0..1
_HEIGHTS_ALIKE = 3.0  # boxes whose heights differ by more are not of one row


@dataclass(frozen=True)
class Box:
    """A rectangle of whole pixels; `right` and `bottom` are not in it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top


@dataclass(frozen=True)
class PageScale:
    """The size of a page, and of the detector's view of it."""

    height: int
    width: int
    map_height: int
    map_width: int


def find_boxes(probability_map: Array, scale: PageScale) -> list[Box]:
    """The lines of text in pixels of the page, row by row from the top, from left to right.

    `probability_map` is the detector's output, (1, 1, height, width) or (height, width), for
    the input that `scale` came with. Of more than `BOXES_MAX` boxes the largest are kept.
    Raises `BadInput` for another shape, and for what are no probabilities.
    """
    probabilities = _check_map(probability_map, scale)
    bounds, scores = find_regions(probabilities, THRESHOLD)
    left, top, right, bottom = bounds.T
    width, height = right - left, bottom - top
    kept = (scores >= SCORE_MIN) & (np.minimum(width, height) >= SIDE_MIN)
    bounds, width, height = bounds[kept], width[kept], height[kept]

    largest = np.argsort(-width * height, kind="stable")[:BOXES_MAX]
    bounds, width, height = bounds[largest], width[largest], height[largest]
    growth = (width * height * UNCLIP_RATIO / (2 * (width + height)))[:, np.newaxis]
    across, down = scale.width / scale.map_width, scale.height / scale.map_height
    # Outwards to whole pixels, so that no box is empty, and back to the page's edge.
    starts = np.floor((bounds[:, :2] - growth) * (across, down)).clip(0)
    ends = np.ceil((bounds[:, 2:] + growth) * (across, down)).clip(max=(scale.width, scale.height))
    boxes = np.concatenate([starts, ends], axis=1).astype(int).tolist()
    return in_reading_order([Box(*sides) for sides in boxes])


def _check_map(probability_map: Array, scale: PageScale) -> Array:
    size = (scale.map_height, scale.map_width)
    array = np.asarray(probability_map)
    if array.shape not in {size, (1, 1, *size)}:
        raise BadInput(
            f"A detector's map for this page is of shape {(1, 1, *size)}, got {array.shape}.",
            expected=[1, 1, *size],
            got=list(array.shape),
        )
    check_probabilities("A detector's map", array)
    return array.reshape(size)


def check_probabilities(what: str, array: Array) -> None:
    """Raises `BadInput` unless `array` holds floats from 0 to 1."""
    got = str(array.dtype)
    if array.dtype.kind == "f":
        low, high = (array.min(), array.max()) if array.size else (0.0, 0.0)
        if low >= -_ROUNDING and high <= 1 + _ROUNDING:  # false for NaN, too
            return
        got = f"{low:g} to {high:g}"
    raise BadInput(
        f"{what} holds probabilities: expected floats from 0 to 1, got {got}.",
        expected="floats from 0 to 1",
        got=got,
    )


def find_regions(values: Array, threshold: float) -> tuple[Array, Array]:
    """The regions of `values` (height, width) above `threshold`, pixels touching at corners too.

    Returns bounds (regions, 4) as left, top, right, bottom (the last two outside), and the mean
    value of each region's own pixels (regions,).
    """
    height, width = values.shape
    # A run is what a region has of one row without a gap: from `first` up to `end`.
    edges = np.diff(np.pad((values > threshold).astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, first = np.nonzero(edges == 1)
    _, end = np.nonzero(edges == -1)

    # Runs are sorted, so those that a run touches in the next row are neighbours of each other.
    stride = width + 2
    below = (rows + 1) * stride
    touched_from = np.searchsorted(rows * stride + end, below + first, side="left").tolist()
    touched_to = np.searchsorted(rows * stride + first, below + end, side="right").tolist()
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    for run, (low, high) in enumerate(zip(touched_from, touched_to, strict=True)):
        for other in range(low, high):
            one, two = sorted((root(run), root(other)))
            parents[two] = one

    roots, region = np.unique([root(run) for run in parents], return_inverse=True)
    bounds = np.empty((len(roots), 4), int)
    for column, fold, start, given in (
        (0, np.minimum, width, first),
        (1, np.minimum, height, rows),
        (2, np.maximum, 0, end),
        (3, np.maximum, 0, rows + 1),
    ):
        bounds[:, column] = start
        fold.at(bounds[:, column], region, given)
    sums = np.pad(values.cumsum(axis=1, dtype=np.float64), ((0, 0), (1, 0)))
    totals = np.bincount(region, sums[rows, end] - sums[rows, first], len(roots))
    return bounds, totals / np.bincount(region, end - first, len(roots))


def in_reading_order(boxes: Sequence[Box]) -> list[Box]:
    """Row by row from the top, each row from left to right; columns of text are not told apart."""
    rows: list[list[Box]] = []
    for box in sorted(boxes, key=lambda box: (box.top + box.bottom, box.left)):
        # Only the last few rows can reach down to it, and a tall box has one of its own.
        row = next((row for row in reversed(rows[-3:]) if _of_one_row(row[0], box)), None)
        if row is None:
            rows.append([box])
        else:
            row.append(box)
    return [box for row in rows for box in sorted(row, key=lambda box: box.left)]


def _of_one_row(one: Box, two: Box) -> bool:
    low, high = sorted((one.height, two.height))
    shared = min(one.bottom, two.bottom) - max(one.top, two.top)
    return shared >= low / 2 and high <= low * _HEIGHTS_ALIKE
