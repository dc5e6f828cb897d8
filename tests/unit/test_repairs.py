"""A browser that failed: its repair climbs the steps of a plan."""

import pytest

from recovery.adjustments import adjust
from recovery.breaker import CircuitBreaker
from recovery.control import (
    HISTORY_MAX,
    Adjusted,
    BreakersMoved,
    BrowserFailed,
    BrowserReady,
    BrowserReconnected,
    BrowserUnwanted,
    BrowserWanted,
    Launch,
    Load,
    ModelLoaded,
    ModelPhase,
    ModelWanted,
    Phase,
    Reconnect,
    Stop,
)
from recovery.failures import Category
from recovery.kinds import BrowserType, Level, ModelType, RecoveryLevel
from recovery.placement import Placing
from recovery.plan import INEFFECTIVE_ATTEMPTS
from recovery.supervision import RestartLimit
from tests.fakes import FACTS, NUMERIC, failure
from tests.stories import (
    CHROME,
    LIMIT,
    OUT_OF_TOUCH,
    Story,
    serving_story,
    serving_with,
    starting_story,
)

FIREFOX, EDGE = BrowserType.FIREFOX, BrowserType.EDGE


@pytest.fixture
def starting() -> Story:
    return starting_story()


@pytest.fixture
def serving() -> Story:
    """Browser b is ready, with model m loaded."""
    return serving_story()


def test_browser_that_dies_in_service_starts_again_at_once(serving):
    assert serving.failed(epoch=0) == (Launch("b", CHROME, epoch=1, delay=0.0),)
    assert (serving.browser.phase, serving.browser.epoch) == (Phase.STARTING, 1)
    assert serving.browser.models == serving.browser.numeric == {}
    assert serving.browser.failure.category is Category.CRASH


def test_next_epoch_loads_the_models_again_and_ends_the_repair(serving):
    serving.failed(epoch=0)
    repair = serving.browser.repair
    assert (repair.from_epoch, repair.ready) == (0, None)
    assert serving.ready(epoch=1) == (Load("b", 1, "m"),)
    (repair,) = serving.state.repairs
    assert repair.ready - repair.began == 1.0


def test_browser_that_cannot_start_waits_longer_each_time(starting):
    assert starting.failed(0, Category.LAUNCH_FAILURE) == (Launch("b", CHROME, 1, delay=1.0),)
    adjusted = Adjusted(ModelType.UNKNOWN, Category.LAUNCH_FAILURE)
    again = Launch("b", CHROME, 2, delay=2.0, adjusted=adjusted)
    assert starting.failed(1, Category.LAUNCH_FAILURE) == (again,)


def test_too_many_restarts_give_the_browser_up_and_stop_it(serving):
    for epoch in range(LIMIT.restarts_max):
        serving.failed(epoch)
        serving.ready(epoch=epoch + 1)
    assert serving.failed(2) == (Stop("b", 2),)
    assert serving.browser.phase is Phase.GIVEN_UP
    assert serving.state.repairs[-1].outcome == "given up"
    assert serving.browser.models == {}


def test_restarts_long_ago_are_forgiven(serving):
    for epoch in range(LIMIT.restarts_max):
        serving.failed(epoch)
        serving.ready(epoch=epoch + 1)
    serving.at += LIMIT.period_seconds
    assert serving.failed(2) == (Launch("b", CHROME, 3),)


def test_failure_that_trying_again_cannot_help_is_final(starting):
    assert starting.failed(0, Category.LAUNCH_FAILURE, final=True) == (Stop("b", 0),)
    assert starting.browser.phase is Phase.GIVEN_UP


def test_repairs_remembered_are_bounded():
    story = Story(RestartLimit(restarts_max=10**6))
    story.tell(BrowserWanted("b", CHROME))
    story.ready()
    for epoch in range(HISTORY_MAX + 5):
        story.failed(epoch)
        story.ready(epoch=epoch + 1)
    assert len(story.state.repairs) == HISTORY_MAX
    assert story.state.repairs[-1].from_epoch == HISTORY_MAX + 4


def test_page_that_is_out_of_touch_is_asked_back_and_keeps_what_it_has(serving):
    assert serving.tell(BrowserFailed("b", 0, OUT_OF_TOUCH)) == (Reconnect("b", 0),)
    assert serving.browser.phase is Phase.RECONNECTING
    assert serving.browser.models == {"m": ModelPhase.LOADED}
    assert serving.tell(BrowserReconnected("b", 0)) == ()
    assert serving.browser.phase is Phase.READY
    assert serving.browser.models == {"m": ModelPhase.LOADED}
    (repair,) = serving.state.repairs
    assert (repair.outcome, repair.steps[0].worked) == ("reconnected", RecoveryLevel.MINIMAL)


