"""An image to its text, through a detector and a recogniser as PP-OCRv4 has them.

What surrounds the two graphs: a page made the detector's input, each line that it found the
recogniser's, and scores made text, all as PaddleOCR does. This module must not know who runs
the graphs (`read_page` is handed two functions that do), and opens no file but a dictionary.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import numpy as np

from pool.ocr.text_boxes import Box, PageScale, check_probabilities, find_boxes
from recovery.bounded_files import read_bounded
from recovery.errors import BadInput
from sharding.models.frames import Array

Ask: TypeAlias = Callable[[dict[str, Array]], Awaitable[Mapping[str, Array]]]

INPUT = "x"  # of both graphs
PAGE_SIDE_MAX = 960  # of the detector's input
PAGE_SIDE_MULTIPLE = 32
LINE_HEIGHT = 48
LINE_WIDTH_MIN = 320  # narrower lines are padded: the recogniser was trained on this width
LINE_WIDTH_MULTIPLE = 32  # so that a browser meets few shapes
LINE_WIDTH_MAX = 3200  # wider lines are squeezed
LINES_AT_ONCE = 4

_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
_UPRIGHT = 1.5  # height to width, from which a box holds a line that runs down
_BLANK = 0  # the class that says "nothing new here"
_DICTIONARY_BYTES_MAX = 16 << 20


@dataclass(frozen=True)
class Line:
    """One line of text; `confidence` is the mean over its characters, `box` is on the page."""

    text: str
    confidence: float
    box: Box


async def read_page(
    image: Array,
    detect: Ask,
    recognise: Ask,
    dictionary: Sequence[str],
    *,
    lines_at_once: int = LINES_AT_ONCE,
) -> list[Line]:
    """The lines of text in `image` (uint8, RGB, (height, width, 3)), in reading order.

    `detect` and `recognise` run one graph each, on inputs by name; `recognise` is asked for at
    most `lines_at_once` lines at a time. Boxes in which no character is found are left out.

    Raises `BadInput` before either is asked for what is no such image or dictionary, and after
    for an answer that no such model gives; the first error of `detect` or `recognise` as it is,
    when what was still under way has been cancelled.
    """
    _check_image(image)
    _check_dictionary(dictionary)
    if lines_at_once < 1:
        _refuse("lines_at_once bounds the lines under way", "at least 1", lines_at_once)
    page, scale = await asyncio.to_thread(prepare_page, image)
    probability_map = _only_output("detector", await detect({INPUT: page}))
    boxes = await asyncio.to_thread(find_boxes, probability_map, scale)
    lines: dict[int, Line] = {}
    waiting = iter(enumerate(boxes))

    async def read_lines() -> None:
        for index, box in waiting:
            (prepared,) = prepare_lines(image, [box])  # only now: all of them would be large
            scores = _only_output("recogniser", await recognise({INPUT: prepared}))
            lines[index] = Line(*decode_line(scores, dictionary), box)

    tasks = [asyncio.create_task(read_lines()) for _ in range(min(lines_at_once, len(boxes)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [line for _, line in sorted(lines.items()) if line.text.strip()]


def prepare_page(image: Array, *, side_max: int = PAGE_SIDE_MAX) -> tuple[Array, PageScale]:
    """The detector's input, float32 (1, 3, height, width), and how it relates to the page.

    Its sides are the nearest multiples of 32, with the longer one at most `side_max`.
    Raises `BadInput` for what is no uint8 image (height, width, 3), RGB.
    """
    _check_image(image)
    if side_max < PAGE_SIDE_MULTIPLE:
        _refuse("side_max bounds the detector's input", "at least 32", side_max)
    height, width, _ = image.shape
    shrink = min(1.0, side_max / max(height, width))
    map_height, map_width = (
        min(max(round(side * shrink / PAGE_SIDE_MULTIPLE), 1), side_max // PAGE_SIDE_MULTIPLE)
        * PAGE_SIDE_MULTIPLE
        for side in (height, width)
    )
    pixels = _resize(image, map_height, map_width) / np.float32(255)
    # PaddleOCR's pages are BGR, and their first channel is scaled by the first of these.
    scaled = (pixels[:, :, ::-1] - _MEAN) / _DEVIATION
    return _as_input(scaled), PageScale(height, width, map_height, map_width)


def prepare_lines(image: Array, boxes: Sequence[Box]) -> list[Array]:
    """The recogniser's inputs, float32 (1, 3, 48, width), one for each box of `image`.

    What is much higher than wide is turned by a quarter, as a line that runs down the page.
    Raises `BadInput` for what is no image, and for boxes that are no part of it.
    """
    _check_image(image)
    height, width, _ = image.shape
    for box in boxes:
        if not (0 <= box.left < box.right <= width and 0 <= box.top < box.bottom <= height):
            _refuse("A box must lie within its image", f"within {width} x {height}", box)
    return [_prepare_line(image[box.top : box.bottom, box.left : box.right]) for box in boxes]


def _prepare_line(cut: Array) -> Array:
    if cut.shape[0] >= cut.shape[1] * _UPRIGHT:
        cut = np.rot90(cut)  # its top becomes the left end
    height, width, _ = cut.shape
    filled = min(math.ceil(LINE_HEIGHT * width / height), LINE_WIDTH_MAX)
    padded = math.ceil(max(filled, LINE_WIDTH_MIN) / LINE_WIDTH_MULTIPLE) * LINE_WIDTH_MULTIPLE
    line = np.zeros((LINE_HEIGHT, padded, 3), np.float32)  # zero is grey: padding, not paper
    line[:, :filled] = _resize(cut, LINE_HEIGHT, filled)[:, :, ::-1] / np.float32(127.5) - 1
    return _as_input(line)


def decode_line(probabilities: Array, dictionary: Sequence[str]) -> tuple[str, float]:
    """The text that the recogniser's output (1, steps, classes) says, and how sure it is.

    CTC, greedily: the likeliest class of each step, repeats once, blanks never. The confidence
    is the mean probability of what is left, 0 if that is nothing. Raises `BadInput` if the
    classes are not the dictionary's, and for what are no probabilities.
    """
    array = np.asarray(probabilities)
    if array.ndim != 3 or (array.shape[0], array.shape[2]) != (1, len(dictionary)):
        expected = f"(1, steps, {len(dictionary)})"
        _refuse("A recogniser has a class for each entry of its dictionary", expected, array.shape)
    check_probabilities("A recogniser's output", array)
    steps = array[0]
    classes = steps.argmax(axis=1)
    new = classes != _BLANK
    new[1:] &= classes[1:] != classes[:-1]
    text = "".join(dictionary[index] for index in classes[new])
    return text, float(steps.max(axis=1)[new].mean(dtype=np.float64)) if new.any() else 0.0


def read_dictionary(path: str | Path) -> tuple[str, ...]:
    """What each class of the recogniser stands for, from PP-OCR's file of keys (one a line).

    The first class is the blank, which the file does not list, and the last one the space.
    Raises `BadInput` for a file that cannot be read, and for one with an empty line.
    """
    return dictionary_from(read_dictionary_file(path), path)


def read_dictionary_file(path: str | Path) -> bytes:
    """The content of a dictionary's file. Raises `BadInput`: it can't be read, or is too large."""
    return read_bounded(path, _DICTIONARY_BYTES_MAX, what="a dictionary of characters")


def dictionary_from(data: bytes, path: str | Path) -> tuple[str, ...]:
    """The dictionary in the content of a file, of which `path` is for errors."""
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except ValueError as error:
        raise BadInput(
            f"{path}: expected a dictionary of characters, got: {error}.",
            path=str(path),
            expected="UTF-8, one character a line",
            got=str(error),
        ) from error
    # Only at ends of lines: one of PP-OCR's keys is a wide space, and others would be lost, too.
    keys = text.removesuffix("\n").split("\n")
    if "" in keys:
        _refuse(
            f"{path}: a dictionary has one character a line",
            "no empty line",
            f"line {keys.index('') + 1} empty",
        )
    return ("", *keys, " ")


def _as_input(pixels: Array) -> Array:
    """(height, width, 3) as a batch of one, channels first."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[np.newaxis], np.float32)


