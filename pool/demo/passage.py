"""The demonstration's last act: three browsers write a passage, and one is killed in mid-sentence.

It is written twice, first without a fault; every token and every bit of every score must be the
same. This module must not judge the machine: who calls it looks for what was left behind.
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
ASK: Mapping[str, Any] = {
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
    """How the act went: what was checked, and every launch that there was."""

    checks: Mapping[str, bool]
    launches: tuple[LaunchReport, ...]


def engines() -> dict[str, int]:
    """One browser of each engine that is here; two of the only one. Raises `SetupError`."""
    here = installed_kinds()
    kinds = [str(kind) for kind in _ENGINES if kind in here]
    if not kinds:
        raise SetupError("no browser for the passage is installed: `tabpool doctor` names them")
    return dict.fromkeys(kinds, 1) if len(kinds) > 1 else {kinds[0]: 2}


async def write_passage(console: Console) -> Passage:
    """Open a pool, have it write the passage twice, kill a browser the second time; close it."""
    model, browsers = kjv_llama_folder(), engines()
    who = ", ".join(f"{count} {kind}" for kind, count in browsers.items())
    began = time.monotonic()
    pool = BrowserPool(browsers, name="passage", backend="wasm", level="high")
    launches: dict[tuple[str, int], LaunchReport] = {}
    try:
        with console.status(f"a llama, cut into {SHARDS}: starting {who} ...") as status:
            await pool.open()
            await pool.load("llama", model, shards=SHARDS)
            opened = time.monotonic() - began
            status.update("writing a passage without a fault ...")
            right = await pool.run_with_recovery("llama", "generate", ASK)
            launches.update(await _launched(pool))
        console.print(
            f"\n{len(browsers)} engines, one llama in {SHARDS} shards (ready in {opened:.1f} s): "
            f"the passage again, and after {KILL_AFTER} tokens the browser of the middle stage is "
            "killed",
            highlight=False,
        )
        notes: list[str] = []
        plain = PlainText(_on(console), notes.append, mark=True)
        shown = screen_or(console, plain)
        if shown is plain:
            _on(console)(ASK["text"])
        written = await write(pool, "llama", ASK, shown, kill=Kill(KILL_AFTER))
        for note in notes:  # a screen has shown them already
            console.print(f"  {note}", **_PLAIN)
        with console.status("the killed browser is being replaced ..."):
            await _repaired(pool)
            launches.update(await _launched(pool))
    finally:
        await pool.close()
    return Passage(checked(written, right, len(browsers)), tuple(launches.values()))


_PLAIN: Mapping[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}


def _on(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, **_PLAIN, end="")


async def _launched(pool: BrowserPool) -> dict[tuple[str, int], LaunchReport]:
    launches = (await pool.state()).launches
    return {(name, report.pids.get("browser", 0)): report for name, report in launches.items()}


async def _repaired(pool: BrowserPool) -> None:
    """Return when the browser that was killed is back, or another in its place."""
    async with asyncio.timeout(_REPAIR_SECONDS):
        while True:
            state = await pool.control()
            over = (Phase.READY, Phase.STOPPED)
            settled = all(r.phase in over or r.replaced_by for r in state.browsers.values())
            if state.repairs and settled:
                return
            await pool.changed()


def checked(written: Written, right: Result, engines: int) -> dict[str, bool]:
    """What the passage was to show, and whether it does. `right` is the one without a fault."""
    result, killed = written.result, written.killed
    assert result is not None
    good = result.success and right.success
    same_tokens = good and np.array_equal(result.values["tokens"], right.values["tokens"])
    same_bits = good and result.values["logits"].tobytes() == right.values["logits"].tobytes()
    text = str(right.values.get("text", ""))
    rate = result.metrics["tokens_per_second"]
    where = "nobody" if killed is None else f"{killed.browser_id} (stage {killed.stage})"
    rebuilt = written.rebuilt_after_kill
    again = ", ".join(f"{step.what} in {step.seconds * 1e3:.0f} ms" for step in rebuilt)
    return {
        f"{len(written.tokens)} tokens by {engines} engines ({rate:.1f} a second); "
        f"{where} was killed after {KILL_AFTER} of them": killed is not None,
        f"its stage went on elsewhere: {again or 'it did not'}": bool(rebuilt),
        "the passage is the same as without the kill, token by token": same_tokens,
        "so is every bit of every score": same_bits,
        "its text was delivered once": good and written.text == text,
    }
