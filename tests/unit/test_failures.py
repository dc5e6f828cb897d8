import errno
import pickle
from signal import SIGABRT, SIGILL, SIGKILL, SIGSEGV, SIGTRAP

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from recovery import errors, failures
from recovery.failures import (
    Category,
    Failure,
    Fingerprint,
    Scope,
    Severity,
    categorize_browser_failure,
)
from recovery.kinds import BrowserType, ModelType
from recovery.records import HostRef

REF = HostRef("chrome-0", 3)
UNKNOWN = {"reason": "unknown", "message": "gone"}
DESTROYED = {"reason": "destroyed", "message": ""}
FULL = {"used": 99, "limit": 100}


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


FACTS = {
    "browser_exited": "crash severe browser",
    "driver_exited": "crash severe browser",
    "worker_exited": "crash severe browser",
    "page_closed": "crash severe page",
    "webdriver_null": "crash severe page",
    "socket_closed": "connection_failure moderate page",
    "deadline_passed": "timeout moderate operation",
    "runtime_aborted": "crash severe page",
    "page_hung": "timeout severe page",
    "suspended": "timeout moderate page",
    "device_lost": "gpu_error severe page",
    "device_destroyed": "internal_error moderate page",
    "gpu_process_exited": "gpu_error moderate browser",
    "no_adapter": "gpu_error moderate operation",
    "out_of_memory": "resource_exhaustion severe page",
    "worker_out_of_memory": "resource_exhaustion severe browser",
    "node_exhausted": "resource_exhaustion severe node",
    "wrong_answer": "wrong_answer severe browser",
    "launch_failed": "launch_failure severe browser",
    "load_failed": "api_error moderate operation",
    "run_failed": "api_error moderate operation",
    "http_error": "api_error moderate operation",
    "short_file": "api_error moderate operation",
    "too_large": "api_error mild operation",
    "encode_failed": "api_error mild operation",
    "bad_call": "api_error mild operation",
    "bad_frame": "internal_error moderate operation",
    "unknown_kind": "internal_error moderate operation",
    "warm_failed": "api_error moderate page",
    "info_failed": "api_error moderate page",
    "not_loaded": "connection_failure mild operation",
    "circuit_open": "connection_failure mild operation",
    "refused": "internal_error moderate operation",
    "replaced": "connection_failure mild operation",
    "stale_frame": "internal_error mild operation",
    "stale_step": "connection_failure mild operation",
    "out_of_step": "connection_failure mild operation",
    "too_many_sequences": "resource_exhaustion mild operation",
}


def verdict(failure: Failure) -> str:
    return f"{failure.category} {failure.severity} {failure.scope}"


@pytest.mark.parametrize(("what", "expected"), FACTS.items())
def test_what_was_seen_decides_the_category(what, expected):
    seen = categorize_browser_failure("text that says nothing", {"what": what, "ref": REF})
    assert (verdict(seen), seen.ref) == (expected, REF)
    assert seen.evidence["what"] == seen.fingerprint.where == what


def test_every_fact_and_every_category_is_in_the_table_above():
    assert FACTS.keys() == failures._FACTS.keys()
    assert {line.split()[0] for line in FACTS.values()} == set(Category)


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (errors.LaunchFailed("no"), Category.LAUNCH_FAILURE),
        (errors.BrowserMissing("no"), Category.LAUNCH_FAILURE),
        (errors.BrowserLost("gone"), Category.CRASH),
        (errors.PageError("bad shape"), Category.API_ERROR),
        (TimeoutError(), Category.TIMEOUT),
        (MemoryError(), Category.RESOURCE_EXHAUSTION),
        (ConnectionResetError("reset"), Category.CONNECTION_FAILURE),
        (EOFError(), Category.CONNECTION_FAILURE),
        (OSError(errno.ENOSPC, "no space left"), Category.RESOURCE_EXHAUSTION),
        (OSError(errno.EPERM, "not allowed"), Category.INTERNAL_ERROR),
        (errors.MessageTooLarge("no"), Category.API_ERROR),
        (errors.BadInput("no"), Category.API_ERROR),
        (errors.BadFrame("no"), Category.INTERNAL_ERROR),
        (errors.InternalError("no"), Category.INTERNAL_ERROR),
        (caused(errors.BrowserError("no"), TimeoutError()), Category.TIMEOUT),
        (caused(errors.BrowserLost("no"), TimeoutError()), Category.CRASH),
        (
            caused(RuntimeError("no"), errors.BrowserLost("no", what="socket_closed")),
            Category.CONNECTION_FAILURE,
        ),
        (KeyError("x"), Category.INTERNAL_ERROR),
        ("a text without a clue", Category.INTERNAL_ERROR),
    ],
    ids=repr,
)
def test_without_a_fact_the_error_itself_decides(error, category):
    assert categorize_browser_failure(error).category is category