def _resize(image: Array, height: int, width: int) -> Array:
    """float32; linear between the centres of pixels, several samples averaged where it shrinks."""
    return _resample(_resample(image, height, 0), width, 1)


def _resample(pixels: Array, size: int, axis: int) -> Array:
    had = pixels.shape[axis]
    if had == size:
        return pixels.astype(np.float32)
    samples = max(1, round(had / size))
    shape = [1, 1, 1]
    shape[axis] = size
    total = np.float32(0)
    for sample in range(samples):
        place = (np.arange(size) + (sample + 0.5) / samples) * (had / size) - 0.5
        place = place.clip(0, had - 1)
        low = place.astype(int)
        part = (place - low).astype(np.float32).reshape(shape)
        high = np.minimum(low + 1, had - 1)
        total = total + pixels.take(low, axis) * (1 - part) + pixels.take(high, axis) * part
    return np.asarray(total / np.float32(samples), np.float32)


def _only_output(model: str, outputs: Mapping[str, Array]) -> Array:
    if len(outputs) != 1:
        _refuse(f"A {model} of text has one output", 1, list(outputs))
    (output,) = outputs.values()
    return output


def _check_image(image: Any) -> None:
    expected = "uint8 (height, width, 3), no side 0"
    if not isinstance(image, np.ndarray):
        _refuse("An image is an RGB array", expected, type(image).__name__)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        _refuse("An image is an RGB array", expected, f"{image.dtype} {image.shape}")


def _check_dictionary(dictionary: Any) -> None:
    what, expected = "A dictionary lists what each class stands for", 'strings, the first one ""'
    if isinstance(dictionary, str) or not isinstance(dictionary, Sequence):
        _refuse(what, expected, type(dictionary).__name__)
    if other := next((type(entry) for entry in dictionary if not isinstance(entry, str)), None):
        _refuse(what, expected, f"{other.__name__} among them")
    if len(dictionary) < 2 or dictionary[_BLANK]:
        _refuse(what, expected, list(dictionary[:2]))


def _refuse(what: str, expected: Any, got: Any) -> NoReturn:
    raise BadInput(f"{what}: expected {expected}, got {got}.", expected=expected, got=got)
