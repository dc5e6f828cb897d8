"""The next token from scores: greedy or drawn, beside a plain reference written here.

The reference works on lists and follows the order of Hugging Face's warpers: temperature, `top_k`,
`top_p`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recovery.errors import BadInput
from sharding.sequences.decoding import (
    NEW_TOKENS_MAX,
    OPTIONS,
    TOP_K_MAX,
    Decoding,
    choose,
    decoding_from,
    draw,
    highest,
)

SEED_MAX = 2**64 - 1
SEEDS = st.integers(0, 2**63 - 1)  # larger ones have a test of their own


def chosen(scores, decoding: Decoding, position: int = 0) -> int:
    """The choice among all of `scores`, by id."""
    row = np.asarray(scores, np.float32)
    return choose(np.arange(row.size, dtype=np.int32), row, decoding, position)


def kept_by(scores, decoding: Decoding) -> list[tuple[int, float]]:
    """The ids that may be drawn and their probabilities, most likely first; the plain way."""
    ranked = sorted(enumerate(map(float, scores)), key=lambda pair: (-pair[1], pair[0]))
    if decoding.top_k:
        ranked = ranked[: decoding.top_k]
    top = ranked[0][1]
    weights = [math.exp((score - top) / decoding.temperature) for _, score in ranked]
    shares = [weight / sum(weights) for weight in weights]
    kept, total = [], 0.0
    for (token, _), share in zip(ranked, shares, strict=True):
        if kept and total >= decoding.top_p:
            break
        kept.append((token, share))
        total += share
    return [(token, share / total) for token, share in kept]


def drawn_by(scores, decoding: Decoding, position: int) -> int:
    """The plain way to draw: walk through the probabilities until the number is used up."""
    left, kept = draw(decoding.seed, position), kept_by(scores, decoding)
    for token, share in kept:
        left -= share
        if left < 0:
            return token
    return kept[-1][0]


# Scores on a grid, so that there are ties, and sums that differ by more than rounding.
SCORES = st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=1, max_size=40)
SAMPLED = st.builds(
    Decoding,
    temperature=st.sampled_from([0.25, 0.7, 1.0, 1.5, 10.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 50]),
    top_p=st.sampled_from([1.0, 0.97, 0.61, 0.13]),
    seed=SEEDS,
)
GREEDY = st.just(Decoding())
PINNED = [
    0.011546754286331562,
    0.8133540609793564,
    0.3035680343067586,
    0.23913108230032698,
]  # of the four below


# -- greedy ----------------------------------------------------------------------------------------


def test_greedy_takes_the_highest_and_of_equals_the_lowest_id():
    assert chosen([1, 3, 3, 2, 3], Decoding()) == 1
    assert chosen([0, 0, 0], Decoding()) == 0
    assert chosen([-0.0, 0.0], Decoding()) == 0, "the two zeros are equals"
    assert chosen([-math.inf, -1e30, math.inf], Decoding()) == 2


def test_greedy_does_not_care_in_which_order_the_candidates_come():
    ids, scores = np.array([9, 4, 7, 2], np.int32), np.array([5, 8, 8, 1], np.float32)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        assert choose(ids[order], scores[order], Decoding(), 0) == 4


def test_greedy_depends_on_neither_seed_nor_position():
    scores = np.random.default_rng(1).standard_normal(100)
    best = int(np.float32(scores).argmax())
    assert {chosen(scores, Decoding(seed=s), p) for s in range(5) for p in range(5)} == {best}


def test_greedy_takes_a_number_before_no_number():
    assert chosen([math.nan, 1, 2], Decoding()) == 2


@given(SCORES)
def test_greedy_is_what_argmax_says(scores):
    assert chosen(scores, Decoding()) == int(np.argmax(np.float32(scores)))


# -- sampled ---------------------------------------------------------------------------------------


@given(SCORES, SAMPLED, st.integers(0, 10_000))
def test_drawn_token_is_the_plain_references(scores, decoding, position):
    assert chosen(scores, decoding, position) == drawn_by(scores, decoding, position)


@given(SCORES, SAMPLED, st.integers(0, 100))
def test_drawn_token_is_never_outside_what_is_kept(scores, decoding, position):
    kept = {token for token, _ in kept_by(scores, decoding)}
    assert chosen(scores, decoding, position) in kept


@given(SCORES, st.integers(0, 100), SEEDS)
def test_one_candidate_is_greedy_whatever_the_temperature(scores, position, seed):
    greedy = chosen(scores, Decoding())
    for narrow in ({"top_k": 1}, {"top_k": 0, "top_p": 1e-9}):
        assert chosen(scores, Decoding(temperature=9.0, seed=seed, **narrow), position) == greedy


def test_top_p_keeps_the_fewest_that_sum_to_it():
    scores = np.log([0.5, 0.25, 0.125, 0.125])
    for top_p, count in ((0.4, 1), (0.6, 2), (0.74, 2), (0.76, 3), (0.9, 4), (1.0, 4)):
        decoding = Decoding(temperature=1.0, top_k=0, top_p=top_p)
        met = {chosen(scores, replace(decoding, seed=seed)) for seed in range(300)}
        assert met == set(range(count)), top_p


def test_top_p_is_of_what_top_k_left():
    # Of all, the first two hold 40 %; of the three that are kept, 80 %.
    scores = np.log([0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    decoding = Decoding(temperature=1.0, top_k=3, top_p=0.75)
    assert {chosen(scores, replace(decoding, seed=seed)) for seed in range(200)} == {0, 1}


def test_temperature_comes_before_top_p():
    scores = np.log([0.6, 0.4])
    cold = Decoding(temperature=0.1, top_p=0.9)  # 98 % are the first's by then
    assert {chosen(scores, replace(cold, seed=seed)) for seed in range(200)} == {0}
    warm = replace(cold, temperature=1.0)
    assert {chosen(scores, replace(warm, seed=seed)) for seed in range(200)} == {0, 1}


def test_tokens_come_as_often_as_they_are_likely():
    scores, decoding, tries = [2.0, 1.0, 0.0, -1.0], Decoding(temperature=1.3, seed=11), 4000
    counts = np.bincount([chosen(scores, decoding, at) for at in range(tries)], minlength=4)
    expected = tries * np.array([share for _, share in kept_by(scores, decoding)])
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-squared, 3 degrees, p = 0.001


def test_large_scores_and_masked_ones_overflow_nothing():
    decoding = Decoding(temperature=0.01, top_k=0)
    assert chosen([3e38, -3e38, 1.0], decoding) == 0
    assert {chosen([-math.inf, 1.0, 1.0], decoding, at) for at in range(50)} == {1, 2}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_temperature_next_to_zero_takes_the_highest():
    decoding = Decoding(temperature=1e-310, top_p=0.9).checked()
    assert chosen([1.0, 5.0, 3.0], decoding) == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_token_whose_score_is_no_number_is_not_drawn():
    for decoding in (Decoding(temperature=1.0, top_p=0.9), Decoding(temperature=5.0)):
        met = {chosen([1.0, math.nan, 1.0], decoding, at) for at in range(50)}
        assert met == {0, 2}


# -- the random number -----------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["position", "seed"])
def test_draws_are_uniform(by):
    tries, bins = 5000, 20
    at = [(7, n) if by == "position" else (n, 7) for n in range(tries)]
    values = np.array([draw(seed, position) for seed, position in at])
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.bincount((values * bins).astype(int), minlength=bins)
    assert ((counts - tries / bins) ** 2).sum() / (tries / bins) < 43.8  # 19 degrees, p = 0.001
    # Kolmogorov-Smirnov at p = 0.001, and no run from one to the next.
    steps = np.abs(np.sort(values) - np.arange(tries) / tries)
    assert steps.max() < 1.95 / math.sqrt(tries)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 3.3 / math.sqrt(tries)


@given(SEEDS, st.integers(0, 2**31))
def test_seed_and_position_alone_make_the_number(seed, position):
    assert draw(seed, position) == draw(seed, position)
    assert draw(seed, position) != draw(seed, position + 1)
    assert draw(seed, position) != draw(seed ^ 1, position)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_largest_seeds_are_told_apart():
    assert len({draw(SEED_MAX - n, 5) for n in range(10)}) == 10
    assert draw(np.uint64(SEED_MAX), 5) == draw(SEED_MAX, 5)
    assert draw(np.int64(7), 5) == draw(7, 5)


# A caller elsewhere, or of another version, goes on with the same tokens: these never change.
def test_draws_are_pinned():
    assert [draw(0, 0), draw(0, 1), draw(1, 0), draw(2**63 - 1, 10**6)] == PINNED


@given(SCORES, SAMPLED, st.integers(0, 1000))
def test_same_seed_and_position_give_the_same_token(scores, decoding, position):
    assert chosen(scores, decoding, position) == chosen(scores, decoding, position)


# -- candidates ------------------------------------------------------------------------------------


def test_candidates_are_no_more_than_a_choice_needs():
    assert Decoding().candidates == 1
    assert Decoding(temperature=1.0, top_k=7).candidates == 7
    assert Decoding(temperature=1.0, top_k=TOP_K_MAX).candidates == TOP_K_MAX
    assert Decoding(temperature=1.0, top_k=TOP_K_MAX + 1).candidates == 0
    assert Decoding(temperature=1.0, top_k=0).candidates == 0
    assert Decoding(logits=True).candidates == 0


@settings(max_examples=200)
@given(SCORES, st.one_of(GREEDY, SAMPLED), st.integers(0, 1000), st.randoms())
def test_choosing_among_the_candidates_equals_choosing_among_all(scores, decoding, position, mix):
    row = np.asarray(scores, np.float32)
    ids, values = highest(row, decoding.candidates)
    order = list(range(len(ids)))
    mix.shuffle(order)
    got = choose(ids[order], values[order], decoding, position)
    assert got == chosen(scores, decoding, position)


@given(SCORES, st.integers(0, 60))
def test_highest_are_sorted_and_above_the_rest(scores, count):
    row = np.asarray(scores, np.float32)
    ids, values = highest(row, count)
    assert len(ids) == (min(count, row.size) or row.size)
    assert ids.dtype == np.int32
    assert values.dtype == row.dtype
    assert values.tolist() == row[ids].tolist()
    ranked = sorted(range(row.size), key=lambda token: (-row[token], token))
    assert ids.tolist() == ranked[: len(ids)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_highest_keeps_the_dtype_and_puts_no_number_last(dtype):
    row = np.array([1, np.nan, 3, -np.inf, 3], dtype)
    ids, values = highest(row, 4)
    assert ids.tolist() == [2, 4, 0, 3]
    assert values.dtype == dtype


# -- options ---------------------------------------------------------------------------------------


def test_without_options_the_defaults_hold():
    assert decoding_from({}) == Decoding()
    assert Decoding().greedy
    assert set(OPTIONS) >= {"max_new_tokens", "temperature", "stop", "logits"}


@pytest.mark.parametrize(
    ("stop", "ids"),
    [
        (5, {5}),
        (np.int64(5), {5}),
        ([5, 6, 5], {5, 6}),
        ((5,), {5}),
        ({5, np.int32(6)}, {5, 6}),
        (frozenset({7}), {7}),
        ([], set()),
    ],
)
def test_stop_may_be_one_id_or_several(stop, ids):
    got = decoding_from({"stop": stop}).stop
    assert got == frozenset(ids)
    assert all(type(token) is int for token in got)


@pytest.mark.parametrize("stop", [None, "5", True, [True], [5.0], ["5"], {5: 6}, b"5", 5.0])
def test_stop_that_is_no_token_ids_is_refused(stop):
    with pytest.raises(BadInput, match="stop: expected token ids"):
        decoding_from({"stop": stop})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 1),
        ("max_new_tokens", NEW_TOKENS_MAX),
        ("max_new_tokens", np.int32(3)),
        ("temperature", 0),
        ("temperature", 100),
        ("temperature", np.float32(0.5)),
        ("top_k", 0),
        ("top_k", 2**31 - 1),
        ("top_p", 1),
        ("top_p", 1e-12),
        ("seed", 0),
        ("seed", SEED_MAX),
        ("seed", np.uint64(SEED_MAX)),
        ("ignore_eos", True),
        ("logits", True),
    ],
)
def test_value_at_the_edge_of_its_range_is_taken(name, value):
    assert getattr(decoding_from({name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_new_tokens", v) for v in (0, -1, NEW_TOKENS_MAX + 1, 1.0, True, "5", None)],
        *[("temperature", v) for v in (-0.1, 100.1, math.nan, math.inf, True, "1", None, 1j)],
        *[("top_k", v) for v in (-1, 2**31, 5.0, False, None)],
        *[("top_p", v) for v in (0, 0.0, 1.01, -1, math.nan, True, "1", None)],
        *[("seed", v) for v in (-1, SEED_MAX + 1, 1.5, True, "x", None)],
        *[("ignore_eos", v) for v in (0, 1, None, "yes")],
        *[("logits", v) for v in (0, 1, None, "yes")],
    ],
)
def test_value_out_of_its_range_is_refused_by_name(name, value):
    with pytest.raises(BadInput, match=rf"^{name}: expected") as refused:
        decoding_from({name: value})
    assert refused.value.fields["got"] is value or value != value


def test_refusal_says_what_would_be_right():
    for name, value, expected in (
        ("top_p", 0, "a number above 0 up to 1, got 0"),
        ("temperature", 101, "a number from 0 to 100, got 101"),
        ("top_k", 0.5, "a whole number from 0 to 2,147,483,647, got 0.5"),
        ("stop", [5, -1], "token ids from 0 to 2,147,483,647, got -1"),
        ("logits", "no", "True or False, got 'no'"),
    ):
        with pytest.raises(BadInput) as refused:
            decoding_from({name: value})
        assert refused.value.message == f"{name}: expected {expected}."


def test_numbers_of_numpy_become_numbers_of_python():
    numbers = {"temperature": np.float32(0.5), "top_k": np.int64(5), "logits": np.True_}
    made = decoding_from({**numbers, "stop": np.array([[3, 4]], np.uint8)})
    assert made == decoding_from({"temperature": 0.5, "top_k": 5, "logits": True, "stop": [3, 4]})
    assert [type(getattr(made, name)) for name in numbers] == [float, int, bool]
    assert {type(token) for token in made.stop} == {int}


def test_option_of_another_name_is_refused():
    with pytest.raises(BadInput):
        decoding_from({"temprature": 1.0})