def test_causes_that_run_in_a_ring_end():
    first, second = RuntimeError("a"), RuntimeError("b")
    caused(caused(first, second).__cause__, first)
    assert categorize_browser_failure(first).category is Category.INTERNAL_ERROR


def test_an_error_brings_its_own_fact():
    error = errors.BrowserLost("no", what="socket_closed", port=7)
    seen = categorize_browser_failure(error)
    assert seen.category is Category.CONNECTION_FAILURE
    assert seen.evidence == {"what": "socket_closed", "port": 7, "error_type": "BrowserLost"}


def test_what_the_watch_saw_outweighs_what_the_error_says():
    error = errors.PageError("bad", what="run_failed")
    assert categorize_browser_failure(error, {"what": "page_hung"}).category is Category.TIMEOUT


@pytest.mark.parametrize(
    "message",
    [
        "std::bad_alloc",
        "RangeError: Array buffer allocation failed",
        "WebGPU: Out of memory",
        "failed to allocate: OOM",
    ],
)
def test_memory_that_ran_out_is_no_fault_of_the_input(message):
    seen = categorize_browser_failure(errors.PageError(message))
    assert (seen.category, seen.scope) == (Category.RESOURCE_EXHAUSTION, Scope.PAGE)
    assert seen.severity is Severity.SEVERE


@pytest.mark.parametrize("message", ["bloom: bad shape", "no room in tensor", "zoom failed"])
def test_words_that_only_look_like_oom_are_not_memory(message):
    assert categorize_browser_failure(errors.PageError(message)).category is Category.API_ERROR


def test_only_an_error_of_the_page_is_read_for_memory():
    seen = categorize_browser_failure("out of memory", {"what": "browser_exited"})
    assert seen.category is Category.CRASH


def test_evidence_is_kept_and_what_is_known_has_its_field():
    context = {"what": "run_failed", "ref": REF, "op_id": "op", "at": 5.0, "console": ("a",)}
    seen = categorize_browser_failure(errors.PageError("bad"), context)
    assert (seen.ref, seen.op_id, seen.at, seen.message) == (REF, "op", 5.0, "bad")
    assert seen.evidence == {"what": "run_failed", "console": ("a",), "error_type": "PageError"}
    assert context["ref"] == REF  # the caller's dictionary is left alone


def test_a_failure_without_words_is_named_by_its_type():
    assert categorize_browser_failure(TimeoutError()).message == "TimeoutError"


def test_a_failure_crosses_a_pickle_and_tells_where_it_was():
    seen = categorize_browser_failure("gone", {"what": "page_closed", "ref": REF})
    assert pickle.loads(pickle.dumps(seen)) == seen
    assert str(seen) == "crash in chrome-0#3: gone"
    assert str(Failure(Category.CRASH, Severity.MILD, Scope.PAGE, "m")) == "crash: m"


@pytest.mark.parametrize("engine", BrowserType)
@pytest.mark.parametrize("what", ["browser_exited", "driver_exited", "socket_closed"])
@pytest.mark.parametrize("status", [0, 1, 139, -SIGKILL, -SIGTRAP])
def test_a_process_that_ended_has_crashed_whatever_its_exit_status(engine, what, status):
    context = {"what": what, "status": status, "browser": engine}
    assert verdict(categorize_browser_failure("ended", context)) == FACTS["browser_exited"]


@pytest.mark.parametrize("status", [0, 1, 11, -SIGKILL, True, "139", None])
def test_an_exit_status_alone_is_no_crash(status):
    seen = categorize_browser_failure("ended", {"status": status})
    assert seen.category is Category.INTERNAL_ERROR


MEMORY, CRASH = Category.RESOURCE_EXHAUSTION, Category.CRASH


