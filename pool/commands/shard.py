"""`tabpool shard`: cut a model into shards for several browsers, and show each shard.

The command line of `sharding.cutting.manager`: it reads options, shows progress and
prints. This module must not decide where to cut, and starts no browser.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from pool.commands.printing import shown
from pool.models.registry import read_model
from recovery.errors import BadInput
from sharding.cutting.analyzer import Measurement
from sharding.cutting.manager import COMPONENT_BASED, STRATEGIES, ModelShardingManager
from sharding.cutting.manifest import Manifest, Shard
from sharding.cutting.spans import Partition
from sharding.cutting.strategies import STRATEGY_RULES
from sharding.models.load_memory import peak_bytes
from sharding.models.signature import ModelSpec, TensorSpec

EPILOG = (
    "Example: `tabpool shard llama/model.onnx --capacity 2GiB --out llama-shards` cuts the model "
    "into the fewest shards that browsers of 2 GiB can load. The table shows for each shard its "
    "layers, its size, its peak memory while loading, the tensors it receives (from the previous "
    "shard, by shape; from the caller, by name) and those it sends."
)

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}iB": 1 << 10 * (at + 1) for at, letter in enumerate("KMGT")}
_UNITS |= {f"{letter}B": 1000 ** (at + 1) for at, letter in enumerate("KMGT")}
_SIZES = {unit.lower(): size for unit, size in _UNITS.items()}
_POLL_SECONDS = 0.2  # between two checks of how much is written
_CLOCK_SLACK_SECONDS = 0.1  # by which a file's time may be behind the clock


def shard(
    model: Annotated[
        Path, typer.Argument(help="An .onnx file, or a folder with one, as for `pool.load`.")
    ],
    shards: Annotated[
        int | None,
        typer.Option(help="Number of shards; by default the fewest that --capacity allows."),
    ] = None,
    capacity: Annotated[
        str,
        typer.Option(help="Memory of one browser for loading its shard, such as 512MiB or 2GiB."),
    ] = "",
    strategy: Annotated[
        str,
        typer.Option(
            help="layer_based: equal numbers of layers. optimal: minimises the time of the slowest "
            "shard. browser_based: the same, one shard for each of --shards browsers. "
            "component_based: MODEL is a folder of several models, none of which is cut."
        ),
    ] = "layer_based",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the shards; by default MODEL.shards beside the model."),
    ] = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Time each layer first, in native onnxruntime; the default for optimal and "
            "browser_based. Otherwise times are estimated from sizes.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Cut a model into shards for several browsers, and show each shard.

    Each shard is an ordinary ONNX file. Run in order, they compute the same as the whole model. A
    folder that already holds this cut is verified and kept.
    """
    if strategy not in STRATEGIES:
        raise BadInput(
            f"--strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}.",
            expected=list(STRATEGIES),
            got=strategy,
        )
    capacity_bytes = parse_size(capacity) if capacity else None
    console = Console(stderr=True)
    if strategy == COMPONENT_BASED:
        given = {"--shards": shards, "--capacity": capacity_bytes, "--out": out}
        for option, value in {**given, "--measure": measure or None}.items():
            if value is not None:
                raise BadInput(
                    f"{option} does not apply to --strategy component_based, which cuts nothing: "
                    "omit it.",
                    expected="no such option",
                    got=option,
                )
        specs = ModelShardingManager(model).component_specs()
        _print_components(specs, as_json)
        return
    rule = STRATEGY_RULES[strategy]
    if shards is None and (capacity_bytes is None or rule.in_order):
        also = "" if rule.in_order else ", or --capacity for the fewest that fit"
        raise BadInput(
            f"The number of shards is missing: give --shards{also}.",
            expected="--shards",
            got="none",
        )
    path = Path(read_model("model", model).spec.files[0].path)
    manager = ModelShardingManager(path, out)

    def planned(times: Measurement) -> Partition:
        return manager.plan(
            shards, strategy=strategy, capacity_bytes=capacity_bytes, measured=times
        )

    times = manager.analyzer.by_bytes()
    plan = planned(times)
    if rule.by_time if measure is None else measure:
        with _bar(console, "measuring layers") as show:
            times = manager.analyzer.measure(progress=show)
        plan = planned(times)
    spans = [(span.start, span.end) for span in plan.spans]
    with _bar(console, "looking for an earlier cut"):
        manifest = manager.find(spans)
    found = manifest is not None
    if manifest is None:
        expected = sum(span.bytes for span in plan.spans)
        with _written(console, "writing shards", manager.folder(), len(spans), expected):
            manifest = manager.cut(spans)
    if as_json:
        plain = {"folder": str(manager.folder()), "found": found, "strategy": strategy}
        typer.echo(json.dumps(plain | as_plain(manifest, plan, times.measured), indent=2))
    else:
        _print_shards(manifest, plan, times)
        typer.echo(shown(plan.reason))
        typer.echo(f"{'found' if found else 'written'}: {manager.folder()}")


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "1.5 GB" or "1000000". Raises `BadInput`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII)
    unit = _SIZES.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise BadInput(
            f"--capacity: expected a size such as 512MiB or 2GiB, got {text!r} (units: "
            f"{', '.join(filter(None, _UNITS))}).",
            expected="a size",
            got=text,
        )
    return int(float(match[1]) * unit)


