"""The circuit breakers of one browser, on a clock of their own."""

from actors.browser.breakers import HostBreakers
from recovery.breaker import (
    BreakerConfig,
    BreakerKey,
    BreakerSwitch,
    CircuitState,
    RegistryConfig,
    Snapshot,
)
from recovery.failures import Category, Failure, Scope, Severity

CONFIG = BreakerConfig(recovery_timeout=10.0, recovery_timeout_jitter=0.0, success_threshold=1)
BAD = Failure(Category.API_ERROR, Severity.MODERATE, Scope.OPERATION, "out of range")
DEATH = Failure(Category.CRASH, Severity.SEVERE, Scope.BROWSER, "it died")


class Guarded:
    def __init__(self) -> None:
        self.now = 100.0
        self.changes: list[dict[str, Snapshot]] = []
        self.breakers = HostBreakers(
            "b0",
            CONFIG,
            lambda moved: self.changes.append(dict(moved)),
            clock=lambda: self.now,
            wall=lambda: self.now,
        )

    def fail(self, model: str = "m", times: int = 1, retried: bool = False) -> None:
        for _ in range(times):
            admission = self.breakers.admit(model)
            assert admission is not None
            admission.failed(BAD, retried=retried)

    def states(self) -> list[tuple[str, CircuitState]]:
        """What was told, in order."""
        return [(m, s.breaker.state) for moved in self.changes for m, s in moved.items()]


def test_three_failures_in_a_row_block_the_model_and_no_other():
    it = Guarded()
    it.fail(times=2)
    assert it.breakers.blocked() == {}
    it.fail()
    assert it.breakers.blocked() == {"m": 10.0}
    assert it.breakers.admit("m") is None
    assert it.breakers.admit("other") is not None
    assert it.states() == [("m", CircuitState.OPEN)]


def test_cured_failures_of_one_category_count_from_the_second_on():
    it = Guarded()
    it.fail(times=3, retried=True)
    assert it.breakers.blocked() == {}
    it.fail(retried=True)
    assert it.breakers.blocked() == {"m": 10.0}


def test_while_a_probe_is_under_way_the_model_stays_blocked_and_its_success_closes():
    it = Guarded()
    it.fail(times=3)
    it.now += 10.0
    assert it.breakers.blocked() == {}, "it is time for a probe"
    probe = it.breakers.admit("m")
    assert probe is not None
    assert it.breakers.blocked() == {"m": CONFIG.probe_timeout}
    assert it.breakers.admit("m") is None
    probe.succeeded()
    assert it.breakers.blocked() == {}
    assert [state for _, state in it.states()] == ["open", "half_open", "closed"]


def test_probe_without_a_verdict_frees_its_place():
    it = Guarded()
    it.fail(times=3)
    it.now += 10.0
    probe = it.breakers.admit("m")
    assert probe is not None
    probe.abandoned()
    assert it.breakers.blocked() == {}
    assert it.breakers.admit("m") is not None


def test_deaths_count_once_each_however_many_operations_they_take_along():
    it = Guarded()
    for _ in range(2):
        taken = [it.breakers.admit("m") for _ in range(5)]
        it.breakers.observe(DEATH)
        for admission in taken:
            assert admission is not None
            admission.abandoned()
    assert it.breakers.blocked() == {}
    it.breakers.observe(DEATH)
    assert it.breakers.blocked() == {"": 10.0}
    assert it.breakers.admit("m") is None
    assert it.states() == [("", CircuitState.OPEN)]


def test_refusal_by_the_model_leaves_nothing_behind_in_the_browsers_breaker():
    it = Guarded()
    it.fail(times=3)
    for _ in range(3):
        it.breakers.observe(DEATH)
    it.now += 10.0
    it.fail("other")  # the probe of the browser's breaker has no verdict
    admission = it.breakers.admit("other")
    assert admission is not None
    admission.succeeded()
    assert it.breakers.snapshots()[""].breaker.state is CircuitState.CLOSED


