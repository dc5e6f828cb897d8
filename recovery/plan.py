"""What to do about a failed browser: rungs, the strategies that order them, and a plan.

All data and pure functions. A *level* says which rungs an operation may count on, a *strategy* is
an order of rungs, and `plan` cuts a strategy's order to the rung at which this failure should
start. The supervisor carries a plan out and moves on to its next step. This module must not act,
wait or read a clock.

Where a failure begins is listed, with what the rung does, in `docs/architecture.md`, "The way of a
repair".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from recovery.breaker import CircuitState
from recovery.checks import shown
from recovery.errors import BadInput
from recovery.failures import Category, Failure, Scope
from recovery.kinds import Level, RecoveryLevel, Strategy

# Rungs by short names: this module is a table of them.
MINIMAL = RecoveryLevel.MINIMAL
MODERATE = RecoveryLevel.MODERATE
AGGRESSIVE = RecoveryLevel.AGGRESSIVE
FALLBACK = RecoveryLevel.FALLBACK
SIMULATION = RecoveryLevel.SIMULATION

START_RUNG: Mapping[Category, RecoveryLevel] = {
    Category.CONNECTION_FAILURE: MINIMAL,
    Category.TIMEOUT: MINIMAL,
    Category.LAUNCH_FAILURE: MODERATE,
    Category.CRASH: MODERATE,
    Category.INTERNAL_ERROR: MODERATE,
    Category.RESOURCE_EXHAUSTION: AGGRESSIVE,
    Category.GPU_ERROR: AGGRESSIVE,
    Category.API_ERROR: AGGRESSIVE,
    Category.WRONG_ANSWER: FALLBACK,
}

LEVEL_RUNGS: Mapping[Level, frozenset[RecoveryLevel]] = {
    Level.NONE: frozenset(),
    Level.LOW: frozenset({MINIMAL}),
    Level.MEDIUM: frozenset(RecoveryLevel),
    Level.HIGH: frozenset(RecoveryLevel),
    Level.CRITICAL: frozenset(RecoveryLevel),
}

# A rung with so many attempts for a kind of failure, and at most this success rate, is skipped.
INEFFECTIVE_ATTEMPTS = 5
INEFFECTIVE_RATE = 0.2


@dataclass(frozen=True)
class StrategyOrder:
    """A strategy as data. `race`: its rungs are tried at once, and the first that works is kept."""

    name: str
    rungs: tuple[RecoveryLevel, ...]
    race: bool = False


STRATEGIES: dict[str, StrategyOrder] = {
    order.name: order
    for order in (
        StrategyOrder(Strategy.PROGRESSIVE, (MINIMAL, MODERATE, AGGRESSIVE, FALLBACK)),
        StrategyOrder(Strategy.RECONNECT, (MINIMAL,)),
        StrategyOrder(Strategy.RESTART, (MODERATE, AGGRESSIVE)),
        StrategyOrder(Strategy.FAILOVER, (FALLBACK,)),
        StrategyOrder(Strategy.PARALLEL, (MINIMAL, MODERATE, FALLBACK), race=True),
        # Sharded models: what is rebuilt is a stage; the order of rungs is the same.
        StrategyOrder(Strategy.COORDINATED, (MODERATE, AGGRESSIVE, FALLBACK)),
    )
}

_BUILT_IN = frozenset(STRATEGIES)


def register_strategy(name: str, rungs: Iterable[RecoveryLevel], *, race: bool = False) -> None:
    """Let pools of this process use `name` as a strategy. Raises `BadInput`.

    The order is part of the pool's configuration and of its log, so only the process
    that makes the pool has to register it.
    """
    order = StrategyOrder(name, tuple(RecoveryLevel(rung) for rung in rungs), race)
    if not name or name in _BUILT_IN:
        raise BadInput(
            f"{name!r} can't be registered as a strategy: the name is empty, or is "
            "built in. Choose another name.",
            got=name,
        )
    if not order.rungs or len(set(order.rungs)) != len(order.rungs):
        raise BadInput(
            f"strategy {name!r}: expected one or more rungs, each once, got {order.rungs}.",
            got=[int(rung) for rung in order.rungs],
        )
    STRATEGIES[name] = order


def strategy_order(name: str) -> StrategyOrder:
    """The strategy of that name. Raises `BadInput`, listing the known names."""
    try:
        return STRATEGIES[name]
    except (KeyError, TypeError):  # TypeError: what is no key at all
        known = ", ".join(STRATEGIES)
        raise BadInput(
            f"strategy: expected one of {known}, got {shown(name)}. Others can be registered with "
            "recovery.plan.register_strategy.",
            expected=list(STRATEGIES),
            got=name,
        ) from None


@dataclass(frozen=True)
class Tally:
    """How often a rung was tried for failures of one kind, and how often it worked."""

    attempts: int = 0
    successes: int = 0

    @property
    def ineffective(self) -> bool:
        tried = self.attempts >= INEFFECTIVE_ATTEMPTS
        return tried and self.successes <= self.attempts * INEFFECTIVE_RATE


@dataclass(frozen=True)
class Plan:
    """Steps in order; the rungs of one step are tried at once. No steps: nothing can be done.

    `reason` says why it begins where it does, for people.
    """

    steps: tuple[tuple[RecoveryLevel, ...], ...]
    reason: str


def start_rung(failure: Failure, breaker: CircuitState) -> RecoveryLevel:
    """Where recovery from this failure begins, before its history is considered."""
    rung = START_RUNG[failure.category]
    if breaker is CircuitState.HALF_OPEN:
        rung = max(rung, MODERATE)
    if breaker in (CircuitState.OPEN, CircuitState.FORCED_OPEN):
        rung = max(rung, FALLBACK)
    connection = failure.category is Category.CONNECTION_FAILURE
    alive = failure.scope is Scope.OPERATION or (connection and failure.scope is Scope.PAGE)
    if rung is MINIMAL and not alive:
        rung = MODERATE  # its process is dead or hangs: reconnecting can't help
    return rung


def plan(
    level: Level,
    strategy: StrategyOrder,
    failure: Failure,
    breaker: CircuitState = CircuitState.CLOSED,
    history: Mapping[RecoveryLevel, Tally] | None = None,
    *,
    start: RecoveryLevel | None = None,
) -> Plan:
    """The steps against `failure` that `level` allows, in the order of `strategy`.

    `breaker` is the browser's; `history` holds the tally of each rung for failures of this kind.
    `start` overrides the rung to begin with. Rung 5 is no step: it answers in place of a browser,
    at the caller. A strategy that has no rung from the start rung on begins with
    its highest one: a pool whose strategy is only to restart restarts.
    """
    history = history or {}
    allowed = LEVEL_RUNGS[level]
    if start is not None:
        why = f"requested to start at rung {int(start)}"
    else:
        usual, start = START_RUNG[failure.category], start_rung(failure, breaker)
        why = f"{failure.category} starts at rung {int(usual)}"
        if start is not usual:
            why += f", raised to {int(start)} (breaker {breaker}, scope {failure.scope})"
    rungs = [rung for rung in strategy.rungs if rung is not SIMULATION]
    begin = [rung for rung in rungs if rung >= start] or rungs[-1:]
    effective = [rung for rung in begin if not history.get(rung, Tally()).ineffective]
    if effective and effective != begin:
        skipped = ", ".join(str(int(rung)) for rung in begin if rung not in effective)
        why += f"; rung {skipped} rarely works for this kind of failure"
        begin = effective
    # A race that begins above its lowest rung is still a race of the remaining rungs.
    begin = [rung for rung in begin if rung in allowed]
    steps = (tuple(begin),) if strategy.race and begin else tuple((rung,) for rung in begin)
    if failure.category is Category.WRONG_ANSWER and begin == [FALLBACK] and MODERATE in rungs:
        # Where no other kind of browser can take over, a fresh one of the same kind is next best.
        steps = (*steps, (MODERATE,))
    if not steps:
        why = f"level {level} allows no rung for this failure"
    return Plan(steps, why)
