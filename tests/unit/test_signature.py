import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from recovery.errors import NotAModel
from recovery.kinds import ModelType
from recovery.voting import Tolerance
from sharding.models.frames import HEADER_BYTES_MAX, TENSORS_MAX
from sharding.models.load_memory import LOAD_OVERHEAD_BYTES
from sharding.models.native import NativeSession
from sharding.models.signature import TensorSpec, check_carried, read_signature
from tests import models


def test_signature_of_a_model_in_one_file(tmp_path):
    path = models.add_model(tmp_path / "add.onnx", ("batch", 3, None))
    spec = read_signature(path, name="add", type=ModelType.VISION)
    data = path.read_bytes()
    assert spec.name == "add"
    assert spec.type is ModelType.VISION
    assert spec.inputs == (TensorSpec("x", "float32", ("batch", 3, None)),)
    assert spec.outputs == (TensorSpec("y", "float32", ("batch", 3, None)),)
    assert spec.digest == hashlib.sha256(data).hexdigest()
    assert [(file.path, file.name, file.bytes) for file in spec.files] == [
        (str(path), "add.onnx", len(data))
    ]
    assert spec.bytes == len(data)
    assert spec.load_peak_bytes == 2 * len(data) + LOAD_OVERHEAD_BYTES
    assert spec.tolerance == Tolerance()
    assert spec.opset == 17
    assert spec.span is None
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    models.add_model(tmp_path / "add.onnx")
    monkeypatch.chdir(tmp_path)
    assert read_signature("add.onnx", name="add").files[0].path == str(tmp_path / "add.onnx")


def test_inputs_with_an_initializer_are_parameters(tmp_path):
    path = models.add_model(tmp_path / "add.onnx")
    model = onnx.load(path)
    model.graph.input.append(models.value("amount", TensorProto.FLOAT, (1,)))
    path.write_bytes(model.SerializeToString())
    assert [tensor.name for tensor in read_signature(path, name="add").inputs] == ["x"]


def test_a_dimension_of_zero_is_unknown_and_a_missing_shape_has_no_rank(tmp_path):
    spec = read_signature(models.identity_model(tmp_path / "a.onnx", (0, 576)), name="a")
    assert spec.inputs[0].shape == (None, 576)
    spec = read_signature(models.identity_model(tmp_path / "b.onnx", None), name="b")
    assert spec.inputs[0].shape is None
    assert spec.inputs[0].rank is None
    spec = read_signature(models.identity_model(tmp_path / "c.onnx", ()), name="c")
    assert spec.inputs[0].shape == ()
    assert [str(TensorSpec("x", "int8", shape)) for shape in (None, (), ("n", None, 3))] == [
        "int8 of any shape",
        "int8[]",
        "int8[n, ?, 3]",
    ]


def test_external_data_files_belong_to_the_model(tmp_path):
    path = models.external_model(tmp_path / "model.onnx")
    spec = read_signature(path, name="external")
    assert [file.name for file in spec.files] == ["model.onnx", "b.data", "w.data"]
    assert [file.bytes for file in spec.files[1:]] == [16, 16]
    assert spec.files[1].digest == hashlib.sha256((tmp_path / "b.data").read_bytes()).hexdigest()

    renamed = path.rename(tmp_path / "renamed.onnx")
    assert read_signature(renamed, name="external").digest == spec.digest
    (tmp_path / "b.data").write_bytes(b"\1" * 16)
    assert read_signature(renamed, name="external").digest != spec.digest


def test_external_data_in_a_subfolder_and_in_a_subgraph(tmp_path):
    path = models.external_model(tmp_path / "m.onnx", locations=("weights/w", "./b.data"))
    assert [file.name for file in read_signature(path, name="m").files] == [
        "m.onnx",
        "b.data",
        "weights/w",
    ]
    path = models.external_in_subgraph_model(tmp_path / "if.onnx")
    assert [file.name for file in read_signature(path, name="if").files] == [
        "if.onnx",
        "then.data",
    ]


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("sub//w.bin", "sub/w.bin"),
        ("./w.bin", "w.bin"),
        (".//w.bin", "w.bin"),
        ("././w.bin", "w.bin"),
        ("sub/./w.bin", "sub/w.bin"),
        ("sub/../w.bin", "w.bin"),
        ("sub/w.bin", "sub/w.bin"),
    ],
)
def test_external_data_is_one_file_however_the_graph_writes_its_name(tmp_path, location, name):
    path = models.external_model(tmp_path / "m.onnx", locations=(location, "b.data"))
    spec = read_signature(path, name="m")
    (file,) = (file for file in spec.files if file.name == name)
    assert file.spellings == (() if location == name else (location,))
    assert file.digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    session = NativeSession(path)
    session.open()
    assert session.run({"x": np.ones(4, np.float32)})["y"].tolist() == [3.0] * 4


def test_two_spellings_of_one_file_are_one_file(tmp_path):
    path = models.external_model(tmp_path / "m.onnx", locations=("./w.bin", "w.bin"))
    spec = read_signature(path, name="m")
    assert [(file.name, file.spellings) for file in spec.files[1:]] == [("w.bin", ("./w.bin",))]


