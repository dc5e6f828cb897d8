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
from typing import Any

from actors.driver.profiles import cache_root
from pool.models.components import example_for, with_dictionary
from pool.models.registry import ModelEntry, check_name, model_type, read_components, read_model
from recovery import checks
from recovery.errors import BadInput, NotAModel, SetupError
from recovery.kinds import ModelType
from sharding.cutting.manager import (
    COMPONENT_BASED,
    DEFAULT_STRATEGY,
    STRATEGIES,
    ModelShardingManager,
)
from sharding.cutting.manifest import MANIFEST_NAME, Manifest, read_manifest
from sharding.models.frames import Array
from sharding.models.known_answers import Recording
from sharding.models.signature import ModelSpec, check_carried
from sharding.sequences.stages import (
    Stage,
    decoder_pipeline,
    example,
    pipeline_of_manifest,
    stage_specs,
)

SHARDS_MAX = 10_000  # more than any model has layers; how many it has is known when it is read


@dataclass(frozen=True)
class LoadOptions:
    """What a caller asks to be loaded, and how, with numbers as Python has them."""

    name: str
    path: str
    type: ModelType | None
    example: Mapping[str, Any] | None
    shards: int | None
    strategy: str | None


def load_options(
    name: Any, path: Any, type_: Any, example: Any, shards: Any, strategy: Any
) -> LoadOptions:
    """The options of a load. Raises `BadInput`; reads nothing."""
    check_name(name)
    return LoadOptions(
        str(name),
        checks.path("path", path),
        None if type_ is None else model_type(type_),
        checks.optional(checks.mapping, "example", example, "a mapping of input names to arrays"),
        checks.optional(checks.whole, "shards", shards, 1, SHARDS_MAX),
        checks.optional(checks.word, "strategy", strategy, STRATEGIES),
    )


@dataclass(frozen=True)
class Part:
    """What one browser loads: a model, a shard or a component. `tried`: valid inputs."""

    spec: ModelSpec
    tried: Mapping[str, Array] | None = None

    def recording(self) -> Recording:
        """Of the native runtime's answer to `tried`, or to generated inputs."""
        return Recording(self.spec, self.tried)


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
    `NotAModel` as `read_model` and the cutting do, and for a part that no browser could be asked.
    """
    try:
        entry, parts = _read_parts(name, path, type, shards, strategy)
    except OSError as error:  # a folder that can't be listed, a name that is too long
        raise NotAModel(
            f"{path}: expected a model that can be read, got: {error.strerror or error}.",
            path=str(path),
            expected="a model that can be read",
            got=str(error),
        ) from error
    for part in parts:
        check_carried(part.spec)
    return entry, parts


def _read_parts(
    name: str,
    path: str | Path,
    type: str | ModelType | None,  # noqa: A002
    shards: int | None,
    strategy: str | None,
) -> tuple[ModelEntry, tuple[Part, ...]]:
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
    spec = replace(first.spec, inputs=manifest.inputs, outputs=manifest.outputs)
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
