"""Failure bundles: all data about a failed operation in one file, for a bug report.

A bundle is a zip archive: `bundle.json` (operation, result, model, pool, versions, the plan of a
chaos run), `events.jsonl` (the end of the control log), `telemetry.json`, and for each browser its
console, the headers of its last frames and, if its page lives, a screenshot. Of inputs
it has names, dtypes, shapes and hashes only, unless data is included (`inputs.npz`). Secrets are
taken out (`pool.redaction`). Whoever reads one knows nothing of who wrote it: it is read within
bounds, and `pool.replaying` says what of it may be used. This module must not run anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import tempfile
import time
import zipfile
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from actors.messages import PageDiagnostics
from pool.config import PoolConfig
from pool.doctor import machine
from pool.models.registry import ModelEntry
from pool.redaction import Redaction, as_plain
from pool.results import Result
from recovery.bounded_archives import (
    ArchiveBounds,
    arrays_in,
    open_archive,
    pack_arrays,
    read_arrays,
)
from recovery.bounded_files import JsonBounds, json_object_from
from recovery.errors import BadInput, PoolError
from recovery.log import log
from recovery.records import HostStatus
from sharding.cutting.manager import COMPONENT_BASED
from sharding.cutting.manifest import MANIFEST_NAME, read_manifest
from sharding.models.signature import ModelFile, digest_of

FORMAT = 1
EVENTS_MAX = 500  # of the log's end
BROWSERS_MAX = 32
BUNDLE_BYTES_MAX = 512 << 20  # of a bundle, and of all that is in it, unpacked
_FACTS, _INPUTS = "bundle.json", "inputs.npz"
# A schedule of `recovery.faults.SCHEDULE_FAULTS_MAX` faults takes about half of these.
_FACTS_BOUNDS = JsonBounds(_FACTS, 32 << 20, items_max=1_000_000)
_BOUNDS = ArchiveBounds("a failure bundle", BUNDLE_BYTES_MAX, members_max=256)
_INPUTS_BOUNDS = ArchiveBounds("arrays", BUNDLE_BYTES_MAX, members_max=1024)
_HEADER_BYTES = 10_000  # of an array, at most
_COLLECT_SECONDS = 20.0

# The options of a pool that a bundle has and that a replay takes from one, with their types. All
# are harmless: none names a file, a folder or an address, or keeps something running.
REPLAYED_OPTIONS: Mapping[str, tuple[type, ...]] = {
    "level": (str,),
    "strategy": (str,),
    "strict": (bool,),
    "max_recovery_attempts": (int,),
    "headless": (bool,),
    "backend": (str,),
    "threads": (int,),
    "deadline": (int, float),
    "queue_max": (int,),
    "when_full": (str,),
    "waiting_max": (int,),
    "message_bytes_max": (int,),
    "launch_seconds": (int, float),
    "load_seconds": (int, float),
    "hang_seconds": (int, float),
    "hedge_quantile": (float,),
    "hedge_seconds": (int, float),
    "simulation": (bool,),
    "probe_seconds": (int, float),
    "reconnect_seconds": (int, float),
    "checkpoint_interval": (int, float),
    "lease": (int, float),
}


@dataclass(frozen=True)
class Bundle:
    """The content of a bundle. `inputs` is None if data is not included, or was not unpacked.

    `listed` are the names of all files in it but `bundle.json`.
    """

    facts: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    listed: tuple[str, ...] = ()


class DiagnosedPool(Protocol):
    """The part of `BrowserPool` that is used here."""

    @property
    def log_folder(self) -> Path | None: ...
    async def export_telemetry(self) -> dict[str, Any]: ...
    def hosts(self) -> tuple[HostStatus, ...]: ...
    async def diagnose(self, browser_id: str, *, screenshot: bool = True) -> PageDiagnostics: ...


async def collect(
    pool: DiagnosedPool,
    result: Result,
    inputs: Mapping[str, Any],
    *,
    entry: ModelEntry,
    config: PoolConfig,
    why: str = "failed",
    with_data: bool = False,
    chaos: Mapping[str, Any] | None = None,
) -> Bundle:
    """Collect the data about `result`. Omits what is unavailable; does not raise."""
    redaction = Redaction()
    facts = {
        "format": FORMAT,
        "made_at": time.time(),
        "why": why,
        "operation": {
            "op_id": result.op_id,
            "model": result.model,
            "op": result.op,
            "inputs": {name: described(value) for name, value in inputs.items()},
        },
        "result": redaction.plain(result_as_plain(result)),
        "model": model_as_plain(entry),
        "pool": pool_as_plain(config),
        "versions": {name: v for name, v in machine().items() if name != "executable"},
        "chaos": dict(chaos) if chaos else None,
        "with_data": with_data,
    }
    files: dict[str, bytes] = {}
    with contextlib.suppress(PoolError, TimeoutError, OSError):
        async with asyncio.timeout(_COLLECT_SECONDS):
            await _look(pool, files, redaction)
    return Bundle(facts, dict(inputs) if with_data else None, files)


async def _look(pool: DiagnosedPool, files: dict[str, bytes], redaction: Redaction) -> None:
    if pool.log_folder is not None:
        events = await asyncio.to_thread(_last_events, pool.log_folder, redaction)
        files["events.jsonl"] = events
    files["telemetry.json"] = _json(redaction.plain(await pool.export_telemetry()))
    for host in pool.hosts()[:BROWSERS_MAX]:
        name = host.ref.browser_id
        with contextlib.suppress(PoolError):
            found = await pool.diagnose(name)
            picture = found.screenshot
            plain = dataclasses.asdict(dataclasses.replace(found, screenshot=b""))
            files[f"browsers/{name}.json"] = _json(redaction.plain(plain))
            if picture:
                files[f"browsers/{name}.png"] = picture


def _last_events(folder: Path, redaction: Redaction) -> bytes:
    last = deque(log.show(folder), maxlen=EVENTS_MAX)
    return b"".join(json.dumps(redaction.plain(event)).encode() + b"\n" for event in last)


def described(value: Any) -> dict[str, Any]:
    """A description of an input without its data."""
    if isinstance(value, str):
        digest = hashlib.sha256(value.encode("utf-8", "replace")).hexdigest()
        return {"kind": "text", "characters": len(value), "sha256": digest}
    if isinstance(value, bool | int | float) or value is None:
        return {"kind": "option", "value": value}
    array = np.asarray(value)
    return {
        "kind": "array",
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "sha256": hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest(),
    }


def result_as_plain(result: Result) -> dict[str, Any]:
    """A result without its values."""
    return {
        "success": result.success,
        "error": result.error,
        "browser": result.browser_id,
        "browser_type": str(result.browser_type or ""),
        "backend": str(result.backend or ""),
        "level_effective": str(result.level_effective),
        "simulated": result.simulated,
        "original_error": str(result.original_error or ""),
        "metrics": dict(result.metrics),
        "stages": list(result.stages),
        "recovery": [
            {
                "what": step.what,
                "where": step.where,
                "at": step.at,
                "seconds": step.seconds,
                "outcome": step.outcome,
                "failure": str(step.failure or ""),
            }
            for step in result.recovery
        ],
    }


def model_as_plain(entry: ModelEntry) -> dict[str, Any]:
    """The model, and how to load it again.

    `path` is where it was; `files` are what lay there, by names relative to it (a folder) or to
    its own folder (a file), so that it can be known again before it is loaded.
    """
    file = Path(entry.spec.files[0].path)
    cut_before = (file.parent / MANIFEST_NAME).is_file()
    files = [*entry.spec.files, *([entry.dictionary] if entry.dictionary else [])]
    folder = Path(os.path.commonpath([Path(each.path).parent for each in files]))
    if cut_before:
        folder, files = file.parent, _files_of_shards(file.parent)
    whole_folder = bool(entry.components) or cut_before
    cut_here = entry.in_parts and not whole_folder
    return {
        "name": entry.name,
        "path": str(folder if whole_folder else file),
        "digest": entry.spec.digest,
        "type": str(entry.spec.type),
        "shards": len(entry.parts) if cut_here else None,
        "strategy": COMPONENT_BASED if entry.components else None,
        "files": [
            {
                "name": Path(os.path.relpath(each.path, folder)).as_posix(),
                "bytes": each.bytes,
                "digest": each.digest,
            }
            for each in files
        ],
    }


def _files_of_shards(folder: Path) -> list[ModelFile]:
    """The files of a model that was cut; none if they are gone."""
    try:
        manifest = read_manifest(folder, verify=False)
        bytes_, digest = digest_of(folder / MANIFEST_NAME)
    except (PoolError, OSError):
        return []
    found = [ModelFile(str(folder / MANIFEST_NAME), MANIFEST_NAME, bytes_, digest)]
    for shard in manifest.shards:
        for file in shard.files:
            found.append(ModelFile(str(folder / file.name), file.name, file.bytes, file.digest))
    return found


def pool_as_plain(config: PoolConfig) -> dict[str, Any]:
    """The options to create a pool that behaves the same, but none of this machine or account."""
    plain = {name: getattr(config, name) for name in REPLAYED_OPTIONS}
    return {**plain, "browsers": {str(kind): n for kind, n in config.kinds().items()}}


def write_bundle(bundle: Bundle, path: Path) -> Path:
    """Write a bundle that only its owner may read; what is beyond the bounds is left out.

    Raises `OSError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    members = {_FACTS: _json(bundle.facts), **bundle.files}
    if bundle.inputs is not None:
        arrays = {name: np.asarray(value) for name, value in bundle.inputs.items()}
        size = sum(array.nbytes + _HEADER_BYTES for array in arrays.values())
        if size <= BUNDLE_BYTES_MAX and len(arrays) <= _INPUTS_BOUNDS.members_max:
            with contextlib.suppress(BadInput):  # there is an input that is no plain array
                members[_INPUTS] = pack_arrays(arrays)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
            room = BUNDLE_BYTES_MAX
            for name, content in members.items():
                if len(content) <= room:
                    z.writestr(name, content)
                    room -= len(content)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return path


def read_bundle(path: str | Path, *, contents: bool = True) -> Bundle:
    """The bundle at `path`, whoever wrote it; without `contents` only its facts are unpacked.

    Raises `BadInput` for what is no bundle, and for one beyond the bounds of size, number or depth.
    The facts are not checked further: `pool.replaying` does.
    """
    files: dict[str, bytes] = {}
    inputs = None
    try:
        with open_archive(path, _BOUNDS) as archive:
            listed = tuple(sorted(archive.sizes.keys() - {_FACTS}))
            packed = archive.read(_FACTS, _FACTS_BOUNDS.bytes_max)
            facts = json_object_from(packed, _FACTS_BOUNDS, _FACTS)
            for name in listed if contents else ():
                content = archive.read(name)
                if name == _INPUTS:
                    inputs = _unpacked(content)
                else:
                    files[name] = bytes(content)
    except BadInput as error:
        message = f"{path} is no failure bundle: {error}"
        raise BadInput(message, **{**error.fields, "path": str(path)}) from error
    if facts.get("format") != FORMAT:
        raise BadInput(
            f"{path} is a bundle of another version of tabpool: expected format {FORMAT}.",
            expected=FORMAT,
            got=facts.get("format"),
        )
    for part in ("operation", "result", "model", "pool"):
        if not isinstance(facts.get(part), dict):
            raise BadInput(f"{path} is no failure bundle: its {part} is no JSON object")
    return Bundle(facts, inputs, files, listed)


def _unpacked(packed: bytearray) -> dict[str, Any]:
    arrays = arrays_in(io.BytesIO(packed), _INPUTS, _INPUTS_BOUNDS)
    return {name: _value(array) for name, array in arrays.items()}


def read_inputs(path: str | Path) -> dict[str, Any]:
    """Inputs from an .npz file, which may have come with a bundle. Raises `BadInput`."""
    found = read_arrays(path, _INPUTS_BOUNDS)
    return {name: _value(array) for name, array in found.items()}


def _value(array: np.ndarray[Any, Any]) -> Any:
    """An input as the caller gave it: texts and options were made arrays to be kept."""
    if array.dtype.kind == "U":
        return array.tolist()  # a text, or a list of them
    return array.item() if array.ndim == 0 and array.dtype.kind == "b" else array


def _json(value: Any) -> bytes:
    return json.dumps(as_plain(value), indent=1, allow_nan=False).encode()