def test_links_inside_the_folder_are_followed_and_those_that_lead_out_refused(tmp_path):
    folder, outside = tmp_path / "m", tmp_path / "outside"
    path = models.external_model(folder / "model.onnx", locations=("w.bin", "b.bin"))
    (folder / "w.bin").rename(folder / "real.bin")
    (folder / "w.bin").symlink_to("real.bin")
    assert read_signature(path, name="m").bytes > 0
    outside.mkdir()
    (folder / "real.bin").rename(outside / "secret")
    for target in (outside / "secret", Path("../outside/secret")):
        (folder / "w.bin").unlink()
        (folder / "w.bin").symlink_to(target)
        with pytest.raises(NotAModel, match=r"own folder.*a link to .*outside/secret"):
            read_signature(path, name="m")
    (folder / "sub").symlink_to(outside)
    path = models.external_model(tmp_path / "other.onnx", locations=("m/sub/secret", "b.bin"))
    (tmp_path / "other.onnx").rename(folder / "other.onnx")
    model = onnx.load(folder / "other.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "sub/secret"
    (folder / "other.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(NotAModel, match="own folder"):
        read_signature(folder / "other.onnx", name="m")


def test_snapshot_whose_files_are_all_links_to_one_folder_of_blobs_is_a_model(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    models.external_model(blobs / "model.onnx", locations=("w.bin", "b.bin"))
    (snapshot / "onnx").mkdir(parents=True)
    for number, name in enumerate(("model.onnx", "w.bin", "b.bin")):
        (blobs / name).rename(blobs / f"sha{number}")
        (snapshot / "onnx" / name).symlink_to(f"../../../blobs/sha{number}")
    spec = read_signature(snapshot / "onnx" / "model.onnx", name="m")
    assert [file.name for file in spec.files] == ["model.onnx", "b.bin", "w.bin"]


@pytest.mark.parametrize(
    ("outputs", "name", "expected"),
    [
        (TENSORS_MAX + 1, "y{}", r"at most 1,024 outputs, .*, got 1,025 \("),
        (2, "y{}" + "z" * (HEADER_BYTES_MAX // 2), "names fit into the header"),
        (1, "__metadata__", "names fit into the header"),
    ],
)
def test_outputs_that_no_message_carries_are_refused_with_the_limit(
    tmp_path, outputs, name, expected
):
    path = models.chatty_model(tmp_path / "m.onnx", outputs, name)
    spec = read_signature(path, name="m")  # it can still be looked at, and cut
    with pytest.raises(NotAModel, match=expected):
        check_carried(spec)
    check_carried(read_signature(models.chatty_model(path, TENSORS_MAX), name="m"))
    many = tuple(TensorSpec(f"x{n}", "float32", None) for n in range(TENSORS_MAX + 1))
    with pytest.raises(NotAModel, match="at most 1,024 inputs"):
        check_carried(replace(spec, inputs=many, outputs=()))


@pytest.mark.parametrize(
    "location", ["../w.data", "/tmp/w.data", "a/../../w", "C:w", "a\\w", "", ".", "a/.."]
)
def test_external_data_outside_the_folder_is_refused(tmp_path, location):
    path = models.external_model(tmp_path / "m" / "model.onnx")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(NotAModel, match="own folder"):
        read_signature(path, name="m")


def test_missing_and_short_external_data_is_refused(tmp_path):
    path = models.external_model(tmp_path / "model.onnx")
    (tmp_path / "w.data").write_bytes(b"\0" * 15)
    with pytest.raises(NotAModel, match=r"at least 16 bytes.*15 bytes"):
        read_signature(path, name="m")
    (tmp_path / "w.data").unlink()
    with pytest.raises(NotAModel, match=r"w\.data"):
        read_signature(path, name="m")


def test_external_data_with_an_offset_that_is_no_number_is_refused(tmp_path):
    path = models.external_model(tmp_path / "model.onnx")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "offset":
            entry.value = "x"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(NotAModel, match="integers"):
        read_signature(path, name="m")


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"", "an empty file"),
        (b"\x00\x01\x02", "no ONNX"),
        (b"<html>404</html>", "no ONNX"),
        (b"\x08\x08", "no ONNX"),  # parses as a model of IR version 8 with nothing in it
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_a_file_that_is_no_onnx_is_refused(tmp_path, content, got):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(NotAModel, match=got) as caught:
        read_signature(path, name="m")
    assert caught.value.fields["expected"] == "a complete ONNX model"


def test_every_truncation_is_refused(tmp_path):
    path = models.add_model(tmp_path / "add.onnx")
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(NotAModel):
            read_signature(path, name="m")


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(NotAModel, match="a folder"):
        read_signature(tmp_path, name="m")
    with pytest.raises(NotAModel, match="No such file"):
        read_signature(tmp_path / "none.onnx", name="m")


@pytest.mark.parametrize(
    ("dtype", "named"),
    [
        (TensorProto.STRING, "string"),
        (TensorProto.BFLOAT16, "bfloat16"),
        (TensorProto.COMPLEX64, "complex64"),
        (TensorProto.UNDEFINED, "number 0"),
        (99, "number 99"),
    ],
)
def test_unsupported_dtypes_are_refused(tmp_path, dtype, named):
    path = models.identity_model(tmp_path / "m.onnx", dtype=dtype)
    with pytest.raises(NotAModel, match=rf"'x' of dtype {named}, which is not supported"):
        read_signature(path, name="m")


def test_sequences_and_optionals_are_refused(tmp_path):
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    for kind, proto in (
        ("sequence_type", helper.make_sequence_type_proto(tensor)),
        ("optional_type", helper.make_optional_type_proto(tensor)),
    ):
        x, y = (helper.make_value_info(name, proto) for name in "xy")
        path = models.save(
            tmp_path / "m.onnx", [helper.make_node("Identity", ["x"], ["y"])], [x], [y]
        )
        with pytest.raises(NotAModel, match=f"of {kind}, which is not supported"):
            read_signature(path, name="m")
