"""The demonstration: embeddings from browsers that are killed, crashed or made to answer wrong.

The sentences are embedded at level `high`, where a crash costs no restart, then some of them at
`critical`, where three browsers vote and one of them is made to answer wrong.

Then three browsers of different engines generate a text with a llama in three shards, and one is
killed in mid-sentence (`pool.demo.passage`).

Every answer is compared with native onnxruntime, and afterwards the machine is searched for leaked
processes, profiles and ports. Exit code 0 only if all checks pass.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from actors.faults import crash_tab, kill_process, wrong_answers
from actors.messages import LaunchReport
from actors.ray import connection
from pool import BrowserPool, PoolView, Result
from pool.commands.printing import print_error
from pool.demo.passage import Passage, write_passage
from pool.leaks import leaked
from pool.models.bundled import minilm_folder
from pool.models.registry import ModelEntry
from pool.models.tokens import encoder_for
from pool.operations.embed import EMBED
from recovery.control import Phase
from recovery.errors import PoolError
from recovery.kinds import BrowserType
from recovery.levels import LEVELS_ASCENDING
from sharding.models.native import NativeSession

BROWSERS = {"chrome": 2, "firefox": 1, "safari": 1}
DIFFERENCE_MAX = 1e-4  # to native onnxruntime; the browsers' WASM and it differ in rounding only
_AT_ONCE = 8
_REPAIR_SECONDS = 60.0
_VOTED = 12  # sentences embedded again, by three browsers at once
_SENTENCES = Path(__file__).parents[1] / "assets" / "sentences.txt"


@dataclass(frozen=True)
class Fault:
    """One injected fault."""

    at: float  # seconds since the first operation
    what: str
    browser_id: str


def main() -> int:
    """Run the demonstration; returns the exit code."""
    console = Console()
    try:
        return asyncio.run(_demonstrate(console))
    except PoolError as error:
        print_error(console, error)
        return 2


async def _demonstrate(console: Console) -> int:
    sentences = _SENTENCES.read_text(encoding="utf-8").splitlines()
    model = minilm_folder()
    began = time.monotonic()
    wanted = ", ".join(f"{count} {kind}" for kind, count in BROWSERS.items())
    pool = BrowserPool(BROWSERS, name="demo", backend="wasm", level="critical", faults=True)
    launched: dict[str, LaunchReport] = {}
    with console.status(f"starting Ray and {wanted} ..."):
        await pool.open()
    # One Ray for both pools: it is stopped when the last one closes.
    ray = await asyncio.to_thread(connection.connect, None, dashboard=False)
    try:
        return await _both_parts(console, pool, launched, sentences, model, began)
    finally:
        await asyncio.to_thread(connection.disconnect, ray)


async def _both_parts(
    console: Console,
    pool: BrowserPool,
    launched: dict[str, LaunchReport],
    sentences: Sequence[str],
    model: Path,
    began: float,
) -> int:
    try:
        with console.status("loading all-MiniLM-L6-v2 into every browser ..."):
            entry = await pool.load("minilm", model)
        console.print(f"{pool!r} ready after {time.monotonic() - began:.1f} s")
        results, faults, first = await _embed_all(console, pool, sentences, launched)
        view = await _repaired(pool)
        results += await _embed_with_votes(console, pool, sentences[-_VOTED:], faults, first)
        view = await _repaired(pool, 3)
        launched.update({f"{name} repaired": report for name, report in view.launches.items()})
        if view.dashboard_url:
            console.print(f"Ray's dashboard ran at {view.dashboard_url}")
    finally:
        await pool.close()
    vectors = np.concatenate([result.outputs["embedding"] for result in results])
    embedded = [*sentences, *sentences[-_VOTED:]]
    reference = await asyncio.to_thread(_native, entry, embedded)
    difference = float(np.abs(vectors - reference).max())
    found = await leaked(list(launched.values()))

    console.print(_browser_table(view, results))
    _print_timeline(console, view, results, faults, first)
    _print_levels(console, results)
    _print_nearest(console, sentences, vectors[: len(sentences)])
    passage = await write_passage(console)
    found += await leaked(passage.launches)
    return _print_checks(console, results, difference, passage, found, view)


async def _embed_all(
    console: Console, pool: BrowserPool, sentences: Sequence[str], launched: dict[str, LaunchReport]
) -> tuple[list[Result], list[Fault], float]:
    """Embed every sentence, a few at once, and inject two faults meanwhile."""
    view = await pool.state()
    launched.update(view.launches)
    places = asyncio.Semaphore(_AT_ONCE)
    begun = asyncio.Event()
    faults: list[Fault] = []
    first = time.time()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("embedding sentences", total=len(sentences))
        started = 0

        async def embed(sentence: str) -> Result:
            nonlocal started
            async with places:
                started += 1
                begun.set()
                result = await pool.run_with_recovery(
                    "minilm", "embed", {"text": sentence}, level="high"
                )
            progress.advance(bar)
            return result

        async def when(count: int) -> None:
            while started < count:
                begun.clear()
                await begun.wait()

        async def break_things() -> None:
            await when(len(sentences) // 3)
            target = _busiest(pool, BrowserType.CHROME, ())
            pid = kill_process(launched[target], "browser")
            faults.append(Fault(time.time() - first, f"SIGKILL of the browser, pid {pid}", target))
            progress.console.print(f"[red]killed[/red] {target} (SIGKILL, pid {pid})")
            await when(2 * len(sentences) // 3)
            other = _busiest(pool, BrowserType.CHROME, (target,))
            pids = crash_tab(launched[other], BrowserType.CHROME)
            faults.append(Fault(time.time() - first, f"tab crash, renderers {pids}", other))
            progress.console.print(f"[red]crashed[/red] the tab of {other}")

        breaking = asyncio.create_task(break_things())
        results = await asyncio.gather(*(embed(sentence) for sentence in sentences))
        await breaking
    return list(results), faults, first


async def _embed_with_votes(
    console: Console,
    pool: BrowserPool,
    sentences: Sequence[str],
    faults: list[Fault],
    first: float,
) -> list[Result]:
    """Embed at level `critical` while one browser answers wrong."""
    faulty = next(h.ref.browser_id for h in pool.hosts() if h.browser is BrowserType.FIREFOX)
    await pool.inject(faulty, wrong_answers(1000, bit=30))
    faults.append(Fault(time.time() - first, "flips a bit in each of its answers", faulty))
    console.print(
        f"[red]corrupted[/red] from now on: answers of {faulty} (bit 30 of one number flipped)"
    )
    return [
        await pool.run_with_recovery("minilm", "embed", {"text": sentence})
        for sentence in sentences
    ]


def _busiest(pool: BrowserPool, kind: BrowserType, excluded: Sequence[str]) -> str:
    """The browser of this kind with the most operations in flight."""
    hosts = [
        host
        for host in pool.hosts()
        if host.browser is kind and host.ref.browser_id not in excluded
    ]
    return max(hosts, key=lambda host: host.queue).ref.browser_id


async def _repaired(pool: BrowserPool, repairs: int = 2) -> PoolView:
    """The pool's state once every broken browser has been repaired or replaced."""
    async with asyncio.timeout(_REPAIR_SECONDS):
        while True:
            view = await pool.state()
            records = view.control.browsers.values()
            # A replacement that could not be started (not installed, say) is STOPPED.
            settled = (Phase.READY, Phase.STOPPED)
            back = all(r.phase in settled or r.replaced_by for r in records)
            if back and len(view.control.repairs) >= repairs:
                return view
            await pool.changed()


