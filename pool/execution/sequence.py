"""One sequence of one caller, from its prompt to its result, over the pool's browsers.

`sharding.sequences.pipeline` generates it, over `pool.execution.routed_stages`; this module makes
the tokens, the view and the `Result` of it. This module must not choose a browser or a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pool.execution.routed_stages import RoutedStages
from pool.models.registry import ModelEntry
from pool.models.tokens import TextEncoder
from pool.results import RecoveryStep, Result
from recovery.errors import SequenceLost
from recovery.levels import effective_level
from recovery.records import HostRef
from sharding.models.frames import Array
from sharding.sequences.barrier import Barrier
from sharding.sequences.decoding import Decoding
from sharding.sequences.pipeline import Generation, Token
from sharding.sequences.rules import PipelineRules
from sharding.sequences.stages import StagePipeline


@dataclass(frozen=True)
class Prompt:
    """The input of a sequence. `pipeline` are its stages."""

    pipeline: StagePipeline
    ids: tuple[int, ...]
    decoding: Decoding


@dataclass(frozen=True)
class GeneratedToken:
    """One new token of a stream. `text` is its text, which `str()` returns."""

    id: int
    position: int
    text: str
    scores: Array | None = None
    step_ms: float = 0.0  # duration of the step, repairs included
    in_page_ms: float = 0.0  # of which in the pages

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class StageView:
    """A stage of a sequence now; see `sharding.sequences.copies.StageStatus`. `layers`: None if
    unknown.
    """

    model: str
    layers: tuple[int, int] | None
    where: tuple[HostRef, ...]
    position: int
    rebuilding: bool


@dataclass(frozen=True)
class SequenceView:
    """A sequence in progress: its stages, and its recovery steps so far."""

    stages: tuple[StageView, ...] = ()
    recovery: tuple[RecoveryStep, ...] = ()


class Generating:
    """One sequence of one caller."""

    def __init__(
        self,
        op_id: str,
        op: str,
        entry: ModelEntry,
        prompt: Prompt,
        stages: RoutedStages,
        rules: PipelineRules,
        encoder: TextEncoder | None,
        barrier: Barrier | None,
    ) -> None:
        self._op_id = op_id
        self._op = op
        self._entry = entry
        self._prompt = prompt
        self._stages = stages
        self._encoder = encoder
        self._level = rules.level
        self._began = time.monotonic()
        self._first_token: float | None = None
        self._tokens: list[Token] = []
        self._error: SequenceLost | None = None
        # Unique, as two clients may use the same operation ids.
        name = f"{op_id}/{secrets.token_hex(4)}"
        self.generation = Generation(
            name, prompt.pipeline, stages, rules, prompt.decoding, barrier=barrier
        )

    async def stream(self) -> AsyncGenerator[GeneratedToken]:
        """The new tokens, as they are generated. Raises `SequenceLost`."""
        piece_of = self._encoder.pieces() if self._encoder else lambda _: ""
        try:
            async for token in self.generation.tokens(self._prompt.ids):
                if self._first_token is None:
                    self._first_token = time.monotonic()
                self._tokens.append(token)
                yield GeneratedToken(
                    token.id,
                    token.position,
                    piece_of(token.id),
                    token.scores,
                    token.step_ms,
                    token.in_page_ms,
                )
        except SequenceLost as error:
            self._error = error
            raise

    async def run(self, seconds: float | None = None) -> Result:
        """Generate all tokens within `seconds`; a lost or late sequence is a failed result."""
        try:
            async with asyncio.timeout(seconds), contextlib.aclosing(self.stream()) as tokens:
                async for _ in tokens:
                    pass
        except SequenceLost:
            pass
        except TimeoutError:
            self._error = SequenceLost(f"the sequence was not finished within {seconds:g} s")
        return self.result()

    def view(self) -> SequenceView:
        """The current state: cheap, sends no request."""
        statuses = zip(self._prompt.pipeline.stages, self.generation.statuses(), strict=True)
        return SequenceView(
            tuple(
                StageView(
                    stage.model,
                    self._stages.layers(stage.model),
                    now.refs,
                    now.position,
                    now.rebuilding,
                )
                for stage, now in statuses
            ),
            self._recovery(),
        )

    def _recovery(self) -> tuple[RecoveryStep, ...]:
        return tuple(
            RecoveryStep(
                step.what,
                f"{step.where} ({_place(step.stage)}position {step.position})".strip(),
                step.at,
                step.seconds,
                step.outcome,
                step.failure,
            )
            for step in self.generation.statistics.events
        )

    def result(self) -> Result:
        """The result so far. The error of a failed one has the number of generated tokens."""
        statistics, ended = self.generation.statistics, time.monotonic()
        tokens = np.asarray([token.id for token in self._tokens], np.int64)
        values: dict[str, Any] = {"tokens": tokens}
        if self._encoder is not None:
            values["text"] = self._encoder.decode(tokens.tolist())
        if self._prompt.decoding.logits:
            rows = [token.scores for token in self._tokens if token.scores is not None]
            values["logits"] = np.stack(rows) if rows else np.zeros((0, 0), np.float32)
        began = self._first_token or ended
        rate = (len(tokens) - 1) / (ended - began) if ended > began and len(tokens) > 1 else 0.0
        refs = self.generation.where()
        last = next((s for s in self._stages.hosts() if refs and s.ref == refs[-1]), None)
        model = self._prompt.pipeline.stages[-1].model
        error = self._error
        return Result(
            self._op_id,
            self._entry.name,
            self._op,
            success=error is None,
            level_effective=effective_level(self._level, self._stages.ready()),
            browser_id=refs[-1].browser_id if refs else "",
            browser_type=last.browser if last else None,
            epoch=refs[-1].epoch if refs else 0,
            backend=last.models[model].backend if last and model in last.models else None,
            recovery=self._recovery(),
            original_error=self.generation.first_failure,
            error="" if error is None else f"{error} (after {len(tokens)} tokens)",
            metrics={
                "duration_ms": (ended - self._began) * 1e3,
                "in_page_ms": statistics.in_page_ms,
                "first_token_ms": (began - self._began) * 1e3,
                "tokens_per_second": rate,
                "tokens": float(len(tokens)),
                "attempts": 1.0 + sum(step.what == "failed" for step in statistics.events),
                "copied_bytes": float(statistics.copied_bytes),
                "history_bytes": float(statistics.history_bytes),
            },
            values=values if error is None else {},
            stages=tuple(ref.browser_id for ref in refs),
        )


def _place(stage: int) -> str:
    return f"stage {stage}, " if stage >= 0 else ""  # below 0: no one stage's
