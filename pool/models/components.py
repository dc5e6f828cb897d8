"""Models that work together: which of them finds text and which reads it, and their dictionary.

A detector and a recogniser of text are known by the shapes of their inputs and outputs, and by
their names only where several have such shapes. This module must not ask a browser, and does
nothing to images (`pool.ocr.reading` does).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pool.models.registry import ModelEntry
from pool.ocr.reading import (
    LINE_HEIGHT,
    dictionary_from,
    prepare_lines,
    prepare_page,
    read_dictionary_file,
)
from pool.ocr.text_boxes import Box
from recovery.errors import BadInput, NotAModel
from sharding.models.frames import Array
from sharding.models.signature import ModelFile, ModelSpec
from sharding.sequences.stages import STAGE_MARK

_DETECTOR, _RECOGNISER = "det", "rec"  # words in the names of such models
_DICTIONARY = re.compile(r"keys|dict", re.IGNORECASE)
_DICTIONARIES_KEPT = 8
_SEED = 48


# -- who reads -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """The two components that make text of a page."""

    detector: ModelSpec
    recogniser: ModelSpec

    @property
    def classes(self) -> int | None:
        """How many entries the recogniser's dictionary must have; None: it does not say."""
        (output,) = self.recogniser.outputs
        last = (output.shape or (None,))[-1]
        return last if isinstance(last, int) else None


def find_reader(components: Sequence[ModelSpec]) -> Reader | None:
    """The detector and the recogniser among `components`, if there is one of each."""
    detector = _only(_DETECTOR, [spec for spec in components if _is_detector(spec)])
    recogniser = _only(_RECOGNISER, [spec for spec in components if _is_recogniser(spec)])
    return Reader(detector, recogniser) if detector and recogniser else None


def _only(word: str, found: Sequence[ModelSpec]) -> ModelSpec | None:
    if len(found) > 1:
        found = [spec for spec in found if word in _words(spec)]
    return found[0] if len(found) == 1 else None


def _words(spec: ModelSpec) -> list[str]:
    return re.split(r"[^a-z]+", spec.name.rpartition(STAGE_MARK)[2].lower())


def _is_detector(spec: ModelSpec) -> bool:
    """Whether it makes a map of one channel of an image of any size."""
    taken, given = _image_shape(spec), _output_shape(spec)
    if taken is None or given is None or len(given) != 4 or given[1] != 1:
        return False
    return not any(isinstance(side, int) for side in taken[2:])


def _is_recogniser(spec: ModelSpec) -> bool:
    """Whether it makes steps of classes of a line as high as `pool.ocr.reading` makes lines."""
    taken, given = _image_shape(spec), _output_shape(spec)
    if taken is None or given is None or len(given) != 3 or isinstance(taken[3], int):
        return False
    height = taken[2]
    return height == LINE_HEIGHT if isinstance(height, int) else _RECOGNISER in _words(spec)


def _image_shape(spec: ModelSpec) -> tuple[int | str | None, ...] | None:
    """The shape of its only input, if that can be an image of three colours."""
    if len(spec.inputs) != 1 or spec.inputs[0].dtype != "float32":
        return None
    shape = spec.inputs[0].shape
    return shape if shape is not None and len(shape) == 4 and shape[1] == 3 else None


def _output_shape(spec: ModelSpec) -> tuple[int | str | None, ...] | None:
    return spec.outputs[0].shape if len(spec.outputs) == 1 else None


# -- the dictionary --------------------------------------------------------------------------------


def with_dictionary(entry: ModelEntry) -> ModelEntry:
    """The entry with the dictionary of its reader, if it has a reader. Reads the file.

    It is a text file beside the recogniser whose name says so, or the only one there, with as
    many characters as the recogniser has classes. Raises `NotAModel` if there is none.
    """
    reader = find_reader(entry.components)
    if reader is None:
        return entry
    folder = Path(reader.recogniser.files[0].path).parent
    texts = sorted(file for file in folder.glob("*.txt") if file.is_file())
    named = [file for file in texts if _DICTIONARY.search(file.stem)] or texts
    lengths: dict[str, Any] = {}
    for path in named:
        try:
            data = read_dictionary_file(path)
            lengths[path.name] = len(dictionary_from(data, path))
        except BadInput as error:
            lengths[path.name] = str(error)
            continue
        if reader.classes in (None, lengths[path.name]):
            file = ModelFile(str(path), path.name, len(data), hashlib.sha256(data).hexdigest())
            whole = hashlib.sha256(f"{entry.spec.digest} {file.digest}".encode()).hexdigest()
            return replace(entry, spec=replace(entry.spec, digest=whole), dictionary=file)
    expected = "a text file with a character a line, called *keys* or *dict*"
    if reader.classes is not None:
        expected += f", of {reader.classes - 2} lines"
    found = ", ".join(
        f"{name} ({length - 2} lines)" if isinstance(length, int) else f"{name} ({length})"
        for name, length in lengths.items()
    )
    raise NotAModel(
        f"{folder}: {reader.recogniser.name} has {reader.classes or 'some'} classes (a blank, a "
        f"space and the dictionary's), so expected {expected}, got {found or 'none'}.",
        path=str(folder),
        expected=expected,
        got=lengths,
    )


@lru_cache(_DICTIONARIES_KEPT)
def characters_of(path: str, digest: str) -> tuple[str, ...]:
    try:
        data = read_dictionary_file(path)
        characters = dictionary_from(data, path)
    except BadInput as error:
        raise NotAModel(
            f"{path}: the dictionary that the model was loaded with can't be read: {error}.",
            path=path,
            expected="the dictionary",
            got=str(error),
        ) from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise NotAModel(
            f"{path}: the dictionary has changed since the model was loaded. Unload the model and "
            "load it again.",
            path=path,
            expected=digest,
            got="another content",
        )
    return characters


# -- known answers ---------------------------------------------------------------------------------


def example_for(entry: ModelEntry, spec: ModelSpec) -> dict[str, Array] | None:
    """Inputs that suit one component, small and not all the same; None: nothing is known of it."""
    reader = find_reader(entry.components)
    if reader is None or spec not in (reader.detector, reader.recogniser):
        return None
    speckled = np.random.default_rng(_SEED).integers(0, 256, (96, 160, 3), np.uint8)
    if spec == reader.detector:
        return input_of(spec, prepare_page(speckled)[0])
    (line,) = prepare_lines(speckled, [Box(0, 0, 160, 24)])
    return input_of(spec, line)


def input_of(spec: ModelSpec, array: Array) -> dict[str, Array]:
    (only,) = spec.inputs
    return {only.name: array}