def test_another_worker_goes_on_and_hears_of_the_death_in_between():
    it, later = Guarded(), Guarded()
    it.fail(times=3)
    it.breakers.observe(DEATH)
    it.breakers.observe(DEATH)
    later.now = it.now + 4.0
    later.breakers.restore(it.breakers.snapshots())
    assert later.breakers.blocked() == {"m": 6.0}
    assert later.changes == []
    later.breakers.observe(DEATH)
    assert later.breakers.blocked() == {"m": 6.0, "": 10.0}
    assert later.states() == [("", CircuitState.OPEN)]


def test_unloaded_model_is_forgotten_and_late_reports_of_it_are_no_news():
    it = Guarded()
    late = [it.breakers.admit("m") for _ in range(3)]
    it.breakers.forget("m")
    for admission in late:
        assert admission is not None
        admission.failed(BAD, retried=False)
    assert it.changes == []
    assert it.breakers.blocked() == {}
    assert it.breakers.admit("m") is not None


def test_operation_that_is_the_probe_of_a_half_open_breaker_knows_it():
    it = Guarded()
    admission = it.breakers.admit("m")
    assert admission is not None
    assert not admission.on_trial
    admission.succeeded()
    it.fail(times=3)
    it.now += 11
    probe = it.breakers.admit("m")
    assert probe is not None
    assert probe.on_trial
    probe.succeeded()
    after = it.breakers.admit("m")
    assert after is not None
    assert not after.on_trial


# -- what ended an outage, and switches by hand ----------------------------------------------------


def test_repair_is_named_in_what_ended_the_outage():
    it = Guarded()
    it.fail(times=3)
    it.breakers.repaired("restart")
    it.now += 10.0
    probe = it.breakers.admit("m")
    assert probe is not None
    probe.succeeded()
    (recovery,) = it.breakers.metrics()["m"]["recovery_history"]
    assert recovery["recovery_method"] == "restart"


def test_outage_that_only_time_has_ended_says_probe():
    it = Guarded()
    it.breakers.repaired("restart")  # before anything was broken: it explains nothing
    it.fail(times=3)
    it.now += 10.0
    probe = it.breakers.admit("m")
    assert probe is not None
    probe.succeeded()
    (recovery,) = it.breakers.metrics()["m"]["recovery_history"]
    assert recovery["recovery_method"] == "probe"


def test_circuit_is_forced_open_disabled_and_reset_by_hand():
    it = Guarded()
    it.breakers.switch("m", BreakerSwitch.FORCE_OPEN)
    assert it.breakers.admit("m") is None
    assert it.breakers.blocked()["m"] > 1e6
    it.breakers.switch("m", BreakerSwitch.DISABLE)
    it.fail(times=5)
    assert it.breakers.admit("m") is not None
    it.breakers.switch("m", BreakerSwitch.RESET)
    assert it.states()[-1] == ("m", CircuitState.CLOSED)
    it.breakers.switch("", BreakerSwitch.FORCE_OPEN)
    assert it.breakers.admit("other") is None, "the browser's own refuses for all its models"


def test_models_may_be_set_to_something_else_than_their_browser():
    breakers = HostBreakers(
        "b0",
        CONFIG,
        lambda moved: None,
        clock=lambda: 0.0,
        model_config=BreakerConfig(failure_threshold=1, recovery_timeout_jitter=0.0),
    )
    admission = breakers.admit("m")
    assert admission is not None
    admission.failed(BAD, retried=False)
    assert "m" in breakers.blocked()


def test_cap_on_open_circuits_is_the_pool_s():
    breakers = HostBreakers(
        "b0",
        CONFIG,
        lambda moved: None,
        clock=lambda: 0.0,
        limits=RegistryConfig(open_share_max=0.0),
    )
    breakers.note_peers({BreakerKey("b1", "m"): CircuitState.CLOSED})
    for _ in range(5):
        admission = breakers.admit("m")
        assert admission is not None, "no circuit may open here"
        admission.failed(BAD, retried=False)