def as_plain(manifest: Manifest, plan: Partition, measured: bool) -> dict[str, Any]:
    """The shards as plain data, for JSON. Times are in seconds, None where not measured."""
    return {
        "model": manifest.name,
        "source": manifest.source,
        "kind": manifest.kind,
        "layers": manifest.layers,
        "reason": plan.reason,
        "bottleneck_seconds": plan.bottleneck_seconds if measured else None,
        "total_seconds": plan.total_seconds if measured else None,
        "shards": [
            {
                "index": index,
                "layers": list(shard.span),
                "file": shard.graph_file,
                "bytes": shard.bytes,
                "load_peak_bytes": peak_bytes(shard.bytes),
                "seconds": span.seconds if measured else None,
                "receives": [asdict(spec) for spec in shard.receives],
                "inputs": [asdict(spec) for spec in shard.shared],
                "sends": [asdict(spec) for spec in shard.sends],
                "outputs": [asdict(spec) for spec in shard.outputs],
                "caches": len(shard.caches),
            }
            for index, (shard, span) in enumerate(zip(manifest.shards, plan.spans, strict=True))
        ],
    }


# -- progress --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A transient bar, on a terminal only; call what it yields with (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(bar, completed=min(done, total), total=total)


@contextlib.contextmanager
def _written(
    console: Console, what: str, folder: Path, shards: int, expected: int
) -> Iterator[None]:
    """A bar that follows the bytes written into `folder`: cutting has no progress callback."""
    begun = time.time() - _CLOCK_SLACK_SECONDS
    names = [f"shard-{at}.onnx{end}" for at in range(shards) for end in ("", ".data")]
    done = threading.Event()

    def written(name: str) -> int:
        try:
            stat = (folder / name).stat()
        except OSError:
            return 0  # not there yet
        return stat.st_size if stat.st_mtime >= begun else 0

    with _bar(console, what) as show:

        def poll() -> None:
            while not done.wait(_POLL_SECONDS):
                show(sum(written(name) for name in names), max(expected, 1))

        thread = threading.Thread(target=poll, name="shard progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


# -- tables ----------------------------------------------------------------------------------------


def _print_shards(manifest: Manifest, plan: Partition, times: Measurement) -> None:
    table = Table(title=f"{manifest.name}: {manifest.layers} layers", show_lines=True)
    columns = ["shard", "layers", "bytes", "peak when loading"]
    columns += ["time per step"] if times.measured else []
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("receives", overflow="fold")
    table.add_column("sends", overflow="fold")
    for index, (shard, span) in enumerate(zip(manifest.shards, plan.spans, strict=True)):
        cells = [str(index), _span(shard), _size(shard.bytes), _size(peak_bytes(shard.bytes))]
        cells += [f"{1000 * span.seconds:.3g} ms"] if times.measured else []
        cells += [_tensors(shard.receives, shard.shared), _tensors(shard.sends, shard.outputs)]
        table.add_row(*cells)
    Console(markup=False).print(table)


def _print_components(specs: Mapping[str, ModelSpec], as_json: bool) -> None:
    if as_json:
        plain = {
            name: {
                "path": spec.files[0].path,
                "digest": spec.digest,
                "bytes": spec.bytes,
                "load_peak_bytes": spec.load_peak_bytes,
                "inputs": [asdict(tensor) for tensor in spec.inputs],
                "outputs": [asdict(tensor) for tensor in spec.outputs],
            }
            for name, spec in specs.items()
        }
        typer.echo(json.dumps({"strategy": COMPONENT_BASED, "components": plain}, indent=2))
        return
    table = Table(title=f"{len(specs)} components, nothing to cut", show_lines=True)
    table.add_column("component", overflow="fold")
    table.add_column("bytes", justify="right")
    table.add_column("peak when loading", justify="right")
    table.add_column("receives", overflow="fold")
    table.add_column("sends", overflow="fold")
    for name, spec in specs.items():
        sizes = _size(spec.bytes), _size(spec.load_peak_bytes)
        named = (
            "\n".join(shown(f"{tensor.name}: {tensor}") for tensor in tensors)
            for tensors in (spec.inputs, spec.outputs)
        )
        table.add_row(shown(name), *sizes, *named)
    Console(markup=False).print(table)


def _span(shard: Shard) -> str:
    start, end = shard.span
    return str(start) if end - start == 1 else f"{start} to {end - 1}"


def _tensors(handed: Sequence[TensorSpec], own: Sequence[TensorSpec]) -> str:
    """Tensors passed between shards, by shape; those of the whole model, by name."""
    counts = Counter(str(spec) for spec in handed)
    lines = [shown(f"{count} x {shape}") for shape, count in counts.items()]
    if own:
        lines.append(shown(", ".join(spec.name for spec in own)))
    return "\n".join(lines)


def _size(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size} B"
