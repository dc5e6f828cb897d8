"""The demonstration: real sentences, real browsers, some killed, one crashed, one lying.

Two thirds are asked at level `high`, where a death costs no restart, the last at `critical`,
where three browsers vote and one of them is made to answer wrong.

Then three browsers of different engines write a passage together, with a llama that is cut into
three, and one is killed in mid-sentence (`pool.demo.passage`).

Every answer is held against native onnxruntime, and afterwards the machine is searched for
anything left behind. Exit code 0 only if all is right. It uses the pool as any program would.
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
from actors.ray import connection as ray_actors
from pool import BrowserPool, PoolView, Result
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
_VOTED = 12  # sentences asked again, of three browsers at once
_SENTENCES = Path(__file__).parents[1] / "assets" / "sentences.txt"


@dataclass(frozen=True)
class Fault:
    """One fault that the demo made."""

    at: float  # seconds since the first operation
    what: str
    browser_id: str


def main() -> int:
    """Run the demonstration; returns the exit code."""
    console = Console()
    try:
        return asyncio.run(_demonstrate(console))
    except PoolError as error:
        console.print(f"[red]{type(error).__name__}[/red]: {error}", highlight=False)
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
    # One Ray for both pools: it ends with the last who uses it.
    ray = await asyncio.to_thread(ray_actors.connect, None, dashboard=False)
    try:
        return await _both_acts(console, pool, launched, sentences, model, began)
    finally:
        await asyncio.to_thread(ray_actors.disconnect, ray)


async def _both_acts(
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
        results += await _outvote(console, pool, sentences[-_VOTED:], faults, first)
        view = await _repaired(pool, 3)
        launched.update({f"{name} repaired": report for name, report in view.launches.items()})
        if view.dashboard_url:
            console.print(f"Ray's dashboard was at {view.dashboard_url} while this ran")
    finally:
        await pool.close()
    vectors = np.concatenate([result.outputs["embedding"] for result in results])
    asked = [*sentences, *sentences[-_VOTED:]]
    reference = await asyncio.to_thread(_native, entry, asked)
    difference = float(np.abs(vectors - reference).max())
    left = await leaked(list(launched.values()))

    console.print(_browser_table(view, results))
    _print_timeline(console, view, results, faults, first)
    _print_levels(console, results)
    _print_nearest(console, sentences, vectors[: len(sentences)])
    passage = await write_passage(console)
    left += await leaked(passage.launches)
    return _judge(console, results, difference, passage, left, view)


async def _embed_all(
    console: Console, pool: BrowserPool, sentences: Sequence[str], launched: dict[str, LaunchReport]
) -> tuple[list[Result], list[Fault], float]:
    """Embed every sentence, a few at once, with two faults on the way."""
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


async def _outvote(
    console: Console,
    pool: BrowserPool,
    sentences: Sequence[str],
    faults: list[Fault],
    first: float,
) -> list[Result]:
    """Ask at level critical, while one browser answers wrong."""
    faulty = next(h.ref.browser_id for h in pool.hosts() if h.browser is BrowserType.FIREFOX)
    await pool.inject(faulty, wrong_answers(1000, bit=30))
    faults.append(Fault(time.time() - first, "a bit of each of its answers is flipped", faulty))
    console.print(f"[red]lying[/red] from now on: {faulty} (bit 30 of one number in each answer)")
    return [
        await pool.run_with_recovery("minilm", "embed", {"text": sentence})
        for sentence in sentences
    ]


def _busiest(pool: BrowserPool, kind: BrowserType, spared: Sequence[str]) -> str:
    """The browser of this kind with the most operations under way."""
    hosts = [
        host for host in pool.hosts() if host.browser is kind and host.ref.browser_id not in spared
    ]
    return max(hosts, key=lambda host: host.queue).ref.browser_id


async def _repaired(pool: BrowserPool, repairs: int = 2) -> PoolView:
    """The pool's state once every broken browser is back, or another in its place."""
    async with asyncio.timeout(_REPAIR_SECONDS):
        while True:
            view = await pool.state()
            records = view.control.browsers.values()
            # One that was to replace another and could not (not installed, say) has stopped.
            over = (Phase.READY, Phase.STOPPED)
            back = all(r.phase in over or r.replaced_by for r in records)
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
    table = Table(title="what each browser answered, and how many of these after a fault")
    columns = ("browser", "version", "back end", "operations", "recovered", "p50 ms")
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
        lines.append((repair.began - first, f"noticed   {where}: {repair.failure.message}"))
        if repair.ready is not None:
            took = repair.ready - repair.began
            lines.append(
                (repair.ready - first, f"[green]repaired[/green]  {where} after {took:.2f} s")
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
    table = Table(title="levels: what an operation was promised, and what became of it")
    for column in ("level held", "operations", "hit by a fault", "votes", "p50 ms", "slowest ms"):
        table.add_column(column, justify="left" if column == "level held" else "right")
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
    console.print("\nnearest sentence by these embeddings (judge for yourself)")
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -1.0)
    for index in range(0, len(sentences), max(len(sentences) // 6, 1)):
        nearest = int(likeness[index].argmax())
        console.print(f"  {sentences[index]}", highlight=False)
        score = likeness[index, nearest]
        console.print(f"    [cyan]{score:.2f}[/cyan]  {sentences[nearest]}", highlight=False)


def _judge(
    console: Console,
    results: Sequence[Result],
    difference: float,
    passage: Passage,
    leaked: Sequence[str],
    view: PoolView,
) -> int:
    ids = {result.op_id for result in results}
    checks: Mapping[str, bool] = {
        f"{len(results)} operations asked, {sum(r.success for r in results)} answered, "
        f"each once": len(ids) == len(results) and all(r.success for r in results),
        f"{sum(r.recovered for r in results)} recovered from a fault": any(
            r.recovered for r in results
        ),
        f"{len(view.control.repairs)} browsers repaired": all(
            repair.ready is not None for repair in view.control.repairs
        ),
        f"largest difference to native onnxruntime {difference:.2e} (goal: below "
        f"{DIFFERENCE_MAX:g})": difference < DIFFERENCE_MAX,
        **passage.checks,
        "nothing left behind" if not leaked else f"left behind: {', '.join(leaked)}": (not leaked),
        "no answer simulated": not any(r.simulated for r in results),
    }
    console.print()
    for line, right in checks.items():
        console.print(f"  {'[green]ok[/green] ' if right else '[red]NOT[/red]'} {line}")
    return 0 if all(checks.values()) else 1
