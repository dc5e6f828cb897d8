import pickle
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.adjustments import adjust
from recovery.breaker import CircuitBreaker
from recovery.control import (
    COMING,
    HISTORY_MAX,
    LOAD_AGAIN_SECONDS,
    Adjusted,
    Body,
    BreakersMoved,
    BrowserFailed,
    BrowserReady,
    BrowserReconnected,
    BrowserRecycled,
    BrowserStopped,
    BrowserUnwanted,
    BrowserWanted,
    Drain,
    Event,
    Instruction,
    Launch,
    Load,
    ModelFailed,
    ModelLoaded,
    ModelParked,
    ModelPhase,
    ModelUnwanted,
    ModelWanted,
    Phase,
    PoolClosing,
    PoolOpened,
    PoolState,
    Reconnect,
    Stop,
    Unload,
    apply,
    decide,
)
from recovery.errors import IllegalTransition
from recovery.failures import Category, Scope
from recovery.kinds import BrowserType, Level, ModelType, RecoveryLevel
from recovery.placement import Placing
from recovery.plan import HOPELESS_ATTEMPTS, STRATEGIES
from recovery.supervision import RestartLimit
from tests.fakes import FACTS, NUMERIC, failure

LIMIT = RestartLimit(restarts_max=2, period_seconds=60.0, delay_first_seconds=1.0)
CHROME = BrowserType.CHROME


class Story:
    """A state that events happen to, one second apart unless said otherwise."""

    def __init__(
        self,
        limit: RestartLimit = LIMIT,
        level: Level = Level.MEDIUM,
        strategy: str = "progressive",
    ) -> None:
        self.events: list[Event] = []
        self.state = PoolState()
        self.at = 0.0
        self.tell(PoolOpened("pool", level, STRATEGIES[strategy], limit, term=1))

    def tell(self, body: Body, after: float = 1.0) -> tuple[Instruction, ...]:
        event = Event(len(self.events) + 1, 1, self.at + after, body)
        self.state, instructions = decide(self.state, event)
        self.at = event.at
        self.events.append(event)
        return instructions

    def ready(self, browser_id: str = "b", epoch: int = 0) -> tuple[Instruction, ...]:
        return self.tell(BrowserReady(browser_id, epoch, FACTS))

    def failed(
        self, epoch: int, category: Category = Category.CRASH, *, final: bool = False
    ) -> tuple[Instruction, ...]:
        return self.tell(BrowserFailed("b", epoch, failure(category), final))

    @property
    def browser(self):
        return self.state.browsers["b"]


@pytest.fixture
def starting() -> Story:
    story = Story()
    story.tell(BrowserWanted("b", CHROME))
    return story


@pytest.fixture
def serving(starting) -> Story:
    """Browser b is ready, with model m loaded."""
    starting.ready()
    starting.tell(ModelWanted("m", "digest"))
    starting.tell(ModelLoaded("b", 0, "m", NUMERIC))
    return starting


def test_the_pool_opens_with_what_it_was_configured_to():
    state = Story().state
    assert (state.name, state.level, state.limit, state.term) == ("pool", Level.MEDIUM, LIMIT, 1)


def test_wanted_browser_is_launched_as_epoch_0():
    story = Story()
    assert story.tell(BrowserWanted("b", CHROME)) == (Launch("b", CHROME, 0),)
    assert story.browser.phase is Phase.STARTING


def test_browser_that_is_ready_loads_every_wanted_model(starting):
    starting.tell(ModelWanted("m", "digest"))
    starting.tell(ModelWanted("n", "digest"))
    assert starting.ready() == (Load("b", 0, "m"), Load("b", 0, "n"))
    assert starting.browser.models == {"m": ModelPhase.LOADING, "n": ModelPhase.LOADING}
    assert starting.browser.facts == FACTS


def test_wanted_model_is_loaded_by_browsers_that_are_ready_and_only_by_those(starting):
    starting.tell(BrowserWanted("late", CHROME))
    starting.ready()
    assert starting.tell(ModelWanted("m", "digest")) == (Load("b", 0, "m"),)


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


