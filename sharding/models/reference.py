"""Runs a model in the native runtime within limits on time and memory, in a process of its own.

What inputs that were made up cost is not known before: five numbers may ask for gigabytes. This
module must not make up inputs (`sharding.models.known_answers` does), nor run a model itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.models.frames import Array
from sharding.models.known_tensors import KnownTensor

_ROOT = Path(__file__).parents[2]
_PROGRAM = "sharding.models.reference_process"
_SINGLE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # threads reserve address space


@dataclass(frozen=True)
class RunLimits:
    """What a run may take on top of an idle process, for a model of `model_bytes`.

    A model that is opened takes a few times its own bytes, and time in proportion. Of the seconds
    those of the processor count, so that a busy machine changes nothing; on the clock it may be
    `clock_factor` times as many.
    """

    bytes_max: int = 256 << 20
    seconds_max: int = 10
    model_factor: int = 4
    model_bytes_per_second: int = 50_000_000
    clock_factor: int = 6

    def memory(self, model_bytes: int) -> int:
        return self.bytes_max + self.model_factor * model_bytes

    def seconds(self, model_bytes: int) -> int:
        return self.seconds_max + model_bytes // self.model_bytes_per_second


@dataclass(frozen=True)
class Answered:
    """The outputs for the candidate of this number."""

    number: int
    outputs: Mapping[str, KnownTensor]


@dataclass(frozen=True)
class Unanswered:
    """Why there are no outputs, and whether the last candidate may suit the model all the same."""

    why: str
    suits: bool = False


class ReferenceRun:
    """One process for one model at `path`. `run` once; `stop` ends it, from any thread."""

    def __init__(
        self,
        path: str,
        model_bytes: int,
        candidates: Sequence[Mapping[str, Array]],
        limits: RunLimits | None = None,
    ) -> None:
        self._path = path
        self._candidates = candidates
        limits = limits or RunLimits()
        self._bytes_max = limits.memory(model_bytes)
        self._seconds_max = limits.seconds(model_bytes)
        self._clock_max = limits.clock_factor * self._seconds_max
        self._guard = threading.Lock()  # over the process, which `stop` may find unborn
        self._stopped = False
        self._late = False
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> Answered | Unanswered:
        """The outputs for the first of the candidates that suits the model, or why there are none.

        Blocks.
        """
        with self._guard:
            if self._stopped:
                return Unanswered("it was no longer wanted")
            try:
                self._process = process = self._started()
            except (OSError, ValueError) as error:
                why = f"the process that runs native onnxruntime could not be started: {error}"
                return Unanswered(why, suits=True)
        timer = threading.Timer(self._clock_max, self._end_late)
        timer.daemon = True
        timer.start()
        try:
            said = self._exchanged(process)
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        return self._outcome(said, process.returncode)

    def stop(self) -> None:
        """End the process now."""
        with self._guard:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def _end_late(self) -> None:
        self._late = True
        self.stop()

    def _started(self) -> subprocess.Popen[bytes]:
        places = [str(_ROOT), *(place for place in sys.path if place)]
        return subprocess.Popen(
            # -P: a file of the working directory must not be taken for a module.
            [sys.executable, "-P", "-m", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_SINGLE, "PYTHONPATH": os.pathsep.join(places)},
        )

    def _exchanged(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        order = (self._path, self._candidates, self._bytes_max, self._seconds_max)
        with process.stdout as stdout, process.stdin as stdin:
            with contextlib.suppress(BrokenPipeError):  # it has ended; what it said tells why
                stdin.write(pickle.dumps(order))
                stdin.flush()
            said = stdout.read()
            with contextlib.suppress(BrokenPipeError):
                stdin.close()
            return said

    def _outcome(self, said: bytes, status: int) -> Answered | Unanswered:
        if self._stopped and not self._late:
            return Unanswered("it was no longer wanted")
        if self._late or status == -signal.SIGXCPU:
            return Unanswered(f"it took longer than {self._seconds_max} s")
        try:
            found: dict[str, Any] = json.loads(said)
        except ValueError:
            mib = self._bytes_max >> 20
            return Unanswered(f"its process ended ({_in_words(status)}); it may take {mib:,} MiB")
        if "why" in found:
            return Unanswered(str(found["why"]), bool(found["suits"]))
        outputs = {
            name: KnownTensor(kept["dtype"], tuple(kept["shape"]), kept["stride"], kept["data"])
            for name, kept in found["outputs"].items()
        }
        return Answered(int(found["number"]), outputs)


def _in_words(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-status).name
    return f"status {status}"
