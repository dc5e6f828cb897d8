"""A llama cut across browsers, against the same one uncut in one browser; and when browsers die.

Everything is interleaved in one run: same back end (WASM), one thread a session, after warm-up.
`uncut` has a browser to itself, in a pool of its own. Of the models one is the shipped llama (3.5 M
parameters), the other is generated, with random weights (107 M, fp32). The failing runs follow the
table in Petals' paper: at each token a browser is killed, or its tab, with a probability; the
baseline starts the generation anew each time, as soon as all stages are back.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from actors.driver.profiles import cache_root
from actors.faults import crash_tab, kill_process
from benchmarks.report import Report, run
from pool import BrowserPool, Result
from pool.models.bundled import kjv_llama_folder
from recovery.breaker import BreakerConfig
from recovery.control import ModelPhase, Phase
from recovery.errors import BadInput, SequenceLost
from recovery.kinds import BrowserType
from recovery.supervision import RestartLimit

SHARDS = 3
PROMPT = list(range(3, 19))
_SCRIPT = Path(__file__).parents[1] / "scripts" / "make_random_llama.py"
# Deaths without end are the point here: no circuit may open, and no browser be given up.
_PATIENT: dict[str, Any] = {
    "backend": "wasm",
    "breaker": BreakerConfig(failure_threshold=10_000),
    "restart_limit": RestartLimit(restarts_max=1000),
    "history": False,
    "dashboard": False,  # it takes a part of a core, and two are here
}
_RATES = (1e-3, 1e-2)
_KILLS_MAX = 6  # in one generation
_WHOLE_SECONDS = 120.0


def random_llama() -> Path:
    """The generated model, made once: 500 MB in the cache directory."""
    path = cache_root() / "models" / "random-llama-107m.onnx"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, str(_SCRIPT), str(path)], check=True)
    return path


async def _ask(pool: BrowserPool, model: str, tokens: int, level: str = "low") -> Result:
    inputs = {"input_ids": PROMPT, "max_new_tokens": tokens, "ignore_eos": True}
    result = await pool.run_with_recovery(model, "generate", inputs, level=level)
    if not result.success:
        raise AssertionError(result.error)
    return result


async def _steps(pool: BrowserPool, model: str, tokens: int) -> tuple[Result, list[float]]:
    """The same, and of each step after the prompt its milliseconds outside the pages."""
    inputs = {"input_ids": PROMPT, "max_new_tokens": tokens, "ignore_eos": True}
    ended: list[Result] = []
    over = []
    async for token in pool.stream(model, inputs, level="low", on_result=ended.append):
        over.append(token.step_ms - token.in_page_ms)
    return ended[0], over[1:]


async def _rates(
    report: Report, quick: bool, progress: Progress, name: str, whole: BrowserPool, cut: BrowserPool
) -> None:
    """Tokens per second of 1 to 3 shards and uncut, one sequence and three."""
    rounds, tokens = (4, 24) if quick else (12, 48)
    models = {"uncut": (whole, name), **{f"{n}_shards": (cut, f"{name}{n}") for n in (1, 2, 3)}}
    one: dict[str, list[float]] = {key: [] for key in models}
    many: dict[str, list[float]] = {"uncut": [], "3_shards": []}
    hops: list[float] = []
    right: list[int] | None = None
    task = progress.add_task(f"{name}: warm-up", total=len(models))
    for key, (pool, model) in models.items():
        # Chromium compiles in tiers: what runs often is fast only after some 10 s.
        end = time.perf_counter() + (8 if quick else 15)
        while time.perf_counter() < end:
            result = await _ask(pool, model, tokens)
            got = result.outputs["tokens"].tolist()
            if right is not None and got != right:
                raise AssertionError(f"{name}: {key} wrote other tokens than uncut")
            right = got
        progress.advance(task)
    task = progress.add_task(f"{name}: tokens per second", total=rounds)
    for _ in range(rounds):
        for key, (pool, model) in models.items():
            result, steps = await _steps(pool, model, tokens)
            one[key].append(result.metrics["tokens_per_second"])
            if key == "3_shards":
                hops += [over / SHARDS for over in steps]
        for key in many:
            pool, model = models[key]
            began = time.perf_counter()
            await asyncio.gather(*(_ask(pool, model, tokens) for _ in range(3)))
            many[key].append(3 * tokens / (time.perf_counter() - began))
        progress.advance(task)
    uncut = statistics.median(one["uncut"])
    large = name == "random"
    for key, values in one.items():
        rate = statistics.median(values)
        ratio = statistics.median(v / u for v, u in zip(values, one["uncut"], strict=True))
        goal = large and key == "3_shards"
        report.add(
            f"{name}_{key}_1_sequence",
            rate,
            "tokens/s",
            baseline=uncut,
            ratio=ratio,
            goal="at least 0.85 of uncut" if goal else "",
            met=ratio >= 0.85 if goal else None,
        )
    for key, values in many.items():
        ratio = statistics.median(v / u for v, u in zip(values, one["uncut"], strict=True))
        goal = large and key == "3_shards"
        report.add(
            f"{name}_{key}_3_sequences",
            statistics.median(values),
            "tokens/s",
            baseline=uncut,
            ratio=ratio,
            goal="at least 1.2 of one uncut" if goal else "",
            met=ratio >= 1.2 if goal else None,
        )
    hop = statistics.median(hops)
    report.add(f"{name}_hop_over_in_page", hop, "ms", goal="at most 1.5 ms", met=hop <= 1.5)


async def _levels(
    report: Report, quick: bool, progress: Progress, name: str, pool: BrowserPool
) -> None:
    """What a level costs without a fault, and how long a token takes when a browser is killed."""
    rounds, tokens = (3, 24) if quick else (8, 48)
    model = f"{name}{SHARDS}"
    cost: dict[str, list[float]] = {level: [] for level in ("low", "medium", "high")}
    task = progress.add_task(f"{name}: levels", total=rounds)
    copied = 0.0
    for _ in range(rounds):
        for level, values in cost.items():
            result = await _ask(pool, model, tokens, level)
            values.append(result.metrics["tokens_per_second"])
            copied = max(copied, result.metrics["copied_bytes"])
        progress.advance(task)
    base = statistics.median(cost["low"])
    for level, values in cost.items():
        ratio = statistics.median(v / u for v, u in zip(values, cost["low"], strict=True))
        report.add(
            f"{name}_{level}_no_fault",
            statistics.median(values),
            "tokens/s",
            baseline=base,
            ratio=ratio,
        )
    report.add(f"{name}_copied_per_token", copied / (len(PROMPT) + tokens - 1), "B")
    task = progress.add_task(f"{name}: kills", total=2 * rounds)
    for level in ("medium", "high"):
        gaps = []
        for _ in range(rounds):
            await _whole(pool, model)
            run_ = _Writing(pool, model, level, tokens, lambda n: n == tokens // 2)
            await run_.write()
            gaps.append(run_.longest)
            progress.advance(task)
        report.add(f"{name}_{level}_token_at_a_kill_p50", statistics.median(gaps) * 1e3, "ms")
        report.add(f"{name}_{level}_token_at_a_kill_max", max(gaps) * 1e3, "ms")


class _Writing:
    """One generation; where `dies(step)` says so, the browser of a stage is killed, or its tab."""

    def __init__(
        self,
        pool: BrowserPool,
        model: str,
        level: str,
        tokens: int,
        dies: Callable[[int], bool],
        seed: int = 0,
    ) -> None:
        self._pool = pool
        self._model = model
        self._level = level
        self._left = tokens
        self._dies = dies
        self._chance = random.Random(seed)
        self.ids: list[int] = []
        self.kills = 0
        self.longest = 0.0
        self.steps = 0

    async def write(self) -> None:
        """Raises `SequenceLost`, at a level that does not survive."""
        inputs = {"input_ids": PROMPT, "max_new_tokens": self._left, "ignore_eos": True}
        launches = (await self._pool.state()).launches
        before = time.perf_counter()
        self.ids = []
        async for token in self._pool.stream(self._model, inputs, level=self._level):
            now = time.perf_counter()
            self.longest = max(self.longest, now - before)
            before = now
            self.ids.append(token.id)
            self.steps += 1
            if self._dies(self.steps):
                launches = (await self._pool.state()).launches
                self._strike(launches)

    def _strike(self, launches: Any) -> None:
        part = f"{self._model}@{self._chance.randrange(SHARDS)}"
        holders = [h.ref.browser_id for h in self._pool.hosts() if h.can_take(part)]
        for browser_id in holders[:1]:
            try:
                if self._chance.random() < 0.5:
                    kill_process(launches[browser_id], "browser")
                else:
                    crash_tab(launches[browser_id], BrowserType.CHROME)
                self.kills += 1
            except (BadInput, KeyError):
                pass  # it is being replaced already


async def _failing(
    report: Report, quick: bool, progress: Progress, pool: BrowserPool, model: str
) -> None:
    """Tokens per second while browsers die, against starting anew."""
    tokens = 96 if quick else 256
    await _whole(pool, model)
    began = time.perf_counter()
    right = (await _ask(pool, model, tokens, "high")).outputs["tokens"].tolist()
    free = tokens / (time.perf_counter() - began)
    task = progress.add_task(f"{model}: with failures", total=2 * len(_RATES))
    for rate in _RATES:
        # The same steps for both; at a rate of 1e-3 a short text would see none, so one at least.
        chance = random.Random(int(1 / rate))
        strikes = {n for n in range(1, 10 * tokens) if chance.random() < rate}
        if min(strikes, default=tokens) >= tokens:
            strikes.add(tokens // 2)
        struck = sorted(strikes)[:_KILLS_MAX]
        rates = {}
        for level in ("high", "none"):
            await _whole(pool, model)
            run_ = _Writing(pool, model, level, tokens, struck.__contains__, seed=1)
            began, restarts = time.perf_counter(), 0
            while True:
                try:
                    await run_.write()
                    break
                except SequenceLost:
                    restarts += 1
                    await _whole(pool, model)
            rates[level] = tokens / (time.perf_counter() - began)
            if run_.ids != right:
                raise AssertionError(f"at {level} and {rate:g} other tokens came")
            key = "recovered" if level == "high" else "started_anew"
            report.add(f"failing_{rate:g}_{key}_kills", run_.kills, "kills")
            if level == "none":
                report.add(f"failing_{rate:g}_restarts", restarts, "restarts")
            progress.advance(task)
        goal = rate == 1e-2
        report.add(
            f"failing_{rate:g}_recovered",
            rates["high"],
            "tokens/s",
            baseline=free,
            ratio=rates["high"] / free,
            goal="at least half of fault-free" if goal else "",
            met=rates["high"] >= free / 2 if goal else None,
        )
        report.add(
            f"failing_{rate:g}_started_anew",
            rates["none"],
            "tokens/s",
            baseline=free,
            ratio=rates["none"] / free,
        )


async def _whole(pool: BrowserPool, model: str) -> None:
    """Wait until all browsers are back and each stage has its copies, known to this client."""
    parts = [f"{model}@{n}" for n in range(SHARDS)]
    async with asyncio.timeout(_WHOLE_SECONDS):
        while True:
            records = [r for r in (await pool.control()).browsers.values() if not r.replaced_by]
            ready = all(r.phase is Phase.READY and r.repair is None for r in records)
            loaded = all(
                sum(r.models.get(part) is ModelPhase.LOADED for r in records) >= 2
                and sum(h.can_take(part) for h in pool.hosts()) >= 2
                for part in parts
            )
            if ready and loaded:
                return
            await pool.changed(0.1)


async def _measure(report: Report, quick: bool, console: Console) -> None:
    paths = {"shipped": kjv_llama_folder(), "random": random_llama()}
    whole = BrowserPool({"chrome": 1}, level="low", **_PATIENT)
    # Three for the stages, and one to spare.
    cut = BrowserPool({"chrome": SHARDS + 1}, level="high", **_PATIENT)
    async with whole, cut:
        with Progress(console=console) as progress:
            for name, path in paths.items():
                await whole.load(name, path)
                for shards in (1, 2, 3):
                    await cut.load(f"{name}{shards}", path, shards=shards)
                await _rates(report, quick, progress, name, whole, cut)
                await whole.unload(name)
                for shards in (1, 2):
                    await cut.unload(f"{name}{shards}")
                await _levels(report, quick, progress, name, cut)
                if name == "random":
                    await _failing(report, quick, progress, cut, f"{name}{SHARDS}")
                await cut.unload(f"{name}{SHARDS}")


def measure(report: Report, quick: bool, console: Console) -> None:
    asyncio.run(_measure(report, quick, console))


if __name__ == "__main__":
    sys.exit(run("sharding", measure))
