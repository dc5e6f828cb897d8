"""The demonstration's last part: three browsers generate a text, and one is killed in mid-sentence.

The text is generated twice, first without a fault; the tokens and logits must be bit-identical.
This module must not search for leaked processes: its caller does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from actors.driver.binaries import installed_kinds
from actors.messages import LaunchReport
from pool.commands.passage_view import Kill, PlainText, Written, screen_or, write
from pool.models.bundled import kjv_llama_folder
from pool.pool import BrowserPool
from pool.results import Result
from recovery.control import Phase
from recovery.errors import SetupError
from recovery.kinds import BrowserType

SHARDS = 3
KILL_AFTER = 24  # tokens: in the middle of a sentence
INPUTS: Mapping[str, Any] = {
    "text": "And the LORD said unto Moses,",
    "max_new_tokens": 60,
    "temperature": 0.6,
    "seed": 3,
    "ignore_eos": True,
    "logits": True,
}
_ENGINES = (BrowserType.CHROME, BrowserType.FIREFOX, BrowserType.SAFARI)
_REPAIR_SECONDS = 30.0


@dataclass(frozen=True)
class Passage:
    """The outcome: the checks, and every launch of a browser."""

    checks: Mapping[str, bool]
    launches: tuple[LaunchReport, ...]


def engines() -> dict[str, int]:
    """One browser of each installed engine, two if it is the only one. Raises `SetupError`."""
    installed = installed_kinds()
    kinds = [str(kind) for kind in _ENGINES if kind in installed]
    if not kinds:
        raise SetupError("no browser is installed: run `tabpool doctor` to see what to install")
    return dict.fromkeys(kinds, 1) if len(kinds) > 1 else {kinds[0]: 2}


async def write_passage(console: Console) -> Passage:
    """Open a pool, generate the text twice, kill a browser the second time; close the pool."""
    model, browsers = kjv_llama_folder(), engines()
    wanted = ", ".join(f"{count} {kind}" for kind, count in browsers.items())
    began = time.monotonic()
    pool = BrowserPool(browsers, name="passage", backend="wasm", level="high")
    launches: dict[tuple[str, int], LaunchReport] = {}
    try:
        with console.status(f"starting {wanted} for a llama in {SHARDS} shards ...") as status:
            await pool.open()
            await pool.load("llama", model, shards=SHARDS)
            opened = time.monotonic() - began
            status.update("generating a text without a fault ...")
            reference = await pool.run_with_recovery("llama", "generate", INPUTS)
            launches.update(await _launched(pool))
        console.print(
            f"\n{len(browsers)} engines, one llama in {SHARDS} shards (ready in {opened:.1f} s): "
            f"the same text again; after {KILL_AFTER} tokens the browser of the middle stage is "
            "killed",
            highlight=False,
        )
        notes: list[str] = []
        plain = PlainText(_printer(console), notes.append, mark=True)
        display = screen_or(console, plain)
        if display is plain:
            _printer(console)(INPUTS["text"])
        written = await write(pool, "llama", INPUTS, display, kill=Kill(KILL_AFTER))
        for note in notes:  # empty if a `Screen` has shown them
            console.print(f"  {note}", **_PLAIN)
        with console.status("waiting for the killed browser to be replaced ..."):
            await _repaired(pool)
            launches.update(await _launched(pool))
    finally:
        await pool.close()
    return Passage(checked(written, reference, len(browsers)), tuple(launches.values()))


_PLAIN: Mapping[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}


def _printer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, **_PLAIN, end="")


async def _launched(pool: BrowserPool) -> dict[tuple[str, int], LaunchReport]:
    launches = (await pool.state()).launches
    return {(name, report.pids.get("browser", 0)): report for name, report in launches.items()}


async def _repaired(pool: BrowserPool) -> None:
    """Return when the killed browser has been repaired or replaced."""
    async with asyncio.timeout(_REPAIR_SECONDS):
        while True:
            state = await pool.control()
            over = (Phase.READY, Phase.STOPPED)
            settled = all(r.phase in over or r.replaced_by for r in state.browsers.values())
            if state.repairs and settled:
                return
            await pool.changed()


def checked(written: Written, reference: Result, engines: int) -> dict[str, bool]:
    """The checks and whether each passes. `reference` is the result without a fault."""
    result, killed = written.result, written.killed
    assert result is not None
    good = result.success and reference.success
    same_tokens = good and np.array_equal(result.values["tokens"], reference.values["tokens"])
    same_bits = good and result.values["logits"].tobytes() == reference.values["logits"].tobytes()
    text = str(reference.values.get("text", ""))
    rate = result.metrics["tokens_per_second"]
    where = "no browser" if killed is None else f"{killed.browser_id} (stage {killed.stage})"
    rebuilt = written.rebuilt_after_kill
    again = ", ".join(f"{step.what} in {step.seconds * 1e3:.0f} ms" for step in rebuilt)
    return {
        f"{len(written.tokens)} tokens by {engines} engines ({rate:.1f} tokens/s); "
        f"{where} was killed after {KILL_AFTER} tokens": killed is not None,
        f"stage rebuilt in another browser: {again or 'no'}": bool(rebuilt),
        "same tokens as without the kill": same_tokens,
        "bit-identical logits": same_bits,
        "text delivered exactly once": good and written.text == text,
    }