def test_model_wanted_meanwhile_is_loaded_when_the_page_is_back(serving):
    serving.tell(BrowserFailed("b", 0, OUT_OF_TOUCH))
    serving.tell(ModelWanted("n", "digest"))
    assert serving.tell(BrowserReconnected("b", 0)) == (Load("b", 0, "n"),)


@pytest.mark.parametrize(
    "options", [{"strategy": "restart"}, {"strategy": "failover"}, {"level": Level.NONE}], ids=str
)
def test_page_that_is_replaced_while_it_lives_takes_its_models_with_it(options):
    """Else the next incarnation, once ready, would be said to have what it has yet to load."""
    story = serving_with(**options)
    story.tell(BrowserFailed("b", 0, OUT_OF_TOUCH))
    assert story.browser.phase in (Phase.STARTING, Phase.REPLACING)
    assert story.browser.models == story.browser.numeric == {}


def test_progressive_climbs_from_reconnecting_to_another_browser():
    story = serving_with(limit=RestartLimit(restarts_max=10))
    assert story.tell(BrowserFailed("b", 0, OUT_OF_TOUCH)) == (Reconnect("b", 0),)
    assert story.tell(BrowserFailed("b", 0, OUT_OF_TOUCH)) == (Launch("b", CHROME, 1),)
    adjusted = Adjusted(ModelType.TEXT, Category.CONNECTION_FAILURE)
    (again,) = story.failed(1, Category.LAUNCH_FAILURE)
    assert (again.epoch, again.adjusted) == (2, adjusted)
    (other,) = story.failed(2, Category.LAUNCH_FAILURE)
    assert (other.browser_id, other.kind) == ("edge-r1", EDGE)
    assert story.browser.phase is Phase.REPLACING
    stopped, other = story.tell(BrowserFailed("edge-r1", 0, failure(), final=True))
    assert (stopped, other) == (Stop("edge-r1", 0), Launch("firefox-r2", FIREFOX, 0))
    assert story.tell(BrowserReady("firefox-r2", 0, FACTS)) == (
        Load("firefox-r2", 0, "m"),
        Stop("b", 2),
    )
    assert (story.browser.phase, story.browser.replaced_by) == (Phase.GIVEN_UP, "firefox-r2")
    (repair,) = story.state.repairs
    assert repair.outcome == "replaced by firefox-r2"
    assert [step.rungs for step in repair.steps] == [(1,), (2,), (3,), (4,)]
    assert [step.worked for step in repair.steps] == [None, None, None, 4]


def test_failover_never_restarts():
    story = serving_with(strategy="failover")
    assert story.failed(0) == (Launch("edge-r1", EDGE, 0),)


def test_restart_never_leaves_the_kind():
    story = serving_with(strategy="restart", limit=RestartLimit(restarts_max=10))
    assert story.failed(0) == (Launch("b", CHROME, 1),)
    (again,) = story.failed(1)
    assert again.adjusted is not None
    assert story.failed(2) == (Stop("b", 2),)


def test_parallel_races_and_the_first_that_is_ready_stays():
    story = serving_with(strategy="parallel", limit=RestartLimit(restarts_max=10))
    assert story.failed(0) == (Launch("b", CHROME, 1), Launch("edge-r1", EDGE, 0))
    assert story.ready(epoch=1) == (Load("b", 1, "m"), Stop("edge-r1", 0))
    assert story.state.browsers["edge-r1"].phase is Phase.STOPPED
    assert story.state.repairs[0].outcome == "restarted"


def test_parallel_race_that_the_other_browser_wins_stops_the_restart():
    story = serving_with(strategy="parallel", limit=RestartLimit(restarts_max=10))
    story.failed(0)
    assert story.tell(BrowserReady("edge-r1", 0, FACTS)) == (Load("edge-r1", 0, "m"), Stop("b", 1))
    assert story.ready(epoch=1) == ()
    assert story.browser.phase is Phase.GIVEN_UP


def test_parallel_race_goes_on_until_all_have_failed():
    story = serving_with(strategy="parallel", limit=RestartLimit(restarts_max=20))
    reconnect, same, other = story.tell(BrowserFailed("b", 0, OUT_OF_TOUCH))
    assert (reconnect, same.kind, other.kind) == (Reconnect("b", 0), CHROME, EDGE)
    assert story.tell(BrowserFailed("b", 0, OUT_OF_TOUCH)) == ()
    assert story.browser.phase is Phase.REPLACING
    assert story.tell(BrowserFailed(same.browser_id, 0, failure())) == (Stop(same.browser_id, 0),)
    assert story.tell(BrowserReady(other.browser_id, 0, FACTS))[-1] == Stop("b", 0)
    assert story.state.repairs[0].steps[0].worked is RecoveryLevel.FALLBACK


