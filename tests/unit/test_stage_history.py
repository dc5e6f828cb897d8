"""What a caller keeps of a stage: inputs or copies that always lead to the last position."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.errors import SequenceLost
from recovery.kinds import Level
from sharding.models.frames import Frame, decode, encode
from sharding.models.signature import CacheSpec, TensorSpec
from sharding.sequences.caches import CHOICE_SCORES, DELTA, restored_shape
from sharding.sequences.events import SequenceStatistics
from sharding.sequences.history import BoundedStageHistory, RecordedStep, StageHistory
from sharding.sequences.rules import PipelineRules
from sharding.sequences.stages import Stage

WIDTH = 3
KEYS = CacheSpec("past.k", "present.k", "float32", (1, 2, 0, WIDTH), 2)
VALUES = CacheSpec("past.v", "present.v", "float32", (1, 2, 0, WIDTH), 2)
RING = CacheSpec("past.r", "present.r", "float16", (1, 2, 8, WIDTH), -1)
HIDDEN = TensorSpec("hidden", "float32", (1, "s", WIDTH))
LAST = Stage("m@1", (HIDDEN,), (), (), (KEYS, VALUES))


def taken(position: int, tokens: int = 1) -> RecordedStep:
    return RecordedStep(
        position, tokens, {"hidden": np.full((1, tokens, WIDTH), position, np.float32)}
    )


def deltas(position: int, tokens: int = 1) -> dict[str, np.ndarray]:
    made = np.full((1, 2, tokens, WIDTH), position, np.float32)
    return {DELTA + "past.k": made, DELTA + "past.v": -made, "hidden": made}


STEP_BYTES = WIDTH * 4
COPY_BYTES = 2 * 2 * WIDTH * 4  # keys and values of one position


def memory(stage=LAST, *, copies=True, copy_bytes_max=1 << 20) -> StageHistory:
    return StageHistory(stage, copies=copies, copy_bytes_max=copy_bytes_max)


def test_without_copies_all_inputs_are_kept_in_their_steps():
    kept = memory(copies=False)
    for step in (taken(0, 4), taken(4), taken(5)):
        kept.note(step)
        kept.copy(deltas(step.position, step.tokens))
    assert not kept.copying
    assert kept.covered == kept.copy_bytes == 0
    assert kept.caches() == {}
    assert kept.step_bytes == 6 * STEP_BYTES
    assert [(step.position, step.tokens) for step in kept.rest(5)] == [(0, 4), (4, 1)]
    assert [step.position for step in kept.rest(6)] == [0, 4, 5]
    assert kept.rest(0) == []


def test_step_that_is_noted_again_is_kept_once():
    kept = memory(copies=False)
    kept.note(taken(0, 4))
    kept.note(taken(4))
    kept.note(taken(4))
    assert kept.step_bytes == 5 * STEP_BYTES
    assert len(kept.rest(9)) == 2


def test_copies_stand_for_the_steps_that_they_cover():
    kept = memory()
    kept.note(taken(0, 4))
    assert kept.rest(4), "a step counts until it is copied"
    kept.copy(deltas(0, 4))
    for position in (4, 5):
        kept.note(taken(position))
        kept.copy(deltas(position))
    assert kept.covered == 6
    assert kept.step_bytes == 0
    assert kept.copy_bytes == 6 * COPY_BYTES
    assert kept.rest(6) == []
    for _ in range(2):  # the second time they are put together already
        caches = kept.caches()
        assert caches["past.k"][0, 0, :, 0].tolist() == [0, 0, 0, 0, 4, 5]
        assert caches["past.v"][0, 1, :, 2].tolist() == [0, 0, 0, 0, -4, -5]
    assert kept.copy_bytes == sum(array.nbytes for array in caches.values())
    kept.note(taken(6))
    kept.copy(deltas(6))
    assert kept.caches()["past.k"].shape == restored_shape(KEYS, 7)


def test_beyond_their_bound_copies_end_and_inputs_follow():
    kept = memory(copy_bytes_max=5 * COPY_BYTES)
    for step in (taken(0, 4), taken(4), taken(5), taken(6)):
        kept.note(step)
        kept.copy(deltas(step.position, step.tokens))
    assert not kept.copying
    assert kept.covered == 5
    assert kept.copy_bytes == 5 * COPY_BYTES
    assert [step.position for step in kept.rest(7)] == [5, 6]
    assert kept.step_bytes == 2 * STEP_BYTES


@pytest.mark.parametrize("missing", ["past.k", "past.v"])
def test_answer_without_every_delta_ends_the_copies(missing):
    kept = memory()
    kept.note(taken(0, 4))
    kept.copy(deltas(0, 4))
    kept.note(taken(4))
    answer = deltas(4)
    del answer[DELTA + missing]
    kept.copy(answer)
    assert not kept.copying
    assert kept.covered == 4
    assert [step.position for step in kept.rest(5)] == [4]


def test_ring_is_never_copied():
    assert not memory(replace(LAST, caches=(KEYS, RING))).copying
    assert memory().copying


def test_copy_of_no_step_is_ignored():
    kept = memory()
    kept.copy(deltas(0))
    assert kept.covered == kept.copy_bytes == 0
    assert kept.copying


def test_copies_hold_no_more_memory_than_they_count():
    scores = np.zeros(100_000, np.float32)
    sent = Frame("reply", tensors={**deltas(0), CHOICE_SCORES: scores})
    answer = decode(encode(sent, bytes_max=1 << 20), bytes_max=1 << 20).tensors
    kept = memory()
    kept.note(taken(0))
    kept.copy(answer)
    for array in kept.caches().values():
        assert not np.may_share_memory(array, answer[CHOICE_SCORES])
        assert array.base is None, "what it is a view of lives as long"


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=12),
    st.booleans(),
    st.integers(0, 20 * COPY_BYTES),
)
def test_copies_and_rest_always_lead_to_the_last_position(steps, copies, most):
    kept, position = memory(copies=copies, copy_bytes_max=most), 0
    for tokens in steps:
        kept.note(taken(position, tokens))
        assert kept.copy_bytes <= most
        kept.copy(deltas(position, tokens))
        position += tokens
        caches, at = kept.caches(), kept.covered
        assert all(array.shape[2] == at for array in caches.values())
        for step in kept.rest(position):
            assert step.position == at
            at += step.tokens
        assert at == position
        assert kept.step_bytes == (position - kept.covered) * STEP_BYTES


# -- within the bounds of a sequence ---------------------------------------------------------------


def test_stages_of_a_sequence_are_counted_in_one_account():
    statistics, rules = SequenceStatistics(), PipelineRules(Level.HIGH)
    copied = BoundedStageHistory(memory(), rules, statistics)
    replayed = BoundedStageHistory(memory(copies=False), rules, statistics)
    for history in (copied, replayed):
        history.note(taken(0, 4))
    assert statistics.history_bytes == 8 * STEP_BYTES
    for history in (copied, replayed):
        history.copy(deltas(0, 4))
    assert statistics.history_bytes == 4 * STEP_BYTES
    assert statistics.copied_bytes == 4 * COPY_BYTES


def test_more_inputs_than_the_sequence_may_keep_end_it():
    rules = PipelineRules(Level.MEDIUM, history_bytes_max=4 * STEP_BYTES)
    history = BoundedStageHistory(memory(copies=False), rules, SequenceStatistics())
    history.note(taken(0, 4))
    with pytest.raises(SequenceLost, match="60 bytes; the limit is 48"):
        history.note(taken(4))


@pytest.mark.parametrize("level", [Level.NONE, Level.LOW])
def test_levels_that_never_rebuild_keep_nothing(level):
    statistics, kept = SequenceStatistics(), memory()
    history = BoundedStageHistory(kept, PipelineRules(level), statistics)
    history.note(taken(0, 4))
    history.copy(deltas(0, 4))
    assert (
        statistics.history_bytes == statistics.copied_bytes == kept.step_bytes == kept.covered == 0
    )