def test_late_news_of_an_old_epoch_changes_nothing(serving):
    serving.failed(0)
    serving.ready(epoch=1)
    before = serving.state
    for late in (
        BrowserReady("b", 0, FACTS),
        BrowserFailed("b", 0, failure()),
        ModelLoaded("b", 0, "m", NUMERIC),
        ModelFailed("b", 0, "m", failure(Category.API_ERROR)),
    ):
        assert serving.tell(late) == ()
        assert serving.state == before


def test_news_of_a_browser_that_was_given_up_changes_nothing(starting):
    starting.failed(0, final=True)
    before = starting.state
    assert starting.failed(0) == ()
    assert starting.ready(epoch=0) == ()
    assert starting.state == before


def test_unwanted_browser_drains_and_then_stops(serving):
    assert serving.tell(BrowserUnwanted("b")) == (Drain("b", 0),)
    assert serving.browser.phase is Phase.DRAINING
    serving.tell(BrowserStopped("b"))
    assert serving.browser.phase is Phase.STOPPED
    assert serving.browser.models == serving.browser.numeric == {}


def test_unwanted_browser_that_is_still_starting_is_stopped(starting):
    assert starting.tell(BrowserUnwanted("b")) == (Stop("b", 0),)
    assert starting.browser.phase is Phase.STOPPED
    assert starting.ready() == ()  # it came up all the same
    assert starting.browser.phase is Phase.STOPPED


def test_browser_that_dies_while_draining_is_not_started_again(serving):
    serving.tell(BrowserUnwanted("b"))
    assert serving.failed(0) == (Stop("b", 0),)
    assert serving.browser.phase is Phase.STOPPED


def test_unwanting_twice_says_nothing_new(serving):
    serving.tell(BrowserUnwanted("b"))
    assert serving.tell(BrowserUnwanted("b")) == ()


def test_stopped_browser_can_be_wanted_again_under_a_new_epoch(serving):
    serving.tell(BrowserUnwanted("b"))
    serving.tell(BrowserStopped("b"))
    assert serving.tell(BrowserWanted("b", CHROME)) == (Launch("b", CHROME, 1),)


def test_closing_stops_every_browser_that_lives(serving):
    serving.tell(BrowserWanted("young", CHROME))
    serving.tell(BrowserWanted("gone", CHROME))
    serving.tell(BrowserFailed("gone", 0, failure(), final=True))
    assert serving.tell(PoolClosing()) == (Stop("b", 0), Stop("young", 0))
    assert serving.state.closing


def test_nothing_is_started_again_while_closing(serving):
    serving.tell(PoolClosing())
    assert serving.failed(0) == (Stop("b", 0),)
    assert serving.browser.phase is Phase.STOPPED


def test_model_that_cannot_be_loaded_is_marked_and_the_browser_goes_on(starting):
    starting.ready()
    starting.tell(ModelWanted("m", "digest"))
    why = failure(Category.API_ERROR)
    assert starting.tell(ModelFailed("b", 0, "m", why)) == (Load("b", 0, "m", LOAD_AGAIN_SECONDS),)
    assert starting.browser.models == {"m": ModelPhase.LOADING}
    assert starting.tell(ModelFailed("b", 0, "m", why)) == ()
    assert starting.browser.phase is Phase.READY
    assert starting.browser.models == {"m": ModelPhase.FAILED}
    assert starting.browser.load_failures == {"m": why}


def test_unwanted_model_is_unloaded_and_leaves_no_trace(serving):
    assert serving.tell(ModelUnwanted("m")) == (Unload("b", 0, "m"),)
    assert serving.state.models == serving.browser.models == serving.browser.numeric == {}


def test_model_that_is_replaced_is_not_loaded_until_the_new_one_is(serving):
    assert serving.tell(ModelWanted("m", "another digest")) == (Load("b", 0, "m"),)
    assert serving.browser.models == {"m": ModelPhase.LOADING}
    assert serving.browser.numeric == {}


def test_model_that_was_unwanted_while_it_loaded_is_not_taken_in(starting):
    starting.ready()
    starting.tell(ModelWanted("m", "digest"))
    starting.tell(ModelUnwanted("m"))
    starting.tell(ModelLoaded("b", 0, "m", NUMERIC))
    assert starting.browser.models == starting.browser.numeric == {}


