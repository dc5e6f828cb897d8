"""A model in the native runtime: the arbiter of votes, the last rung, and the tests' reference.

The only module that uses `onnxruntime`, whose errors it converts. It computes on the CPU, one
kernel after the other. This module must not check inputs against a signature
(`sharding.models.inputs` does) and must not retry.
"""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from recovery.errors import BadInput, InternalError, NotAModel, PageError
from recovery.kinds import Backend
from recovery.records import NumericId
from sharding.models.frames import Array

# What the runtime raises while it reads a model, each straight below Exception.
_LOAD_ERRORS = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
_RUN_ERRORS = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
_SILENT = 4  # fatal only: errors are raised, and need not be printed too

# Instruction sets by which the runtime's CPU kernels differ, and with them the last bits.
_INSTRUCTION_SETS = frozenset(
    {"avx", "avx2", "fma", "f16c", "avx_vnni", "avx_ne_convert", "amx_int8", "amx_bf16"}
    | {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"}
    | {"asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"}
)


class NativeSession:
    """One model in native onnxruntime. Call `open`, `run` any number of times, then `close`.

    Calls block; `run` may be called from several threads. `threads` is the number that one
    kernel may use (it can change the last bits of an answer, so it is in the `numeric_id`).
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        if threads < 1:
            raise BadInput(
                f"threads must be at least 1, not {threads}.", expected="at least 1", got=threads
            )
        self._path = str(path)
        self._threads = threads
        self._session: Any = None

    def __repr__(self) -> str:
        state = "closed" if self._session is None else "open"
        return f"<NativeSession {self._path} {state}, {self._threads} threads>"

    @property
    def numeric_id(self) -> NumericId:
        return NumericId(
            ort_build=f"native {onnxruntime.__version__} {_build()}".rstrip(),
            backend=Backend.NATIVE,
            threads=self._threads,
            simd=True,
            adapter=_cpu(),
        )

    def open(self) -> None:
        """Loads the model. Raises `NotAModel` if the runtime cannot. A second call does nothing."""
        if self._session is not None:
            return
        options = onnxruntime.SessionOptions()
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _SILENT
        # Idle threads that spin would take the cores from the browsers on this machine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                self._path, options, providers=["CPUExecutionProvider"]
            )
        except _LOAD_ERRORS as error:
            raise NotAModel(
                f"{self._path}: expected an ONNX model that the native runtime takes, got: {error}",
                path=self._path,
                expected="an ONNX model",
                got=str(error),
            ) from error

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs of the graph by name, for inputs as `check_inputs` returns them.

        Raises `BadInput` for inputs that the runtime refuses by name, dtype or rank,
        `PageError` if a kernel fails (here too the runtime is alive and reports an error), and
        `InternalError` if the session is not open.
        """
        session = self._session
        if session is None:
            raise InternalError(f"{self!r}: run() needs open() first.")
        names = [output.name for output in session.get_outputs()]
        try:
            values = session.run(names, dict(inputs))
        # ValueError: a missing input. RuntimeError (not theirs): a value that is no array.
        except (ort_errors.InvalidArgument, ValueError, RuntimeError) as error:
            raise BadInput(
                f"The native runtime refused the inputs: {error}",
                expected=[f"{i.name}: {i.type}{i.shape}" for i in session.get_inputs()],
                got=[f"{name}: {np.asarray(a).dtype}{np.shape(a)}" for name, a in inputs.items()],
            ) from error
        except _RUN_ERRORS as error:
            raise PageError(f"The native runtime failed: {error}", backend="native") from error
        return dict(zip(names, values, strict=True))

    def close(self) -> None:
        """Frees the model. May be called twice, and before `open`."""
        self._session = None


def _build() -> str:
    match = re.search(r"git-commit-id=(\w+)", onnxruntime.get_build_info())
    return match.group(1) if match else ""


@functools.cache
def _cpu() -> str:
    """The architecture and those instruction sets of it that decide which kernels run."""
    flags: set[str] = set()
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                key, _, value = line.partition(":")
                if key.strip() in {"flags", "Features"}:
                    flags.update(value.split())
                    break
    except OSError:
        flags.update(platform.processor().split())  # macOS: one kind per architecture
    return " ".join([platform.machine(), *sorted(flags & _INSTRUCTION_SETS)])
