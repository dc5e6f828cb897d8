"""Voting: whether answers agree, and which of them is accepted.

Hosts with equal `NumericId` must agree bit for bit if that is `exact`; others within the model's
tolerance, which can see large errors only. Two that agree elect an answer. Pure: this module must
not know how an answer was computed, and must not act on a verdict.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from recovery.kinds import Level
from recovery.records import HostRef, NumericId

QUORUM = 2  # answers that must agree, where browsers vote
Array: TypeAlias = np.ndarray[Any, Any]


def quorum(level: Level) -> int:
    """How many answers must agree at this level."""
    return QUORUM if level is Level.CRITICAL else 1


@dataclass(frozen=True)
class Tolerance:
    """How far answers of unequal `NumericId` may lie apart.

    Two numbers agree if |a - b| <= atol + rtol * max(|a|, |b|). Integers and booleans must be
    equal in any case. The default is for float32 on WASM against native or WebGPU: the differences
    that were measured lie between 1e-6 and 1e-4 (other orders of summation, other fused kernels),
    and real faults (a wrong layer, a flipped exponent bit) are orders of magnitude above it.
    """

    rtol: float = 1e-3
    atol: float = 1e-4


@dataclass(frozen=True)
class Ballot:
    """One host's answer to one operation."""

    voter: HostRef
    numeric: NumericId
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Elected:
    """The result of a vote.

    `winner` has most supporters. `outvoted` agree with no other answer, or differ in low bits from
    two of their `NumericId` that are equal. `doubtful` agree with another within tolerance, but
    not bit for bit with those of equal id as they should: which is wrong can't be decided.
    """

    winner: Ballot
    supporters: tuple[HostRef, ...]
    outvoted: tuple[HostRef, ...] = ()
    doubtful: tuple[HostRef, ...] = ()


@dataclass(frozen=True)
class Undecided:
    """No two agree. `spread` says how far apart they are."""

    spread: str


Verdict: TypeAlias = Elected | Undecided


def count_votes(ballots: Sequence[Ballot], tolerance: Tolerance) -> Verdict:
    """The verdict on the answers so far.

    The winner is the answer that most others repeat bit for bit, then the one that most agree
    with, then the first.
    """
    agreeing, identical, conflicting = _relations(ballots, tolerance)
    if not any(agreeing):
        return Undecided(describe_spread(ballots))
    first = max(range(len(ballots)), key=lambda n: (len(identical[n]), len(agreeing[n])))
    supporters = [first, *sorted(agreeing[first])]
    outvoted, doubtful = [], []
    for n in range(len(ballots)):
        off = bool(conflicting[n]) and not identical[n]
        if not agreeing[n] or (off and any(identical[other] for other in conflicting[n])):
            outvoted.append(n)
        elif off or n not in supporters:
            doubtful.append(n)
    kept = [n for n in supporters if n not in outvoted]
    names = [tuple(ballots[n].voter for n in some) for some in (kept, outvoted, doubtful)]
    return Elected(ballots[first], *names)


_Relation: TypeAlias = list[set[int]]  # of each ballot: the numbers of others


def _relations(
    ballots: Sequence[Ballot], tolerance: Tolerance
) -> tuple[_Relation, _Relation, _Relation]:
    """Which ballots agree, which are equal bit for bit, and which should be but are not.

    Each pair is compared once: answers may be large.
    """
    agreeing, identical, conflicting = ([set[int]() for _ in ballots] for _ in range(3))
    for a, b in itertools.combinations(range(len(ballots)), 2):
        relations = [agreeing] if agree(ballots[a], ballots[b], tolerance) else []
        if _must_repeat(ballots[a], ballots[b]):
            relations.append(identical if relations else conflicting)
        for relation in relations:
            relation[a].add(b)
            relation[b].add(a)
    return agreeing, identical, conflicting


def _must_repeat(a: Ballot, b: Ballot) -> bool:
    return a.numeric == b.numeric and a.numeric.exact


def agree(a: Ballot, b: Ballot, tolerance: Tolerance) -> bool:
    """Whether two answers are the same, as far as their hosts can be expected to agree."""
    if _must_repeat(a, b):
        return same_bits(a.outputs, b.outputs)
    return close(a.outputs, b.outputs, tolerance)


def same_bits(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    """Equal in names, dtypes, shapes and every bit; only that any NaN equals any other.

    WebAssembly leaves the sign and payload of a NaN open, so engines may differ in them.
    """
    return _same_form(a, b) and all(_bits(a[name]) == _bits(b[name]) for name in a)


def _bits(array: Array) -> bytes:
    if array.dtype.kind == "f" and np.isnan(array).any():
        array = np.where(np.isnan(array), np.array(np.nan, array.dtype), array)
    return np.ascontiguousarray(array).tobytes()


def close(a: Mapping[str, Array], b: Mapping[str, Array], tolerance: Tolerance) -> bool:
    """Equal in names, dtypes and shapes, and every number within tolerance; NaN equals NaN."""
    return _same_form(a, b) and all(_close(a[name], b[name], tolerance) for name in a)


def describe_spread(ballots: Sequence[Ballot]) -> str:
    """The largest difference between any two answers, in words for a person."""
    worst, words = -1.0, "no two answers to compare"
    for first, second in itertools.combinations(ballots, 2):
        pair = f"{first.voter} and {second.voter}"
        if not _same_form(first.outputs, second.outputs):
            return f"{pair} differ in names, dtypes or shapes: " + " and ".join(
                ", ".join(f"{n}: {a.dtype}{list(a.shape)}" for n, a in ballot.outputs.items())
                for ballot in (first, second)
            )
        for name in first.outputs:
            distance, place = _distance(first.outputs[name], second.outputs[name])
            if distance > worst:
                worst = distance
                words = f"{pair} differ by up to {distance:.6g} in {name!r} (element {place})"
    return words


def _same_form(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape for name in a
    )


def _close(a: Array, b: Array, tolerance: Tolerance) -> bool:
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf
        near = np.abs(x - y) <= tolerance.atol + tolerance.rtol * np.maximum(np.abs(x), np.abs(y))
    infinite = np.isinf(x) | np.isinf(y)
    both_nan = np.isnan(x) & np.isnan(y)
    return bool(np.all(np.where(infinite, x == y, near) | both_nan))


def _distance(a: Array, b: Array) -> tuple[float, int]:
    """The largest |a - b| (infinite where only one is NaN), and the flat index of it."""
    if a.size == 0 or a.dtype.kind not in "fiub":
        return (0.0 if np.array_equal(a, b) else np.inf), 0
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    with np.errstate(invalid="ignore"):
        apart = np.abs(x - y)
    apart = np.where(x == y, 0.0, apart)
    apart = np.where(np.isnan(x) & np.isnan(y), 0.0, apart)
    apart = np.where(np.isnan(apart), np.inf, apart)
    place = int(apart.argmax())
    return float(apart[place]), place
