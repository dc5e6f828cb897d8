"""Faults that benchmarks inject, and the operation that browsers run meanwhile.

The operation is long enough to inject a fault in the middle; native onnxruntime gives the expected
answer. This module must not measure.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from actors.driver.processes import BrowserProcesses
from pool.models.bundled import minilm_folder
from pool.models.registry import read_model
from pool.operations.embed import EMBED
from recovery.kinds import BrowserType
from sharding.models.native import NativeSession

_T = TypeVar("_T")
_Array = np.ndarray[Any, Any]
ENGINES = (BrowserType.CHROME, BrowserType.FIREFOX)
_TOKENS = 128
_BATCH = 4  # long enough (some 0.3 s) for the fault to fall well inside
_FAULT_AFTER_SECONDS = 0.1
_DIFFERENCE_MAX = 1e-4


@dataclass(frozen=True)
class Fault:
    """A signal to some of a browser's processes."""

    name: str
    find: Callable[[BrowserProcesses], Sequence[int]]
    signal: signal.Signals = signal.SIGKILL
    engines: Sequence[BrowserType] = (BrowserType.CHROME,)
    plain: bool = False  # hits the plain script, too
    from_notice: bool = False  # the time counts from its detection
    notice_goal: bool = False


def _page(target: BrowserProcesses) -> list[int]:
    return [process.pid for process in target.pages()]


FAULTS = (
    Fault("tab_crash", _page, engines=ENGINES, plain=True, notice_goal=True),
    Fault(
        "browser_kill",
        lambda target: [target.pids["browser"]],
        engines=ENGINES,
        plain=True,
        notice_goal=True,
    ),
    Fault(
        "driver_kill",
        lambda target: [target.pids["driver"]],
        engines=ENGINES,
        plain=True,
        notice_goal=True,
    ),
    Fault("hang", _page, signal.SIGSTOP, from_notice=True),
    Fault("worker_kill", lambda target: [target.pids["worker"]]),
    Fault("network_kill", lambda target: [p.pid for p in target.network()]),
)


@dataclass(frozen=True)
class Question:
    """What is asked, of which model, and the native answer (batch, hidden)."""

    folder: Path
    model: Path
    inputs: Mapping[str, _Array]
    expected: _Array

    def check(self, answer: _Array) -> None:
        difference = float(np.abs(answer - self.expected).max())
        if not difference < _DIFFERENCE_MAX:
            raise AssertionError(f"a wrong answer: {difference:g} from native onnxruntime's")


def make_question() -> Question:
    """MiniLM on 4 sentences of 128 tokens. Blocks: it computes the native answer."""
    folder = minilm_folder()
    entry = read_model("minilm", folder)
    shape = (_BATCH, _TOKENS)
    inputs = {
        "input_ids": np.random.default_rng(0).integers(1000, 20000, shape, dtype=np.int64),
        "attention_mask": np.ones(shape, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
    }
    model = Path(entry.spec.files[0].path)
    native = NativeSession(str(model))
    native.open()
    expected = EMBED.finish(entry, inputs, native.run(inputs))["embedding"]
    return Question(folder, model, inputs, expected)


async def struck(
    asked: Awaitable[_T], fault: Fault, target: BrowserProcesses
) -> tuple[_T, float, float]:
    """Let the fault happen while an operation runs; what came of that, and when it happened.

    When: by the wall clock and by the performance counter.
    """
    pids = fault.find(target)  # looked up first: that takes longer than noticing may
    if not pids or not all(pids):
        raise AssertionError(f"{fault.name}: no such process of {target}")
    running = asyncio.ensure_future(asked)
    await asyncio.sleep(_FAULT_AFTER_SECONDS)
    wall, began = time.time(), time.perf_counter()
    for pid in pids:
        os.kill(pid, fault.signal)
    return await running, wall, began
