"""What went wrong, as a plain record: category, severity, scope and evidence.

Failures are records, not exceptions: they cross processes, are logged, and are what
plans are made from. `categorize_browser_failure` is the one place that turns evidence
into a category. This module must not act on a failure.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from signal import SIGABRT, SIGILL, SIGKILL, SIGSEGV, SIGTRAP
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
class Fingerprint:
    """Which failures count as the same kind. `version` is the major number only; `where` is the
    reported fact, or the error's type if there was none."""

    engine: str = ""
    version: str = ""
    backend: str = ""
    adapter: str = ""
    model_type: str = ""
    where: str = ""

    def __str__(self) -> str:
        parts = (self.engine, self.version, self.backend, self.adapter, self.model_type, self.where)
        return "/".join(part.replace("/", "|") for part in parts)


@dataclass(frozen=True)
class Failure:
    """One failure as it was observed. `at` is wall time in seconds since the epoch."""

    category: Category
    severity: Severity
    scope: Scope
    message: str
    ref: HostRef | None = None
    op_id: str = ""
    at: float = 0.0
    evidence: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: Fingerprint = Fingerprint()

    def __str__(self) -> str:
        where = f" in {self.ref}" if self.ref else ""
        return f"{self.category}{where}: {self.message}"


_Kind = tuple[Category, Severity, Scope]

# The facts that the bridge and the death watch report (which process ended, which socket closed),
# by the `what` of the evidence, and what each means.
_FACTS: Mapping[str, _Kind] = {
    "browser_exited": (Category.CRASH, Severity.SEVERE, Scope.BROWSER),
    "driver_exited": (Category.CRASH, Severity.SEVERE, Scope.BROWSER),
    "worker_exited": (Category.CRASH, Severity.SEVERE, Scope.BROWSER),
    "page_closed": (Category.CRASH, Severity.SEVERE, Scope.PAGE),
    "webdriver_null": (Category.CRASH, Severity.SEVERE, Scope.PAGE),  # w3c/webdriver#1308
    "socket_closed": (Category.CONNECTION_FAILURE, Severity.MODERATE, Scope.PAGE),
    "deadline_passed": (Category.TIMEOUT, Severity.MODERATE, Scope.OPERATION),
    "runtime_aborted": (
        Category.CRASH,
        Severity.SEVERE,
        Scope.PAGE,
    ),  # heap may be corrupt
    "page_hung": (Category.TIMEOUT, Severity.SEVERE, Scope.PAGE),
    "suspended": (Category.TIMEOUT, Severity.MODERATE, Scope.PAGE),
    "device_lost": (Category.GPU_ERROR, Severity.SEVERE, Scope.PAGE),
    # Only our own page can call `destroy()`. The GPU works, so the repair of a GPU error (to launch
    # without it) would be wrong; but every session on that device is lost.
    "device_destroyed": (Category.INTERNAL_ERROR, Severity.MODERATE, Scope.PAGE),
    "gpu_process_exited": (Category.GPU_ERROR, Severity.MODERATE, Scope.BROWSER),
    "no_adapter": (Category.GPU_ERROR, Severity.MODERATE, Scope.OPERATION),
    "out_of_memory": (Category.RESOURCE_EXHAUSTION, Severity.SEVERE, Scope.PAGE),
    "worker_out_of_memory": (Category.RESOURCE_EXHAUSTION, Severity.SEVERE, Scope.BROWSER),
    "node_exhausted": (Category.RESOURCE_EXHAUSTION, Severity.SEVERE, Scope.NODE),
    "wrong_answer": (Category.WRONG_ANSWER, Severity.SEVERE, Scope.BROWSER),
    "launch_failed": (Category.LAUNCH_FAILURE, Severity.SEVERE, Scope.BROWSER),
    "load_failed": (Category.API_ERROR, Severity.MODERATE, Scope.OPERATION),
    "run_failed": (Category.API_ERROR, Severity.MODERATE, Scope.OPERATION),
    "http_error": (Category.API_ERROR, Severity.MODERATE, Scope.OPERATION),
    "short_file": (Category.API_ERROR, Severity.MODERATE, Scope.OPERATION),
    "too_large": (Category.API_ERROR, Severity.MILD, Scope.OPERATION),
    "encode_failed": (Category.API_ERROR, Severity.MILD, Scope.OPERATION),
    "bad_call": (Category.API_ERROR, Severity.MILD, Scope.OPERATION),
    "bad_frame": (Category.INTERNAL_ERROR, Severity.MODERATE, Scope.OPERATION),
    "unknown_kind": (Category.INTERNAL_ERROR, Severity.MODERATE, Scope.OPERATION),
    "warm_failed": (Category.API_ERROR, Severity.MODERATE, Scope.PAGE),
    "info_failed": (Category.API_ERROR, Severity.MODERATE, Scope.PAGE),
    "not_loaded": (Category.CONNECTION_FAILURE, Severity.MILD, Scope.OPERATION),
    "circuit_open": (Category.CONNECTION_FAILURE, Severity.MILD, Scope.OPERATION),
    "refused": (Category.INTERNAL_ERROR, Severity.MODERATE, Scope.OPERATION),
    "replaced": (Category.CONNECTION_FAILURE, Severity.MILD, Scope.OPERATION),
    "stale_frame": (Category.INTERNAL_ERROR, Severity.MILD, Scope.OPERATION),
    # Steps of a sequence that don't match the page's caches.
    "stale_step": (Category.CONNECTION_FAILURE, Severity.MILD, Scope.OPERATION),
    "out_of_step": (Category.CONNECTION_FAILURE, Severity.MILD, Scope.OPERATION),
    "too_many_sequences": (Category.RESOURCE_EXHAUSTION, Severity.MILD, Scope.OPERATION),
}
_UNEXPLAINED: _Kind = (Category.INTERNAL_ERROR, Severity.MODERATE, Scope.BROWSER)

