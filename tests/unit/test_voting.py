"""Which answers are believed: bit for bit among equals, within tolerance among others."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.kinds import Backend
from recovery.records import HostRef, NumericId
from recovery.voting import Ballot, Elected, Tolerance, Undecided, close, count_votes, same_bits

WASM = NumericId("1.30.0/wasm", Backend.WASM)
GPU = NumericId("1.30.0/webgpu", Backend.WEBGPU, adapter="swiftshader")
RIGHT = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)
TOLERANCE = Tolerance()


def ballot(name: str, values=RIGHT, numeric: NumericId = WASM) -> Ballot:
    return Ballot(HostRef(name), numeric, {"y": np.asarray(values)})


def flipped(bit: int, at: int = 5) -> np.ndarray:
    """The right answer with one bit of one element flipped (0 is the lowest)."""
    bits = RIGHT.copy().view(np.uint32).ravel()
    bits[at] ^= np.uint32(1) << np.uint32(bit)
    return bits.view(np.float32).reshape(RIGHT.shape)


def names(refs) -> list[str]:
    return [ref.browser_id for ref in refs]


def test_one_answer_elects_nothing():
    assert isinstance(count_votes([ballot("a")], TOLERANCE), Undecided)
    assert isinstance(count_votes([], TOLERANCE), Undecided)


def test_first_two_that_agree_elect_without_the_third():
    verdict = count_votes([ballot("a"), ballot("b")], TOLERANCE)
    assert isinstance(verdict, Elected)
    assert verdict.winner.voter == HostRef("a")
    assert names(verdict.supporters) == ["a", "b"]
    assert verdict.outvoted == verdict.doubtful == ()


@pytest.mark.parametrize("bit", range(32))
@pytest.mark.parametrize("faulty", range(3))
def test_any_single_bit_is_outvoted_among_equals(bit, faulty):
    ballots = [ballot(name, flipped(bit) if n == faulty else RIGHT) for n, name in enumerate("abc")]
    verdict = count_votes(ballots, TOLERANCE)
    assert isinstance(verdict, Elected)
    assert names(verdict.outvoted) == ["abc"[faulty]]
    assert same_bits(verdict.winner.outputs, {"y": RIGHT})


@pytest.mark.parametrize("faulty", range(3))
def test_large_error_is_outvoted_among_any(faulty):
    numerics = (WASM, GPU, NumericId("1.30.0/webgpu", Backend.WEBGPU, adapter="other"))
    near = RIGHT + np.float32(2e-5)
    values = [RIGHT, near, RIGHT]
    values[faulty] = flipped(30)
    ballots = [
        ballot(name, value, numeric)
        for name, value, numeric in zip("abc", values, numerics, strict=True)
    ]
    verdict = count_votes(ballots, TOLERANCE)
    assert isinstance(verdict, Elected)
    assert names(verdict.outvoted) == ["abc"[faulty]]


def test_low_bit_is_not_seen_among_unequal_hosts():
    verdict = count_votes([ballot("a", flipped(0)), ballot("b", RIGHT, GPU)], TOLERANCE)
    assert isinstance(verdict, Elected)  # what tolerances can't see, said plainly
    assert verdict.outvoted == ()


def test_two_equals_that_differ_in_low_bits_are_both_in_doubt():
    ballots = [ballot("a", flipped(0)), ballot("b"), ballot("c", RIGHT, GPU)]
    verdict = count_votes(ballots, TOLERANCE)
    assert isinstance(verdict, Elected)
    assert verdict.outvoted == ()
    assert set(names(verdict.doubtful)) == {"a", "b"}


@pytest.mark.parametrize("order", ["".join(o) for o in itertools.permutations("xabc")])
def test_low_bit_is_outvoted_by_two_equals_though_a_third_kind_agrees_with_all(order):
    cast = {"x": (RIGHT, GPU), "a": (flipped(0), WASM), "b": (RIGHT, WASM), "c": (RIGHT, WASM)}
    verdict = count_votes([ballot(name, *cast[name]) for name in order], TOLERANCE)
    assert isinstance(verdict, Elected)
    assert names(verdict.outvoted) == ["a"]
    assert set(names(verdict.supporters)) == {"x", "b", "c"}
    assert verdict.doubtful == ()


def test_gpus_of_one_name_need_not_agree_bit_for_bit():
    verdict = count_votes(
        [ballot("a", RIGHT, GPU), ballot("b", flipped(0), GPU), ballot("c", RIGHT, GPU)], TOLERANCE
    )
    assert isinstance(verdict, Elected)
    assert verdict.outvoted == verdict.doubtful == ()
    assert not NumericId("1.30.0/wasm", Backend.WASM, threads=4).exact


def test_who_agrees_with_anybody_is_not_charged():
    """Tolerance is not transitive: a is close to b, b to c, and a not to c."""
    step = np.float32(0.9) * np.float32(TOLERANCE.atol)
    kinds = [NumericId("o", Backend.WEBGPU, adapter=name) for name in "abc"]
    ballots = [
        ballot(name, np.zeros(3, np.float32) + n * step, kind)
        for n, (name, kind) in enumerate(zip("abc", kinds, strict=True))
    ]
    verdict = count_votes(ballots, Tolerance(rtol=0.0))
    assert isinstance(verdict, Elected)
    assert verdict.outvoted == ()
    assert verdict.winner.voter.browser_id == "b"


def test_two_that_repeat_each_other_win_over_two_that_are_merely_close():
    ballots = [
        ballot("a", RIGHT + 5, GPU),
        ballot("b", RIGHT + np.float32(5.0001), NumericId("o", Backend.WEBNN)),
        ballot("c"),
        ballot("d"),
    ]
    verdict = count_votes(ballots, TOLERANCE)
    assert isinstance(verdict, Elected)
    assert verdict.winner.voter.browser_id == "c"


def test_none_that_agree_shows_the_spread():
    ballots = [ballot("a"), ballot("b", RIGHT + 5), ballot("c", RIGHT - 7)]
    verdict = count_votes(ballots, TOLERANCE)
    assert isinstance(verdict, Undecided)
    assert "b#0 and c#0 differ by up to 12 in 'y'" in verdict.spread


def test_spread_of_a_nan_is_infinite_and_of_other_shapes_is_told():
    bad = RIGHT.copy()
    bad[0, 1] = np.nan
    verdict = count_votes([ballot("a"), ballot("b", bad)], TOLERANCE)
    assert isinstance(verdict, Undecided)
    assert "inf in 'y' (element 1)" in verdict.spread
    verdict = count_votes([ballot("a"), ballot("b", RIGHT.ravel())], TOLERANCE)
    assert isinstance(verdict, Undecided)
    assert "shapes" in verdict.spread


def test_integers_must_be_equal_whatever_the_hosts():
    one = ballot("a", np.array([7, 8]))
    assert isinstance(count_votes([one, ballot("b", np.array([7, 8]), GPU)], TOLERANCE), Elected)
    assert isinstance(count_votes([one, ballot("b", np.array([7, 9]), GPU)], TOLERANCE), Undecided)


def test_infinities_agree_with_themselves_only():
    a, b = np.array([np.inf, 1.0]), np.array([np.inf, 1.0 + 1e-6])
    assert close({"y": a}, {"y": b}, TOLERANCE)
    assert not close({"y": a}, {"y": -a}, TOLERANCE)
    assert not close({"y": a}, {"y": np.array([1e300, 1.0])}, TOLERANCE)


def test_any_nan_agrees_with_any_nan():
    quiet = np.array([0x7FC00000, 7], np.uint32).view(np.float32)
    other = np.array([0xFFC00001, 7], np.uint32).view(np.float32)
    assert close({"y": quiet}, {"y": other}, TOLERANCE)
    assert same_bits({"y": quiet}, {"y": other})
    assert not same_bits({"y": quiet}, {"y": quiet[::-1]})


values = st.sampled_from([RIGHT, flipped(0), flipped(30), RIGHT + 1, RIGHT - 1])
kinds = st.sampled_from([WASM, GPU])


@given(st.lists(st.tuples(values, kinds), max_size=5))
def test_whatever_the_ballots_a_verdict_is_consistent(cast):
    ballots = [ballot(f"b{n}", value, numeric) for n, (value, numeric) in enumerate(cast)]
    verdict = count_votes(ballots, TOLERANCE)
    if isinstance(verdict, Undecided):
        return
    voters = [b.voter for b in ballots]
    assert len(verdict.supporters) >= 2
    assert verdict.winner.voter in verdict.supporters
    assert set(verdict.supporters) <= set(voters)
    assert not set(verdict.supporters) & set(verdict.outvoted)
    assert not set(verdict.doubtful) & set(verdict.outvoted)


@given(st.permutations([RIGHT, RIGHT, RIGHT + 1]))
def test_order_of_arrival_does_not_change_what_is_elected(cast):
    verdict = count_votes([ballot(f"b{n}", v) for n, v in enumerate(cast)], TOLERANCE)
    assert isinstance(verdict, Elected)
    assert same_bits(verdict.winner.outputs, {"y": RIGHT})
