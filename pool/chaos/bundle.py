"""Writes a failure bundle for each failed or wrongly answered operation of a chaos run.

This module must not delay the run: bundles are written in background tasks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from pool.chaos.workload import Question
from pool.pool import BrowserPool
from pool.results import Result
from recovery.errors import PoolError
from recovery.faults import Schedule

BUNDLES_MAX = 20  # per run: the first ones are the most useful


class BundleWriter:
    """Writes to `folder`/bundles; with no folder, nothing."""

    def __init__(
        self,
        folder: Path | None,
        schedule: Schedule,
        settings: Mapping[str, str],
        *,
        with_data: bool = False,
    ) -> None:
        self._folder = folder
        self._schedule = json.loads(schedule.to_json())
        self._settings = dict(settings)
        self._with_data = with_data
        self._pool: BrowserPool | None = None
        self._writing: list[asyncio.Task[None]] = []

    def attach(self, pool: BrowserPool) -> None:
        """Set the pool of the run."""
        self._pool = pool

    def write(self, number: int, question: Question, result: Result, why: str) -> None:
        """Start writing the bundle of operation `number`."""
        if self._folder is None or self._pool is None or len(self._writing) >= BUNDLES_MAX:
            return
        path = self._folder / "bundles" / f"operation-{number}.zip"
        chaos = {"schedule": self._schedule, "settings": self._settings, "number": number}
        writing = self._write(self._pool, path, question, result, why, chaos)
        self._writing.append(asyncio.create_task(writing, name="bundle"))

    async def _write(
        self,
        pool: BrowserPool,
        path: Path,
        question: Question,
        result: Result,
        why: str,
        chaos: Mapping[str, object],
    ) -> None:
        with contextlib.suppress(PoolError, OSError):
            await pool.bundle(
                result, question.inputs, path, with_data=self._with_data, why=why, chaos=chaos
            )

    async def done(self) -> None:
        """Wait until all bundles are written."""
        await asyncio.gather(*self._writing)
