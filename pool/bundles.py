"""Failure bundles: all data about a failed operation in one file, for a bug report.

A bundle is a zip archive: `bundle.json` (operation, result, model, pool, versions, the plan of a
chaos run), `events.jsonl` (the end of the control log), `telemetry.json`, and for each browser its
console, the headers of its last frames and, if its page lives, a screenshot. Of inputs
it has names, dtypes, shapes and hashes only, unless data is included (`inputs.npz`). This module
must not run anything: `pool.commands.replay` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import json
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
from pool.results import Result
from recovery.errors import BadInput, PoolError
from recovery.log import log
from recovery.records import HostStatus
from sharding.cutting.manager import COMPONENT_BASED
from sharding.cutting.manifest import MANIFEST_NAME

FORMAT = 1
EVENTS_MAX = 500  # of the log's end
BROWSERS_MAX = 32
BUNDLE_BYTES_MAX = 512 << 20  # limit when reading
_COLLECT_SECONDS = 20.0


@dataclass(frozen=True)
class Bundle:
    """The content of a bundle. `inputs` is None if data is not included."""

    facts: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)


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
        "result": result_as_plain(result),
        "model": model_as_plain(entry),
        "pool": pool_as_plain(config),
        "versions": {name: v for name, v in machine().items() if name != "executable"},
        "chaos": dict(chaos) if chaos else None,
        "with_data": with_data,
    }
    files: dict[str, bytes] = {}
    with contextlib.suppress(PoolError, TimeoutError, OSError):
        async with asyncio.timeout(_COLLECT_SECONDS):
            await _look(pool, files)
    return Bundle(facts, dict(inputs) if with_data else None, files)


async def _look(pool: DiagnosedPool, files: dict[str, bytes]) -> None:
    if pool.log_folder is not None:
        files["events.jsonl"] = await asyncio.to_thread(_last_events, pool.log_folder)
    files["telemetry.json"] = _json(await pool.export_telemetry())
    for host in pool.hosts()[:BROWSERS_MAX]:
        name = host.ref.browser_id
        with contextlib.suppress(PoolError):
            found = await pool.diagnose(name)
            picture = found.screenshot
            plain = dataclasses.asdict(dataclasses.replace(found, screenshot=b""))
            files[f"browsers/{name}.json"] = _json(plain)
            if picture:
                files[f"browsers/{name}.png"] = picture


def _last_events(folder: Path) -> bytes:
    last = deque(log.show(folder), maxlen=EVENTS_MAX)
    return b"".join(json.dumps(event, default=str).encode() + b"\n" for event in last)


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
    """The model, and how to load it again."""
    file = Path(entry.spec.files[0].path)
    whole_folder = bool(entry.components) or (file.parent / MANIFEST_NAME).is_file()
    cut_here = entry.in_parts and not whole_folder
    return {
        "name": entry.name,
        "path": str(file.parent if whole_folder else file),
        "digest": entry.spec.digest,
        "type": str(entry.spec.type),
        "shards": len(entry.parts) if cut_here else None,
        "strategy": COMPONENT_BASED if entry.components else None,
    }


def pool_as_plain(config: PoolConfig) -> dict[str, Any]:
    """The options to create a pool that behaves the same."""
    plain = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, str | int | float | bool) and name not in _OF_ONE_MACHINE
    }
    return {**plain, "browsers": {str(kind): n for kind, n in config.kinds().items()}}


_OF_ONE_MACHINE = frozenset({"name", "state_dir", "address", "persistent", "dashboard", "history"})


def write_bundle(bundle: Bundle, path: Path) -> Path:
    """Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bundle.json", _json(bundle.facts))
        for name, content in bundle.files.items():
            archive.writestr(name, content)
        if bundle.inputs is not None:
            packed = io.BytesIO()
            arrays: dict[str, Any] = {n: np.asarray(v) for n, v in bundle.inputs.items()}
            np.savez_compressed(packed, **arrays)
            archive.writestr("inputs.npz", packed.getvalue())
    aside.rename(path)
    return path


def read_bundle(path: str | Path) -> Bundle:
    """Raises `BadInput`."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > BUNDLE_BYTES_MAX:
                raise BadInput(
                    f"{path} would unpack to more than the limit of {BUNDLE_BYTES_MAX >> 20} MiB"
                )
            files = {info.filename: archive.read(info) for info in archive.infolist()}
        facts = json.loads(files.pop("bundle.json"))
        packed = files.pop("inputs.npz", None)
        inputs = None if packed is None else _unpacked(packed)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} is no failure bundle: {error}", got=str(path)) from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise BadInput(
            f"{path} is a bundle of another version of tabpool: expected format {FORMAT}.",
            expected=FORMAT,
            got=facts.get("format") if isinstance(facts, dict) else None,
        )
    for part in ("operation", "result", "model", "pool"):
        if not isinstance(facts.get(part), dict):
            raise BadInput(f"{path} is no failure bundle: its {part} is no JSON object")
    return Bundle(facts, inputs, files)


def _unpacked(packed: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        return {name: _value(arrays[name]) for name in arrays.files}


def _value(array: np.ndarray[Any, Any]) -> Any:
    plain_scalar = array.ndim == 0 and array.dtype.kind in "Ub"
    return array.item() if plain_scalar else array


def made_up(described_inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Inputs of the same names, dtypes and shapes as those of a bundle without data."""
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for name, about in described_inputs.items():
        match about["kind"]:
            case "text":
                found[name] = " ".join(["word"] * (1 + about["characters"] // 5))
            case "option":
                found[name] = about["value"]
            case _:
                dtype, shape = np.dtype(about["dtype"]), tuple(about["shape"])
                whole = dtype.kind in "iub"
                values = rng.integers(0, 2, shape) if whole else rng.standard_normal(shape)
                found[name] = values.astype(dtype)
    return found


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, default=str).encode()
