"""The chaos run of a failure bundle, as far as it may be run again.

A bundle may be anybody's: of its settings only these are taken, each within bounds, and of its
models only those that come with tabpool, or the one that the user names. What is broken is what the
replay itself starts, as in any chaos run. This module must not run anything.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pool.chaos.workload import known_sources
from recovery.bounded_files import text_of
from recovery.errors import BadInput
from recovery.faults import Schedule, schedule_from_plain

OPERATIONS_MAX = 1_000_000
AT_ONCE_MAX = 1024
NODES_MAX = 8
SECONDS_MAX = 86_400.0
_TEXT_MAX = 500
_WORDS = ("level", "strategy", "browsers", "backend")  # which the pool checks
_FLAGS = ("gated", "settle")


def run_of(chaos: Any, model: Path | None = None) -> tuple[Schedule, dict[str, str]]:
    """The schedule of a bundle's chaos run, and its settings up to the operation that failed.

    `model` takes the place of the one model of the run that does not come with tabpool. Raises
    `BadInput`, naming what is missing or makes no sense.
    """
    if not isinstance(chaos, dict) or not isinstance(chaos.get("settings"), dict):
        raise _bad("settings", "an object", chaos)
    given = chaos["settings"]
    number = chaos.get("number")
    if type(number) is not int or not 0 <= number < OPERATIONS_MAX:
        raise _bad("number", f"an operation from 0 to {OPERATIONS_MAX - 1:,}", number)
    settings = {name: _text(given, name) for name in _WORDS}
    settings |= {name: _one_of(given, name, ("True", "False")) for name in _FLAGS}
    settings["at_once"] = _count(given, "at_once", AT_ONCE_MAX)
    settings["nodes"] = _count(given, "nodes", NODES_MAX)
    settings["deadline"] = _seconds(given, "deadline")
    settings["model"] = _models(_text(given, "model"), model)
    settings["operations"] = str(number + 1)
    settings["simulation"] = "off"
    return schedule_from_plain(chaos.get("schedule"), "the bundle's chaos run"), settings


def _bad(what: str, expected: str, got: object) -> BadInput:
    return BadInput(
        f"the bundle's chaos run is incomplete, or not one of tabpool: {what}: expected {expected},"
        f" got {text_of(got)}.",
        expected=expected,
        got=text_of(got),
    )


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or not 1 <= len(value) <= _TEXT_MAX:
        raise _bad(name, f"a text of 1 to {_TEXT_MAX} characters", value)
    return value


def _one_of(given: Mapping[str, Any], name: str, words: Collection[str]) -> str:
    value = _text(given, name)
    if value not in words:
        raise _bad(name, " or ".join(words), value)
    return value


def _count(given: Mapping[str, Any], name: str, most: int) -> str:
    value = _text(given, name)
    if not (value.isascii() and value.isdigit() and len(value) < 10 and 1 <= int(value) <= most):
        raise _bad(name, f"1 to {most}", value)
    return value


def _seconds(given: Mapping[str, Any], name: str) -> str:
    value = _text(given, name)
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= SECONDS_MAX:  # which NaN is not either
        raise _bad(name, f"seconds, at most {SECONDS_MAX:g}", value)
    return value


def _models(words: str, model: Path | None) -> str:
    """The models of the run: a path that the bundle names is never opened."""
    taken = [word.strip() for word in words.split(",") if word.strip()]
    known = known_sources()
    others = [word for word in taken if word not in known]
    if not others:
        return ",".join(taken)
    if model is None or len(others) > 1:
        raise BadInput(
            f"the bundle's chaos run used {text_of(', '.join(others))}, which a replay does not "
            "open by itself: pass the path of that model, if it is one, with --model. To run the "
            "faults again with several, use `tabpool chaos --plan` and `--model`.",
            expected=list(known),
            got=others,
        )
    return ",".join(str(model) if word in others else word for word in taken)
