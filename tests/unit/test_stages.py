"""Stages: what a line of them is, how a step is taken, and what is kept to rebuild one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.errors import BadInput, NotAModel, PageError
from sharding.cutting.cut import cut
from sharding.cutting.layers import find_boundaries
from sharding.models.frames import Frame, decode, encode
from sharding.models.signature import CacheSpec, TensorSpec
from sharding.sequences.stages import (
    CHOICE_IDS,
    CHOICE_SCORES,
    DELTA,
    LOGITS,
    Line,
    SequenceCaches,
    Stage,
    StageMemory,
    StepOrder,
    Taken,
    check_length,
    decoder_line,
    example,
    inputs_of_step,
    line_of_manifest,
    line_of_map,
    restored_shape,
    stage_name,
    stage_specs,
)

DECODERS = Path(__file__).parent.parent / "assets" / "decoders"
WIDTH = 3
KEYS = CacheSpec("past.k", "present.k", "float32", (1, 2, 0, WIDTH), 2)
VALUES = CacheSpec("past.v", "present.v", "float32", (1, 2, 0, WIDTH), 2)
RING = CacheSpec("past.r", "present.r", "float16", (1, 2, 8, WIDTH), -1)
HIDDEN = TensorSpec("hidden", "float32", (1, "s", WIDTH))
IDS = TensorSpec("input_ids", "int64", ("b", "s"))
FIRST = Stage("m@0", (), (HIDDEN,), (IDS,), (KEYS, VALUES))
LAST = Stage("m@1", (HIDDEN,), (), (), (KEYS, VALUES))


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


# -- what a host takes -----------------------------------------------------------------------------


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


# -- what a caller keeps ---------------------------------------------------------------------------


def taken(position: int, tokens: int = 1) -> Taken:
    return Taken(position, tokens, {"hidden": np.full((1, tokens, WIDTH), position, np.float32)})


def deltas(position: int, tokens: int = 1) -> dict[str, np.ndarray]:
    made = np.full((1, 2, tokens, WIDTH), position, np.float32)
    return {DELTA + "past.k": made, DELTA + "past.v": -made, "hidden": made}


STEP_BYTES = WIDTH * 4
COPY_BYTES = 2 * 2 * WIDTH * 4  # keys and values of one position


def memory(stage=LAST, *, copies=True, copy_bytes_max=1 << 20) -> StageMemory:
    return StageMemory(stage, copies=copies, copy_bytes_max=copy_bytes_max)


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


# -- lines -----------------------------------------------------------------------------------------


def line_of(name: str) -> Line:
    return line_of_map("m", find_boundaries(DECODERS / f"{name}.onnx"))


def test_inputs_of_a_step_without_position_ids():
    made = line_of("builder-llama").inputs_of_step([7, 8], 3)
    assert list(made) == ["input_ids", "attention_mask"]
    assert made["input_ids"].tolist() == [[7, 8]]
    assert made["attention_mask"].tolist() == [[1] * 5]
    assert made["input_ids"].dtype == np.int64


@pytest.mark.parametrize("name", ["builder-llama-positions", "optimum-llama", "optimum-gpt2"])
def test_inputs_of_a_step_with_position_ids(name):
    made = line_of(name).inputs_of_step([7, 8], 3)
    assert made["position_ids"].tolist() == [[3, 4]]
    assert made["attention_mask"].shape == (1, 5)
    assert made["input_ids"].shape == (1, 2)


def test_inputs_have_the_dtypes_that_the_graph_takes():
    specs = [
        TensorSpec("attention_mask", "float32", ("b", "t")),
        TensorSpec("position_ids", "int32", ("b", "s")),
        TensorSpec("token_type_ids", "int64", ("b", "s")),
    ]
    made = inputs_of_step(specs, [7, 8], 3)
    assert {name: array.dtype.name for name, array in made.items()} == {
        "attention_mask": "float32",
        "position_ids": "int32",
        "token_type_ids": "int64",
    }
    assert made["token_type_ids"].tolist() == [[0, 0]]
    assert all(array.flags.c_contiguous for array in made.values())


@pytest.mark.parametrize("name", ["optimum-bert", "optimum-bert-int8"])
def test_encoder_can_not_generate(name):
    line = line_of(name)
    assert not line.decoder
    with pytest.raises(NotAModel, match="expected caches, got none"):
        line.check_generates()
    assert decoder_line("m", DECODERS / f"{name}.onnx") is None


def test_export_that_takes_embeddings_can_not_generate():
    line = line_of("builder-llama-embeds")
    assert line.decoder
    with pytest.raises(NotAModel, match="inputs_embeds"):
        line.check_generates()
    assert decoder_line("m", DECODERS / "builder-llama-embeds.onnx") is None


@pytest.mark.parametrize("name", ["optimum-bert", "builder-llama-embeds"])
def test_cut_models_that_can_not_generate_say_so_too(name, tmp_path):
    manifest = cut(DECODERS / f"{name}.onnx", [(0, 1), (1, 3)], tmp_path)
    with pytest.raises(NotAModel, match="m can't generate"):
        line_of_manifest("m", manifest).check_generates()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": (TensorSpec("attention_mask", "int64", ("b", "t")),)}, "expected input_ids"),
        ({"outputs": (HIDDEN,)}, "an output 'logits'"),
        ({"inputs": (IDS, TensorSpec("seqlens_k", "int32", ("b",)))}, "seqlens_k"),
    ],
)
def test_line_without_what_text_takes_says_what_it_lacks(changes, words):
    with pytest.raises(NotAModel, match=words):
        replace(line_of("builder-llama"), **changes).check_generates()


@pytest.mark.parametrize("shape", [None, ("b", 2, "t", "d"), ("b", 2, 8, WIDTH)])
def test_cache_that_does_not_grow_along_one_dimension_is_refused(shape):
    layers = find_boundaries(DECODERS / "builder-llama.onnx")
    (cache, *others) = layers.layers[0].caches
    odd = replace(cache, past=replace(cache.past, shape=shape))
    first = replace(layers.layers[0], caches=(odd, *others))
    with pytest.raises(NotAModel, match="a cache"):
        line_of_map("m", replace(layers, layers=(first, *layers.layers[1:])))


def test_file_that_is_no_model_is_no_decoder(tmp_path):
    path = tmp_path / "no.onnx"
    path.write_bytes(b"nothing of the kind")
    assert decoder_line("m", path) is None


def test_uncut_decoder_is_its_own_only_stage():
    line = decoder_line("m", DECODERS / "builder-llama.onnx")
    assert line is not None
    (stage,) = line.stages
    assert stage.model == "m"
    assert stage.last
    assert stage.copyable
    assert len(stage.caches) == 6
    assert stage.caches[0].shape == (1, 1, 0, 16)
    assert stage.caches[0].axis == 2


def test_ring_has_its_window_and_no_axis():
    line = decoder_line("m", DECODERS / "builder-gemma2.onnx")
    assert line is not None
    (stage,) = line.stages
    assert not stage.copyable
    (ring, *_) = [cache for cache in stage.caches if cache.axis < 0]
    assert ring.shape == (1, 1, 16, 16)


def test_stages_of_a_cut_model_hand_on_and_share_its_caches(tmp_path):
    manifest = cut(DECODERS / "builder-llama.onnx", [(0, 1), (1, 2), (2, 3)], tmp_path)
    line, whole = line_of_manifest("m", manifest), line_of("builder-llama")
    line.check_generates()
    assert [stage.model for stage in line.stages] == [stage_name("m", n) for n in range(3)]
    assert [stage.last for stage in line.stages] == [False, False, True]
    for before, after in zip(line.stages, line.stages[1:], strict=False):
        assert before.sends == after.receives
    caches = [cache for stage in line.stages for cache in stage.caches]
    assert sorted(map(str, caches)) == sorted(map(str, whole.stages[0].caches))
    assert line.inputs == whole.inputs
    specs = stage_specs("m", tmp_path, manifest)
    assert [spec.span for spec in specs] == [(0, 1), (1, 2), (2, 3)]
    for stage, spec in zip(line.stages, specs, strict=True):
        assert spec.caches == stage.caches
        made = example(stage)
        assert made.keys() == {tensor.name for tensor in spec.inputs}
        assert all(made[tensor.name].dtype == tensor.dtype for tensor in spec.inputs)


# -- length ----------------------------------------------------------------------------------------


def test_length_within_the_models_positions_is_fine():
    check_length(5, 3, 8)
    check_length(5, 3, None)
    check_length(1, 1, 2)


def test_empty_prompt_is_refused_whatever_the_limit():
    for limit in (None, 8):
        with pytest.raises(BadInput, match="holds no token"):
            check_length(0, 3, limit)


def test_too_many_tokens_are_refused_with_what_would_fit():
    with pytest.raises(BadInput, match="max_new_tokens=3 or less") as refusal:
        check_length(5, 4, 8)
    assert refusal.value.fields["got"] == 9
