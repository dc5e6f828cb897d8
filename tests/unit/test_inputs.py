import numpy as np
import pytest

from recovery.errors import BadInput
from recovery.kinds import ModelType
from recovery.voting import Tolerance
from sharding.models.inputs import (
    check_inputs,
    unequal_dimensions,
    warmup_bytes,
    warmup_inputs,
)
from sharding.models.native import NativeSession
from sharding.models.signature import ModelSpec, TensorSpec, read_signature
from tests import models


def model(*inputs: TensorSpec) -> ModelSpec:
    return ModelSpec(
        name="m",
        digest="d",
        type=ModelType.UNKNOWN,
        inputs=inputs,
        outputs=(),
        files=(),
        load_peak_bytes=0,
        tolerance=Tolerance(),
        opset=17,
    )


def x(dtype: str, *shape: int | str | None) -> ModelSpec:
    return model(TensorSpec("x", dtype, shape))


def refusal(spec, inputs) -> BadInput:
    with pytest.raises(BadInput) as caught:
        check_inputs(spec, inputs)
    assert caught.value.fields.keys() == {"expected", "got"}
    return caught.value


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("float32", [[0.1, 2.5]]),
        ("float32", [[1, 2]]),
        ("float32", ((1, 0.5),)),
        ("float32", [[float("inf"), float("nan")]]),
        ("float16", [[65504, 0.1]]),
        ("float64", [[2**53, 1e300]]),
        ("int64", [[-(2**63), 2**63 - 1]]),
        ("uint64", [[0, 2**64 - 1]]),
        ("uint8", [[0, 255]]),
        ("bool", [[True, False]]),
        ("int64", [[np.int32(1), np.int64(2)]]),
        ("float32", [np.array([1.0, 2.0])]),
    ],
)
def test_python_numbers_become_arrays(dtype, value):
    array = check_inputs(x(dtype, "n", 2), {"x": value})["x"]
    assert array.dtype == dtype
    assert array.shape == (1, 2)
    np.testing.assert_array_equal(array, np.array(value, dtype))


def test_scalars_and_empty_lists_become_arrays():
    scalar = check_inputs(x("int64"), {"x": 16000})["x"]
    assert (scalar.shape, scalar.dtype, int(scalar)) == ((), np.dtype("int64"), 16000)
    assert check_inputs(x("float32", "n"), {"x": []})["x"].shape == (0,)
    assert check_inputs(x("bool"), {"x": np.True_})["x"].shape == ()


@pytest.mark.parametrize(
    ("dtype", "value", "words"),
    [
        ("int64", [[1.0, 2]], "float"),
        ("int64", [[True, 1]], "bool"),
        ("bool", [[1, 0]], "int"),
        ("float32", [[True, 1.0]], "bool"),
        ("float32", [[1e300, 0.0]], "overflows"),
        ("float16", [[70000, 0]], "cannot hold exactly"),
        ("float32", [[2**24 + 1, 0]], "cannot hold exactly"),
        ("float32", [[10**400, 0]], "too large"),
        ("int8", [[128, 0]], "from -128 to 127"),
        ("uint8", [[-1, 0]], "from 0 to 255"),
        ("float32", [[1.0, 2.0], [3.0]], "different lengths"),
        ("float32", [[1.0, [2.0]]], "different lengths"),
        ("float32", [["1.0", "2.0"]], "str"),
        ("float32", [[None, 1.0]], "NoneType"),
        ("float32", [[1j, 1.0]], "complex"),
        ("float32", "text", "str"),
        ("float32", b"bytes", "bytes"),
        ("float32", None, "NoneType"),
        ("float32", {1.0, 2.0}, "set"),
    ],
)
def test_what_would_lose_or_guess_something_is_refused(dtype, value, words):
    assert words in str(refusal(x(dtype, "n", 2), {"x": value}))


def test_arrays_need_the_exact_dtype_and_are_told_how_to_get_it():
    error = refusal(x("int64", "n"), {"x": np.zeros(2, np.int32)})
    assert str(error) == (
        "Input 'x' of model 'm': expected int64[n] (convert it with .astype(\"int64\")), "
        "got an array of int32."
    )
    for array in (np.array(["a"]), np.array([None]), np.zeros(1, "M8[s]"), np.str_("a")):
        assert ".astype" not in str(refusal(x("int64", "n"), {"x": array}))
    refusal(x("float32", "n"), {"x": np.ma.masked_array([1.0], [True])})