@pytest.mark.parametrize(
    ("evidence", "category"),
    [
        ({"status": -SIGKILL, "oom": 1}, MEMORY),
        ({"status": 128 + SIGKILL, "memory": FULL}, MEMORY),
        ({"status": -SIGKILL, "memory": FULL}, MEMORY),
        ({"status": -SIGKILL, "memory": {"used": 94, "limit": 100}}, CRASH),
        ({"status": -SIGKILL, "memory": {"used": 5, "limit": 0}}, CRASH),
        ({"status": -SIGKILL, "memory": "all of it"}, CRASH),
        ({"status": -SIGKILL, "oom": False}, CRASH),
        ({"status": 0, "oom": 1}, MEMORY),  # Firefox, when a content process was killed
        ({"status": 0, "memory": FULL}, CRASH),
        ({"status": -SIGTRAP, "oom": 1}, CRASH),
        ({"status": -SIGSEGV, "memory": FULL}, CRASH),
    ],
    ids=repr,
)
@pytest.mark.parametrize("what", ["browser_exited", "worker_exited", "page_closed"])
def test_a_kill_for_want_of_memory_is_no_crash(what, evidence, category):
    seen = categorize_browser_failure("gone", {"what": what, **evidence})
    assert seen.category is category
    assert str(seen.scope) == FACTS[what].split()[2]


@pytest.mark.parametrize(
    ("what", "lost", "expected"),
    [
        ("device_lost", UNKNOWN, "device_lost"),
        ("device_lost", {}, "device_lost"),
        ("device_lost", DESTROYED, "device_destroyed"),
        ("run_failed", UNKNOWN, "device_lost"),
        ("run_failed", DESTROYED, "device_destroyed"),
        ("page_closed", UNKNOWN, "device_lost"),
        ("page_closed", DESTROYED, "page_closed"),  # a page that goes takes its device along
        ("browser_exited", UNKNOWN, "browser_exited"),
        ("page_hung", UNKNOWN, "page_hung"),
        ("", UNKNOWN, "device_lost"),
        ("", DESTROYED, "device_destroyed"),
        ("run_failed", "unknown", "run_failed"),
    ],
)
def test_why_a_device_was_lost_counts_where_the_fact_leaves_it_open(what, lost, expected):
    seen = categorize_browser_failure("failed", {"what": what, "device_lost": lost})
    assert verdict(seen) == FACTS[expected]


@pytest.mark.parametrize(("code", "fact"), failures._WEBDRIVER.items())
def test_a_webdriver_code_counts_where_nothing_was_seen(code, fact):
    assert verdict(categorize_browser_failure("x", {"webdriver": code})) == FACTS[fact]
    lost = errors.BrowserLost("x", webdriver=code)
    assert verdict(categorize_browser_failure(lost)) == FACTS[fact]
    seen = categorize_browser_failure(lost, {"what": "page_hung"})
    assert verdict(seen) == FACTS["page_hung"]


@pytest.mark.parametrize("code", ["unknown error", "", None, 7, "no such element"])
def test_other_webdriver_codes_say_nothing(code):
    seen = categorize_browser_failure(TimeoutError(), {"webdriver": code})
    assert verdict(seen) == FACTS["deadline_passed"]


@pytest.mark.parametrize("signal", [SIGTRAP, SIGILL, SIGABRT, SIGSEGV])
def test_each_kind_of_evidence_outweighs_the_next(signal):
    """Takes the strongest evidence away, again and again."""
    error = caused(errors.BrowserError("Device is lost"), errors.PageError("2147"))
    context = {
        "what": "page_hung",
        "status": -signal,
        "device_lost": DESTROYED,
        "webdriver": "script timeout",
        "console": ("Device is lost",),
    }
    for strongest, expected in {
        "what": "page_hung",
        "status": "browser_exited",
        "device_lost": "device_destroyed",
        "webdriver": "suspended",
        "console": "device_lost",
        "": "run_failed",  # the outer message is not the page's
    }.items():
        assert verdict(categorize_browser_failure(error, context)) == FACTS[expected]
        context.pop(strongest, None)


def test_what_the_page_said_is_read_where_its_error_is_a_cause():
    error = caused(RuntimeError("no"), errors.PageError("out of memory"))
    assert verdict(categorize_browser_failure(error)) == FACTS["out_of_memory"]


def test_a_launch_that_failed_is_one_whatever_else_is_known():
    error = errors.LaunchFailed("no", webdriver="timeout", status=-SIGSEGV)
    assert verdict(categorize_browser_failure(error)) == FACTS["launch_failed"]
    error = caused(errors.LaunchFailed("no"), errors.BrowserLost("no", what="socket_closed"))
    assert verdict(categorize_browser_failure(error)) == FACTS["launch_failed"]


