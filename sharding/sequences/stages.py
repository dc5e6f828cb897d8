"""A model as a pipeline of stages: the inputs and outputs of each in one step of a sequence.

A stage is one shard (or an uncut decoder, the only one of its pipeline). Plain data and pure
functions; the rules by which a host executes a step are in `sharding.sequences.caches`. This module
must not run a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recovery.errors import BadInput, NotAModel
from recovery.kinds import ModelType
from sharding.cutting.layers import LayerMap, find_boundaries
from sharding.cutting.manifest import Cache, Manifest, Shard
from sharding.models.frames import Array
from sharding.models.signature import CacheSpec, ModelSpec, TensorSpec, read_signature
from sharding.sequences.caches import LOGITS

STAGE_MARK = "@"  # between a model's name and the number of a stage

_IDS, _MASK, _POSITIONS, _TYPES = "input_ids", "attention_mask", "position_ids", "token_type_ids"
_MADE = frozenset({_IDS, _MASK, _POSITIONS, _TYPES})
_EXAMPLE_TOKENS = 4


def stage_name(model: str, index: int) -> str:
    """The name under which a stage of a cut model is loaded."""
    return f"{model}{STAGE_MARK}{index}"


@dataclass(frozen=True)
class Stage:
    """One stage. `model` is the name under which it is loaded; the rest as in `manifest.Shard`."""

    model: str
    receives: tuple[TensorSpec, ...]
    sends: tuple[TensorSpec, ...]
    shared: tuple[TensorSpec, ...]
    caches: tuple[CacheSpec, ...]

    @property
    def last(self) -> bool:
        return not self.sends

    @property
    def copyable(self) -> bool:
        """Whether its caches can be copied step by step: a ring's can't, it overwrites itself."""
        return all(cache.axis >= 0 for cache in self.caches)


@dataclass(frozen=True)
class StagePipeline:
    """All stages of a model, first to last, and the inputs and outputs of the uncut one."""

    model: str
    stages: tuple[Stage, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def decoder(self) -> bool:
        """Whether it keeps caches, and so runs step by step."""
        return any(stage.caches for stage in self.stages)

    def check_generates(self) -> None:
        """Raises `NotAModel` if it can't generate text: no decoder, or unknown inputs."""
        if not self.decoder:
            raise _no_decoder(self.model, "caches", "none")
        names = [spec.name for spec in self.inputs]
        if unknown := [name for name in names if name not in _MADE]:
            raise _no_decoder(self.model, f"inputs among {', '.join(sorted(_MADE))}", unknown)
        if _IDS not in names:
            raise _no_decoder(self.model, _IDS, names)
        if LOGITS not in [spec.name for spec in self.outputs]:
            raise _no_decoder(
                self.model, f"an output {LOGITS!r}", [spec.name for spec in self.outputs]
            )

    def inputs_of_step(self, ids: Sequence[int], position: int) -> dict[str, Array]:
        """The uncut model's inputs for `ids`, which follow `position` others: a batch of one."""
        return inputs_of_step(self.inputs, ids, position)


def inputs_of_step(
    inputs: Sequence[TensorSpec], ids: Sequence[int], position: int
) -> dict[str, Array]:
    """Token ids, and the mask, positions and type ids (0) that follow from `position`."""
    count = len(ids)
    made = {
        _IDS: np.asarray(ids).reshape(1, count),
        _MASK: np.ones((1, position + count)),
        _POSITIONS: np.arange(position, position + count).reshape(1, count),
        _TYPES: np.zeros((1, count)),
    }
    return {
        spec.name: np.ascontiguousarray(made[spec.name].astype(np.dtype(spec.dtype)))
        for spec in inputs
    }


def inputs_of_stage(
    stage: Stage, inputs: Mapping[str, Array], handed: Mapping[str, Array]
) -> dict[str, Array]:
    """A stage's inputs, without caches: from `inputs`, and `handed` on by the stage before."""
    shared = {spec.name: inputs[spec.name] for spec in stage.shared}
    return shared | {spec.name: handed[spec.name] for spec in stage.receives}