# WebDriver's error codes (W3C) and chromedriver's own, and the fact that each implies.
_WEBDRIVER: Mapping[str, str] = {
    "session not created": "launch_failed",
    "invalid session id": "browser_exited",  # the session ends with the browser or its last tab
    "chrome not reachable": "browser_exited",
    "no such window": "page_closed",
    "tab crashed": "page_closed",
    "disconnected": "socket_closed",
    "timeout": "suspended",
    "script timeout": "suspended",
    "javascript error": "run_failed",
}

# Errors reported by a page that is still alive: their text may imply a more precise fact.
_REPORTED = frozenset({"run_failed", "load_failed", "warm_failed", "info_failed", "encode_failed"})
# Facts that a process has ended, for an unknown cause.
_EXITED = frozenset({"browser_exited", "driver_exited", "worker_exited", "launch_failed"})
_CRASH_SIGNALS = frozenset({SIGTRAP, SIGILL, SIGABRT, SIGSEGV})  # signals of a process's own crash
_EXHAUSTED = frozenset({errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EDQUOT})

# Messages of onnxruntime-web, the engines and Dawn, and the fact that each implies; the first match
# counts. Strict patterns, since a message may also quote names that a model's author chose.
_MESSAGES: Mapping[str, re.Pattern[str]] = {
    fact: re.compile(pattern, re.IGNORECASE)
    for fact, pattern in {
        "out_of_memory": (
            r"bad_alloc|out[ _-]?of[ _-]?(?:device[ _]|host[ _])?memory|allocation failed|\boom\b"
            r"|(?:could not|failed to|cannot) (?:allocate|enlarge) memory|allocation size overflow"
        ),
        "device_lost": (  # also reported for a device that was destroyed on purpose
            r"device (?:is |was )?lost(?!.*destroyed)|(?:device|context)_lost|\bgpu process\b"
            r"|instance dropped|external instance reference no longer exists"
        ),
        "http_error": (
            r"\banswered [45]\d\d\b|\bHTTP(?: status| error)?:? [45]\d\d\b|failed to fetch"
            r"|\bNetworkError\b|TypeError: Load failed|content.length.mismatch"
        ),
        "short_file": r"protobuf parsing failed|unexpected end of (?:file|data|input)",
        "deadline_passed": r"\bTimeoutError\b|\btimed out\b",
        "no_adapter": (  # unless wasm was tried, too: then it is not the cause
            r"\A(?!.*\bwasm: ).*(?:failed to get (?:a )?(?:web)?gpu (?:adapter|device)"
            r"|no available adapters)"
        ),
    }.items()
}
_CONSOLE_LINES = 10  # the last ones: older lines are about older problems
_TEXT_MAX = 2_000  # characters of a text that are read
_NAME_MAX = 100  # characters of a part of a fingerprint: a page may have made it up
_CAUSES_MAX = 10  # a chain of causes may be circular

