"""Progress of a chaos run: a live view on a terminal, else a line per fault.

This module must not delay operations.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pool.chaos.records import FaultRecord
from pool.chaos.runner import ChaosRunner
from pool.pool import BrowserPool
from recovery.errors import PoolError

_POLL_SECONDS = 0.5
_FAULTS_SHOWN = 12


@contextlib.asynccontextmanager
async def shown(
    console: Console, pool: BrowserPool, runner: ChaosRunner, operations: int
) -> AsyncIterator[None]:
    """Show the progress of a run within this context."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    task = bar.add_task("operations", total=operations)
    live = Live(console=console, auto_refresh=False, transient=True)
    printed = 0

    async def update() -> None:
        nonlocal printed
        bar.update(task, completed=len(runner.progress.operations))
        if not console.is_terminal:
            for record in runner.progress.faults[printed:]:
                console.print(fault_line(record), highlight=False, markup=False, soft_wrap=True)
            printed = len(runner.progress.faults)
            return
        with contextlib.suppress(PoolError):
            live.update(picture(pool, runner, bar), refresh=True)

    async def keep_updating() -> None:
        while True:
            await update()
            await asyncio.sleep(_POLL_SECONDS)

    if console.is_terminal:
        live.start()
    updating = asyncio.create_task(keep_updating(), name="chaos view")
    try:
        yield
    finally:
        updating.cancel()
        await asyncio.gather(updating, return_exceptions=True)
        await update()
        live.stop()


def picture(pool: BrowserPool, runner: ChaosRunner, bar: Progress) -> RenderableType:
    """Progress, browsers and the latest faults."""
    progress = runner.progress
    counts = Text(
        f"{len(progress.operations)} finished, "
        f"{sum(op.success for op in progress.operations)} answered, "
        f"{sum(op.recovered for op in progress.operations)} recovered, "
    )
    bad = f"{progress.failed} failed, {progress.wrong} wrong"
    counts.append(bad, style="red bold" if progress.failed or progress.wrong else "green")
    if progress.waiting_for:
        counts.append(f"   waiting for {progress.waiting_for}", style="dim")
    table = Table(box=None, pad_edge=False)
    for column in ("browser", "queue", "served", "models", "state"):
        table.add_column(column, justify="right" if column in ("queue", "served") else "left")
    for host in pool.hosts():
        table.add_row(
            str(host.ref),
            str(host.queue),
            str(host.served),
            str(len(host.models)),
            Text(str(host.readiness), style="green" if host.models else "yellow"),
        )
    lines = [Text(fault_line(record)) for record in progress.faults[-_FAULTS_SHOWN:]]
    return Group(bar, counts, table, *lines)


def fault_line(record: FaultRecord) -> str:
    """One fault as a line."""
    made = record.injected
    if made is None:
        return f"{record.number + 1:4d}  {record.due.fault}: {record.outcome}: {record.why}"
    where = f"{made.target}#{made.epoch}" if made.target else "the supervisor"
    pids = f" (processes {', '.join(map(str, made.pids[:4]))})" if made.pids else ""
    what = f"{made.fault.intensity} {made.fault.kind}"
    return f"{record.number + 1:4d}  {what}: {where}: {made.what}{pids}"
