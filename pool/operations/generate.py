"""Text from a decoder, whole or cut: the caller's inputs to a sequence, and the sequence's way
through the pool's browsers.

`RoutedStages` shows the pool's browsers to `sharding.sequences.pipeline`, which does the work;
`Generating` makes a `Result` of what comes. This module must not choose a browser or a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.messages import RunRequest
from actors.relay import Hop
from pool.latency import Latencies
from pool.models.registry import ModelEntry
from pool.models.tokens import TextEncoder
from pool.results import RecoveryStep, Result
from pool.routing import Routing
from recovery.errors import BadInput, BrowserError, SequenceLost
from recovery.failures import Failure, categorize_browser_failure
from recovery.kinds import Readiness
from recovery.levels import held
from recovery.records import HostRef, HostStatus
from sharding.models.frames import Array
from sharding.sequences.barrier import Rendezvous
from sharding.sequences.caches import StepOrder
from sharding.sequences.decoding import OPTIONS, Decoding, decoding_from
from sharding.sequences.hosts import Chain, Place, StepReply
from sharding.sequences.pipeline import Generation, Token
from sharding.sequences.rules import PipelineRules
from sharding.sequences.stages import Line, check_length

GENERATE = "generate"
_FROZEN_GRACE_SECONDS = 1.0  # past a step's limit, before its browser is taken for frozen


@dataclass(frozen=True)
class Prompt:
    """What a sequence begins with. `line` are the stages that it goes through."""

    line: Line
    ids: tuple[int, ...]
    decoding: Decoding


@dataclass(frozen=True)
class GeneratedToken:
    """One new token of a stream. `text` is what it adds to the text; `str()` gives that."""

    id: int
    position: int
    text: str
    scores: Array | None = None
    step_ms: float = 0.0  # from the step's begin to its answer, repairs included
    in_page_ms: float = 0.0  # of these, in all pages

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class StageView:
    """A stage of a sequence now; see `sharding.sequences.copies.Standing`. `layers`: None if
    unknown.
    """

    model: str
    layers: tuple[int, int] | None
    where: tuple[HostRef, ...]
    position: int
    rebuilding: bool


@dataclass(frozen=True)
class SequenceView:
    """A sequence under way: where its stages are, and what has happened to it so far."""

    stages: tuple[StageView, ...] = ()
    recovery: tuple[RecoveryStep, ...] = ()


def prepare_generate(
    entry: ModelEntry, inputs: Mapping[str, Any], encoder: TextEncoder | None
) -> Prompt:
    """The sequence that a caller asks for. Raises `BadInput` or `NotAModel`.

    `inputs` holds `text` or `input_ids`, and any of `sharding.sequences.decoding.Decoding`'s
    options.
    """
    if entry.line is None:
        raise BadInput(
            f"Model {entry.name!r} can't generate: it is no decoder with a cache.",
            expected="a decoder with a cache",
            got=str(entry.spec.type),
        )
    entry.line.check_generates()
    if not isinstance(inputs, Mapping):
        raise BadInput("Inputs must be named: text or input_ids.", got=type(inputs).__name__)
    known = ("text", "input_ids", *OPTIONS)
    if unknown := [str(name) for name in inputs if name not in known]:
        raise BadInput(
            f"generate takes no {', '.join(unknown)}: expected {', '.join(known)}.",
            expected=list(known),
            got=unknown,
        )
    if ("text" in inputs) == ("input_ids" in inputs):
        raise BadInput(
            "generate takes either text or input_ids.",
            expected="text, or input_ids",
            got=[str(name) for name in inputs],
        )
    options = {name: value for name, value in inputs.items() if name in OPTIONS}
    decoding = decoding_from(options)
    if not decoding.ignore_eos:
        ends = frozenset(_ends(entry.config))
        decoding = decoding_from({**options, "stop": sorted(decoding.stop | ends)})
    ids = _ids_of(entry, inputs, encoder)
    check_length(len(ids), decoding.max_new_tokens, entry.positions_max)
    return Prompt(entry.line, ids, decoding)


def _ids_of(
    entry: ModelEntry, inputs: Mapping[str, Any], encoder: TextEncoder | None
) -> tuple[int, ...]:
    vocabulary = entry.config.get("vocab_size")
    if "text" in inputs:
        if encoder is None:
            raise BadInput(
                f"Model {entry.name!r} has no tokenizer.json beside it, so it takes no text: pass "
                "input_ids.",
                expected="input_ids",
                got="text",
            )
        if not isinstance(inputs["text"], str):
            raise BadInput(
                "text: expected one string; several sequences are several calls.",
                expected="a string",
                got=type(inputs["text"]).__name__,
            )
        ids = encoder.ids(inputs["text"])
        begin = entry.config.get("bos_token_id")
        if isinstance(begin, int) and (not ids or ids[0] != begin):
            ids = [begin, *ids]
        return tuple(ids)
    array = np.asarray(inputs["input_ids"])
    if not array.size:
        return ()
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.size != array.shape[-1]:
        raise BadInput(
            f"input_ids: expected whole numbers of shape (tokens,) or (1, tokens), got "
            f"{array.dtype}{list(array.shape)}.",
            expected="int (tokens,)",
            got=f"{array.dtype}{list(array.shape)}",
        )
    ids = [int(token) for token in array.reshape(-1)]
    most = vocabulary if isinstance(vocabulary, int) else 2**31
    if any(not 0 <= token < most for token in ids):
        raise BadInput(
            f"input_ids: expected ids from 0 to {most - 1}, got {min(ids)} to {max(ids)}.",
            expected=f"0 to {most - 1}",
            got=[min(ids), max(ids)],
        )
    return tuple(ids)


def _ends(config: Mapping[str, Any]) -> Sequence[int]:
    ends = config.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    return [token for token in listed if isinstance(token, int) and not isinstance(token, bool)]


class RoutedStages:
    """The pool's browsers, as a sequence sees them."""

    def __init__(
        self,
        routing: Routing,
        latencies: Latencies,
        client: str,
        digests: Mapping[str, str],
        *,
        on_wrong: Callable[[HostRef, Failure], None],
        on_stuck: Callable[[str], str],
    ) -> None:
        self._routing = routing
        self._latencies = latencies
        self._prefix = f"{client}/" if client else ""
        self._digests = digests
        self._on_wrong = on_wrong
        self._on_stuck = on_stuck
        self._orders = 0
        self._seen = routing.changes

    def hosts(self) -> Sequence[HostStatus]:
        self._seen = self._routing.changes
        return self._routing.candidates()

    async def take(
        self,
        ref: HostRef,
        model: str,
        order: StepOrder,
        tensors: Mapping[str, Array],
        seconds: float,
    ) -> StepReply:
        """One order to one browser; an error of it is a failure in the reply."""
        # Each order is asked under its own name: whether it was carried out already is for the
        # page to say, which has the caches.
        self._orders += 1
        op_id = f"{self._prefix}{order.sequence}:{self._orders}"
        digest = self._digests.get(model, "")
        request = RunRequest(op_id, ref, model, max(seconds, 0.001), digest, stage=order)
        try:
            async with asyncio.timeout(seconds + _FROZEN_GRACE_SECONDS):
                reply = await self._routing.run(ref, request, tensors)
        except (BrowserError, TimeoutError) as error:
            fields = error.fields if isinstance(error, BrowserError) else {}
            return StepReply(failure=self._failure(error, ref, op_id, **fields))
        if reply is None:
            return StepReply(failure=self._failure("it was replaced", ref, op_id, what="replaced"))
        await self._routing.learn(reply.status)
        if reply.failure is not None:
            return StepReply(failure=reply.failure)
        if reply.busy:
            return StepReply(busy=True)
        return StepReply(reply.outputs or {}, in_page_ms=reply.in_page_ms)

    def _failure(self, error: Exception | str, ref: HostRef, op_id: str, **facts: Any) -> Failure:
        return categorize_browser_failure(
            error, {**facts, "ref": ref, "op_id": op_id, "at": time.time()}
        )

    async def chain(
        self, sequence: str, places: Sequence[Place], *, copies: bool, seconds: float
    ) -> Chain | None:
        hops = []
        for number, place in enumerate(places):
            later = {spec.name for other in places[number + 1 :] for spec in other.stage.shared}
            hops.append(
                Hop(
                    number,
                    place.ref,
                    place.stage.model,
                    self._digests.get(place.stage.model, ""),
                    place.fence,
                    tuple(spec.name for spec in (*place.stage.shared, *place.stage.receives)),
                    tuple(sorted(later)),
                    place.choice,
                    place.deltas,
                    copies,
                    seconds,
                )
            )
        return await self._routing.chain(sequence, hops)

    async def change(self, seconds: float) -> None:
        for model in self._digests:
            self._on_stuck(model)  # it may be parked
        await self._routing.change(seconds, self._seen)

    async def distrust(self, ref: HostRef) -> None:
        await self._routing.distrust(ref)

    def outvoted(self, ref: HostRef, failure: Failure) -> None:
        self._on_wrong(ref, failure)

    def took(self, model: str, tokens: int, seconds: float) -> None:
        self._latencies.note(_kind(model, tokens), seconds)

    def late_after(self, model: str, tokens: int) -> float:
        return self._latencies.late_after(_kind(model, tokens))

    def layers(self, model: str) -> tuple[int, int] | None:
        """Which layers of the uncut model a stage has, from and to (exclusive)."""
        order = self._routing.models().get(model)
        return order.spec.span if order is not None else None

    def ready(self) -> int:
        """How many browsers each stage has at least."""
        return min(
            sum(
                status.readiness is Readiness.READY and model in status.models
                for status in self._routing.candidates()
            )
            for model in self._digests
        )