def test_repairs_remembered_are_bounded():
    story = Story(RestartLimit(restarts_max=10**6))
    story.tell(BrowserWanted("b", CHROME))
    story.ready()
    for epoch in range(HISTORY_MAX + 5):
        story.failed(epoch)
        story.ready(epoch=epoch + 1)
    assert len(story.state.repairs) == HISTORY_MAX
    assert story.state.repairs[-1].from_epoch == HISTORY_MAX + 4


@pytest.mark.parametrize(
    "body",
    [
        BrowserReady("b", 0, FACTS),  # it is ready already
        BrowserWanted("b", CHROME),  # it is there already
        BrowserReady("nobody", 0, FACTS),
        BrowserFailed("nobody", 0, failure()),
        BrowserUnwanted("nobody"),
        BrowserStopped("nobody"),
        ModelLoaded("nobody", 0, "m", NUMERIC),
        ModelFailed("nobody", 0, "m", failure()),
    ],
    ids=lambda body: f"{type(body).__name__}-{body.browser_id}",
)
def test_illegal_event_raises_and_leaves_the_state_alone(serving, body):
    before = pickle.dumps(serving.state)
    with pytest.raises(IllegalTransition):
        serving.tell(body)
    assert pickle.dumps(serving.state) == before


def test_nothing_can_be_wanted_of_a_pool_that_closes(serving):
    serving.tell(PoolClosing())
    with pytest.raises(IllegalTransition):
        serving.tell(BrowserWanted("new", CHROME))


def test_state_and_events_cross_a_pickle(serving):
    serving.failed(0)
    assert pickle.loads(pickle.dumps(serving.state)) == serving.state
    assert pickle.loads(pickle.dumps(serving.events)) == serving.events


# -- repairs climb the steps of a plan -------------------------------------------------------------

OUT_OF_TOUCH = failure(Category.CONNECTION_FAILURE, scope=Scope.PAGE)
FIREFOX, EDGE = BrowserType.FIREFOX, BrowserType.EDGE


def serving_with(**options) -> Story:
    story = Story(**options)
    story.tell(BrowserWanted("b", CHROME))
    story.ready()
    story.tell(ModelWanted("m", "digest", ModelType.TEXT))
    story.tell(ModelLoaded("b", 0, "m", NUMERIC))
    return story


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
    assert story.state.repairs[0].outcome == "filled again, not recovered"


def test_open_breaker_goes_to_another_browser(serving):
    breaker = CircuitBreaker("b", failure_threshold=1)
    breaker.observe(failure())
    serving.tell(BreakersMoved("b", {"": breaker.snapshot()}))
    (launch,) = serving.failed(0)
    assert launch.kind is not CHROME


def test_rung_that_rarely_works_for_such_a_failure_is_passed_by():
    story = serving_with(limit=RestartLimit(restarts_max=1000, launches_failed_max=100))
    epoch = 0
    for _ in range(HOPELESS_ATTEMPTS):
        (moderate,) = story.failed(epoch)
        assert moderate.adjusted is None or epoch
        story.failed(epoch + 1)
        epoch += 2
        story.ready(epoch=epoch)
    (launch,) = story.failed(epoch)
    assert launch.adjusted == Adjusted(ModelType.TEXT, Category.CRASH)
    assert "rung 2 rarely works" in story.browser.repair.plan.reason


def test_model_that_kills_the_browser_as_it_loads_is_left_out_the_next_time_but_one(starting):
    starting.ready()
    starting.tell(ModelWanted("good", "digest"))
    starting.tell(ModelLoaded("b", 0, "good", NUMERIC))
    starting.tell(ModelWanted("bad", "digest"))
    starting.failed(0)
    assert starting.ready(epoch=1) == (Load("b", 1, "good"), Load("b", 1, "bad"))
    starting.tell(ModelLoaded("b", 1, "good", NUMERIC))
    starting.failed(1)
    assert starting.ready(epoch=2) == (Load("b", 2, "good"),)
    assert starting.browser.models["bad"] is ModelPhase.FAILED
    assert starting.browser.load_failures["bad"].category is Category.CRASH
    (load,) = starting.tell(ModelWanted("bad", "another digest"))
    assert load == Load("b", 2, "bad"), "a model of new content has new attempts"


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


