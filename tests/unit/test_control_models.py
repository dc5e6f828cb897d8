"""What events make of models: who loads which, and who never will."""

import pytest

from recovery.control import (
    LOAD_AGAIN_SECONDS,
    BrowserWanted,
    Load,
    ModelFailed,
    ModelLoaded,
    ModelParked,
    ModelPhase,
    ModelUnwanted,
    ModelWanted,
    Phase,
    Unload,
)
from recovery.failures import Category
from tests.fakes import FACTS, NUMERIC, failure
from tests.stories import CHROME, Story, serving_story, starting_story


@pytest.fixture
def starting() -> Story:
    return starting_story()


@pytest.fixture
def serving() -> Story:
    """Browser b is ready, with model m loaded."""
    return serving_story()


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
