"""Whether answers agree, and which of them are to be believed.

Hosts with equal `NumericId` must agree bit for bit; others within the model's tolerance, which
can see large errors only. Two that agree elect an answer. Pure: this module must not know how
an answer came about, and must not act on a verdict.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
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
    """`winner` is the first of those that agree.

    `outvoted` are those that disagree with everybody else. `doubtful` agree within tolerance, but
    not bit for bit with one of equal `NumericId`: one of the two is wrong in low bits, and
    nothing says which.
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
    """What the answers that have come so far elect, in the order in which they came."""
    for first, second in itertools.combinations(ballots, 2):
        if agree(first, second, closeness):
            return _elected(ballots, first, closeness)
    return Undecided(describe_spread(ballots))


def agree(a: Ballot, b: Ballot, closeness: Closeness) -> bool:
    """Whether two answers are the same, as far as their hosts can be expected to agree."""
    if a.numeric == b.numeric:
        return same_bits(a.outputs, b.outputs)
    return close(a.outputs, b.outputs, closeness)


def same_bits(a: Mapping[str, Array], b: Mapping[str, Array]) -> bool:
    """Equal in names, dtypes, shapes and every bit, those of a NaN included."""
    return _same_form(a, b) and all(
        np.ascontiguousarray(a[name]).tobytes() == np.ascontiguousarray(b[name]).tobytes()
        for name in a
    )


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


def _elected(ballots: Sequence[Ballot], winner: Ballot, closeness: Closeness) -> Elected:
    supporters = [b for b in ballots if b is winner or agree(b, winner, closeness)]
    others = [b for b in ballots if not any(b is one for one in supporters)]
    doubtful: dict[HostRef, None] = {}
    outvoted = []
    for ballot in others:
        if close(ballot.outputs, winner.outputs, closeness):
            # Close, yet of equal id: it or the winner is off by low bits. If two of that id
            # stand together, the third is outvoted; else nothing says which it is.
            if _stands_alone(ballot, ballots):
                outvoted.append(ballot.voter)
            else:
                doubtful.update(dict.fromkeys((winner.voter, ballot.voter)))
        else:
            outvoted.append(ballot.voter)
    for one, two in itertools.combinations(supporters, 2):
        if one.numeric == two.numeric and not same_bits(one.outputs, two.outputs):
            doubtful.update(dict.fromkeys((one.voter, two.voter)))
    return Elected(winner, tuple(b.voter for b in supporters), tuple(outvoted), tuple(doubtful))


def _stands_alone(ballot: Ballot, ballots: Sequence[Ballot]) -> bool:
    """Whether others of its `NumericId` agree with each other, and not with it."""
    kin = [b for b in ballots if b.numeric == ballot.numeric and b is not ballot]
    together = any(same_bits(a.outputs, b.outputs) for a, b in itertools.combinations(kin, 2))
    return together and not any(same_bits(ballot.outputs, b.outputs) for b in kin)


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
