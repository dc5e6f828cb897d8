import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.answering import (
    AnsweringPolicy,
    Attempt,
    GiveUp,
    Refuse,
    Send,
    WaitForHost,
    next_action,
)
from recovery.failures import Category, Failure, Scope
from recovery.kinds import Level, Readiness
from recovery.records import HostRef
from tests.fakes import failure, host_status

A, B = HostRef("a", 0), HostRef("b", 0)
MEDIUM = AnsweringPolicy(Level.MEDIUM, attempts_max=3, wait_when_full=True)
LOW = AnsweringPolicy(Level.LOW, attempts_max=3, wait_when_full=True)


def crashed(ref: HostRef) -> Attempt:
    return Attempt(ref, failure(Category.CRASH, ref=ref))


def dropped(ref: HostRef) -> Attempt:
    """Only the connection was lost."""
    return Attempt(ref, failure(Category.CONNECTION_FAILURE, scope=Scope.PAGE, ref=ref))


def reported(ref: HostRef, message: str = "bad shape") -> Attempt:
    """The page reported an error, and lives."""
    error = failure(Category.API_ERROR, scope=Scope.OPERATION, ref=ref, message=message)
    return Attempt(ref, error)


def decide(policy=MEDIUM, attempts=(), hosts=(), left=10.0, seed=0):
    return next_action(policy, "m", attempts, hosts, left, random.Random(seed))


def test_operation_is_sent_to_a_host_that_has_the_model():
    other = host_status("other", models=["n"])
    draining = host_status("draining", readiness=Readiness.DRAINING)
    assert decide(hosts=[other, draining, host_status("a")]) == Send(host_status("a"))


def test_nobody_ready_means_to_wait():
    assert isinstance(decide(hosts=[host_status("other", models=["n"])]), WaitForHost)
    assert isinstance(decide(hosts=[]), WaitForHost)


def test_crashed_incarnation_is_not_tried_again():
    hosts = [host_status("a"), host_status("b")]
    for seed in range(20):
        assert decide(attempts=[crashed(A)], hosts=hosts, seed=seed) == Send(hosts[1])
    assert isinstance(decide(attempts=[crashed(A)], hosts=hosts[:1]), WaitForHost)


def test_next_epoch_of_the_same_browser_is_tried():
    again = host_status("a", epoch=1)
    assert decide(attempts=[crashed(A)], hosts=[host_status("a"), again]) == Send(again)


def test_host_that_was_only_busy_is_asked_again():
    assert decide(attempts=[Attempt(A, None)], hosts=[host_status("a")]) == Send(host_status("a"))


def test_host_that_only_lost_its_connection_is_asked_again():
    assert decide(attempts=[dropped(A)], hosts=[host_status("a")]) == Send(host_status("a"))


def test_full_queues_wait_or_refuse_as_the_caller_chose():
    full = [host_status("a", queue=4), host_status("b", queue=5)]
    assert isinstance(decide(hosts=full), WaitForHost)
    refusing = AnsweringPolicy(Level.MEDIUM, attempts_max=3, wait_when_full=False)
    assert isinstance(decide(refusing, hosts=full), Refuse)
    # Nobody has it ready: that is a repair to wait for, not back-pressure.
    assert isinstance(decide(refusing, hosts=[]), WaitForHost)


def test_shorter_queue_of_two_is_chosen():
    hosts = [host_status("a", queue=3), host_status("b", queue=1)]
    assert all(decide(hosts=hosts, seed=seed) == Send(hosts[1]) for seed in range(20))


def test_longest_of_three_queues_is_never_chosen_and_no_other_is_starved():
    hosts = [host_status(name, queue=queue) for name, queue in (("a", 0), ("b", 1), ("c", 2))]
    chosen = Counter(decide(hosts=hosts, seed=s).status.ref.browser_id for s in range(200))
    assert chosen["c"] == 0
    assert chosen["a"] > chosen["b"] > 0


def test_equal_queues_share_the_work():
    hosts = [host_status("a"), host_status("b")]
    chosen = Counter(decide(hosts=hosts, seed=s).status.ref.browser_id for s in range(200))
    assert min(chosen["a"], chosen["b"]) > 50


def test_same_seed_chooses_the_same():
    hosts = [host_status(f"b{n}") for n in range(8)]
    one, other = random.Random(7), random.Random(7)
    for _ in range(50):
        assert next_action(MEDIUM, "m", (), hosts, 1.0, one) == next_action(
            MEDIUM, "m", (), hosts, 1.0, other
        )


def test_attempts_are_bounded():
    attempts = [crashed(HostRef("a", epoch)) for epoch in range(3)]
    hosts = [host_status("a", epoch=3)]
    assert decide(attempts=attempts[:2], hosts=hosts) == Send(hosts[0])
    assert decide(attempts=attempts, hosts=hosts) == GiveUp("3 attempts failed")


def test_lost_connections_and_workers_are_no_operations_doing_and_bounded_on_their_own():
    hosts = [host_status("a"), host_status("b")]
    gone = failure(Category.CRASH, ref=A, evidence={"what": "worker_exited"})
    several = [dropped(B), Attempt(A, gone), Attempt(A, gone), crashed(HostRef("c", 0))]
    assert isinstance(decide(attempts=several, hosts=hosts), Send), "a node died, say"
    assert isinstance(decide(attempts=[dropped(A)] * 11, hosts=hosts), Send)
    assert decide(attempts=[dropped(A)] * 12, hosts=hosts) == GiveUp("12 attempts failed")