# The fact that an error's type implies; the first match counts.
_TYPES: tuple[tuple[type[BaseException], str], ...] = (
    (errors.LaunchFailed, "launch_failed"),
    (errors.SetupError, "launch_failed"),
    (errors.BrowserLost, "browser_exited"),
    (errors.PageError, "run_failed"),
    (errors.MessageTooLarge, "too_large"),
    (errors.CallerError, "bad_call"),
    (errors.BadFrame, "bad_frame"),
    (TimeoutError, "deadline_passed"),
    (MemoryError, "worker_out_of_memory"),
    (ConnectionError, "socket_closed"),
    (EOFError, "socket_closed"),
)


def categorize_browser_failure(
    error: BaseException | str, context: Mapping[str, Any] | None = None
) -> Failure:
    """Turn an error and its context into a `Failure`.

    `context` may hold `ref`, `op_id`, `at`, the parts of the fingerprint (`browser`, `version`,
    `backend`, `adapter`, `model_type`) and any evidence, which is kept (as its `repr` if it is not
    plain data); so are the fields of `error`, which `context` overrides. In the order of trust:

    1. `what`, a fact from the death watch or bridge: see `_FACTS`. A `LaunchFailed` is one, too.
    2. Evidence for the cause of such a fact. A process that the kernel killed for memory
       (`oom`: how often; or `memory`: `{"used", "limit"}` in bytes, with SIGKILL) ran out of it;
       `status` is an exit status, a negative one the signal. `device_lost` is WebGPU's
       `{"reason", "message"}`, of which only the reason may be relied on.
    3. Without a fact, evidence that implies one: a signal of a crash, a lost device, the WebDriver
       error code `webdriver`. An exit code implies nothing: Firefox crashes with 0.
    4. The types of `error` and of its causes, and their `what`.
    5. Text, and only a page's: the message of an error that it reported, then, for memory and GPU
       only, the last lines of `console` and its last report `page`.
    """
    facts = dict(context or {})
    ref, op_id, at = facts.pop("ref", None), facts.pop("op_id", ""), facts.pop("at", 0.0)
    message = str(error) or type(error).__name__
    if isinstance(error, BaseException):
        facts["error_type"] = type(error).__name__
    if isinstance(error, errors.PoolError):
        facts = {**error.fields, **facts}
    fact, said = _text(facts.get("what")), message
    where = fact or _text(facts.get("error_type"))
    if fact not in _FACTS:
        launch = isinstance(error, errors.LaunchFailed | errors.SetupError)
        fact = "launch_failed" if launch else _fact_of_evidence(facts)
        if not fact:
            fact, said = _fact_of_error(error)
    return Failure(
        *_refined(fact, facts, said),
        message,
        ref if isinstance(ref, HostRef) else None,
        _text(op_id),
        at if isinstance(at, int | float) else 0.0,
        {str(name): _plain(value) for name, value in facts.items()},
        _fingerprint(facts, where),
    )


def _refined(fact: str, facts: Mapping[str, Any], message: str) -> _Kind:
    """What a fact means, given the other evidence."""
    status, lost = _status(facts), _lost_reason(facts)
    if fact == "socket_closed" and status is not None:
        fact = "browser_exited"  # any exit status means that it has ended
    reported, kind = fact in _REPORTED, _FACTS.get(fact, _UNEXPLAINED)
    if (fact in _EXITED or fact == "page_closed") and _killed_for_memory(facts, status):
        return Category.RESOURCE_EXHAUSTION, Severity.SEVERE, kind[2]
    if lost == "destroyed" and (reported or fact == "device_lost"):
        return _FACTS["device_destroyed"]
    if lost and lost != "destroyed" and (reported or fact == "page_closed"):
        return _FACTS["device_lost"]
    said = _fact_of_text(message) if reported else ""
    # With onnxruntime's own error code, the console does not hold the cause.
    if fact == "page_closed" or (reported and not said and "ERROR_CODE" not in message):
        heard = (_fact_of_text(line) for line in _last_lines(facts))
        said = next((what for what in heard if what in ("out_of_memory", "device_lost")), "")
    if said and _FACTS[said][0] is not kind[0]:  # else the fact has the better scope
        return _FACTS[said]
    return kind


