"""What went wrong, as a plain record: category, severity, scope and evidence.

Failures are records, not exceptions: they cross processes, are logged, and are what
plans are made from. `categorize_browser_failure` is the one place that turns evidence
into a category. This module must not act on a failure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from recovery import errors
from recovery.records import HostRef


class Category(StrEnum):
    LAUNCH_FAILURE = "launch_failure"
    CONNECTION_FAILURE = "connection_failure"
    TIMEOUT = "timeout"
    CRASH = "crash"
    RESOURCE_EXHAUSTION = "resource_exhaustion"
    GPU_ERROR = "gpu_error"
    API_ERROR = "api_error"
    INTERNAL_ERROR = "internal_error"
    WRONG_ANSWER = "wrong_answer"


class Severity(StrEnum):
    MILD = "mild"
    MODERATE = "moderate"
    SEVERE = "severe"


class Scope(StrEnum):
    """How far the damage reaches: everything inside the scope is lost or suspect."""

    OPERATION = "operation"
    PAGE = "page"
    BROWSER = "browser"
    NODE = "node"
    SUPERVISOR = "supervisor"
    STORE = "store"
    POOL = "pool"


@dataclass(frozen=True)
class Failure:
    """One failure as it was seen. `at` is wall time in seconds since the epoch."""

    category: Category
    severity: Severity
    scope: Scope
    message: str
    ref: HostRef | None = None
    op_id: str = ""
    at: float = 0.0
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        where = f" in {self.ref}" if self.ref else ""
        return f"{self.category}{where}: {self.message}"


# What the bridge and the death watch can see, and what it means. A key is a `what` of the
# evidence; the watch reports facts (which process ended, which socket closed), not opinions.
_SEEN: Mapping[str, tuple[Category, Severity, Scope]] = {
    "browser_exited": (Category.CRASH, Severity.SEVERE, Scope.BROWSER),
    "driver_exited": (Category.CRASH, Severity.SEVERE, Scope.BROWSER),
    "worker_exited": (Category.CRASH, Severity.SEVERE, Scope.BROWSER),
    "page_closed": (Category.CRASH, Severity.SEVERE, Scope.PAGE),
    "socket_closed": (Category.CONNECTION_FAILURE, Severity.MODERATE, Scope.PAGE),
    "deadline_passed": (Category.TIMEOUT, Severity.MODERATE, Scope.OPERATION),
    "page_hung": (Category.TIMEOUT, Severity.SEVERE, Scope.PAGE),
    "device_lost": (Category.GPU_ERROR, Severity.SEVERE, Scope.PAGE),
    "launch_failed": (Category.LAUNCH_FAILURE, Severity.SEVERE, Scope.BROWSER),
    "load_failed": (Category.API_ERROR, Severity.MODERATE, Scope.OPERATION),
    "run_failed": (Category.API_ERROR, Severity.MODERATE, Scope.OPERATION),
    "too_large": (Category.API_ERROR, Severity.MILD, Scope.OPERATION),
    "encode_failed": (Category.API_ERROR, Severity.MILD, Scope.OPERATION),
    "bad_frame": (Category.INTERNAL_ERROR, Severity.MODERATE, Scope.OPERATION),
    "unknown_kind": (Category.INTERNAL_ERROR, Severity.MODERATE, Scope.OPERATION),
    "warm_failed": (Category.API_ERROR, Severity.MODERATE, Scope.PAGE),
    "info_failed": (Category.API_ERROR, Severity.MODERATE, Scope.PAGE),
    "not_loaded": (Category.CONNECTION_FAILURE, Severity.MILD, Scope.OPERATION),
    "refused": (Category.INTERNAL_ERROR, Severity.MODERATE, Scope.OPERATION),
    "replaced": (Category.CONNECTION_FAILURE, Severity.MILD, Scope.OPERATION),
    "stale_frame": (Category.INTERNAL_ERROR, Severity.MILD, Scope.OPERATION),
}

# onnxruntime-web reports an allocation that failed as text only; these are its own words
# (wasm `std::bad_alloc`, JS `RangeError`, WebGPU out-of-memory errors).
_OUT_OF_MEMORY = re.compile(
    r"bad_alloc|out of memory|allocation failed|array buffer allocation|\boom\b", re.IGNORECASE
)


def categorize_browser_failure(
    error: BaseException | str, context: Mapping[str, Any] | None = None
) -> Failure:
    """Turn an error and what is known around it into a `Failure`.

    `context` may hold `what` (a fact from the death watch or bridge, see `_SEEN`), `ref`,
    `op_id`, `at`, and any further evidence, which is kept as it is.
    """
    facts = dict(context or {})
    ref, op_id, at = facts.pop("ref", None), facts.pop("op_id", ""), facts.pop("at", 0.0)
    message = str(error) or type(error).__name__
    if isinstance(error, BaseException):
        facts["error_type"] = type(error).__name__
    if "what" not in facts and isinstance(error, errors.PoolError):
        facts = {**error.fields, **facts}
    kind = _SEEN.get(str(facts.get("what", "")))
    if kind is None:
        kind = _category_of_error(error)
    category, severity, scope = kind
    if category is Category.API_ERROR and _OUT_OF_MEMORY.search(message):
        category, severity, scope = Category.RESOURCE_EXHAUSTION, Severity.SEVERE, Scope.PAGE
    return Failure(category, severity, scope, message, ref, op_id, at, facts)


def _category_of_error(error: BaseException | str) -> tuple[Category, Severity, Scope]:
    match error:
        case errors.LaunchFailed() | errors.SetupError():
            return _SEEN["launch_failed"]
        case errors.BrowserLost():
            return _SEEN["browser_exited"]
        case errors.PageError():
            return _SEEN["run_failed"]
        case TimeoutError():
            return _SEEN["deadline_passed"]
        case MemoryError():
            return Category.RESOURCE_EXHAUSTION, Severity.SEVERE, Scope.BROWSER
        case ConnectionError():
            return _SEEN["socket_closed"]
        case _:
            return Category.INTERNAL_ERROR, Severity.MODERATE, Scope.BROWSER
