"""The test matrix: browsers x model types x platforms x failure types, a small run for each cell.

One pool per browser, platform and model runs its cells in turn, each with one fault at its
beginning. A cell that can't run here is "impossible"; one answered by native onnxruntime in place
of a browser is "simulated", which is no success. This module must not inject faults itself:
`runner` does.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from actors.driver.binaries import installed_kinds
from pool.chaos import charts
from pool.chaos.breakable import chaos_pool
from pool.chaos.plan import Plan
from pool.chaos.records import ChaosRun
from pool.chaos.report import table
from pool.chaos.runner import ChaosRunner
from pool.chaos.workload import Question, Source, Workload, known_sources, native_answer
from pool.config import BACKENDS
from pool.models.registry import read_model
from pool.pool import BrowserPool
from recovery.errors import BadInput, PoolError, SetupError
from recovery.faults import FAULTS, Clock, Due, Fault, FaultKind, Intensity, Schedule
from recovery.kinds import BrowserType, Level, ModelType, detect_browser_type
from recovery.levels import BROWSERS_NEEDED

MODEL_TYPES = ("text", "audio", "vision", "multimodal")
PLATFORMS = BACKENDS[1:]
_QUICK_BROWSERS, _QUICK_MODELS = ("chrome",), ("text", "audio")
_QUICK_KINDS = (
    FaultKind.TAB_CRASH,
    FaultKind.BROWSER_CRASH,
    FaultKind.SOCKET_DROP,
    FaultKind.API_ERROR,
)
_PICTURE = "matrix.png"
_FAULT_AT = 2  # the fault is injected before this operation of a cell


@dataclass(frozen=True)
class MatrixPlan:
    """The parameters of a matrix. Empty sequences: all there are (of kinds: no faults)."""

    seed: int
    browsers: Sequence[str] = ()
    models: Sequence[str] = ()
    platforms: Sequence[str] = ("wasm",)
    kinds: Sequence[FaultKind] = ()
    intensities: Sequence[Intensity] = (Intensity.MODERATE,)
    level: str = "high"
    strategy: str = "progressive"
    operations: int = 12
    workers: int = 2
    seconds: float = 90.0
    retries: int = 0
    simulate: bool = False
    quick: bool = False
    full: bool = False

    def checked(self) -> MatrixPlan:
        """The plan with `quick` and `full` expanded. Raises `BadInput`."""
        kinds, models, hows = self.kinds, self.models, self.intensities
        browsers = [str(detect_browser_type(name.partition("=")[0])) for name in self.browsers]
        if self.quick:
            browsers = browsers or list(_QUICK_BROWSERS)
            models = models or _QUICK_MODELS
            kinds = [kind for kind in kinds if kind in _QUICK_KINDS]
            hows = (Intensity.MODERATE,)
        elif not self.full:
            hows = (Intensity.MODERATE,)
        for word, known, option in (
            *((model, MODEL_TYPES, "--models") for model in models),
            *((platform, PLATFORMS, "--platforms") for platform in self.platforms),
        ):
            if word not in known:
                raise BadInput(
                    f"{option}: expected any of {', '.join(known)}, got {word!r}.",
                    expected=list(known),
                    got=word,
                )
        if self.operations <= _FAULT_AT:
            raise BadInput(
                f"--ops: expected more than {_FAULT_AT} operations a cell, got {self.operations}.",
                got=self.operations,
            )
        return replace(
            self,
            browsers=tuple(dict.fromkeys(browsers)) or tuple(map(str, BrowserType)),
            models=tuple(models) or MODEL_TYPES,
            kinds=tuple(kinds),
            intensities=tuple(hows),
        )


@dataclass(frozen=True)
class Cell:
    """One cell and its result. `outcome`: "passed", "failed", "impossible" or "simulated"."""

    browser: str
    model: str
    platform: str
    failure: str
    outcome: str
    why: str = ""
    asked: int = 0
    answered: int = 0
    wrong: int = 0
    recovered: int = 0
    noticed: str = ""
    noticed_ms: float | None = None
    repair_seconds: float | None = None
    tries: int = 1
    versions: str = ""


def run(plan: MatrixPlan, console: Console, report: Path | None, *, as_json: bool) -> int:
    """Run the matrix; returns the exit code: 1 if any cell failed."""
    plan = plan.checked()
    console.print(f"seed {plan.seed}", highlight=False)
    cells = asyncio.run(_matrix(plan, console))
    plain = {"seed": plan.seed, "plan": asdict(plan), "cells": [asdict(cell) for cell in cells]}
    if as_json:
        typer.echo(json.dumps(plain, indent=1))
    else:
        console.print(table_of(cells))
    for line in summary_lines(cells):
        console.print(line, highlight=False)
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        (report / "matrix.json").write_text(json.dumps(plain, indent=1))
        (report / "matrix.md").write_text(markdown(plan, cells, picture(cells, report)))
        console.print(f"wrote {report / 'matrix.md'}", highlight=False, soft_wrap=True)
    return int(any(cell.outcome == "failed" for cell in cells))


async def _matrix(plan: MatrixPlan, console: Console) -> list[Cell]:
    cells: list[Cell] = []
    installed = {str(kind) for kind in installed_kinds()}
    for browser, platform in itertools.product(plan.browsers, plan.platforms):
        if browser not in installed:
            cells += await _without(plan, browser, platform)
            continue
        for model in plan.models:
            done: list[Cell] = []
            try:
                await _column(plan, console, browser, platform, model, done)
            except PoolError as error:
                why = f"{type(error).__name__}: {error}"
                rest = _all(replace(plan, models=(model,)), browser, platform, "impossible", why)
                done += rest[len(done) :]
            cells += done
    return cells


def _failures(plan: MatrixPlan) -> list[tuple[FaultKind, Intensity] | None]:
    """The failures of each browser and model; None: no fault."""
    pairs = list(itertools.product(plan.kinds, plan.intensities))
    return [*pairs] if pairs else [None]


def _name(failure: tuple[FaultKind, Intensity] | None) -> str:
    return "none" if failure is None else f"{failure[0]} ({failure[1]})"


def _all(plan: MatrixPlan, browser: str, platform: str, outcome: str, why: str) -> list[Cell]:
    return [
        Cell(browser, model, platform, _name(failure), outcome, why)
        for model in plan.models
        for failure in _failures(plan)
    ]


async def _without(plan: MatrixPlan, browser: str, platform: str) -> list[Cell]:
    """The cells of a browser that is not installed."""
    if not plan.simulate:
        why = f"{browser} is not installed (`tabpool doctor` says how to install it)"
        return _all(plan, browser, platform, "impossible", why)
    sources = known_sources()
    cells = []
    for model in plan.models:
        asked = await asyncio.to_thread(_answered_natively, sources[model](), plan.operations)
        why = "native onnxruntime answered; no browser ran, and no fault was injected"
        cell = Cell(browser, model, platform, "none", "simulated", why, asked, asked)
        if not asked:
            cell = replace(
                cell, outcome="impossible", why="models with several components can't be simulated"
            )
        cells += [replace(cell, failure=_name(failure)) for failure in _failures(plan)]
    return cells


def _answered_natively(source: Source, operations: int) -> int:
    if source.type is ModelType.MULTIMODAL:
        return 0
    entry = read_model(source.name, source.path)
    asked = source.ask(entry)
    for number in range(operations):
        op, inputs = asked[number % len(asked)]
        native_answer(entry, Question(source.name, source.type, op, inputs))
    return operations


async def _column(
    plan: MatrixPlan, console: Console, browser: str, platform: str, model: str, done: list[Cell]
) -> None:
    """Run all cells of one browser, platform and model; each is appended to `done`."""
    pool = chaos_pool(
        {browser: max(BROWSERS_NEEDED[Level(plan.level)], 1)},
        level=plan.level,
        strategy=plan.strategy,
        backend=platform,
        dashboard=False,
    )
    async with pool:
        workload = Workload([known_sources()[model]()])
        await workload.load(pool)
        for failure in _failures(plan):
            console.print(f"{browser} {model} {platform} {_name(failure)} ...", highlight=False)
            done.append(await _cell(plan, pool, workload, browser, model, platform, failure))


async def _cell(
    plan: MatrixPlan,
    pool: BrowserPool,
    workload: Workload,
    browser: str,
    model: str,
    platform: str,
    failure: tuple[FaultKind, Intensity] | None,
) -> Cell:
    cell = Cell(browser, model, platform, _name(failure), "failed")
    if failure is not None and BrowserType(browser) not in FAULTS[failure[0]].engines:
        return replace(cell, outcome="impossible", why=f"{failure[0]} can't happen in {browser}")
    faults: tuple[Due, ...] = ()
    if failure is not None:
        faults = (Due(_FAULT_AT, Fault(*failure, f"{browser}-0"), Clock.OPERATIONS),)
    for attempt in range(1, plan.retries + 2):
        cell_plan = Plan(
            Schedule(plan.seed, faults),
            plan.operations,
            plan.workers,
            gated=False,
            seconds=plan.seconds,
        )
        try:
            async with asyncio.timeout(2 * plan.seconds):
                done = await ChaosRunner(pool, workload, cell_plan).run()
        except TimeoutError:
            cell = replace(cell, why=f"timed out after {2 * plan.seconds:g} s", tries=attempt)
            continue
        cell = replace(judged(cell, done, failure, Level(plan.level)), tries=attempt)
        if cell.outcome != "failed":
            break
    return cell


def judged(
    cell: Cell, done: ChaosRun, failure: tuple[FaultKind, Intensity] | None, level: Level
) -> Cell:
    """The cell with the result of its run."""
    operations = done.operations
    cell = replace(
        cell,
        asked=len(operations),
        answered=sum(op.success for op in operations),
        wrong=sum(op.wrong for op in operations),
        recovered=sum(op.recovered for op in operations),
        versions="; ".join(sorted(set(done.browsers.values()))),
    )
    why = []
    for record in done.faults:
        cell = replace(
            cell,
            noticed=", ".join(dict.fromkeys(record.noticed)),
            noticed_ms=record.noticed_ms,
            repair_seconds=record.repair_seconds,
        )
        if record.outcome == "impossible":
            return replace(cell, outcome="impossible", why=record.why)
        if record.outcome != "happened":
            why.append(f"the fault was {record.outcome}: {record.why or 'no evidence of it'}")
        if record.right is False:
            why.append(f"detected as {cell.noticed or 'nothing'}")
    if cell.answered < cell.asked:
        why.append(f"{cell.asked - cell.answered} operations failed")
    corrupts = failure is not None and failure[0] is FaultKind.WRONG_ANSWER
    if cell.wrong and not (corrupts and level is not Level.CRITICAL):
        why.append(f"{cell.wrong} answers were wrong")
    if not done.repaired:
        why.append("not every browser was repaired at the end")
    return replace(cell, outcome="failed" if why else "passed", why="; ".join(why))


def summary_lines(cells: Sequence[Cell]) -> list[str]:
    """The number of cells by outcome, and the failed ones."""
    counts: dict[str, int] = {}
    for cell in cells:
        counts[cell.outcome] = counts.get(cell.outcome, 0) + 1
    lines = [", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))]
    lines += [
        f"failed: {c.browser} {c.model} {c.platform} {c.failure}: {c.why}"
        for c in cells
        if c.outcome == "failed"
    ]
    return lines


_COLUMNS = (
    "browser",
    "model",
    "platform",
    "failure",
    "outcome",
    "answered",
    "detected as",
    "ms",
    "s",
)


def _row(cell: Cell) -> tuple[str, ...]:
    return (
        cell.browser,
        cell.model,
        cell.platform,
        cell.failure,
        cell.outcome,
        f"{cell.answered}/{cell.asked}" if cell.asked else "-",
        cell.noticed or "-",
        "-" if cell.noticed_ms is None else f"{cell.noticed_ms:.0f}",
        "-" if cell.repair_seconds is None else f"{cell.repair_seconds:.1f}",
    )


def table_of(cells: Sequence[Cell]) -> Table:
    """The matrix, a row per cell."""
    shown = Table(title="detected after (ms), repaired after (s)")
    for column in _COLUMNS:
        shown.add_column(column)
    styles: Mapping[str, str] = {"failed": "red", "passed": "green"}
    for cell in cells:
        shown.add_row(*_row(cell), style=styles.get(cell.outcome, "dim"))
    return shown


def picture(cells: Sequence[Cell], folder: Path) -> str:
    """Draw the matrix; returns the file's name, "" if matplotlib is not installed."""
    rows = list(dict.fromkeys(cell.failure for cell in cells))
    places = {cell: f"{cell.browser} {cell.model} {cell.platform}" for cell in cells}
    columns = list(dict.fromkeys(places.values()))
    outcomes = {(cell.failure, place): cell.outcome for cell, place in places.items()}
    try:
        charts.draw_grid(rows, columns, outcomes, folder / _PICTURE)
    except SetupError:
        return ""
    return _PICTURE


def markdown(plan: MatrixPlan, cells: Sequence[Cell], drawn: str = "") -> str:
    """The matrix as Markdown. `drawn`: file name of its picture, if there is one."""
    what = f"Seed {plan.seed}, level {plan.level}, strategy {plan.strategy}"
    lines = [
        "# Test matrix",
        "",
        f"{what}, {plan.operations} operations a cell. {summary_lines(cells)[0]}.",
        "",
        *([f"![Outcomes]({drawn})", ""] if drawn else []),
        *table(_COLUMNS, map(_row, cells)),
    ]
    reasons = [f"- {c.browser} {c.model} {c.platform} {c.failure}: {c.why}" for c in cells if c.why]
    return "\n".join([*lines, "", *reasons, ""])