def test_layout_is_normalised_and_what_fits_is_not_copied():
    wanted = np.arange(6, dtype=np.float32).reshape(2, 3)
    for array in (wanted.astype(">f4"), np.asfortranarray(wanted), wanted[::-1][::-1]):
        got = check_inputs(x("float32", "n", 3), {"x": array})["x"]
        np.testing.assert_array_equal(got, wanted)
        assert got.flags.c_contiguous
        assert got.dtype.isnative
    assert check_inputs(x("float32", "n", 3), {"x": wanted})["x"] is wanted


def test_names_must_match():
    spec = model(TensorSpec("a", "int8", ()), TensorSpec("b", "int8", ()))
    assert list(check_inputs(spec, {"b": 1, "a": 2})) == ["a", "b"]
    error = refusal(spec, {"a": 1, "c": 1})
    assert str(error) == "Model 'm' has no input 'c': expected a, b, got a, c."
    assert "lacks input 'b'" in str(refusal(spec, {"a": 1}))
    assert "got nothing" in str(refusal(spec, {}))
    refusal(spec, {1: 1})
    refusal(spec, [1, 2])
    refusal(spec, None)


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3), ()])
def test_a_wrong_rank_is_refused(shape):
    assert "number of dimensions" in str(
        refusal(x("float32", "n", 3), {"x": np.zeros(shape, np.float32)})
    )


def test_fixed_dimensions_must_fit_even_if_there_is_nothing_in_them():
    error = refusal(x("float32", "n", 3), {"x": np.zeros((0, 2), np.float32)})
    assert "dimension 1: expected 3 (float32[n, 3]), got 2 ([0, 2])" in str(error)
    assert check_inputs(x("float32", "n", 3), {"x": np.zeros((0, 3), np.float32)})["x"].size == 0
    assert check_inputs(x("float32", None), {"x": np.zeros(5, np.float32)})["x"].shape == (5,)


@pytest.mark.parametrize("axis", ["batch", "?", "None", "-1", "N", "unk__0", ""])
def test_name_of_a_dimension_binds_nothing_across_inputs_as_in_the_runtime(tmp_path, axis):
    path = models.matching_model(tmp_path / "clip.onnx", axis)
    spec = read_signature(path, name="clip")
    texts, image = np.arange(12).reshape(3, 4), np.ones((1, 4), np.float32)
    arrays = check_inputs(spec, {"input_ids": texts, "pixel_values": image})
    session = NativeSession(path)
    session.open()
    assert session.run(arrays)["per_image"].tolist() == [[6, 22, 38]]
    assert check_inputs(x("int8", axis, axis), {"x": np.zeros((2, 5), np.int8)})["x"].size == 10


def test_dimensions_of_one_name_and_several_sizes_are_told_to_whoever_looks_for_a_cause():
    spec = model(
        TensorSpec("a", "int8", ("batch", "length")),
        TensorSpec("b", "int8", ("batch", None)),
        TensorSpec("c", "int8", None),
    )
    a, b, c = (np.zeros(shape, np.int8) for shape in ((2, 5), (3, 7), (4,)))
    assert unequal_dimensions(spec, {"a": a, "b": b, "c": c}) == "'batch' is 2 in 'a' and 3 in 'b'"
    assert unequal_dimensions(spec, {"a": a, "b": b[:2], "c": c}) == ""
    assert unequal_dimensions(spec, {"x": a}) == ""


def test_inputs_that_nobody_could_make_are_measured_and_not_made():
    huge = model(TensorSpec("x", "float32", (100_000, 100_000)), TensorSpec("n", "int64", ()))
    assert warmup_bytes(huge) == 4 * 10**10 + 8
    small = x("float16", "batch", None, 3)
    assert warmup_bytes(small) == sum(a.nbytes for a in warmup_inputs(small).values())


def test_any_shape_fits_an_unknown_rank():
    spec = model(TensorSpec("x", "int8", None))
    assert check_inputs(spec, {"x": [[[1]]]})["x"].shape == (1, 1, 1)


def test_warmup_inputs_fit_their_own_model():
    spec = model(
        TensorSpec("cache", "float16", (2, "batch", None)),
        TensorSpec("ids", "int64", ("batch", "length")),
        TensorSpec("mask", "bool", (None, "length", 3)),
        TensorSpec("rate", "int64", ()),
        TensorSpec("any", "uint8", None),
    )
    inputs = warmup_inputs(spec, dim=4)
    assert {name: array.shape for name, array in inputs.items()} == {
        "cache": (2, 1, 4),
        "ids": (1, 4),
        "mask": (1, 4, 3),
        "rate": (),
        "any": (1,),
    }
    assert inputs["mask"].all()
    assert not inputs["ids"].any()
    assert check_inputs(spec, inputs).keys() == inputs.keys()