# -- whatever happens, in whatever order -----------------------------------------------------------

_IDS = st.sampled_from(["a", "b", "edge-r1", "firefox-r2", "chrome-r1"])
_MODELS = st.sampled_from(["m", "n", "m@1"])
_EPOCHS = st.integers(-1, 0)  # the present one, or the one before
_STEPS = st.one_of(
    st.tuples(st.just("want"), _IDS),
    st.tuples(st.just("ready"), _IDS, _EPOCHS),
    st.tuples(st.just("fail"), _IDS, _EPOCHS, st.sampled_from(Category), st.booleans()),
    st.tuples(st.just("drop"), _IDS, _EPOCHS),
    st.tuples(st.just("back"), _IDS, _EPOCHS),
    st.tuples(st.just("unwant"), _IDS),
    st.tuples(st.just("stop"), _IDS),
    st.tuples(st.just("model"), _MODELS),
    st.tuples(st.just("shard"), st.sampled_from(["m@0", "m@1", "m@2"]), st.integers(1, 3)),
    st.tuples(st.just("no model"), _MODELS),
    st.tuples(st.just("loaded"), _IDS, _EPOCHS, _MODELS),
    st.tuples(st.just("not loaded"), _IDS, _EPOCHS, _MODELS),
    st.tuples(st.just("close")),
)


def _body(state: PoolState, step: tuple) -> Body:
    def epoch(browser_id: str, back: int) -> int:
        record = state.browsers.get(browser_id)
        return max(record.epoch + back, 0) if record else 0

    match step:
        case "want", browser_id:
            return BrowserWanted(browser_id, CHROME)
        case "ready", browser_id, back:
            return BrowserReady(browser_id, epoch(browser_id, back), FACTS)
        case "fail", browser_id, back, category, final:
            return BrowserFailed(browser_id, epoch(browser_id, back), failure(category), final)
        case "drop", browser_id, back:
            return BrowserFailed(browser_id, epoch(browser_id, back), OUT_OF_TOUCH)
        case "back", browser_id, back:
            return BrowserReconnected(browser_id, epoch(browser_id, back))
        case "unwant", browser_id:
            return BrowserUnwanted(browser_id)
        case "stop", browser_id:
            return BrowserStopped(browser_id)
        case "model", model:
            return ModelWanted(model, f"digest of {model}")
        case "shard", model, copies:
            return ModelWanted(model, f"digest of {model}", placing=Placing(copies, "m"))
        case "no model", model:
            return ModelUnwanted(model)
        case "loaded", browser_id, back, model:
            return ModelLoaded(browser_id, epoch(browser_id, back), model, NUMERIC)
        case "not loaded", browser_id, back, model:
            return ModelFailed(browser_id, epoch(browser_id, back), model, failure())
        case _:
            return PoolClosing()


def _check(before: PoolState, after: PoolState, instructions: tuple[Instruction, ...]) -> None:
    for record in after.browsers.values():
        old = before.browsers.get(record.id)
        assert old is None or record.epoch >= old.epoch
        if record.phase in (Phase.STARTING, Phase.STOPPED, Phase.GIVEN_UP):
            assert record.models == record.numeric == {}
        if record.phase is Phase.READY:
            here = record.models.keys()
            assert here - after.placed.keys() == after.models.keys() - after.placed.keys()
            assert here <= after.models.keys()
        loaded = {m for m, phase in record.models.items() if phase is ModelPhase.LOADED}
        assert record.numeric.keys() == loaded
        repair = record.repair
        assert (repair is not None and bool(repair.trying)) == (
            repair is not None and record.phase in COMING
        ), "a repair is under way exactly while something is being tried"
        if record.phase in (Phase.RECONNECTING, Phase.REPLACING):
            assert repair is not None
        if record.phase is Phase.REPLACING and not after.closing:
            helpers = [b for b in after.browsers.values() if b.stands_in_for == record.id]
            assert any(b.phase in COMING for b in helpers)
    for model, placing in () if after.closing else after.placed.items():
        ready = [r for r in after.browsers.values() if r.phase is Phase.READY]
        alive = [r for r in after.browsers.values() if r.phase in (Phase.READY, *COMING)]
        has = [r for r in alive if r.models.get(model) not in (None, ModelPhase.FAILED)]
        free = [r for r in ready if model not in r.models and model not in r.load_failures]
        if len(alive) == len(ready) and len(has) < placing.copies:
            assert not free, f"{model} has too few copies, and there is room"
    assert len(after.repairs) <= HISTORY_MAX
    for instruction in instructions:
        record = after.browsers[instruction.browser_id]
        assert instruction.epoch == record.epoch
        if isinstance(instruction, Launch):
            assert record.phase is Phase.STARTING
            assert not after.closing
            assert instruction.delay >= 0
        if isinstance(instruction, Load):
            assert record.models[instruction.model] is ModelPhase.LOADING
    launched = [i.browser_id for i in instructions if isinstance(i, Launch)]
    assert len(launched) == len(set(launched))


