import pickle

import pytest

from recovery import errors
from recovery.failures import Category, Failure, Scope, Severity, categorize_browser_failure
from recovery.records import HostRef

REF = HostRef("chrome-0", 3)


@pytest.mark.parametrize(
    ("what", "category", "scope"),
    [
        ("browser_exited", Category.CRASH, Scope.BROWSER),
        ("driver_exited", Category.CRASH, Scope.BROWSER),
        ("worker_exited", Category.CRASH, Scope.BROWSER),
        ("page_closed", Category.CRASH, Scope.PAGE),
        ("socket_closed", Category.CONNECTION_FAILURE, Scope.PAGE),
        ("deadline_passed", Category.TIMEOUT, Scope.OPERATION),
        ("page_hung", Category.TIMEOUT, Scope.PAGE),
        ("device_lost", Category.GPU_ERROR, Scope.PAGE),
        ("launch_failed", Category.LAUNCH_FAILURE, Scope.BROWSER),
        ("load_failed", Category.API_ERROR, Scope.OPERATION),
        ("run_failed", Category.API_ERROR, Scope.OPERATION),
        ("not_loaded", Category.CONNECTION_FAILURE, Scope.OPERATION),
        ("replaced", Category.CONNECTION_FAILURE, Scope.OPERATION),
        ("stale_frame", Category.INTERNAL_ERROR, Scope.OPERATION),
    ],
)
def test_what_was_seen_decides_the_category(what, category, scope):
    seen = categorize_browser_failure("text that says nothing", {"what": what, "ref": REF})
    assert (seen.category, seen.scope, seen.ref) == (category, scope, REF)
    assert seen.evidence["what"] == what


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
        (KeyError("x"), Category.INTERNAL_ERROR),
        ("a text without a clue", Category.INTERNAL_ERROR),
    ],
    ids=repr,
)
def test_without_a_fact_the_error_itself_decides(error, category):
    assert categorize_browser_failure(error).category is category


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
