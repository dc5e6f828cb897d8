"""Known answers, against the native runtime."""

import dataclasses
import resource
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from actors.browser.probes import Probes
from pool.models.bundled import minilm_folder, silero_vad_path
from pool.models.registry import read_model
from recovery.kinds import Backend
from recovery.records import NumericId
from sharding.models.known_answers import (
    ASK_NOTHING,
    INPUT_BYTES_MAX,
    WARMUP_BYTES_MAX,
    KnownAnswer,
    Recording,
    difference,
    question,
    varied_inputs,
)
from sharding.models.known_tensors import ALL_ELEMENTS_MAX, ELEMENTS_MAX, sampled, whole
from sharding.models.native import NativeSession
from sharding.models.reference import ReferenceRun, RunLimits
from sharding.models.signature import TensorSpec, read_signature
from tests import models
from tests.fakes import spec as spec_of

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
    found = Recording(minilm).run()
    assert (found.answer is not None, found.why) == (True, "")
    return found.answer


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
    assert Recording(spec).run().answer == ASK_NOTHING  # a sampling rate of 0
    found = Recording(spec, FRAME).run().answer
    assert found is not None
    np.testing.assert_array_equal(question(spec, found)["sr"], FRAME["sr"])
    np.testing.assert_array_equal(question(spec, found)["input"], FRAME["input"])


def test_long_output_is_kept_in_part_and_a_scalar_whole():
    long = np.arange(10 * ELEMENTS_MAX, dtype=np.float32)
    kept = sampled({"y": long})["y"]
    assert kept.stride == 10
    assert kept.values().size == ELEMENTS_MAX
    scalar = sampled({"y": np.array(7, np.int64)})["y"]
    assert scalar.values().reshape(scalar.shape) == 7
    assert whole({"x": long})["x"].values().size == long.size


def test_many_outputs_are_kept_in_smaller_parts():
    many = {f"y{n}": np.arange(ELEMENTS_MAX, dtype=np.float32) for n in range(100)}
    kept = sampled(many)
    assert kept.keys() == many.keys()
    sizes = [tensor.values().size for tensor in kept.values()]
    assert min(sizes) >= 1
    assert ALL_ELEMENTS_MAX / 2 < sum(sizes) <= ALL_ELEMENTS_MAX


def test_model_that_the_native_runtime_does_not_take_has_no_known_answer(minilm, tmp_path):
    broken = tmp_path / "m.onnx"
    broken.write_bytes(b"no model")
    file = dataclasses.replace(minilm.files[0], path=str(broken))
    found = Recording(dataclasses.replace(minilm, files=(file,))).run()
    assert found.answer is None
    assert "does not take the model" in found.why


# -- what made-up inputs may cost ------------------------------------------------------------------


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_inputs_that_ask_for_gigabytes_cost_the_caller_nothing(tmp_path):
    spec = read_signature(models.sized_model(tmp_path / "m.onnx"), name="m")
    before, began = peak_bytes(), time.thread_time()
    found = Recording(spec, {"size": np.full(5, 99)}).run()
    assert peak_bytes() - before < 64 << 20
    assert time.thread_time() - began < 2
    # Those of 40 GB are refused, and the first made-up ones that are not are taken.
    assert found.answer is not None
    assert not np.array_equal(question(spec, found.answer)["size"], np.full(5, 99))


def test_run_that_takes_more_memory_than_it_may_is_refused_with_what_it_wanted(tmp_path):
    spec = read_signature(models.sized_model(tmp_path / "m.onnx", numbers=1), name="m")
    little = RunLimits(bytes_max=256 << 20)
    fits, too_much = {"size": np.array([1000])}, {"size": np.array([10**8])}
    assert reference(spec, [too_much, fits], little).number == 1
    found = reference(spec, [too_much], little)
    assert "llocat" in found.why
    assert not found.suits


def test_run_that_takes_longer_than_it_may_is_ended(tmp_path):
    spec = read_signature(models.looping_model(tmp_path / "m.onnx"), name="m")
    found = Recording(spec, limits=RunLimits(seconds_max=1)).run()
    assert (found.answer, found.why) == (ASK_NOTHING, "it took longer than 1 s")
    assert question(spec, found.answer) == {}, "no browser is asked it either"


def test_process_that_waits_and_does_not_compute_is_ended_by_the_clock(tmp_path, monkeypatch):
    waiting = tmp_path / "waits.py"
    waiting.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr("sharding.models.reference._PROGRAM", "waits")
    monkeypatch.syspath_prepend(str(tmp_path))
    limits = RunLimits(seconds_max=1, clock_factor=1)
    assert reference(X_ONLY, [{}], limits).why == "it took longer than 1 s"


def test_process_that_dies_is_an_answer_that_there_is_not(tmp_path, monkeypatch):
    dying = tmp_path / "dies.py"
    dying.write_text("import os\nos.kill(os.getpid(), 11)\n")
    monkeypatch.setattr("sharding.models.reference._PROGRAM", "dies")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "SIGSEGV" in reference(X_ONLY, [{}], RunLimits()).why


def test_recording_that_nobody_waits_for_is_stopped(tmp_path):
    spec = read_signature(models.looping_model(tmp_path / "m.onnx"), name="m")
    recording = Recording(spec, limits=RunLimits(seconds_max=60))
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(recording.run)
        recording.stop()  # before it has begun, or while it runs
        found = running.result(timeout=30)
    assert found.why == "it was no longer wanted"


def test_model_whose_inputs_are_too_large_to_be_made_up_is_not_even_tried(tmp_path):
    spec = read_signature(models.identity_model(tmp_path / "m.onnx"), name="m")
    huge = dataclasses.replace(spec, inputs=(TensorSpec("x", "float32", (1 << 20, 1 << 20)),))
    found = Recording(huge).run()
    assert (found.answer, found.why) == (None, "its inputs are larger than 1 MiB")
    assert question(huge, None) == {}
    large = dataclasses.replace(spec, inputs=(TensorSpec("x", "int8", (2 * INPUT_BYTES_MAX,)),))
    assert question(large, None)["x"].nbytes < WARMUP_BYTES_MAX


def test_process_is_asked_whatever_the_working_directory_holds(tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path)
    spec = read_signature(models.add_model(tmp_path / "m.onnx"), name="m")
    assert Recording(spec).run().answer is not None


X_ONLY = spec_of("m")


def reference(spec, candidates, limits):
    path = spec.files[0].path if spec.files else "none"
    return ReferenceRun(path, spec.bytes, candidates, limits).run()


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
