"""Known answers: reproducible inputs, and a model's outputs for them.

The native runtime computes them when a model is loaded, in a process of its own and within limits
(`sharding.models.reference`); hosts that run the model later can be compared with them. They
reveal large errors only: native kernels, quantisation and back ends differ in low bits. Nothing
here runs a browser; this module must not decide what a wrong answer means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sharding.models.frames import Array
from sharding.models.inputs import warmup_bytes, warmup_inputs
from sharding.models.known_tensors import KnownTensor, whole
from sharding.models.reference import ReferenceRun, RunLimits, Unanswered
from sharding.models.signature import ModelSpec

INPUT_BYTES_MAX = 1 << 20  # of the inputs: they are sent with every order to load the model
WARMUP_BYTES_MAX = 64 << 20  # of inputs that only warm a model up: they are made where it is loaded
# How far a right answer may lie from the native one, as a part of the largest number in it. An
# int8 model may differ by some percent, as its kernels saturate otherwise on other processors
# (onnxruntime, "Quantize ONNX models": U8S8 on AVX2); a flipped exponent bit is far above that.
SCALE = 0.05
_SEED = 20_250
_MASK = "mask"
_IDS = (100, 2)  # below what integers are drawn: any vocabulary has 100 words, some only 2


@dataclass(frozen=True)
class KnownAnswer:
    """Inputs and a model's outputs for them. Plain data, to be sent and stored."""

    inputs: Mapping[str, KnownTensor]
    outputs: Mapping[str, KnownTensor]


# In the place of a known answer: no made-up inputs suit the model, or they cost too much. It is
# loaded without being run, since what the native runtime could not bear may end a browser.
ASK_NOTHING = KnownAnswer({}, {})


@dataclass(frozen=True)
class Recorded:
    """A known answer, or `why` there is none (None, or `ASK_NOTHING`)."""

    answer: KnownAnswer | None
    why: str = ""


def question(spec: ModelSpec, known: KnownAnswer | None) -> dict[str, Array]:
    """The inputs; zeros if there is no known answer, and none if those would be too large."""
    if known is None:
        return warmup_inputs(spec) if warmup_bytes(spec) <= WARMUP_BYTES_MAX else {}
    return {name: tensor.values().reshape(tensor.shape) for name, tensor in known.inputs.items()}


def varied_inputs(spec: ModelSpec, ids_max: int) -> dict[str, Array]:
    """Inputs of a fixed seed: not zeros, which would reveal few errors. Masks are ones."""
    arrays = warmup_inputs(spec)
    rng = np.random.default_rng(_SEED)
    for name, array in arrays.items():
        if array.dtype.kind == "f":
            arrays[name] = rng.standard_normal(array.shape).astype(array.dtype)
        elif array.dtype.kind in "iu" and _MASK in name.lower():
            arrays[name] = np.ones_like(array)
        elif array.dtype.kind in "iu" and array.ndim:  # a number alone is a setting, not data
            arrays[name] = rng.integers(0, ids_max, array.shape).astype(array.dtype)
    return arrays


class Recording:
    """The making of a model's known answer. `run` once; `stop` ends it early, from any thread."""

    def __init__(
        self,
        spec: ModelSpec,
        example: Mapping[str, Array] | None = None,
        limits: RunLimits | None = None,
    ) -> None:
        self._candidates = _candidates(spec, example)
        path = spec.files[0].path
        self._reference = ReferenceRun(path, spec.bytes, self._candidates, limits)

    def run(self) -> Recorded:
        """The native runtime's outputs for the example, or else for made-up inputs. Blocks.

        There are none if it fails, takes too much time or memory, or does not give the same outputs
        twice. (A browser may support what this build of the native runtime does not.)
        """
        if not self._candidates:
            return Recorded(None, f"its inputs are larger than {INPUT_BYTES_MAX >> 20} MiB")
        found = self._reference.run()
        if isinstance(found, Unanswered):
            return Recorded(None if found.suits else ASK_NOTHING, found.why)
        return Recorded(KnownAnswer(whole(self._candidates[found.number]), found.outputs))

    def stop(self) -> None:
        self._reference.stop()


def _candidates(spec: ModelSpec, example: Mapping[str, Array] | None) -> list[Mapping[str, Array]]:
    """Inputs to be tried in order, none of them too large to be kept, or even to be made."""
    found: list[Mapping[str, Array]] = []
    if example is not None and sum(a.nbytes for a in example.values()) <= INPUT_BYTES_MAX:
        found.append(example)
    if warmup_bytes(spec) <= INPUT_BYTES_MAX:
        found += [*(varied_inputs(spec, below) for below in _IDS), warmup_inputs(spec)]
    return found


def difference(known: KnownAnswer, outputs: Mapping[str, Array]) -> str:
    """How an answer is clearly wrong, in words; empty if it is not."""
    if known.outputs.keys() != outputs.keys():
        return f"outputs {', '.join(outputs)} instead of {', '.join(known.outputs)}"
    for name, right in known.outputs.items():
        got = outputs[name]
        if (got.dtype.name, got.ndim) != (right.dtype, len(right.shape)):
            return (
                f"{name}: {got.dtype}{list(got.shape)} instead of {right.dtype}{list(right.shape)}"
            )
        if got.shape != right.shape:
            continue  # as many as were found, say: near ties fall either way
        if wrong := _far(name, right.values(), got.ravel()[:: right.stride]):
            return wrong
    return ""


def _far(name: str, right: Array, got: Array) -> str:
    if right.dtype.kind not in "f" or not right.size:
        return ""  # integers are choices (an argmax, a shape): near ties fall either way
    x, y = right.astype(np.float64), got.astype(np.float64)
    if not np.array_equal(np.isfinite(x), np.isfinite(y)):
        return f"{name}: {np.count_nonzero(~np.isfinite(y))} numbers are not finite"
    x, y = np.where(np.isfinite(x), x, 0.0), np.where(np.isfinite(y), y, 0.0)
    limit = SCALE * max(float(np.abs(x).max()), 1e-3)
    worst = int(np.abs(x - y).argmax())
    if abs(x[worst] - y[worst]) > limit:
        return f"{name}: {y[worst]:.6g} instead of {x[worst]:.6g} (the limit is {limit:.3g})"
    return ""
