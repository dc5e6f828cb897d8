"""A process that runs one model in the native runtime, within limits, and ends.

It is started by `sharding.models.reference`, for inputs that were made up: what a model makes of
those nobody knows. It reads what to run from stdin, says what came of it on stdout as JSON, and
ends at once when stdin closes: its maker is gone, or no longer interested. This module must not
import onnx or anything else that is slow to start.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

from recovery.errors import BadInput, NotAModel, PageError
from recovery.voting import same_bits
from sharding.models.frames import Array
from sharding.models.known_tensors import sampled
from sharding.models.native import NativeSession

_WORDS_MAX = 300  # characters of a runtime's error


def main() -> None:
    said = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a runtime that prints must not be read
    path, candidates, bytes_max, seconds_max = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with, args=(sys.stdin.buffer,), daemon=True).start()
    limit(bytes_max, seconds_max)
    with os.fdopen(said, "w") as stream:
        json.dump(first_answer(path, candidates), stream)
    os._exit(0)


def _end_with(stdin: BinaryIO) -> None:
    stdin.read()
    os._exit(1)


def limit(bytes_max: int, seconds_max: int) -> None:
    """Let this process take so much more memory (on Linux) and processor time than it has."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + seconds_max
    _lower(resource.RLIMIT_CPU, seconds, seconds + 1)  # at the second one it would be SIGKILL
    _lower(resource.RLIMIT_CORE, 0, 0)
    try:
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[0])
    except OSError:
        return  # macOS, which does not hold to a limit on memory either
    most = pages * resource.getpagesize() + bytes_max
    _lower(resource.RLIMIT_AS, most, most)


def _lower(kind: int, soft: int, hard: int) -> None:
    _, known = resource.getrlimit(kind)
    if known != resource.RLIM_INFINITY:
        soft, hard = min(soft, known), min(hard, known)
    resource.setrlimit(kind, (soft, hard))


def first_answer(path: str, candidates: Sequence[Mapping[str, Array]]) -> dict[str, Any]:
    """The number of the first candidate that the model answers twice alike, and the answer.

    Without one, `why` says what was wrong with the last, and `suits` whether it suited the model.
    """
    session = NativeSession(path)
    try:
        session.open()
    except (NotAModel, MemoryError) as error:
        why = f"native onnxruntime does not take the model: {_words(error)}"
        return {"why": why, "suits": True}  # for all that is known
    why, suits = "there were none", False
    for number, inputs in enumerate(candidates):
        try:
            first, second = (session.run(inputs) for _ in range(2))
        except (BadInput, PageError, MemoryError) as error:
            why, suits = _words(error), False  # zeros, perhaps
            continue
        if first and same_bits(first, second):
            kept = {name: asdict(tensor) for name, tensor in sampled(first).items()}
            return {"number": number, "outputs": kept}
        why, suits = "the model answers the same inputs differently each time", True
    return {"why": why, "suits": suits}


def _words(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words[:_WORDS_MAX].rstrip(".")


if __name__ == "__main__":
    main()