def _native(entry: ModelEntry, sentences: Sequence[str]) -> np.ndarray[Any, Any]:
    """The same embeddings by native onnxruntime, one sentence at a time as in the pool."""
    session = NativeSession(entry.spec.files[0].path)
    session.open()
    encoder = encoder_for(entry)
    rows = []
    for sentence in sentences:
        prepared = EMBED.prepare(entry, {"text": sentence}, encoder)
        rows.append(EMBED.finish(entry, prepared, session.run(prepared))["embedding"])
    session.close()
    return np.concatenate(rows)


def _browser_table(view: PoolView, results: Sequence[Result]) -> Table:
    table = Table(title="operations by browser")
    columns = ("browser", "version", "back end", "answered", "after recovery", "p50 ms")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")
    for browser_id, record in view.control.browsers.items():
        own = [result for result in results if result.browser_id == browser_id]
        facts = record.facts
        table.add_row(
            browser_id,
            f"{facts.product} {facts.version}" if facts else "?",
            ", ".join(sorted({str(result.backend) for result in own})) or "-",
            str(len(own)),
            str(sum(result.recovered for result in own)),
            f"{statistics.median(_durations(own)):.1f}" if own else "-",
        )
    return table


def _durations(results: Sequence[Result]) -> list[float]:
    return [result.metrics["duration_ms"] for result in results]


