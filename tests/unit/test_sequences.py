"""What follows when a stage has no answer, on how many browsers one is at work, and on which."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.failures import Category, Failure, Scope, Severity, categorize_browser_failure
from recovery.kinds import Backend, BrowserType, Level, Readiness
from recovery.levels import COPIES_MAX, LEVELS_ASCENDING, copies_wanted
from recovery.records import HostRef, HostStatus, NumericId
from recovery.sequences import (
    MISADDRESSED,
    RecoveryAction,
    choose_stage_host,
    recovery_action,
)
from recovery.voting import quorum

WASM = NumericId("1.30.0/wasm", Backend.WASM)
GPU = NumericId("1.30.0/webgpu", Backend.WEBGPU, adapter="swiftshader")
ASK, REBUILD, GIVE_UP = RecoveryAction.ASK_AGAIN, RecoveryAction.REBUILD, RecoveryAction.GIVE_UP
BRIEF = (Category.CONNECTION_FAILURE, Category.TIMEOUT)


def failure(category=Category.CRASH, scope=Scope.BROWSER, what="") -> Failure:
    evidence = {"what": what} if what else {}
    return Failure(category, Severity.MODERATE, scope, "as scripted", evidence=evidence)


# -- cure ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", list(Category))
@pytest.mark.parametrize("scope", list(Scope))
def test_cure_by_level_and_failure(category, scope):
    page_lives = category in BRIEF and scope in (Scope.PAGE, Scope.OPERATION)
    other = failure(category, scope)
    actions = {level: recovery_action(level, other, 1, 5) for level in LEVELS_ASCENDING}
    assert actions[Level.NONE] is GIVE_UP
    assert actions[Level.LOW] is (ASK if page_lives else GIVE_UP)
    for level in (Level.MEDIUM, Level.HIGH, Level.CRITICAL):
        assert actions[level] is (ASK if page_lives else REBUILD)


@pytest.mark.parametrize("what", sorted(MISADDRESSED))
@pytest.mark.parametrize("category", list(Category))
def test_page_without_these_caches_is_not_asked_for_them_again(what, category):
    gone = failure(category, Scope.OPERATION, what)
    assert recovery_action(Level.NONE, gone, 0, 5) is GIVE_UP
    assert recovery_action(Level.LOW, gone, 0, 5) is GIVE_UP
    for level in (Level.MEDIUM, Level.HIGH, Level.CRITICAL):
        assert recovery_action(level, gone, 0, 5) is REBUILD


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("socket_closed", ASK),
        ("deadline_passed", ASK),
        ("suspended", ASK),
        ("browser_exited", REBUILD),
        ("page_closed", REBUILD),
        ("runtime_aborted", REBUILD),
        ("device_lost", REBUILD),
        ("out_of_memory", REBUILD),
        ("run_failed", REBUILD),
        ("replaced", REBUILD),
        ("not_loaded", REBUILD),
        ("stale_frame", REBUILD),
        ("wrong_answer", REBUILD),
    ],
)
def test_facts_that_are_seen_lead_to_these_cures(what, expected):
    seen = categorize_browser_failure(what, {"what": what, "ref": HostRef("a")})
    assert recovery_action(Level.MEDIUM, seen, 1, 5) is expected


@pytest.mark.parametrize("level", LEVELS_ASCENDING)
@pytest.mark.parametrize("what", ["", "out_of_step"])
def test_more_failures_than_allowed_end_it_at_every_level(level, what):
    for category in Category:
        assert recovery_action(level, failure(category, what=what), 6, 5) is GIVE_UP


@given(
    st.sampled_from([Level.MEDIUM, Level.HIGH, Level.CRITICAL]),
    st.sampled_from(list(Category)),
    st.sampled_from(list(Scope)),
    st.integers(0, 9),
    st.integers(0, 9),
)
def test_from_medium_on_nothing_ends_it_but_the_count(level, category, scope, failures, most):
    decided = recovery_action(level, failure(category, scope), failures, most)
    assert (decided is GIVE_UP) == (failures > most)


# -- copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [Level.NONE, Level.LOW, Level.MEDIUM])
def test_one_copy_is_at_work_late_or_not(level):
    for late in (False, True):
        assert copies_wanted(level, 0, 0, late=late) == 1
        assert copies_wanted(level, 0, 1, late=late) == 1


def test_high_has_one_more_where_that_one_is_late():
    assert copies_wanted(Level.HIGH, 0, 1, late=False) == 1
    assert copies_wanted(Level.HIGH, 0, 1, late=True) == 2
    assert copies_wanted(Level.HIGH, 0, 2, late=True) == 2


def test_critical_has_three_and_one_more_where_they_do_not_agree():
    assert copies_wanted(Level.CRITICAL, 0, 0, late=False) == 3
    assert copies_wanted(Level.CRITICAL, 2, 1, late=False) == 3
    assert copies_wanted(Level.CRITICAL, 2, 0, late=False) == 3, "the third may have died"
    assert copies_wanted(Level.CRITICAL, 3, 0, late=False) == 4
    assert copies_wanted(Level.CRITICAL, 4, 0, late=False) == 5
    assert copies_wanted(Level.CRITICAL, 1, 2, late=True) == 4


@given(st.sampled_from(LEVELS_ASCENDING), st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_copies_are_bounded_and_at_least_one(level, answers, pending, late):
    assert 1 <= copies_wanted(level, answers, pending, late=late) <= COPIES_MAX


@given(st.sampled_from(LEVELS_ASCENDING), st.integers(0, 9), st.booleans())
def test_with_nobody_at_work_there_is_one_to_begin_until_there_are_too_many(level, answers, late):
    if answers < COPIES_MAX:
        assert copies_wanted(level, answers, 0, late=late) > answers


def test_only_critical_wants_two_that_agree():
    assert {level: quorum(level) for level in LEVELS_ASCENDING} == {
        level: 2 if level is Level.CRITICAL else 1 for level in LEVELS_ASCENDING
    }


# -- hosts -----------------------------------------------------------------------------------------


def host(name: str, *, numeric=WASM, queue=0, epoch=0, **options) -> HostStatus:
    fields = {"readiness": Readiness.READY, "models": {"m@1": numeric}, **options}
    return HostStatus(HostRef(name, epoch), BrowserType.CHROME, queue=queue, queue_max=4, **fields)


def name_of(status: HostStatus | None) -> str:
    return status.ref.browser_id if status else ""


def test_of_no_hosts_none_is_chosen():
    assert choose_stage_host([], "m@1") is None


@pytest.mark.parametrize(
    "unfit",
    [
        {"readiness": Readiness.STARTING},
        {"readiness": Readiness.DRAINING},
        {"readiness": Readiness.DEAD},
        {"models": {"m@0": WASM, "m": WASM}},
        {"blocked": {"m@1": 3.0}},
        {"blocked": {"": 3.0}},
    ],
)
def test_host_that_can_not_take_the_stage_is_never_chosen(unfit):
    assert choose_stage_host([host("a", **unfit)], "m@1") is None
    assert name_of(choose_stage_host([host("a", **unfit), host("b", queue=9)], "m@1")) == "b"


def test_block_on_another_model_is_none_on_this():
    assert choose_stage_host([host("a", blocked={"m@0": 3.0})], "m@1") is not None


def test_taken_and_avoided_hosts_are_left_out_by_incarnation():
    hosts = [host("a"), host("b"), host("c")]
    assert name_of(choose_stage_host(hosts, "m@1", taken=[HostRef("a")])) == "b"
    avoid = {HostRef("b")}
    assert name_of(choose_stage_host(hosts, "m@1", taken=[HostRef("a")], avoid=avoid)) == "c"
    assert choose_stage_host(hosts[:1], "m@1", avoid={HostRef("a")}) is None
    assert name_of(choose_stage_host([host("a", epoch=1)], "m@1", avoid={HostRef("a")})) == "a"


def test_equal_numbers_come_first_however_busy():
    hosts = [host("a", numeric=GPU), host("b", queue=3), host("c", queue=4)]
    load = {HostRef("b"): 5}
    assert name_of(choose_stage_host(hosts, "m@1", numeric=WASM, load=load)) == "c"
    assert name_of(choose_stage_host(hosts, "m@1", numeric=GPU, load=load)) == "a"
    assert name_of(choose_stage_host(hosts[:1], "m@1", numeric=WASM)) == "a", "or else another's"


def test_then_those_with_fewer_stages_then_the_shorter_queue_then_by_name():
    hosts = [host("c"), host("a", queue=1), host("b", queue=1)]
    assert name_of(choose_stage_host(hosts, "m@1")) == "c"
    assert name_of(choose_stage_host(hosts, "m@1", load={HostRef("c"): 1})) == "a"
    assert name_of(choose_stage_host(hosts[1:], "m@1", load={HostRef("a"): 2})) == "b"
    assert name_of(choose_stage_host(reversed(hosts[1:]), "m@1")) == "a"


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(0, 2), st.sampled_from([WASM, GPU])),
        unique_by=lambda drawn: drawn[0],
    ),
    st.sets(st.sampled_from("abcd")),
    st.sampled_from([None, WASM, GPU]),
)
def test_choice_is_fit_and_does_not_depend_on_the_order_of_the_hosts(drawn, avoided, numeric):
    hosts = [host(name, queue=queue, numeric=number) for name, queue, number in drawn]
    avoid = {HostRef(name) for name in avoided}
    got = choose_stage_host(hosts, "m@1", avoid=avoid, numeric=numeric)
    assert got == choose_stage_host(hosts[::-1], "m@1", avoid=avoid, numeric=numeric)
    left = [status for status in hosts if status.ref not in avoid]
    assert (got is None) == (not left)
    if got is not None and any(status.models["m@1"] == numeric for status in left):
        assert got.models["m@1"] == numeric
