"""Validation of inputs against a signature, and conversion to the arrays that the graph takes.

Everything that can be refused before a browser is involved is refused here. Values are converted
only without loss and without guessing. This module must not read a model, and
knows no text (that is the pool's).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from recovery.errors import BadInput
from sharding.models.frames import Array
from sharding.models.signature import ModelSpec, TensorSpec

_FLOAT_FAMILIES = frozenset({"int", "float"})


def check_inputs(spec: ModelSpec, inputs: Mapping[str, Any]) -> dict[str, Array]:
    """One C-contiguous array of the exact dtype for every input of the graph, in its order.

    An ndarray must have the dtype already (only its byte order and layout are normalised, not
    copied if they fit). Python numbers and nested lists of them are converted: integers to an
    integer dtype that holds them, integers and floats to a float dtype (a float is rounded to
    it, but must not overflow; an integer must survive exactly), booleans to bool only. A
    dimension of size zero is taken where the graph leaves it open. The names of open dimensions
    bind nothing: exporters give one name to sizes that have nothing to do with each other, and
    the runtime does not compare them either (`unequal_dimensions` tells of them).

    Raises `BadInput`, with `expected=` and `got=`: names that are missing or unknown, a wrong
    dtype, rank or fixed dimension.
    """
    if not isinstance(inputs, Mapping):
        _refuse(f"Model {spec.name!r} takes named inputs", "a mapping", type(inputs).__name__)
    wanted = {tensor.name: tensor for tensor in spec.inputs}
    if unknown := [name for name in inputs if name not in wanted]:
        _refuse(
            f"Model {spec.name!r} has no input {', '.join(map(repr, unknown))}",
            list(wanted),
            [str(name) for name in inputs],
        )
    if missing := [name for name in wanted if name not in inputs]:
        _refuse(
            f"Model {spec.name!r} lacks input {', '.join(map(repr, missing))}",
            [f"{tensor.name}: {tensor}" for tensor in spec.inputs],
            [str(name) for name in inputs],
        )
    arrays: dict[str, Array] = {}
    for name, tensor in wanted.items():
        array = _as_array(spec.name, tensor, inputs[name])
        _check_shape(spec.name, tensor, array.shape)
        arrays[name] = array
    return arrays


def unequal_dimensions(spec: ModelSpec, inputs: Mapping[str, Array]) -> str:
    """The dimensions of one name that have several sizes in these inputs, in words; empty if none.

    That is no error in itself, but often the cause of one.
    """
    sizes: dict[str, dict[int, str]] = {}  # by name: each size, and an input that has it
    for tensor in spec.inputs:
        if tensor.name in inputs:
            for named, size in zip(tensor.shape or (), inputs[tensor.name].shape, strict=False):
                if isinstance(named, str):
                    sizes.setdefault(named, {}).setdefault(size, tensor.name)
    return "; ".join(
        f"{named!r} is " + " and ".join(f"{size} in {name!r}" for size, name in found.items())
        for named, found in sizes.items()
        if len(found) > 1
    )


def warmup_inputs(spec: ModelSpec, *, dim: int = 8) -> dict[str, Array]:
    """Inputs for warming a model up: zeros, and True for booleans (mask nothing).

    An open dimension is 1 if it is the first of its tensor (the batch), else `dim`; one name
    has one size everywhere. A tensor of unknown rank gets the shape `(1,)`. Models whose open
    dimensions depend on each other (a cache's length and a mask's) need better ones.
    """
    arrays: dict[str, Array] = {}
    for tensor, shape in _warmup_shapes(spec, dim):
        dtype = np.dtype(tensor.dtype)
        arrays[tensor.name] = np.ones(shape, dtype) if dtype.kind == "b" else np.zeros(shape, dtype)
    return arrays


def warmup_bytes(spec: ModelSpec, *, dim: int = 8) -> int:
    """How many bytes `warmup_inputs` would make: a graph may declare a shape of any size."""
    return sum(
        math.prod(shape) * np.dtype(tensor.dtype).itemsize
        for tensor, shape in _warmup_shapes(spec, dim)
    )


def _warmup_shapes(spec: ModelSpec, dim: int) -> Iterator[tuple[TensorSpec, tuple[int, ...]]]:
    sizes: dict[str, int] = {}
    for (
        tensor
    ) in spec.inputs:  # First dimensions first: a symbol that is a batch is one everywhere.
        if tensor.shape and isinstance(tensor.shape[0], str):
            sizes[tensor.shape[0]] = 1

    def size(axis: int, wanted: int | str | None) -> int:
        if isinstance(wanted, int):
            return wanted
        if wanted in sizes:
            return sizes[wanted]
        return 1 if axis == 0 else dim

    for tensor in spec.inputs:
        wanted = (1,) if tensor.shape is None else tensor.shape
        yield tensor, tuple(size(axis, one) for axis, one in enumerate(wanted))


def _refuse(problem: str, expected: Any, got: Any) -> NoReturn:
    def shown(value: Any) -> str:
        return ", ".join(value) or "nothing" if isinstance(value, list) else str(value)

    raise BadInput(
        f"{problem}: expected {shown(expected)}, got {shown(got)}.", expected=expected, got=got
    )


def _as_array(model: str, tensor: TensorSpec, value: Any) -> Array:
    dtype = np.dtype(tensor.dtype)
    problem = f"Input {tensor.name!r} of model {model!r}"
    if isinstance(value, np.ma.MaskedArray):
        _refuse(problem, f"an array of {tensor}", "a masked array (fill its holes first)")
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.name != dtype.name:
            hint = (
                f' (convert it with .astype("{dtype.name}"))' if value.dtype.kind in "biuf" else ""
            )
            _refuse(problem, f"{tensor}{hint}", f"an array of {value.dtype.name}")
        # Not ascontiguousarray, which would turn a scalar into a vector.
        return np.asarray(value, dtype=dtype, order="C")
    if isinstance(value, bool | int | float | list | tuple):
        return _from_python(problem, tensor, dtype, value)
    _refuse(problem, f"a numpy array of {tensor}", f"{type(value).__name__}")


def _from_python(problem: str, tensor: TensorSpec, dtype: np.dtype[Any], value: Any) -> Array:
    """Arrays from Python numbers. Made as object arrays first, since numpy would guess a dtype."""
    try:
        leaves: Array = np.array(value, dtype=object)
    except ValueError:
        _refuse(problem, str(tensor), "lists of different lengths")
    families = {_family(leaf) for leaf in leaves.flat}
    if "list" in families:
        _refuse(problem, str(tensor), "lists of different lengths or depths")
    if dtype.kind == "b":
        allowed = frozenset({"bool"})
    elif dtype.kind in "iu":
        allowed = frozenset({"int"})
    else:
        allowed = _FLOAT_FAMILIES
    if not families <= allowed:
        _refuse(problem, str(tensor), f"values of type {' and '.join(sorted(families))}")
    if dtype.kind in "iu" and leaves.size:
        limits = np.iinfo(dtype)
        for leaf in (leaves.min(), leaves.max()):
            if not limits.min <= leaf <= limits.max:
                _refuse(problem, f"{tensor}, from {limits.min} to {limits.max}", str(leaf))
    try:
        with np.errstate(over="ignore"):
            array = leaves.astype(dtype)
    except OverflowError:  # an integer beyond every float
        _refuse(problem, str(tensor), "an integer that is too large")
    if dtype.kind == "f":
        _check_floats(problem, tensor, leaves, array)
    return array


def _family(leaf: Any) -> str:
    if isinstance(leaf, bool | np.bool_):
        return "bool"
    if isinstance(leaf, int | np.integer):
        return "int"
    if isinstance(leaf, float | np.floating):
        return "float"
    return (
        "list" if isinstance(leaf, Sequence) and not isinstance(leaf, str) else type(leaf).__name__
    )


def _check_floats(problem: str, tensor: TensorSpec, leaves: Array, array: Array) -> None:
    for leaf, number in zip(leaves.flat, array.flat, strict=True):
        if _family(leaf) == "int":
            if not np.isfinite(number) or int(number) != leaf:
                _refuse(problem, str(tensor), f"the integer {leaf}, which it cannot hold exactly")
        elif np.isinf(number) and not np.isinf(leaf):
            _refuse(problem, str(tensor), f"{leaf}, which overflows it")


def _check_shape(model: str, tensor: TensorSpec, shape: tuple[int, ...]) -> None:
    if tensor.shape is None:
        return
    problem = f"Input {tensor.name!r} of model {model!r}"
    if len(shape) != len(tensor.shape):
        _refuse(
            f"{problem} has the wrong number of dimensions",
            f"{len(tensor.shape)} ({tensor})",
            f"{len(shape)} ({list(shape)})",
        )
    for axis, (wanted, size) in enumerate(zip(tensor.shape, shape, strict=True)):
        if isinstance(wanted, int) and size != wanted:
            _refuse(
                f"{problem}, dimension {axis}", f"{wanted} ({tensor})", f"{size} ({list(shape)})"
            )