def test_being_busy_is_no_failed_attempt():
    busy = [Attempt(A, None)] * 50
    assert isinstance(decide(attempts=busy, hosts=[host_status("a")]), Send)


@pytest.mark.parametrize("left", [0.0, -1.0])
def test_deadline_ends_it(left):
    assert decide(hosts=[host_status("a")], left=left) == GiveUp("the deadline has passed")


def test_same_error_from_two_browsers_is_the_inputs_fault():
    hosts = [host_status(name) for name in "abc"]
    verdict = decide(attempts=[reported(A), reported(B)], hosts=hosts)
    assert isinstance(verdict, GiveUp)
    assert "the input and the model" in verdict.why


def test_different_errors_from_two_browsers_go_on_to_a_third():
    hosts = [host_status(name) for name in "abc"]
    attempts = [reported(A, "bad shape"), reported(B, "no kernel")]
    assert decide(attempts=attempts, hosts=hosts) == Send(hosts[2])


def test_error_is_taken_to_another_browser_first():
    hosts = [host_status("a"), host_status("b")]
    assert all(decide(attempts=[reported(A)], hosts=hosts, seed=s) == Send(hosts[1]) for s in "xyz")


def test_only_browser_is_asked_again_after_an_error_that_it_survived():
    """Else the operation would wait, until its deadline, for a restart that nothing causes."""
    hosts = [host_status("a")]
    assert decide(attempts=[reported(A)], hosts=hosts) == Send(hosts[0])
    assert isinstance(decide(attempts=[reported(A), reported(A)], hosts=hosts), GiveUp)
    assert isinstance(decide(attempts=[reported(A), crashed(A)], hosts=hosts), WaitForHost)


def test_level_none_reports_the_first_failure():
    none = AnsweringPolicy(Level.NONE, attempts_max=3, wait_when_full=True)
    hosts = [host_status("a"), host_status("b")]
    assert isinstance(decide(none, hosts=hosts), Send)
    for attempt in (crashed(A), dropped(A), reported(A)):
        assert isinstance(decide(none, [attempt], hosts), GiveUp)


def test_level_low_survives_a_dropped_connection_on_the_same_browser():
    hosts = [host_status("b"), host_status("a")]
    assert all(decide(LOW, [dropped(A)], hosts, seed=s) == Send(hosts[1]) for s in range(10))


def test_level_low_survives_no_death():
    hosts = [host_status("a", epoch=1), host_status("b")]
    assert isinstance(decide(LOW, [crashed(A)], hosts), GiveUp)


_FAILURES = st.builds(failure, st.sampled_from(Category), scope=st.sampled_from(Scope))
_REFS = st.builds(HostRef, st.sampled_from("abc"), st.integers(0, 2))


def _with_ref(ref: HostRef, seen: Failure | None) -> Attempt:
    return Attempt(ref, None if seen is None else failure(seen.category, scope=seen.scope, ref=ref))


@given(
    level=st.sampled_from([Level.NONE, Level.LOW, Level.MEDIUM]),
    attempts=st.lists(st.builds(_with_ref, _REFS, st.none() | _FAILURES), max_size=6),
    hosts=st.lists(
        st.builds(
            host_status,
            st.sampled_from("abc"),
            st.integers(0, 2),
            queue=st.integers(0, 5),
            readiness=st.sampled_from(Readiness),
            models=st.sampled_from([(), ("m",)]),
        ),
        max_size=5,
    ),
    left=st.floats(-1, 5),
    wait=st.booleans(),
)
def test_whatever_is_known_nothing_is_sent_where_it_cannot_be_answered(
    level, attempts, hosts, left, wait
):
    policy = AnsweringPolicy(level, attempts_max=3, wait_when_full=wait)
    action = next_action(policy, "m", attempts, hosts, left, random.Random(0))
    failed = [attempt for attempt in attempts if attempt.failure is not None]
    if isinstance(action, Send):
        assert action.status in hosts
        assert action.status.can_take("m")
        assert not action.status.full
        assert left > 0
        # A lost connection may not be the operation's doing: four of them count as one attempt.
        lost = [
            a
            for a in failed
            if a.failure.category is Category.CONNECTION_FAILURE
            and a.failure.scope in (Scope.OPERATION, Scope.PAGE)
        ]
        assert len(failed) - len(lost) < 3
        assert len(lost) < 4 * 3
        crashes = {a.ref for a in failed if a.failure.category is Category.CRASH}
        assert action.status.ref not in crashes
    if failed and level is Level.NONE:
        assert isinstance(action, GiveUp)
    if isinstance(action, Refuse):
        assert not wait


def test_nobody_left_is_no_reason_to_wait_for_the_deadline():
    policy = AnsweringPolicy(Level.MEDIUM, attempts_max=3, wait_when_full=True)
    rng = random.Random(0)
    waits = next_action(policy, "m", (), (), 60.0, rng, coming=True)
    gives_up = next_action(policy, "m", (), (), 60.0, rng, coming=False)
    assert isinstance(waits, WaitForHost)
    assert isinstance(gives_up, GiveUp)
    assert "no browser is left" in gives_up.why
