"""Known answers, against the native runtime."""

import dataclasses

import numpy as np
import pytest

from actors.browser.probes import Probes
from pool.models.bundled import minilm_folder, silero_vad_path
from pool.models.registry import read_model
from recovery.kinds import Backend
from recovery.records import NumericId
from sharding.models.known_answers import (
    ELEMENTS_MAX,
    KnownAnswer,
    _kept,
    difference,
    question,
    record,
    varied_inputs,
)
from sharding.models.native import NativeSession

FRAME = {
    "input": np.ones((1, 512), np.float32),
    "state": np.zeros((2, 1, 128), np.float32),
    "sr": np.array(16000, np.int64),
}


@pytest.fixture(scope="module")
def minilm():
    return read_model("minilm", minilm_folder()).spec


@pytest.fixture(scope="module")
def known(minilm) -> KnownAnswer:
    found = record(minilm)
    assert found is not None
    return found


def answer(known: KnownAnswer, minilm) -> dict[str, np.ndarray]:
    session = NativeSession(minilm.files[0].path)
    session.open()
    try:
        return {name: array.copy() for name, array in session.run(question(minilm, known)).items()}
    finally:
        session.close()


def test_right_answer_shows_no_difference_nor_does_one_with_other_low_bits(minilm, known):
    outputs = answer(known, minilm)
    assert difference(known, outputs) == ""
    near = {name: array * np.float32(1 + 1e-4) for name, array in outputs.items()}
    assert difference(known, near) == ""


def test_question_is_not_all_zeros_and_masks_nothing(minilm, known):
    asked = question(minilm, known)
    assert asked.keys() == varied_inputs(minilm, 2).keys()
    assert asked["input_ids"].any()
    assert asked["attention_mask"].all()


@pytest.mark.parametrize("bit", [30, 31])
def test_flipped_exponent_or_sign_of_a_large_number_is_seen(minilm, known, bit):
    outputs = answer(known, minilm)
    name = next(iter(outputs))
    flat = outputs[name].ravel()
    stride = known.outputs[name].stride
    at = int(np.abs(flat[::stride]).argmax()) * stride
    flat.view(np.uint32)[at] ^= np.uint32(1) << np.uint32(bit)
    assert name in difference(known, {**outputs, name: flat.reshape(outputs[name].shape)})


def test_answer_of_another_form_is_told(minilm, known):
    outputs = answer(known, minilm)
    name = next(iter(outputs))
    assert "instead of" in difference(known, {})
    assert "instead of" in difference(known, {**outputs, name: outputs[name].astype(np.float64)})
    assert "instead of" in difference(known, {**outputs, name: outputs[name][0]})
    assert difference(known, {**outputs, name: outputs[name][:, :3]}) == ""  # nothing can be said
    broken = outputs[name].copy()
    broken.ravel()[0] = np.nan
    assert "not finite" in difference(known, {**outputs, name: broken})


def test_model_that_no_made_up_input_suits_takes_an_example():
    spec = read_model("vad", silero_vad_path()).spec
    assert record(spec) is None  # a sampling rate of 0
    found = record(spec, FRAME)
    assert found is not None
    np.testing.assert_array_equal(question(spec, found)["sr"], FRAME["sr"])
    np.testing.assert_array_equal(question(spec, found)["input"], FRAME["input"])


def test_long_output_is_kept_in_part_and_a_scalar_whole():
    long = np.arange(10 * ELEMENTS_MAX, dtype=np.float32)
    kept = _kept(long)
    assert kept.stride == 10
    assert kept.values().size == ELEMENTS_MAX
    scalar = _kept(np.array(7, np.int64))
    assert scalar.values().reshape(scalar.shape) == 7


def test_model_that_the_native_runtime_does_not_take_has_no_known_answer(minilm, tmp_path):
    broken = tmp_path / "m.onnx"
    broken.write_bytes(b"no model")
    file = dataclasses.replace(minilm.files[0], path=str(broken))
    assert record(dataclasses.replace(minilm, files=(file,))) is None


@pytest.mark.parametrize(
    ("backend", "threads", "seen"),
    [(Backend.WASM, 1, True), (Backend.WASM, 4, False), (Backend.WEBGPU, 1, False)],
)
def test_probe_sees_a_low_bit_only_where_the_same_sum_comes_out_the_same(
    minilm, backend, threads, seen
):
    probes = Probes()
    right = {"y": np.linspace(1, 2, 9, dtype=np.float32)}
    probes.learn(minilm, NumericId("ort", backend, threads), {"x": right["y"]}, right)
    assert probes.next_model() == "minilm"
    known = probes.of("minilm")
    assert known is not None
    assert probes.judge(known, right) == ""
    off = right["y"].copy()
    off.view(np.uint32)[3] ^= 1
    assert bool(probes.judge(known, {"y": off})) is seen
    assert probes.judge(known, {"y": right["y"] + 1}) != ""
    probes.learn(minilm, NumericId("ort", backend, threads), {"x": right["y"]}, right)
    assert probes.judge(known, {"y": right["y"] + 1}) == ""  # it was asked before that
    probes.forget("minilm")
    assert probes.of("minilm") is None
    assert probes.next_model() == ""
