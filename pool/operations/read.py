"""`read`: the text in an image, by a model of two components: one finds lines, one reads them.

This module must not know where the components are, and does nothing to images itself
(`pool.ocr` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pool.execution.placed import PlacedModel
from pool.models.components import Reader, characters_of, find_reader, input_of
from pool.models.registry import ModelEntry
from pool.models.tokens import TextEncoder
from pool.ocr.reading import LINE_HEIGHT, prepare_lines, read_page
from pool.operations.base import Operation
from pool.results import Result
from recovery.errors import BadInput
from sharding.models.frames import Array
from sharding.models.signature import ModelSpec

IMAGE = "image"


class Read(Operation):
    """`{"image": uint8 (height, width, 3)}` in; text, confidence and boxes of its lines out."""

    name = "read"

    def prepare(
        self, entry: ModelEntry, inputs: Mapping[str, Any], encoder: TextEncoder | None
    ) -> Reading:
        return prepare_read(entry, inputs)

    async def run(self, model: PlacedModel, prepared: Reading) -> Result:
        return await model.answer(prepared.run(model))


class AsksComponents(Protocol):
    """Asks one component, whatever fails on the way (`PlacedModel` does)."""

    async def ask(self, spec: ModelSpec, tensors: Mapping[str, Array]) -> Mapping[str, Array]: ...


@dataclass(frozen=True)
class Reading:
    """One page that is to be read: checked, and nothing asked yet."""

    reader: Reader
    dictionary: tuple[str, ...]
    image: Array

    async def run(self, parts: AsksComponents) -> dict[str, Any]:
        """`text` (a list of lines), `confidence` float32 (lines,), `boxes` int64 (lines, 4).

        A box is left, top, right, bottom in pixels of the image, the last two outside. Raises
        `BadInput` for an answer that no such model gives, and what `parts` raises.
        """
        reader = self.reader

        async def detect(tensors: dict[str, Array]) -> Mapping[str, Array]:
            (page,) = tensors.values()
            return await parts.ask(reader.detector, input_of(reader.detector, page))

        async def recognise(tensors: dict[str, Array]) -> Mapping[str, Array]:
            (line,) = tensors.values()
            return await parts.ask(reader.recogniser, input_of(reader.recogniser, line))

        lines = await read_page(self.image, detect, recognise, self.dictionary)
        boxes = [(b.left, b.top, b.right, b.bottom) for b in (line.box for line in lines)]
        return {
            "text": [line.text for line in lines],
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
        raise BadInput(f"read takes {IMAGE!r}, got {got}.", expected=[IMAGE], got=got)
    prepare_lines(inputs[IMAGE], ())  # which refuses what is no image
    characters = characters_of(entry.dictionary.path, entry.dictionary.digest)
    return Reading(reader, characters, inputs[IMAGE])