def _fact_of_evidence(facts: Mapping[str, Any]) -> str:
    """The fact that other evidence implies; empty if none."""
    if -(_status(facts) or 0) in _CRASH_SIGNALS:
        return "browser_exited"
    if _lost_reason(facts):
        return "device_lost"
    return _WEBDRIVER.get(_text(facts.get("webdriver")).lower(), "")


def _fact_of_error(error: BaseException | str) -> tuple[str, str]:
    """The fact implied by an error, or else by its causes, and its text; empty if none."""
    link: BaseException | str | None = error
    for _ in range(_CAUSES_MAX):
        if not isinstance(link, BaseException):
            break
        what = _text(link.fields.get("what")) if isinstance(link, errors.PoolError) else ""
        if what in _FACTS and link is not error:
            return what, str(link)
        if isinstance(link, OSError) and link.errno in _EXHAUSTED:
            return "node_exhausted", str(link)
        for cls, fact in _TYPES:
            if isinstance(link, cls):
                return fact, str(link)
        link = link.__cause__
    return "", ""


def _fact_of_text(text: str) -> str:
    """The fact that a text implies; empty if none."""
    text = text[:_TEXT_MAX]
    return next((fact for fact, pattern in _MESSAGES.items() if pattern.search(text)), "")


def _last_lines(facts: Mapping[str, Any]) -> list[str]:
    """The last console lines and report of the page, the newest first."""
    page, console = facts.get("page"), facts.get("console")
    report = [_text(page.get("text"))] if isinstance(page, Mapping) else []
    lines = console[-_CONSOLE_LINES:] if isinstance(console, list | tuple) else ()
    return report + [_text(line) for line in reversed(lines)]


def _status(facts: Mapping[str, Any]) -> int | None:
    status = facts.get("status")
    if not isinstance(status, int) or isinstance(status, bool):
        return None
    return 128 - status if 128 < status < 192 else status  # a shell reports signal n as 128 + n


def _killed_for_memory(facts: Mapping[str, Any], status: int | None) -> bool:
    """Whether the process was killed because memory ran out."""
    oom, memory = facts.get("oom"), facts.get("memory")
    if isinstance(oom, int) and oom > 0:
        return -(status or 0) not in _CRASH_SIGNALS
    match memory:
        case {"used": int() | float() as used, "limit": int() | float() as limit}:
            return status == -SIGKILL and 20 * used >= 19 * limit > 0  # 95 %
        case _:
            return False


def _lost_reason(facts: Mapping[str, Any]) -> str:
    lost = facts.get("device_lost")
    return (_text(lost.get("reason")) or "unknown") if isinstance(lost, Mapping) else ""


def _fingerprint(facts: Mapping[str, Any], where: str) -> Fingerprint:
    keys = ("browser", "version", "backend", "adapter", "model_type")
    parts = {key: _text(facts.get(key))[:_NAME_MAX] for key in keys}
    major = re.search(r"\d+", parts["version"])
    parts = {**parts, "version": major[0] if major else "", "where": where[:_NAME_MAX]}
    return Fingerprint(engine=parts.pop("browser"), **parts)


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str) else ""


def _plain(value: Any, depth: int = 10) -> Any:
    """`value` as data that can be pickled."""
    match value:
        case None | bool() | int() | float() | str() | bytes() | HostRef() | Failure():
            return value
        case list() | tuple() if depth:
            items = [_plain(item, depth - 1) for item in value]
            return items if isinstance(value, list) else tuple(items)
        case Mapping() if depth:
            return {str(name): _plain(item, depth - 1) for name, item in value.items()}
        case _:
            return repr(value)[:_TEXT_MAX] if depth else "..."
