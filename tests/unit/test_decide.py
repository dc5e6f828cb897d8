"""What each event makes of the state, and that whatever happens leaves it sound."""

import pickle
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.control import (
    COMING,
    HISTORY_MAX,
    Body,
    BrowserFailed,
    BrowserReady,
    BrowserReconnected,
    BrowserRecycled,
    BrowserStopped,
    BrowserUnwanted,
    BrowserWanted,
    Drain,
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
    PoolState,
    Stop,
    apply,
)
from recovery.errors import IllegalTransition
from recovery.failures import Category
from recovery.kinds import Level
from recovery.placement import Placing
from recovery.plan import STRATEGIES
from tests.fakes import FACTS, NUMERIC, failure
from tests.stories import (
    CHROME,
    LIMIT,
    OUT_OF_TOUCH,
    Story,
    serving_story,
    starting_story,
)


@pytest.fixture
def starting() -> Story:
    return starting_story()


@pytest.fixture
def serving() -> Story:
    """Browser b is ready, with model m loaded."""
    return serving_story()


def test_the_pool_opens_with_what_it_was_configured_to():
    state = Story().state
    assert (state.name, state.level, state.limit, state.term) == ("pool", Level.MEDIUM, LIMIT, 1)


def test_wanted_browser_is_launched_as_epoch_0():
    story = Story()
    assert story.tell(BrowserWanted("b", CHROME)) == (Launch("b", CHROME, 0),)
    assert story.browser.phase is Phase.STARTING


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