@pytest.mark.parametrize("level", [Level.NONE, Level.LOW])
def test_slot_is_filled_again_at_levels_that_recover_nothing(level):
    story = serving_with(level=level)
    assert story.failed(0) == (Launch("b", CHROME, 1),)
    assert story.state.repairs[0].outcome == "slot refilled, operation not recovered"


def test_open_breaker_goes_to_another_browser(serving):
    breaker = CircuitBreaker("b", failure_threshold=1)
    breaker.observe(failure())
    serving.tell(BreakersMoved("b", {"": breaker.snapshot()}))
    (launch,) = serving.failed(0)
    assert launch.kind is not CHROME


def test_rung_that_rarely_works_for_such_a_failure_is_passed_by():
    story = serving_with(limit=RestartLimit(restarts_max=1000, launches_failed_max=100))
    epoch = 0
    for _ in range(INEFFECTIVE_ATTEMPTS):
        (moderate,) = story.failed(epoch)
        assert moderate.adjusted is None or epoch
        story.failed(epoch + 1)
        epoch += 2
        story.ready(epoch=epoch)
    (launch,) = story.failed(epoch)
    assert launch.adjusted == Adjusted(ModelType.TEXT, Category.CRASH)
    assert "rung 2 rarely works" in story.browser.repair.plan.reason


def test_error_of_the_machine_is_not_final_for_a_browser_that_has_served(serving):
    assert serving.failed(0, Category.LAUNCH_FAILURE, final=True)[0].epoch == 1


def test_adjustments_stay_for_restarts_that_follow_soon_and_not_for_later_ones():
    story = serving_with(limit=RestartLimit(restarts_max=100))
    story.failed(0)
    (adjusted,) = story.failed(1)
    story.ready(epoch=2)
    assert story.failed(2)[0].adjusted == adjusted.adjusted
    story.ready(epoch=3)
    story.at += 600
    assert story.failed(3)[0].adjusted is None


def test_rung_that_has_nothing_to_adjust_is_no_second_plain_restart():
    story = Story(limit=RestartLimit(restarts_max=100))
    story.tell(BrowserWanted("b", BrowserType.SAFARI))
    story.ready()
    assert not adjust(BrowserType.SAFARI, ModelType.UNKNOWN, Category.API_ERROR)
    (launch,) = story.failed(0, Category.API_ERROR)
    assert launch.kind is not BrowserType.SAFARI, "it went on to the next rung"


def test_stand_in_never_takes_the_name_of_a_browser_that_is_there():
    story = Story(strategy="failover")
    for name in ("b", "edge-r1"):
        story.tell(BrowserWanted(name, CHROME))
        story.ready(name)
    story.failed(0)
    assert story.state.browsers["edge-r1"].phase is Phase.READY
    assert story.state.browsers["edge-r2"].stands_in_for == "b"


def test_drained_stand_in_lets_the_repair_climb_on():
    story = serving_with(strategy="failover")
    story.failed(0)
    stop, launch = story.tell(BrowserUnwanted("edge-r1"))
    assert (stop, launch.kind) == (Stop("edge-r1", 0), FIREFOX)


def test_drain_in_the_middle_of_a_repair_ends_it():
    story = serving_with(strategy="failover")
    story.failed(0)
    assert story.tell(BrowserUnwanted("b")) == (Stop("b", 0), Stop("edge-r1", 0))
    assert story.state.repairs[0].outcome == "stopped"
    assert story.browser.repair is None


def test_crash_in_a_pool_of_several_types_is_planned_for_the_model_that_was_running():
    story = serving_with()  # m is text
    story.tell(ModelWanted("vad", "digest", ModelType.AUDIO))
    story.tell(ModelLoaded("b", 0, "vad", NUMERIC))
    crash = failure(Category.CRASH, evidence={"model": "vad"})
    story.tell(BrowserFailed("b", 0, crash, False))
    assert story.browser.repair.model_type is ModelType.AUDIO


def test_where_nothing_was_running_the_type_is_that_of_all_models_on_the_browser():
    story = serving_with()  # m is text
    story.tell(BrowserWanted("c", CHROME))
    story.ready("c")
    story.tell(ModelWanted("vad", "digest", ModelType.AUDIO, Placing(1, "vad")))
    (without,) = (r for r in story.state.browsers.values() if "vad" not in r.models)
    story.tell(BrowserFailed(without.id, 0, failure(Category.CRASH), False))
    assert story.state.browsers[without.id].repair.model_type is ModelType.TEXT


def test_where_nothing_was_running_and_there_are_several_types_none_is_made_up():
    story = serving_with()  # m is text
    story.tell(ModelWanted("vad", "digest", ModelType.AUDIO))
    story.tell(BrowserFailed("b", 0, failure(Category.CRASH), False))
    assert story.browser.repair.model_type is ModelType.UNKNOWN
