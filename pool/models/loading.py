"""Reads a path into what browsers load: a whole model, its shards, or its components, each with
a known answer.

Shards are written once, to the cache directory, and reused; a folder that `tabpool shard` wrote is
used as it is. Blocks; this module must not talk to a browser.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from actors.driver.profiles import cache_root
from pool.models.components import example_for, with_dictionary
from pool.models.registry import ModelEntry, read_components, read_model
from recovery.errors import BadInput, SetupError
from recovery.kinds import ModelType
from sharding.cutting.manager import COMPONENT_BASED, DEFAULT_STRATEGY, ModelShardingManager
from sharding.cutting.manifest import MANIFEST_NAME, Manifest, read_manifest
from sharding.models.frames import Array
from sharding.models.known_answers import KnownAnswer, record
from sharding.models.signature import ModelSpec
from sharding.sequences.stages import (
    Stage,
    decoder_pipeline,
    example,
    pipeline_of_manifest,
    stage_specs,
)


@dataclass(frozen=True)
class Part:
    """What one browser loads: a model, a shard or a component. `tried`: valid inputs."""

    spec: ModelSpec
    tried: Mapping[str, Array] | None = None

    def known_answer(self) -> KnownAnswer | None:
        """The native runtime's answer to `tried`, or to generated inputs. Blocks."""
        return record(self.spec, self.tried)


def read_parts(
    name: str,
    path: str | Path,
    type: str | ModelType | None = None,  # noqa: A002
    shards: int | None = None,
    strategy: str | None = None,
) -> tuple[ModelEntry, tuple[Part, ...]]:
    """The model at `path` and its parts: one, `shards`, or (`component_based`) its components.

    A folder with a manifest is a model that is already cut; `shards` must then equal its number of
    shards, or be None. A `strategy` without effect is refused. Raises `BadInput` and
    `NotAModel` as `read_model` and the cutting do.
    """
    if strategy == COMPONENT_BASED:
        return _components(name, path, type, shards)
    if (Path(path) / MANIFEST_NAME).is_file():
        if strategy is not None:
            raise BadInput(
                f"strategy: {path} holds a model that is already cut; omit strategy=, or cut "
                "the model again with `tabpool shard`.",
                expected="no strategy",
                got=strategy,
            )
        return _cut_before(name, Path(path), type, shards)
    if shards is None and strategy is not None:
        raise BadInput(
            f"strategy: {strategy!r} needs the number of shards: pass shards=, or omit strategy=. "
            f"Only {COMPONENT_BASED!r} takes no number.",
            expected="shards, or no strategy",
            got=strategy,
        )
    entry = read_model(name, path, type)
    if shards is None:
        return _whole(entry)
    strategy = strategy or DEFAULT_STRATEGY
    source = Path(entry.spec.files[0].path)
    key = hashlib.sha256(f"{entry.spec.digest} {shards} {strategy}".encode()).hexdigest()[:24]
    folder = cache_root() / "shards" / key
    manifest = cut_once(source, folder, shards=shards, strategy=strategy)
    return _parts(entry, folder, manifest)


def _whole(entry: ModelEntry) -> tuple[ModelEntry, tuple[Part, ...]]:
    pipeline = None
    if entry.spec.type in (ModelType.TEXT, ModelType.UNKNOWN):
        pipeline = decoder_pipeline(entry.name, entry.spec.files[0].path)
    if pipeline is None:
        return entry, (Part(entry.spec),)
    (stage,) = pipeline.stages
    spec = replace(entry.spec, caches=stage.caches)
    return replace(entry, spec=spec, pipeline=pipeline), (Part(spec, example(stage)),)


def _parts(
    entry: ModelEntry, folder: Path, manifest: Manifest
) -> tuple[ModelEntry, tuple[Part, ...]]:
    pipeline = pipeline_of_manifest(entry.name, manifest)
    specs = stage_specs(entry.name, folder, manifest)
    whole = "\n".join([manifest.source, *(f"{s.span} {s.digest}" for s in specs)])
    spec = replace(
        entry.spec,
        digest=hashlib.sha256(whole.encode()).hexdigest(),
        load_peak_bytes=max(spec.load_peak_bytes for spec in specs),
    )
    parts = tuple(
        Part(spec, _example(stage)) for spec, stage in zip(specs, pipeline.stages, strict=True)
    )
    return replace(entry, spec=spec, pipeline=pipeline), parts


def _example(stage: Stage) -> Mapping[str, Array] | None:
    try:
        return example(stage)
    except KeyError:
        return None  # an encoder of something other than tokens


def _components(
    name: str, path: str | Path, type_: str | ModelType | None, shards: int | None
) -> tuple[ModelEntry, tuple[Part, ...]]:
    if shards is not None:
        raise BadInput(
            f"shards: {COMPONENT_BASED} loads the models of a folder uncut; omit shards=.",
            expected="no shards",
            got=shards,
        )
    entry = with_dictionary(read_components(name, path, type_))
    return entry, tuple(Part(spec, example_for(entry, spec)) for spec in entry.components)


def _cut_before(
    name: str, folder: Path, type_: str | ModelType | None, shards: int | None
) -> tuple[ModelEntry, tuple[Part, ...]]:
    manifest = read_manifest(folder)
    if shards is not None and shards != len(manifest.shards):
        raise BadInput(
            f"{folder} holds {len(manifest.shards)} shards, not {shards}: omit shards=, or "
            "cut the model again with `tabpool shard`.",
            expected=len(manifest.shards),
            got=shards,
        )
    first = read_model(name, folder / manifest.shards[0].graph_file, type_)
    outputs = tuple(spec for shard in manifest.shards for spec in shard.outputs)
    spec = replace(first.spec, inputs=manifest.inputs, outputs=outputs)
    if type_ is None and spec.type is ModelType.UNKNOWN:
        spec = replace(spec, type=ModelType.TEXT)
    return _parts(replace(first, spec=spec), folder, manifest)


def cut_once(source: Path, folder: Path, *, shards: int, strategy: str) -> Manifest:
    """The shards of the model at `source` in `folder`, written if they do not exist.

    `folder` is for this cut only: existing shards are used as they are. If several pools cut the
    same model at the same time, one writes the shards and the others wait.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder.parent / f".{folder.name}.lock", os.O_WRONLY | os.O_CREAT)
    except OSError as error:
        raise SetupError(
            f"the shards of {source} can't be written to {folder.parent} ({error}): set "
            "TABPOOL_CACHE to a folder that can, or cut the model with `tabpool shard`."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        manager = ModelShardingManager(source, folder)
        return manager.find() or manager.shard(shards, strategy=strategy)
    finally:
        os.close(lock)
