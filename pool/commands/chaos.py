"""`tabpool chaos`: inject faults into browsers under load, and report the outcome.

It reads options, opens a pool, runs `runner` (or `matrix`) and has `report` write. This module
must not inject a fault itself.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from actors.ray.cluster import LocalCluster
from pool.chaos import matrix as matrices
from pool.chaos.breakable import chaos_pool
from pool.chaos.bundle import BundleWriter
from pool.chaos.plan import Plan
from pool.chaos.records import ChaosRun
from pool.chaos.replayed import run_of
from pool.chaos.report import verdict, write_report
from pool.chaos.runner import ChaosRunner
from pool.chaos.view import shown
from pool.chaos.workload import Workload, source_of
from pool.commands.generate import parse_browsers
from pool.config import PoolConfig
from recovery.errors import BadInput
from recovery.faults import (
    FAULTS,
    FaultKind,
    Intensity,
    Schedule,
    draw_schedule,
    read_schedule,
)
from recovery.kinds import BrowserType

EPILOG = (
    "Example: `tabpool chaos --ops 100 --seed 7 --report out` sends 100 operations to four "
    "browsers, injects a fault every 10 operations, compares every answer with the one computed "
    "without faults, and writes out/report.md with charts. `--plan out/plan.json` repeats the same "
    "faults. `--faults tab_crash,full_disk` selects faults, `--faults all,-wrong_answer` excludes "
    "some. `tabpool chaos --list` lists what each fault does and which level survives it. "
    "`tabpool chaos --matrix --quick` tests each kind of failure on each browser and model. "
    "Exit code 0 if all checks pass, 1 if not."
)
_BROWSERS = "chrome=2,firefox=1,safari=1"
_DEFAULT = PoolConfig()


def chaos(
    ops: Annotated[int, typer.Option(help="Number of operations to run.")] = 100,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed for drawing the faults; by default random, and printed."),
    ] = None,
    level: Annotated[
        str, typer.Option(help="Recovery level of the pool: none, low, medium, high or critical.")
    ] = "high",
    strategy: Annotated[
        str, typer.Option(help="Order of recovery actions, as for BrowserPool(strategy=).")
    ] = _DEFAULT.strategy,
    faults: Annotated[
        str,
        typer.Option(
            help="Faults to inject, separated by commas; `all` for all, `-NAME` to exclude one."
        ),
    ] = "all,-wrong_answer",
    intensity: Annotated[
        str, typer.Option(help="Intensities to draw from: any of mild, moderate, severe.")
    ] = "mild,moderate,severe",
    every: Annotated[float, typer.Option(help="Inject a fault every this many operations.")] = 10,
    browsers: Annotated[
        str,
        typer.Option(help="Browsers and how many of each: chrome=2,firefox=1,safari=1."),
    ] = _BROWSERS,
    model: Annotated[
        str,
        typer.Option(
            help="Models to run, separated by commas: text, audio, vision, multimodal, llama "
            "(these come with tabpool or its npm packages), or paths of models."
        ),
    ] = "text",
    backend: Annotated[str, typer.Option(help="Back end: auto, wasm, webgpu or webnn.")] = "wasm",
    at_once: Annotated[int, typer.Option(help="Concurrent operations.")] = 4,
    nodes: Annotated[
        int, typer.Option(help="Ray nodes to start on this machine; node_death needs 2.")
    ] = 1,
    ungated: Annotated[
        bool, typer.Option("--ungated", help="Also break browsers whose circuit breaker is open.")
    ] = False,
    overlap: Annotated[
        bool,
        typer.Option("--overlap", help="Inject faults without waiting for earlier repairs."),
    ] = False,
    deadline: Annotated[float, typer.Option(help="Deadline of an operation, in seconds.")] = 120.0,
    plan: Annotated[
        Path | None, typer.Option(help="A plan.json of an earlier run: inject the same faults.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Folder for report.md, run.json, plan.json and charts."),
    ] = None,
    with_data: Annotated[
        bool, typer.Option("--with-data", help="Include inputs and outputs in failure bundles.")
    ] = False,
    list_faults: Annotated[
        bool, typer.Option("--list", help="List the faults and what each does, then exit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    matrix: Annotated[
        bool,
        typer.Option(
            "--matrix", help="Test each failure on each browser, model type and platform instead."
        ),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Matrix: chrome with text and audio only.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Matrix: every browser, model type, failure, intensity.")
    ] = False,
    models: Annotated[
        str, typer.Option(help="Matrix: any of text, audio, vision, multimodal; by default all.")
    ] = "",
    platforms: Annotated[
        str, typer.Option(help="Matrix: any of wasm, webgpu, webnn; by default wasm.")
    ] = "wasm",
    no_failures: Annotated[
        bool, typer.Option("--no-failures", help="Matrix: run the operations without faults.")
    ] = False,
    test_timeout: Annotated[
        float,
        typer.Option(help="Matrix: deadline of an operation in seconds; a cell gets twice that."),
    ] = 90.0,
    retry_count: Annotated[int, typer.Option(help="Matrix: retries of a failed cell.")] = 0,
    workers: Annotated[int, typer.Option(help="Matrix: concurrent operations.")] = 2,
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate",
            help="Matrix: run native onnxruntime in place of a missing browser; such cells are "
            "labelled simulated and counted separately.",
        ),
    ] = False,
) -> None:
    """Inject faults into browsers under load, and report the outcome."""
    console = Console(stderr=as_json)
    if list_faults:
        _list(console)
        return
    kinds = parse_faults(faults)
    intensities = [_word(Intensity, word, "--intensity") for word in _split(intensity)]
    if ops < 1 or at_once < 1 or nodes < 1:
        raise BadInput("--ops, --at-once and --nodes: expected whole numbers of at least 1.")
    if matrix:
        matrix_plan = matrices.MatrixPlan(
            seed=secrets.randbelow(1 << 31) if seed is None else seed,
            browsers=_split(browsers) if browsers != _BROWSERS else (),
            models=_split(models),
            platforms=_split(platforms),
            kinds=() if no_failures else tuple(kinds),
            intensities=tuple(intensities),
            level=level,
            strategy=strategy,
            operations=ops if ops != 100 else 12,
            workers=workers,
            seconds=test_timeout,
            retries=retry_count,
            simulate=simulate,
            quick=quick,
            full=full,
        )
        raise typer.Exit(matrices.run(matrix_plan, console, report, as_json=as_json))
    counts = parse_browsers(browsers)
    if plan is not None:
        schedule = read_schedule(plan)
    else:
        drawn = secrets.randbelow(1 << 31) if seed is None else seed
        schedule = draw_schedule(
            drawn, _slots(counts), until=ops, every=every, kinds=kinds, intensities=intensities
        )
    settings = {
        "level": level,
        "strategy": strategy,
        "browsers": browsers,
        "model": model,
        "backend": backend,
        "operations": str(ops),
        "at_once": str(at_once),
        "nodes": str(nodes),
        "gated": str(not ungated),
        "settle": str(not overlap),
        "deadline": f"{deadline:g}",
        "simulation": "off",
    }
    bundles = BundleWriter(report, schedule, settings, with_data=with_data)
    run = run_chaos(console, schedule, settings, bundles)
    raise typer.Exit(_print_results(console, run, report, as_json))


def run_chaos(
    console: Console,
    schedule: Schedule,
    settings: Mapping[str, str],
    bundles: BundleWriter | None = None,
) -> ChaosRun:
    """Run as `settings` (those of a `ChaosRun`) say. Raises `BadInput` for invalid ones.

    Blocks until its pool is closed.
    """
    counts = parse_browsers(settings["browsers"])
    plan = Plan(
        schedule,
        int(settings["operations"]),
        int(settings["at_once"]),
        settings["gated"] == "True",
        settings["settle"] == "True",
        float(settings["deadline"]),
        settings=settings,
    )
    workload = Workload([source_of(word) for word in _split(settings["model"])])
    options = {name: settings[name] for name in ("level", "strategy", "backend")}
    console.print(f"seed {schedule.seed}, {len(schedule.faults)} faults", highlight=False)
    nodes = int(settings["nodes"])
    return asyncio.run(_chaos(console, counts, options, workload, plan, nodes, bundles))


def chaos_again(console: Console, chaos: Any, model: Path | None = None) -> int:
    """Repeat the chaos run of a failure bundle, up to the operation that failed.

    Returns the exit code. Raises `BadInput` as `pool.chaos.replayed.run_of`.
    """
    schedule, settings = run_of(chaos, model)
    options = {name: settings[name] for name in ("level", "strategy", "backend")}
    chaos_pool(parse_browsers(settings["browsers"]), **options)  # before any node is started
    run = run_chaos(console, schedule, settings)
    return _print_results(console, run, None, as_json=False)


async def _chaos(
    console: Console,
    counts: dict[str, int],
    options: dict[str, Any],
    workload: Workload,
    plan: Plan,
    nodes: int,
    bundles: BundleWriter | None,
) -> ChaosRun:
    cluster = LocalCluster(nodes, sum(counts.values()) + 2) if nodes > 1 else None
    address = None
    if cluster is not None:
        with console.status(f"starting {nodes} Ray nodes ..."):
            address = await asyncio.to_thread(cluster.start)
    try:
        pool = chaos_pool(counts, address=address, **options)
        async with pool:
            with console.status("loading models and computing the expected answers ..."):
                await workload.load(pool)
            runner = ChaosRunner(
                pool,
                workload,
                plan,
                on_bad_result=bundles.write if bundles else lambda *_: None,
                on_node_death=cluster.fill_up if cluster else lambda: None,
            )
            if bundles is not None:
                bundles.attach(pool)
            async with shown(console, pool, runner, plan.operations):
                run = await runner.run()
            if bundles is not None:
                await bundles.done()
        left = await runner.leaked()
    finally:
        if cluster is not None:
            await asyncio.to_thread(cluster.stop)
    return run.with_leaked(left)


def _print_results(console: Console, run: ChaosRun, folder: Path | None, as_json: bool) -> int:
    checks = verdict(run)
    if as_json:
        typer.echo(run.to_json())
    for words, holds in checks:
        console.print(f"  {'[green]ok[/green]    ' if holds else '[red]FAILED[/red]'} {words}")
    if folder is not None:
        for path in write_report(run, folder):
            console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    return 0 if all(holds for _, holds in checks) else 1


def _list(console: Console) -> None:
    for kind, facts in FAULTS.items():
        engines = "" if len(facts.engines) == len(BrowserType) else ", ".join(sorted(facts.engines))
        console.print(f"[bold]{kind}[/bold]" + (f" ({engines} only)" if engines else ""))
        for how, dose in facts.doses.items():
            noticed = ", ".join(sorted(dose.noticed)) or "nothing"
            console.print(
                f"  {how}: {dose.what}. Survived from level {dose.level} on; detected as {noticed}"
                f"{', or not at all' if dose.quiet else ''}.",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def parse_faults(text: str) -> list[FaultKind]:
    """Fault kinds from "all,-wrong_answer" or "tab_crash,full_disk". Raises `BadInput`."""
    chosen: list[FaultKind] = []
    for word in _split(text):
        if word == "all":
            chosen = list(FaultKind)
        elif word.startswith("-"):
            left_out = _word(FaultKind, word[1:], "--faults")
            chosen = [kind for kind in chosen if kind is not left_out]
        else:
            chosen.append(_word(FaultKind, word, "--faults"))
    if not chosen:
        raise BadInput(
            f"--faults {text}: no fault is left; name at least one of {', '.join(FaultKind)}.",
            got=text,
        )
    return list(dict.fromkeys(chosen))


def _slots(counts: Mapping[str, int]) -> dict[str, BrowserType]:
    return {
        f"{kind}-{n}": BrowserType(kind) for kind, count in counts.items() for n in range(count)
    }


def _split(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _word(kind: Any, word: str, option: str) -> Any:
    try:
        return kind(word)
    except ValueError:
        raise BadInput(
            f"{option}: expected any of {', '.join(kind)}, got {word!r}.",
            expected=list(kind),
            got=word,
        ) from None
