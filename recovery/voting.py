"""Whether answers agree, and which of them are to be believed.

Hosts with equal `NumericId` must agree bit for bit if that is `exact`; others within the model's
tolerance, which can see large errors only. Two that agree elect an answer. Pure: this module must
not know how an answer came about, and must not act on a verdict.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from recovery.records import HostRef, NumericId

QUORUM = 2  # answers that must agree
Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Closeness:
    """How far answers of unequal `NumericId` may lie apart.

    Two numbers agree if |a - b| <= atol + rtol * max(|a|, |b|). Integers and booleans must be
    equal in any case.
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
    """What a vote came to.

    `winner` has most behind it. `outvoted` agree with nobody, or are off by low bits where two of
    their `NumericId` repeat each other. `doubtful` agree with somebody within tolerance, but with
    none of equal id bit for bit as they should: who is wrong by low bits, nothing says.
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


def count_votes(ballots: Sequence[Ballot], closeness: Closeness) -> Verdict:
    """What the answers that have come so far elect.

    The one that most others repeat bit for bit, then the one that most agree with, then the one
    that came first.
    """
    kin = {b.voter: _others(ballots, b, _repeats) for b in ballots}
    friends = {b.voter: _others(ballots, b, lambda x, y: agree(x, y, closeness)) for b in ballots}
    if not any(friends.values()):
        return Undecided(describe_spread(ballots))
    winner = max(ballots, key=lambda b: (len(kin[b.voter]), len(friends[b.voter])))
    supporters = (winner.voter, *(b.voter for b in friends[winner.voter]))
    outvoted, doubtful = [], []
    for ballot in ballots:
        off = _disputed(ballot, ballots) and not kin[ballot.voter]
        if not friends[ballot.voter] or (off and _others_repeat(ballot, ballots)):
            outvoted.append(ballot.voter)
        elif off or ballot.voter not in supporters:
            doubtful.append(ballot.voter)
    kept = tuple(voter for voter in supporters if voter not in outvoted)
    return Elected(winner, kept, tuple(outvoted), tuple(doubtful))


def _others(
    ballots: Sequence[Ballot], one: Ballot, alike: Callable[[Ballot, Ballot], bool]
) -> list[Ballot]:
    return [ballot for ballot in ballots if ballot is not one and alike(one, ballot)]


def _repeats(a: Ballot, b: Ballot) -> bool:
    return a.numeric == b.numeric and a.numeric.exact and same_bits(a.outputs, b.outputs)


def _disputed(ballot: Ballot, ballots: Sequence[Ballot]) -> bool:
    """Whether one that should repeat it bit for bit does not."""
    return ballot.numeric.exact and any(
        other.numeric == ballot.numeric and not same_bits(other.outputs, ballot.outputs)
        for other in ballots
    )


def _others_repeat(ballot: Ballot, ballots: Sequence[Ballot]) -> bool:
    """Whether two of its `NumericId` repeat each other, so that they outvote it in low bits."""
    equals = [b for b in ballots if b.numeric == ballot.numeric and b is not ballot]
    return any(_repeats(a, b) for a, b in itertools.combinations(equals, 2))


def agree(a: Ballot, b: Ballot, closeness: Closeness) -> bool:
    """Whether two answers are the same, as far as their hosts can be expected to agree."""
    if a.numeric == b.numeric and a.numeric.exact:
        return same_bits(a.outputs, b.outputs)
    return close(a.outputs, b.outputs, closeness)


def same_bits(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    """Equal in names, dtypes, shapes and every bit; only that any NaN equals any other.

    WebAssembly leaves the sign and payload of a NaN open, so engines may differ in them.
    """
    return _same_form(a, b) and all(_bits(a[name]) == _bits(b[name]) for name in a)


def _bits(array: Array) -> bytes:
    if array.dtype.kind == "f" and np.isnan(array).any():
        array = np.where(np.isnan(array), np.array(np.nan, array.dtype), array)
    return np.ascontiguousarray(array).tobytes()


def close(a: Mapping[str, Array], b: Mapping[str, Array], closeness: Closeness) -> bool:
    """Equal in names, dtypes and shapes, and every number within tolerance; NaN equals NaN."""
    return _same_form(a, b) and all(_close(a[name], b[name], closeness) for name in a)


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


def _close(a: Array, b: Array, closeness: Closeness) -> bool:
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf
        near = np.abs(x - y) <= closeness.atol + closeness.rtol * np.maximum(np.abs(x), np.abs(y))
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
