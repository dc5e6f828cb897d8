import numpy as np
import pytest

from recovery.errors import BadInput, InternalError, NotAModel, PageError
from recovery.kinds import Backend
from sharding.models.native import NativeSession
from tests import models


def test_runs_a_model_and_one_with_external_data(tmp_path):
    session = NativeSession(models.add_model(tmp_path / "add.onnx"))
    session.open()
    session.open()
    outputs = session.run({"x": np.zeros((2, 3), np.float32)})
    np.testing.assert_array_equal(outputs["y"], np.ones((2, 3), np.float32))
    session.close()
    session.close()

    session = NativeSession(models.external_model(tmp_path / "model.onnx"), threads=2)
    session.open()
    outputs = session.run({"x": np.full(4, 3, np.float32)})
    np.testing.assert_array_equal(outputs["y"], np.full(4, 7, np.float32))


def test_the_constructor_touches_nothing(tmp_path):
    session = NativeSession(tmp_path / "missing.onnx")
    with pytest.raises(InternalError, match="open"):
        session.run({})
    with pytest.raises(NotAModel, match="missing"):
        session.open()


def test_what_the_runtime_cannot_read_is_no_model(tmp_path, capfd):
    path = tmp_path / "model.onnx"
    for content in (b"", b"nonsense", models.add_model(path).read_bytes()[:-30]):
        path.write_bytes(content)
        with pytest.raises(NotAModel):
            NativeSession(path).open()
    models.external_model(path)
    (tmp_path / "w.data").unlink()
    with pytest.raises(NotAModel):
        NativeSession(path).open()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"z": np.zeros((1, 3), np.float32)},
        {"x": np.zeros((1, 3), np.float64)},
        {"x": np.zeros(3, np.float32)},
        {"x": np.float32(3)},
        {"x": "text"},
        {"x": np.zeros((1, 4), np.float32)},
    ],
)
def test_inputs_that_do_not_fit_are_the_callers(tmp_path, inputs):
    session = NativeSession(models.add_model(tmp_path / "add.onnx"))
    session.open()
    with pytest.raises(BadInput):
        session.run(inputs)


def test_a_kernel_that_fails_is_the_runtimes(tmp_path, capfd):
    session = NativeSession(models.pair_model(tmp_path / "pair.onnx"))
    session.open()
    with pytest.raises(PageError, match="native runtime failed"):
        session.run({"a": np.zeros((2, 3), np.float32), "b": np.zeros((2, 4), np.float32)})
    assert capfd.readouterr().err == ""


def test_the_numeric_id_names_build_threads_and_kernels():
    one = NativeSession("m.onnx").numeric_id
    assert one == NativeSession("other.onnx").numeric_id
    assert one != NativeSession("m.onnx", threads=2).numeric_id
    assert one.backend is Backend.NATIVE
    assert one.ort_build.startswith("native ")
    assert one.adapter


def test_zero_threads_are_refused():
    with pytest.raises(BadInput):
        NativeSession("m.onnx", threads=0)
