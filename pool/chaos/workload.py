"""The operations of a chaos run: a few inputs for each kind of model, and the expected answers.

An answer is right if it is bit-identical with the one that the pool gave before any fault; on
other back ends than WASM, if it is within the tolerance. Answers of single models are compared
with native onnxruntime beforehand. This module must not inject faults.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pool.models.bundled import kjv_llama_folder, minilm_folder, ocr_folder, silero_vad_path
from pool.models.registry import ModelEntry
from pool.models.tokens import encoder_for
from pool.operations.graph import GraphOperation
from pool.operations.registry import OperationRegistry
from pool.pool import BrowserPool
from pool.results import Result
from recovery.errors import BadInput, InternalError, OperationFailed
from recovery.kinds import Backend, ModelType
from sharding.models.known_answers import varied_inputs
from sharding.models.native import NativeSession

Array = np.ndarray[Any, Any]
PAGE = Path(__file__).parents[1] / "assets" / "page.npz"
_NATIVE_ATOL = 1e-3  # WASM kernels round differently from native ones; int8 models most: 1e-4 seen
_QUESTIONS = 4  # per model
_RECOGNISER = "ch_PP-OCRv4_rec_infer"


@dataclass(frozen=True)
class Question:
    """One operation on one model. `op` as for `run_with_recovery`."""

    model: str
    type: ModelType
    op: str
    inputs: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Source:
    """A model of the workload: its path, how it is loaded, its inputs."""

    name: str
    type: ModelType
    path: Path
    ask: Callable[[ModelEntry], Sequence[tuple[str, Mapping[str, Any]]]]
    shards: int | None = None
    strategy: str | None = None


@dataclass(frozen=True)
class Expected:
    """The answer without faults."""

    outputs: Mapping[str, Any]
    backend: Backend | None


def _sentences(entry: ModelEntry) -> list[tuple[str, Mapping[str, Any]]]:
    texts = (
        "A cat sits on the mat.",
        "The central bank raised interest rates for the third time this year.",
        "Browsers crash, hang, lose their GPU or lie.",
        "In the beginning God created the heaven and the earth.",
    )
    return [("embed", {"text": text}) for text in texts]


def _frames(entry: ModelEntry) -> list[tuple[str, Mapping[str, Any]]]:
    rng = np.random.default_rng(5)
    state, rate = np.zeros((2, 1, 128), np.float32), np.array(16000, np.int64)
    noise = [rng.standard_normal((1, 512), dtype=np.float32) for _ in range(_QUESTIONS)]
    return [("inference", {"input": each, "state": state, "sr": rate}) for each in noise]


def _lines(entry: ModelEntry) -> list[tuple[str, Mapping[str, Any]]]:
    page = np.load(PAGE)["image"]
    (name,) = (tensor.name for tensor in entry.spec.inputs)
    asked: list[tuple[str, Mapping[str, Any]]] = []
    for top in range(0, 4 * 48, 48):
        line = page[top : top + 48, :320].astype(np.float32).transpose(2, 0, 1)[None]
        asked.append(("inference", {name: line / 127.5 - 1}))
    return asked


def _page(entry: ModelEntry) -> list[tuple[str, Mapping[str, Any]]]:
    return [("read", {"image": np.load(PAGE)["image"]})]


def _verses(entry: ModelEntry) -> list[tuple[str, Mapping[str, Any]]]:
    rest = {"max_new_tokens": 16, "ignore_eos": True, "logits": True}
    texts = ("And the LORD said", "In the beginning")
    return [("generate", {"text": text, **rest}) for text in texts]


def _made_up(entry: ModelEntry) -> list[tuple[str, Mapping[str, Any]]]:
    if entry.pipeline is not None:
        ids = [{"input_ids": [1 + n, 2, 3], "max_new_tokens": 16} for n in range(_QUESTIONS)]
        return [("generate", {**each, "ignore_eos": True, "logits": True}) for each in ids]
    return [("inference", varied_inputs(entry.spec, 2 + n)) for n in range(_QUESTIONS)]


def known_sources() -> dict[str, Callable[[], Source]]:
    """The bundled models by the names that `--model` takes."""
    return {
        "text": lambda: Source("text", ModelType.TEXT, minilm_folder(), _sentences),
        "audio": lambda: Source("audio", ModelType.AUDIO, silero_vad_path(), _frames),
        "vision": lambda: Source(
            "vision", ModelType.VISION, ocr_folder() / f"{_RECOGNISER}.onnx", _lines
        ),
        "multimodal": lambda: Source(
            "multimodal",
            ModelType.MULTIMODAL,
            ocr_folder(),
            _page,
            strategy="component_based",
        ),
        "llama": lambda: Source("llama", ModelType.TEXT, kjv_llama_folder(), _verses, shards=2),
    }


def source_of(word: str) -> Source:
    """The source for a `--model` name or path. Raises `BadInput`."""
    known = known_sources()
    if word in known:
        return known[word]()
    path = Path(word)
    if not path.exists():
        raise BadInput(
            f"--model {word}: expected {', '.join(known)}, or the path of a model (a folder or an "
            ".onnx file).",
            expected=list(known),
            got=word,
        )
    name = "".join(c if c.isalnum() else "-" for c in path.stem)[:40] or "model"
    return Source(name, ModelType.UNKNOWN, path, _made_up)


class Workload:
    """Questions to loaded models, in turn, and the expected answers."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)
        self._questions: list[Question] = []
        self._expected: list[Expected] = []

    def of(self, number: int) -> Question:
        """The question of operation `number`; models take turns."""
        return self._questions[number % len(self._questions)]

    async def load(self, pool: BrowserPool) -> None:
        """Load every model and record the expected answers. Raises `InternalError` if the pool's
        answers differ from native onnxruntime before any fault."""
        by_model: list[list[Question]] = []
        for source in self._sources:
            entry = await pool.load(
                source.name, source.path, shards=source.shards, strategy=source.strategy
            )
            kind = entry.spec.type if source.type is ModelType.UNKNOWN else source.type
            asked = [Question(source.name, kind, op, inputs) for op, inputs in source.ask(entry)]
            by_model.append(asked)
            if not entry.in_parts and entry.pipeline is None:
                await self._compare(pool, entry, asked[0])
        longest = max(map(len, by_model))
        turns = [asked[n % len(asked)] for n in range(longest) for asked in by_model]
        for question in turns:
            result = await pool.run_with_recovery(question.model, question.op, question.inputs)
            if not result.success:
                raise OperationFailed(
                    f"{question} failed before any fault was injected: {result.error}"
                )
            self._questions.append(question)
            self._expected.append(Expected(result.outputs, result.backend))

    async def _compare(self, pool: BrowserPool, entry: ModelEntry, question: Question) -> None:
        result = await pool.run_with_recovery(question.model, question.op, question.inputs)
        native = await asyncio.to_thread(native_answer, entry, question)
        for name, right in native.items():
            got = result.outputs[name]
            if not np.allclose(got, right, rtol=1e-3, atol=_NATIVE_ATOL):
                off = float(np.abs(got - right).max())
                raise InternalError(
                    f"{question.model}: {name} on {result.backend} differs by {off:g} from native "
                    "onnxruntime, before any fault was injected"
                )

    def right(self, number: int, result: Result) -> bool:
        """Whether an operation's answer is the one without faults."""
        expected = self._expected[number % len(self._questions)]
        exact = result.backend is expected.backend is Backend.WASM or expected.backend is None
        if result.outputs.keys() != expected.outputs.keys():
            return False
        return all(
            _same(right, result.outputs[name], exact) for name, right in expected.outputs.items()
        )


def native_answer(entry: ModelEntry, question: Question) -> Mapping[str, Array]:
    """The answer of native onnxruntime, for a model that is not cut. Blocks."""
    operation = OperationRegistry().get(question.op)
    assert isinstance(operation, GraphOperation), f"{question.op} is more than one graph"
    tensors = operation.prepare(entry, question.inputs, encoder_for(entry))
    session = NativeSession(entry.spec.files[0].path)
    session.open()
    try:
        return operation.finish(entry, tensors, session.run(tensors))
    finally:
        session.close()


def _same(right: Any, got: Any, exact: bool) -> bool:
    if not (isinstance(right, np.ndarray) and isinstance(got, np.ndarray)):
        return bool(right == got)  # text
    if right.dtype != got.dtype or right.shape != got.shape:
        return False
    if exact or right.dtype.kind not in "fc":
        return right.tobytes() == got.tobytes()
    return bool(np.allclose(got, right, rtol=1e-3, atol=_NATIVE_ATOL))