SAID = [
    ("RangeError: WebAssembly.Memory(): could not allocate memory", "out_of_memory"),
    ("VK_ERROR_OUT_OF_DEVICE_MEMORY", "out_of_memory"),
    ("InternalError: allocation size overflow", "out_of_memory"),
    ("Device lost: out of memory", "out_of_memory"),
    ("AbortError: Failed to execute 'mapAsync' on 'GPUBuffer': Device is lost", "device_lost"),
    ("WebGPU device lost (1): gone", "device_lost"),
    ("WebGL: CONTEXT_LOST_WEBGL: loseContext: context lost", "device_lost"),
    ("The GPU process has exited", "device_lost"),
    ("OperationError: Instance dropped in popErrorScope", "device_lost"),
    ("A valid external Instance reference no longer exists.", "device_lost"),
    ("wasm: Error: http://a/model/0 answered 500", "http_error"),
    ("HTTP status 404", "http_error"),
    ("TypeError: Failed to fetch; timed out", "http_error"),
    ("NetworkError when attempting to fetch resource", "http_error"),
    ("TypeError: Load failed", "http_error"),
    ("Failed to load model because protobuf parsing failed.", "short_file"),
    ("TimeoutError: signal timed out", "deadline_passed"),
    ("webgpu: Error: Failed to get GPU adapter. You may need to enable flag", "no_adapter"),
    ("Failed to get a WebGPU device: none", "no_adapter"),
]


@pytest.mark.parametrize(("message", "fact"), SAID)
@pytest.mark.parametrize("what", ["run_failed", "load_failed"])
def test_what_the_page_says_refines_what_it_reported(what, message, fact):
    for error, context in [(message, {"what": what}), (errors.PageError(message, what=what), None)]:
        assert verdict(categorize_browser_failure(error, context)) == FACTS[fact]


def test_every_row_of_what_is_said_is_tried():
    assert {fact for _, fact in SAID} == failures._MESSAGES.keys()


@pytest.mark.parametrize(
    "message",
    [
        "input 'timeout' is missing in 'feeds'",
        "memory access out of bounds",
        "WebGPU device lost (2): Device was destroyed.",
        "webgpu: Error: Failed to get GPU adapter; wasm: Error: no such operator",
        "shape [500] is wrong",
    ],
)
def test_words_that_only_look_like_a_cause_are_none(message):
    seen = categorize_browser_failure(message, {"what": "run_failed"})
    assert verdict(seen) == FACTS["run_failed"]


def test_a_cause_of_the_same_category_leaves_the_scope_of_the_fact():
    seen = categorize_browser_failure("/page/warmup.onnx answered 404", {"what": "warm_failed"})
    assert verdict(seen) == FACTS["warm_failed"]


@pytest.mark.parametrize("message", [message for message, _ in SAID])
@pytest.mark.parametrize("what", ["browser_exited", "page_hung", "launch_failed", "refused", ""])
def test_text_counts_for_nothing_where_no_page_said_it(what, message):
    seen = categorize_browser_failure(message, {"what": what, "console": (message,)})
    assert verdict(seen) == FACTS.get(what, "internal_error moderate browser")


MEMORY_LINE = "RangeError: Array buffer allocation failed"


@pytest.mark.parametrize(
    ("what", "message", "evidence", "expected"),
    [
        ("page_closed", "gone", {"console": (MEMORY_LINE,)}, "out_of_memory"),
        ("page_closed", "gone", {"console": [MEMORY_LINE, "hello"]}, "out_of_memory"),
        ("page_closed", "gone", {"console": (MEMORY_LINE, "Device lost")}, "device_lost"),
        ("page_closed", "gone", {"console": (MEMORY_LINE, *["-"] * 10)}, "page_closed"),
        ("page_closed", "gone", {"console": ("TypeError: Failed to fetch",)}, "page_closed"),
        ("page_closed", MEMORY_LINE, {}, "page_closed"),  # the message is the watch's
        ("page_closed", "gone", {"page": {"text": MEMORY_LINE}}, "out_of_memory"),
        ("page_closed", "gone", {"page": {"socket": "data"}}, "page_closed"),
        ("page_closed", "gone", {"console": (None, 5, b"oom")}, "page_closed"),
        ("run_failed", "2147", {"console": (MEMORY_LINE,)}, "out_of_memory"),
        ("load_failed", "2147", {"console": ("GPU process gone",)}, "device_lost"),
        ("run_failed", "Device lost", {"console": (MEMORY_LINE,)}, "device_lost"),
        ("run_failed", "ERROR_CODE: 2, bad", {"console": (MEMORY_LINE,)}, "run_failed"),
        ("page_hung", "hung", {"console": (MEMORY_LINE,)}, "page_hung"),
    ],
)
def test_the_console_counts_where_the_fact_leaves_it_open(what, message, evidence, expected):
    seen = categorize_browser_failure(message, {"what": what, **evidence})
    assert verdict(seen) == FACTS[expected]


