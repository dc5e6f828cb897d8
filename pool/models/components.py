"""Models in parts, and what is asked of each: an encoder's shards, or a reader's components.

A detector and a recogniser of text are known by the shapes of their inputs and outputs, and by
their names only where several have such shapes. This module must not ask a browser (it is handed
what does: `AskParts`), and does nothing to images (`pool.operations.read` does).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pool.models.registry import ModelEntry
from pool.operations.read import (
    LINE_HEIGHT,
    prepare_lines,
    prepare_page,
    read_dictionary,
    read_page,
)
from pool.operations.text_boxes import Box
from recovery.errors import BadInput, NotAModel
from sharding.models.frames import Array
from sharding.models.signature import ModelFile, ModelSpec
from sharding.sequences.stages import STAGE_MARK, Line

READ = "read"
IMAGE = "image"

_DETECTOR, _RECOGNISER = "det", "rec"  # words in the names of such models
_DICTIONARY = re.compile(r"keys|dict", re.IGNORECASE)
_DICTIONARIES_KEPT = 8
_SEED = 48


class AskParts(Protocol):
    """Asks one part, whatever fails on the way."""

    async def ask(self, spec: ModelSpec, tensors: Mapping[str, Array]) -> Mapping[str, Array]: ...


async def run_stages(
    parts: AskParts, line: Line, specs: Sequence[ModelSpec], tensors: Mapping[str, Array]
) -> dict[str, Array]:
    """The uncut encoder's outputs: each stage gets its inputs and what the one before it sends."""
    found: dict[str, Array] = {}
    for stage, spec in zip(line.stages, specs, strict=True):
        given = {shared.name: tensors[shared.name] for shared in stage.shared}
        given |= {received.name: found[received.name] for received in stage.receives}
        found |= await parts.ask(spec, given)
    return {output.name: found[output.name] for output in line.outputs}


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
    """Whether it makes steps of classes of a line as high as `pool.operations.read` makes lines."""
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
            lengths[path.name] = len(read_dictionary(path))
        except BadInput as error:
            lengths[path.name] = str(error)
            continue
        if reader.classes in (None, lengths[path.name]):
            data = path.read_bytes()
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
def _characters(path: str, digest: str) -> tuple[str, ...]:
    try:
        same = hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest
        characters = read_dictionary(path)
    except (OSError, BadInput) as error:
        raise NotAModel(
            f"{path}: the dictionary that the model was loaded with can't be read: {error}.",
            path=path,
            expected="the dictionary",
            got=str(error),
        ) from error
    if not same:
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
        return _input_of(spec, prepare_page(speckled)[0])
    (line,) = prepare_lines(speckled, [Box(0, 0, 160, 24)])
    return _input_of(spec, line)


def _input_of(spec: ModelSpec, array: Array) -> dict[str, Array]:
    (only,) = spec.inputs
    return {only.name: array}


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """One page that is to be read: checked, and nothing asked yet."""

    reader: Reader
    dictionary: tuple[str, ...]
    image: Array

    async def run(self, parts: AskParts) -> dict[str, Array]:
        """`text` (lines,), `confidence` float32 (lines,), `boxes` int64 (lines, 4).

        A box is left, top, right, bottom in pixels of the image, the last two outside. Raises
        `BadInput` for an answer that no such model gives, and what `parts` raises.
        """
        reader = self.reader

        async def detect(tensors: dict[str, Array]) -> Mapping[str, Array]:
            (page,) = tensors.values()
            return await parts.ask(reader.detector, _input_of(reader.detector, page))

        async def recognise(tensors: dict[str, Array]) -> Mapping[str, Array]:
            (line,) = tensors.values()
            return await parts.ask(reader.recogniser, _input_of(reader.recogniser, line))

        lines = await read_page(self.image, detect, recognise, self.dictionary)
        boxes = [(b.left, b.top, b.right, b.bottom) for b in (line.box for line in lines)]
        return {
            "text": np.array([line.text for line in lines], np.str_),
            "confidence": np.array([line.confidence for line in lines], np.float32),
            "boxes": np.array(boxes, np.int64).reshape(len(lines), 4),
        }


def prepare_read(entry: ModelEntry, inputs: Any) -> Reading:
    """The page that `{"image": uint8 (height, width, 3), RGB}` asks to be read.

    Raises `BadInput` for other inputs, and if the model reads no pages; `NotAModel` if its
    dictionary is not what it was.
    """
    reader = find_reader(entry.components)
    if reader is None or entry.dictionary is None:
        raise BadInput(
            f"Model {entry.name!r} can't read: expected one component that finds lines (an image "
            f"of any size to one channel) and one that reads a line of height {LINE_HEIGHT}, got "
            f"{', '.join(entry.parts)}.",
            expected="a detector and a recogniser",
            got=list(entry.parts),
        )
    if not isinstance(inputs, Mapping) or list(inputs) != [IMAGE]:
        got = list(map(str, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise BadInput(f"{READ} takes {IMAGE!r}, got {got}.", expected=[IMAGE], got=got)
    prepare_lines(inputs[IMAGE], ())  # which refuses what is no image
    characters = _characters(entry.dictionary.path, entry.dictionary.digest)
    return Reading(reader, characters, inputs[IMAGE])
