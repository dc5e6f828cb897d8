import pickle
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.errors import IllegalTransition
from recovery.failures import Category
from recovery.kinds import BrowserType, Level, Strategy
from recovery.pool_state import (
    HISTORY_MAX,
    Body,
    BrowserFailed,
    BrowserReady,
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
    ModelPhase,
    ModelUnwanted,
    ModelWanted,
    Phase,
    PoolClosing,
    PoolOpened,
    PoolState,
    Stop,
    Unload,
    apply,
    decide,
)
from recovery.supervision import RestartLimit
from tests.fakes import FACTS, NUMERIC, failure

LIMIT = RestartLimit(restarts_max=2, period_seconds=60.0, delay_first_seconds=1.0)
CHROME = BrowserType.CHROME


class Story:
    """A state that events happen to, one second apart unless said otherwise."""

    def __init__(self, limit: RestartLimit = LIMIT) -> None:
        self.events: list[Event] = []
        self.state = PoolState()
        self.at = 0.0
        self.tell(PoolOpened("pool", Level.MEDIUM, Strategy.PROGRESSIVE, limit, term=1))

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
    (repair,) = serving.state.repairs
    assert (repair.from_epoch, repair.ready) == (0, None)
    assert serving.ready(epoch=1) == (Load("b", 1, "m"),)
    (repair,) = serving.state.repairs
    assert repair.ready - repair.began == 1.0


def test_browser_that_cannot_start_waits_longer_each_time(starting):
    assert starting.failed(0, Category.LAUNCH_FAILURE) == (Launch("b", CHROME, 1, delay=1.0),)
    assert starting.failed(1, Category.LAUNCH_FAILURE) == (Launch("b", CHROME, 2, delay=2.0),)


def test_too_many_restarts_give_the_browser_up_and_stop_it(serving):
    serving.failed(0)
    serving.failed(1)
    assert serving.failed(2) == (Stop("b", 2),)
    assert serving.browser.phase is Phase.GIVEN_UP
    assert serving.browser.models == {}


def test_restarts_long_ago_are_forgiven(serving):
    serving.failed(0)
    serving.failed(1)
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
    starting.tell(ModelFailed("b", 0, "m", why))
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
    for epoch in range(HISTORY_MAX + 5):
        story.failed(epoch)
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


# -- whatever happens, in whatever order -----------------------------------------------------------

_IDS = st.sampled_from(["a", "b"])
_MODELS = st.sampled_from(["m", "n"])
_EPOCHS = st.integers(-1, 0)  # the present one, or the one before
_STEPS = st.one_of(
    st.tuples(st.just("want"), _IDS),
    st.tuples(st.just("ready"), _IDS, _EPOCHS),
    st.tuples(st.just("fail"), _IDS, _EPOCHS, st.sampled_from(Category), st.booleans()),
    st.tuples(st.just("unwant"), _IDS),
    st.tuples(st.just("stop"), _IDS),
    st.tuples(st.just("model"), _MODELS),
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
        case "unwant", browser_id:
            return BrowserUnwanted(browser_id)
        case "stop", browser_id:
            return BrowserStopped(browser_id)
        case "model", model:
            return ModelWanted(model, f"digest of {model}")
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
            assert record.models.keys() == after.models.keys()
        loaded = {m for m, phase in record.models.items() if phase is ModelPhase.LOADED}
        assert record.numeric.keys() == loaded
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


@given(st.lists(st.tuples(st.floats(0, 30), _STEPS), max_size=60))
def test_whatever_happens_the_state_stays_sound_and_replays(steps):
    story = Story()
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