def pipeline_of_manifest(model: str, manifest: Manifest) -> StagePipeline:
    """The stages of a cut model that is loaded as `model`."""
    stages = tuple(
        _stage(stage_name(model, index), shard) for index, shard in enumerate(manifest.shards)
    )
    return StagePipeline(model, stages, manifest.inputs, manifest.outputs)


def pipeline_of_map(model: str, layers: LayerMap) -> StagePipeline:
    """An uncut model as its own only stage."""
    caches = tuple(_cache(cache) for layer in layers.layers for cache in layer.caches)
    stage = Stage(model, (), (), layers.inputs, caches)
    return StagePipeline(model, (stage,), layers.inputs, layers.outputs)


def _no_decoder(model: str, expected: str, got: Any) -> NotAModel:
    return NotAModel(
        f"{model} can't generate: expected {expected}, got {got}. Export it as a decoder with a "
        "cache (onnxruntime-genai's builder, or Optimum's text-generation-with-past).",
        expected=expected,
        got=got,
    )


def _stage(name: str, shard: Shard) -> Stage:
    caches = tuple(_cache(cache) for cache in shard.caches)
    return Stage(name, shard.receives, shard.sends, shard.shared, caches)


def _cache(cache: Cache) -> CacheSpec:
    shape = cache.past.shape
    if shape is None:
        raise _no_decoder(cache.past.name, "a cache of known rank", "none")
    # The first dimension is the batch; the other one that is not fixed grows.
    growing = [axis for axis, dim in enumerate(shape) if axis and not isinstance(dim, int)]
    if len(growing) != 1:
        raise _no_decoder(cache.past.name, "a cache that grows along one dimension", shape)
    begin = tuple(
        1 if axis == 0 else dim if isinstance(dim, int) else cache.window
        for axis, dim in enumerate(shape)
    )
    axis = -1 if cache.window else growing[0]
    return CacheSpec(cache.past.name, cache.present.name, cache.past.dtype, begin, axis)


def stage_specs(model: str, folder: Path, manifest: Manifest) -> tuple[ModelSpec, ...]:
    """The spec of each shard in `folder`, by which it is loaded. Reads the files once."""
    pipeline = pipeline_of_manifest(model, manifest)
    return tuple(
        replace(
            read_signature(folder / shard.graph_file, name=stage.model, type=ModelType.TEXT),
            span=shard.span,
            caches=stage.caches,
        )
        for stage, shard in zip(pipeline.stages, manifest.shards, strict=True)
    )


def decoder_pipeline(model: str, path: str | Path) -> StagePipeline | None:
    """The ONNX file at `path` as a pipeline of one stage; None if it can't generate text."""
    try:
        pipeline = pipeline_of_map(model, find_boundaries(path))
        pipeline.check_generates()
    except NotAModel:
        return None
    return pipeline


def example(stage: Stage) -> dict[str, Array]:
    """Example inputs of a stage: a few tokens after an empty cache, not all zeros."""
    chance = np.random.default_rng(_EXAMPLE_TOKENS)
    tensors = inputs_of_step(stage.shared, range(1, _EXAMPLE_TOKENS + 1), 0)
    for spec in stage.receives:
        shape = [
            dim if isinstance(dim, int) else 1 if axis == 0 else _EXAMPLE_TOKENS
            for axis, dim in enumerate(spec.shape or ())
        ]
        tensors[spec.name] = chance.standard_normal(shape).astype(spec.dtype)
    return {**tensors, **{cache.past: np.zeros(cache.shape, cache.dtype) for cache in stage.caches}}


def check_length(prompt: int, new: int, limit: int | None) -> None:
    """Raises `BadInput` if prompt and new tokens are more than the model has positions for."""
    if prompt < 1:
        raise BadInput(
            "The prompt is empty: pass at least one token.",
            expected="at least one token",
            got=prompt,
        )
    if limit is not None and prompt + new > limit:
        fewer = f"max_new_tokens={limit - prompt} or less, or " if prompt < limit else ""
        raise BadInput(
            f"{prompt} tokens of prompt and {new} new ones are more than the model's {limit} "
            f"positions: pass {fewer}a shorter prompt.",
            expected=f"at most {limit} positions",
            got=prompt + new,
        )