def _print_timeline(
    console: Console,
    view: PoolView,
    results: Sequence[Result],
    faults: Sequence[Fault],
    first: float,
) -> None:
    lines = [
        (fault.at, f"[red]fault[/red]     {fault.browser_id}: {fault.what}") for fault in faults
    ]
    for repair in view.control.repairs:
        where = f"{repair.browser_id}#{repair.from_epoch}"
        lines.append((repair.began - first, f"detected  {where}: {repair.failure.message}"))
        if repair.ready is not None:
            took = repair.ready - repair.began
            lines.append(
                (repair.ready - first, f"[green]repaired[/green]  {where} in {took:.2f} s")
            )
    for result in results:
        if result.recovered:
            at = result.original_error.at - first if result.original_error else 0.0
            steps = ", ".join(
                f"{step.what} {step.where}".strip() + f" {step.seconds * 1e3:.0f} ms"
                for step in result.recovery
            )
            lines.append((at, f"recovered operation {result.op_id[:6]}: {steps}"))
    console.print("\nrecovery timeline (seconds since the first sentence)")
    for at, line in sorted(lines, key=lambda line: line[0]):
        console.print(f"  {at:7.3f}  {line}", highlight=False)


def _print_levels(console: Console, results: Sequence[Result]) -> None:
    table = Table(title="operations by level")
    for column in ("level", "operations", "recovered", "votes", "p50 ms", "max ms"):
        table.add_column(column, justify="left" if column == "level" else "right")
    for level in sorted({result.level_effective for result in results}, key=LEVELS_ASCENDING.index):
        own = [result for result in results if result.level_effective is level]
        votes = sorted({int(result.metrics.get("votes", 1)) for result in own})
        table.add_row(
            str(level),
            str(len(own)),
            str(sum(result.recovered for result in own)),
            " or ".join(map(str, votes)),
            f"{statistics.median(_durations(own)):.1f}",
            f"{max(_durations(own)):.1f}",
        )
    console.print(table)


def _print_nearest(
    console: Console, sentences: Sequence[str], vectors: np.ndarray[Any, Any]
) -> None:
    console.print("\nnearest sentence by embedding (cosine similarity)")
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1.0)
    for index in range(0, len(sentences), max(len(sentences) // 6, 1)):
        nearest = int(similarity[index].argmax())
        console.print(f"  {sentences[index]}", highlight=False)
        score = similarity[index, nearest]
        console.print(f"    [cyan]{score:.2f}[/cyan]  {sentences[nearest]}", highlight=False)


def _print_checks(
    console: Console,
    results: Sequence[Result],
    difference: float,
    passage: Passage,
    leaked: Sequence[str],
    view: PoolView,
) -> int:
    ids = {result.op_id for result in results}
    checks: Mapping[str, bool] = {
        f"{len(results)} operations requested, {sum(r.success for r in results)} answered, "
        "each exactly once": len(ids) == len(results) and all(r.success for r in results),
        f"{sum(r.recovered for r in results)} operations recovered from a fault": any(
            r.recovered for r in results
        ),
        f"{len(view.control.repairs)} browsers repaired": all(
            repair.ready is not None for repair in view.control.repairs
        ),
        f"largest difference from native onnxruntime: {difference:.2e} (limit: "
        f"{DIFFERENCE_MAX:g})": difference < DIFFERENCE_MAX,
        **passage.checks,
        "no leaked processes, profiles or ports"
        if not leaked
        else f"leaked: {', '.join(leaked)}": (not leaked),
        "no simulated answers": not any(r.simulated for r in results),
    }
    console.print()
    for line, right in checks.items():
        console.print(f"  {'[green]ok[/green]    ' if right else '[red]FAILED[/red]'} {line}")
    return 0 if all(checks.values()) else 1
