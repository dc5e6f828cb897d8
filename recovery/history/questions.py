"""What a pool's history can be asked, and with which options: a table, and its check.

Questions are methods of `recovery.history.tracker.PerformanceHistoryTracker`, and views by their
names. This module must not open a store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from recovery import checks
from recovery.errors import BadInput
from recovery.failures import Category
from recovery.history.schema import VIEWS
from recovery.kinds import BrowserType, ModelType

_TEXT_MAX = 2000
_TIME_MAX = 1e12  # seconds since 1970
_ROWS_MAX = 1_000_000_000
_CELL_MAX = 1e18
_COUNTED_BY = ("strategy", "rung", "category", "browser_type", "model_type")

Check = Callable[[str, Any], Any]


def _text(name: str, value: Any) -> str | None:
    return "" if value == "" else checks.optional(checks.text, name, value, _TEXT_MAX)


def _time(name: str, value: Any) -> float | None:
    return checks.optional(checks.number, name, value, 0, _TIME_MAX, "seconds since 1970")


def _window(name: str, value: Any) -> float:
    return checks.number(name, value, 0, _TIME_MAX, "seconds")


def _rows(name: str, value: Any) -> int:
    return checks.whole(name, value, 1, _ROWS_MAX)


def _one_of(words: type, name: str, value: Any) -> str | None:
    return checks.optional(checks.word, name, value, words)


def _counted_by(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise checks.refusal(name, f"some of {', '.join(_COUNTED_BY)}", value)
    return tuple(checks.word(name, each, _COUNTED_BY) for each in value)


_BROWSER: Check = partial(_one_of, BrowserType)
_MODEL_TYPE: Check = partial(_one_of, ModelType)
_OPTIONS: Mapping[str, Mapping[str, Check]] = {
    "analyze_performance_trends": {
        "model": _text,
        "browser_type": _BROWSER,
        "op": _text,
        "time_window_seconds": _window,
    },
    "failure_patterns": {"limit": _rows},
    "get_performance_recommendations": {"time_window_seconds": _window},
    "recommend_browser": {"model_type": _MODEL_TYPE, "since": _time},
    "rung_outcomes": {
        "fingerprint": _text,
        "category": partial(_one_of, Category),
        "browser_type": _BROWSER,
        "model_type": _MODEL_TYPE,
        "since": _time,
    },
    "statistics": {"since": _time},
    "success_rates": {"by": _counted_by, "since": _time},
}
_REQUIRED: Mapping[str, tuple[str, ...]] = {"recommend_browser": ("model_type",)}
QUESTIONS = (*_OPTIONS, *VIEWS)


def checked_options(question: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as plain values. Raises `BadInput` for those, or a question, that there are not.

    The columns of a view are the store's to know; their values must be text, numbers or switches.
    """
    if not isinstance(question, str) or question not in QUESTIONS:
        raise BadInput(
            f"history answers {', '.join(QUESTIONS)}: expected one of these questions, got "
            f"{checks.shown(question)}.",
            expected=list(QUESTIONS),
            got=question,
        )
    if question in VIEWS:
        return {
            name: _rows(name, value) if name == "limit" else _cell(name, value)
            for name, value in options.items()
        }
    known = _OPTIONS[question]
    if unknown := sorted(options.keys() - known.keys()):
        raise BadInput(
            f"{question} has no option {', '.join(unknown)}: expected any of {', '.join(known)}.",
            expected=list(known),
            got=unknown,
        )
    for name in _REQUIRED.get(question, ()):
        if options.get(name) is None:
            raise checks.refusal(name, "one of " + ", ".join(ModelType), None)
    return {name: known[name](name, value) for name, value in options.items()}


def _cell(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return _text(name, value)
    try:
        return checks.flag(name, value)
    except BadInput:
        return checks.number(name, value, -_CELL_MAX, _CELL_MAX, "text, True, False or a number")
