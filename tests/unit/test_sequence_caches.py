"""How a host takes the steps of a sequence: on which caches, by which fence and position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.errors import PageError
from sharding.models.signature import CacheSpec
from sharding.sequences.caches import (
    CHOICE_IDS,
    CHOICE_SCORES,
    DELTA,
    LOGITS,
    SequenceCaches,
    StepOrder,
    restored_shape,
)

WIDTH = 3
KEYS = CacheSpec("past.k", "present.k", "float32", (1, 2, 0, WIDTH), 2)
VALUES = CacheSpec("past.v", "present.v", "float32", (1, 2, 0, WIDTH), 2)
RING = CacheSpec("past.r", "present.r", "float16", (1, 2, 8, WIDTH), -1)


class Host:
    """The graph of a stage on paper: its caches get a row per token, by which it can be told."""

    def __init__(self, caches=(KEYS, VALUES), **options) -> None:
        self._specs = caches
        self.caches = SequenceCaches(caches, **options)
        self.runs = 0

    def step(self, position: int, tokens: int = 1, *, name="s", fence=0, **options):
        order = StepOrder(name, "step", fence, position, tokens, **options)
        past, answer = self.caches.begin(order)
        if answer is not None:
            return answer
        self.runs += 1
        outputs = {
            spec.present: np.concatenate(
                [past[spec.past], np.full((1, 2, tokens, WIDTH), position + 1, np.float32)], axis=2
            )
            for spec in self._specs
        }
        outputs["hidden"] = np.full((1, tokens, WIDTH), position, np.float32)
        outputs[LOGITS] = np.arange(tokens * 5, dtype=np.float32).reshape(1, tokens, 5)
        return self.caches.commit(order, outputs, ["hidden"])

    def restore(self, position: int, *, name="s", fence=1, **wrong):
        tensors = {spec.past: rows(position) for spec in self._specs} | wrong
        self.caches.restore(StepOrder(name, "restore", fence, position), tensors)

    def forget(self, name="s", fence=9):
        self.caches.forget(StepOrder(name, "forget", fence))


def rows(positions: int) -> np.ndarray:
    return np.ones((1, 2, positions, WIDTH), np.float32)


def refused(what: str):
    return pytest.raises(PageError, check=lambda error: error.fields["what"] == what)


def test_step_is_run_on_the_caches_that_the_last_one_left():
    host = Host()
    assert list(host.step(0, 4)) == ["hidden"]
    host.step(4)
    past, answer = host.caches.begin(StepOrder("s", position=5, tokens=1))
    assert answer is None
    assert past["past.k"][0, 0, :, 0].tolist() == [1, 1, 1, 1, 5]
    assert host.runs == 2


def test_sequence_begins_with_empty_caches_and_a_ring_with_zeros():
    past, answer = SequenceCaches((KEYS, RING)).begin(StepOrder("s", tokens=4))
    assert answer is None
    assert past["past.k"].shape == (1, 2, 0, WIDTH)
    assert past["past.r"].shape == (1, 2, 8, WIDTH)
    assert past["past.r"].dtype == np.float16
    assert not past["past.r"].any()


def test_last_step_again_is_answered_again_and_not_computed():
    host = Host()
    host.step(0, 4)
    first = host.step(4, deltas=True, choice=2)
    again = host.step(4, deltas=True, choice=2)
    assert again.keys() == first.keys()
    assert all(again[name].tobytes() == first[name].tobytes() for name in first)
    assert host.runs == 2
    host.step(5)  # and it goes on from there


def test_first_step_again_is_answered_again_too():
    host = Host()
    first = host.step(0, 4)
    assert host.step(0, 4) is first
    assert host.runs == 1


@pytest.mark.parametrize(
    ("position", "tokens"),
    [(4, 1), (0, 4), (7, 1), (0, 6), (3, 3), (4, 2), (5, 2), (0, 1)],
)
def test_any_other_step_than_the_next_or_the_last_is_refused(position, tokens):
    host = Host()
    host.step(0, 4)
    host.step(4)
    host.step(5)
    with refused("out_of_step") as error:
        host.step(position, tokens)
    assert error.value.fields["expected"] == 6
    assert host.runs == 3
    host.step(6)  # what is kept is untouched


def test_unknown_sequence_is_out_of_step_unless_it_begins():
    with refused("out_of_step") as error:
        Host().step(3)
    assert error.value.fields["expected"] == 0


def test_older_fence_is_refused_whatever_it_asks():
    host = Host()
    host.step(0, 4, fence=3)
    for position, tokens in ((4, 1), (0, 4), (0, 1)):
        with refused("stale_step"):
            host.step(position, tokens, fence=2)
    with refused("stale_step"):
        host.restore(4, fence=2)
    host.step(4, fence=3)


def test_newer_fence_begins_anew_and_only_at_the_beginning():
    host = Host()
    host.step(0, 4)
    with refused("out_of_step") as error:
        host.step(4, fence=1)
    assert error.value.fields["expected"] == 0
    host.step(4)  # that refusal cost the older caches nothing
    host.step(0, 4, fence=1)
    with refused("stale_step"):
        host.step(5)
    past, _ = host.caches.begin(StepOrder("s", fence=1, position=4, tokens=1))
    assert past["past.k"].shape[2] == 4


def test_restored_caches_are_gone_on_from():
    host = Host()
    host.restore(6)
    host.step(6, fence=1)
    past, _ = host.caches.begin(StepOrder("s", fence=1, position=7, tokens=1))
    assert past["past.v"][0, 0, :, 0].tolist() == [1, 1, 1, 1, 1, 1, 7]


def test_restored_sequence_has_no_last_step_to_answer_again():
    host = Host()
    host.step(0, 5)
    host.step(5)
    host.restore(6, fence=1)
    with refused("out_of_step"):
        host.step(5, fence=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"past.k": rows(5)},
        {"past.v": rows(7)},
        {"past.v": rows(6)[0]},
        {"past.v": np.ones((2, 2, 6, WIDTH), np.float32)},
        {"past.k": None},
    ],
)
def test_caches_that_are_not_whole_are_not_taken(wrong):
    host = Host()
    host.step(0, 4)
    with refused("out_of_step") as error:
        host.restore(6, **wrong)
    assert error.value.fields["expected"] == 0
    host.step(4)  # the older ones are still there


def test_equal_fence_does_not_replace_caches():
    host = Host()
    host.step(0, 4, fence=1)
    with refused("out_of_step") as error:
        host.restore(6, fence=1)
    assert error.value.fields["expected"] == 4
    host.step(4, fence=1)


def test_restore_again_is_as_good_as_once():
    host = Host()
    host.restore(6)
    host.restore(6)
    host.step(6, fence=1)


def test_so_many_sequences_are_kept_and_no_more_begin():
    host = Host(sequences_max=2)
    host.step(0, 4, name="x")
    host.step(0, 4, name="y")
    with refused("too_many_sequences"):
        host.step(0, 4, name="z")
    with refused("too_many_sequences"):
        host.restore(4, name="z")
    host.step(4, name="x")
    host.step(0, 4, name="y", fence=1)
    assert len(host.caches) == 2
    host.forget("x")
    host.step(0, 4, name="z")


def test_forgotten_sequence_is_unknown_and_forgetting_one_twice_no_error():
    host = Host()
    host.step(0, 4, fence=5)
    host.forget(fence=4)  # sent before it was rebuilt here
    assert len(host.caches)
    host.forget()
    host.forget()
    assert not len(host.caches)
    with refused("out_of_step"):
        host.step(4, fence=5)
    host.step(0, 4)  # not even its fence is remembered


def test_sequence_that_nobody_asks_any_more_makes_room_for_another():
    now = [0.0]
    host = Host(sequences_max=2, clock=lambda: now[0])
    host.step(0, 4, name="idle")
    now[0] = 50.0
    host.step(0, 4, name="busy")
    with refused("too_many_sequences"):
        host.step(0, 4, name="new")
    now[0] = 61.0
    host.step(0, 4, name="new")
    with refused("too_many_sequences"):
        host.step(4, name="idle")
    host.step(4, name="busy")


def test_sequences_do_not_touch_each_other():
    host = Host()
    host.step(0, 4, name="x")
    host.step(0, 2, name="y", fence=7)
    host.step(4, name="x")
    with refused("out_of_step") as error:
        host.step(4, name="y", fence=7)
    assert error.value.fields["expected"] == 2


def test_choice_is_of_the_last_position():
    host = Host()
    answer = host.step(0, 3, choice=2)
    assert answer[CHOICE_IDS].tolist() == [4, 3]
    assert answer[CHOICE_SCORES].tolist() == [14, 13]
    assert host.step(3, choice=0)[CHOICE_IDS].tolist() == [4, 3, 2, 1, 0]


def test_deltas_are_what_the_step_added():
    host = Host()
    prompt = host.step(0, 4, deltas=True)
    assert prompt[DELTA + "past.k"].shape == (1, 2, 4, WIDTH)
    one = host.step(4, deltas=True)[DELTA + "past.v"]
    assert one.shape == (1, 2, 1, WIDTH)
    assert one.flags.c_contiguous
    assert set(one.ravel()) == {5}


def test_restored_shape_grows_along_the_axis_only():
    assert restored_shape(KEYS, 9) == (1, 2, 9, WIDTH)
    assert restored_shape(RING, 9) == RING.shape


ORDERS = st.lists(
    st.tuples(
        st.sampled_from(["step", "again", "restore", "forget"]),
        st.integers(0, 3),  # fence
        st.integers(0, 6),  # position
        st.integers(1, 3),  # tokens
    ),
    max_size=30,
)


@given(ORDERS)
def test_caches_always_hold_the_positions_that_were_stepped_through(orders):
    host, held, fence = Host(), None, -1
    for what, at_fence, position, tokens in orders:
        if what == "forget":
            host.forget()
            held, fence = None, -1
            continue
        before = host.runs
        try:
            if what == "restore":
                host.restore(position, fence=at_fence)
            else:
                host.step(position, tokens, fence=at_fence)
        except PageError:
            assert host.runs == before
            continue
        assert at_fence >= fence, "an older fence was let through"
        if what == "restore":
            held = position
        elif host.runs > before:
            assert position == (held if at_fence == fence and held is not None else 0)
            held = position + tokens
        else:
            assert position + tokens == held, "only the last step is answered again"
        fence = at_fence
        past, _ = host.caches.begin(StepOrder("s", fence=fence, position=held, tokens=1))
        assert past["past.k"].shape[2] == held