def test_a_fingerprint_names_the_kind_of_failure_and_its_parts_stay_in_evidence():
    context = {
        "what": "browser_exited",
        "browser": BrowserType.CHROME,
        "version": "156.0.7977.65",
        "backend": "wasm",
        "model_type": ModelType.TEXT,
    }
    seen = categorize_browser_failure("gone", context)
    assert str(seen.fingerprint) == "chrome/156/wasm//text/browser_exited"
    assert seen.evidence == context


@pytest.mark.parametrize(
    ("version", "major"), [("153.0esr", "153"), ("WebKitGTK 2.50.1", "2"), ("", ""), ("?", "")]
)
def test_a_fingerprint_holds_the_major_version(version, major):
    assert categorize_browser_failure("x", {"version": version}).fingerprint.version == major


def test_a_fingerprint_without_a_fact_names_the_errors_type():
    assert categorize_browser_failure(TimeoutError()).fingerprint == Fingerprint(
        where="TimeoutError"
    )
    assert str(categorize_browser_failure("x").fingerprint) == "/////"


def test_a_fingerprint_has_six_parts_whatever_an_adapter_is_called():
    context = {"adapter": "ANGLE (Intel/Mesa)", "what": "made/up" * 99}
    assert str(categorize_browser_failure("x", context).fingerprint).count("/") == 5
    assert len(categorize_browser_failure("x", context).fingerprint.where) == 100


def test_evidence_that_crosses_no_pickle_is_described():
    context = {"call": lambda: None, "in": [{"it": object()}], "ref": "no ref", "op_id": 5}
    seen = categorize_browser_failure("x", context)
    assert "lambda" in seen.evidence["call"]
    assert seen.evidence["in"][0]["it"].startswith("<object")
    assert (seen.ref, seen.op_id) == (None, "")
    pickle.dumps(seen)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-200, 200)
    | st.floats()
    | st.text()
    | st.binary()
    | st.just(object())
    | st.sampled_from([*failures._FACTS, *failures._WEBDRIVER, *(m for m, _ in SAID), REF]),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.sampled_from(["reason", "used", "limit", "text"]), inner)
    ),
    max_leaves=8,
)
_KNOWN = ["what", "ref", "op_id", "at", "browser", "version", "backend", "adapter", "model_type"]
_KNOWN += ["status", "oom", "memory", "device_lost", "webdriver", "console", "page", "error_type"]
_KEYS = st.text() | st.sampled_from(_KNOWN)
_MESSAGES = st.text() | st.sampled_from([m for m, _ in SAID])
_ERRORS = _MESSAGES | st.builds(
    lambda cls, message, cause: caused(cls(message), cause),
    st.sampled_from([*(cls for cls, _ in failures._TYPES), RuntimeError, OSError, UnicodeError]),
    _MESSAGES,
    st.none() | st.builds(errors.PageError, _MESSAGES, what=_VALUES),
)


@given(_ERRORS, st.dictionaries(_KEYS, _VALUES))
def test_any_error_in_any_context_makes_a_failure_that_crosses_a_pickle(error, context):
    seen = categorize_browser_failure(error, context)
    assert repr(pickle.loads(pickle.dumps(seen))) == repr(seen)
    assert (seen.category, seen.severity, seen.scope) in {*failures._FACTS.values(), _OTHER} or (
        seen.category is Category.RESOURCE_EXHAUSTION and seen.severity is Severity.SEVERE
    )
    assert str(seen.fingerprint).count("/") == 5


_OTHER = failures._UNEXPLAINED
_ADAPTER = TypeAdapter(Failure)


@given(_MESSAGES, st.sampled_from([*FACTS, ""]), st.text(), st.text())
def test_a_failure_survives_the_logs_json(message, what, adapter, version):
    context = {"what": what, "ref": REF, "at": 1.5, "adapter": adapter, "version": version}
    seen = categorize_browser_failure(message, context)
    assert _ADAPTER.validate_json(_ADAPTER.dump_json(seen)) == seen


def test_a_failure_of_an_older_log_has_an_empty_fingerprint():
    line = b'{"category":"crash","severity":"mild","scope":"page","message":"m"}'
    assert _ADAPTER.validate_json(line).fingerprint == Fingerprint()