@given(
    st.lists(st.tuples(st.floats(0, 30), _STEPS), max_size=60),
    st.sampled_from(sorted(STRATEGIES)),
    st.sampled_from(Level),
)
def test_whatever_happens_the_state_stays_sound_and_replays(steps, strategy, level):
    story = Story(strategy=strategy, level=level)
    epochs_launched: set[tuple[str, int]] = set()
    for after, step in steps:
        before = story.state
        try:
            instructions = story.tell(_body(before, step), after)
        except IllegalTransition:
            assert story.state is before
            continue
        _check(before, story.state, instructions)
        for launch in instructions:
            if isinstance(launch, Launch):
                assert (launch.browser_id, launch.epoch) not in epochs_launched
                epochs_launched.add((launch.browser_id, launch.epoch))
    assert reduce(apply, story.events, PoolState()) == story.state
    half = len(story.events) // 2
    checkpoint = reduce(apply, story.events[:half], PoolState())
    assert reduce(apply, story.events[half:], checkpoint) == story.state


def test_browser_that_is_recycled_finishes_and_starts_anew_which_is_no_restart(serving):
    todo = serving.tell(BrowserRecycled("b", 0, "1000 operations"))
    assert todo == (Drain("b", 0),)
    assert serving.browser.phase is Phase.DRAINING
    todo = serving.tell(BrowserStopped("b"))
    assert todo == (Launch("b", CHROME, 1),)
    assert (serving.browser.phase, serving.browser.epoch) == (Phase.STARTING, 1)
    assert not serving.browser.recycling
    assert serving.browser.restarts == ()
    assert serving.ready(epoch=1) == (Load("b", 1, "m"),)


def test_death_while_a_browser_is_drained_to_be_recycled_is_the_end_of_its_drain(serving):
    serving.tell(BrowserRecycled("b", 0, "old"))
    assert serving.failed(0) == ()
    assert serving.tell(BrowserStopped("b")) == (Launch("b", CHROME, 1),)


def test_browser_that_nobody_wants_is_not_started_anew(serving):
    serving.tell(BrowserRecycled("b", 0, "old"))
    serving.tell(BrowserUnwanted("b"))
    assert serving.tell(BrowserStopped("b")) == ()
    assert serving.browser.phase is Phase.STOPPED


def test_only_a_browser_in_service_is_recycled(starting):
    assert starting.tell(BrowserRecycled("b", 0, "old")) == ()
    starting.ready()
    assert starting.tell(BrowserRecycled("b", 7, "old")) == ()
    assert starting.browser.phase is Phase.READY


def test_model_that_is_parked_is_unloaded_and_loaded_again_when_wanted(serving):
    assert serving.tell(ModelParked("m", "memory is short")) == (Unload("b", 0, "m"),)
    assert serving.state.parked == {"m": "digest"}
    assert serving.state.models == {}
    assert serving.tell(ModelParked("m", "again")) == ()
    assert serving.tell(ModelWanted("m", "digest")) == (Load("b", 0, "m"),)
    assert serving.state.parked == {}
    serving.tell(ModelParked("m", "memory is short"))
    serving.tell(ModelUnwanted("m"))
    assert serving.state.parked == {}