def _kind(model: str, tokens: int) -> object:
    return (model, tokens.bit_length())


def _place(stage: int) -> str:
    return f"stage {stage}, " if stage >= 0 else ""  # below 0: no one stage's


class Generating:
    """One sequence of one caller."""

    def __init__(
        self,
        op_id: str,
        entry: ModelEntry,
        prompt: Prompt,
        stages: RoutedStages,
        rules: PipelineRules,
        encoder: TextEncoder | None,
        rendezvous: Rendezvous | None,
    ) -> None:
        self._op_id = op_id
        self._entry = entry
        self._prompt = prompt
        self._stages = stages
        self._encoder = encoder
        self._level = rules.level
        self._began = time.monotonic()
        self._first_token: float | None = None
        self._tokens: list[Token] = []
        self._error: SequenceLost | None = None
        # Two clients may give their operations the same names; a page must not mix them up.
        name = f"{op_id}/{secrets.token_hex(4)}"
        self.generation = Generation(
            name, prompt.line, stages, rules, prompt.decoding, rendezvous=rendezvous
        )

    async def stream(self) -> AsyncGenerator[GeneratedToken]:
        """The new tokens, each as soon as there is one. Raises `SequenceLost`."""
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
        """All of it, within `seconds`; a sequence that is lost, or late, is a failed result."""
        try:
            async with asyncio.timeout(seconds), contextlib.aclosing(self.stream()) as tokens:
                async for _ in tokens:
                    pass
        except SequenceLost:
            pass
        except TimeoutError:
            self._error = SequenceLost(f"it was not done within {seconds:g} s")
        return self.result()

    def view(self) -> SequenceView:
        """How it is now: cheap, and asks nobody."""
        standings = zip(self._prompt.line.stages, self.generation.standings(), strict=True)
        return SequenceView(
            tuple(
                StageView(
                    stage.model,
                    self._stages.layers(stage.model),
                    now.refs,
                    now.position,
                    now.rebuilding,
                )
                for stage, now in standings
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
            for step in self.generation.account.happened
        )

    def result(self) -> Result:
        """What has come of it so far. Of a failed one, the tokens that came are in its error."""
        account, ended = self.generation.account, time.monotonic()
        tokens = np.asarray([token.id for token in self._tokens], np.int64)
        values: dict[str, Array] = {"tokens": tokens}
        if self._encoder is not None:
            values["text"] = np.asarray(self._encoder.decode(tokens.tolist()))
        if self._prompt.decoding.logits:
            rows = [token.scores for token in self._tokens if token.scores is not None]
            values["logits"] = np.stack(rows) if rows else np.zeros((0, 0), np.float32)
        began = self._first_token or ended
        rate = (len(tokens) - 1) / (ended - began) if ended > began and len(tokens) > 1 else 0.0
        refs = self.generation.where()
        last = next((s for s in self._stages.hosts() if refs and s.ref == refs[-1]), None)
        model = self._prompt.line.stages[-1].model
        error = self._error
        return Result(
            self._op_id,
            self._entry.name,
            GENERATE,
            success=error is None,
            level_effective=held(self._level, self._stages.ready()),
            browser_id=refs[-1].browser_id if refs else "",
            browser_type=last.browser if last else None,
            epoch=refs[-1].epoch if refs else 0,
            backend=last.models[model].backend if last and model in last.models else None,
            recovery=self._recovery(),
            original_error=self.generation.first_failure,
            error="" if error is None else f"{error} ({len(tokens)} tokens had come)",
            metrics={
                "duration_ms": (ended - self._began) * 1e3,
                "in_page_ms": account.in_page_ms,
                "first_token_ms": (began - self._began) * 1e3,
                "tokens_per_second": rate,
                "tokens": float(len(tokens)),
                "attempts": 1.0 + sum(step.what == "failed" for step in account.happened),
                "copied_bytes": float(account.copied_bytes),
                "history_bytes": float(account.history_bytes),
            },
            values=values if error is None else {},
            stages=tuple(ref.browser_id for ref in refs),
        )
