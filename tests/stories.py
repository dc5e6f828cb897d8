"""Stories of a pool for the tests of `recovery.control`: events told one after the other.

Pure, like what they test. This module must not assert anything.
"""

from __future__ import annotations

from recovery.control import (
    Body,
    BrowserFailed,
    BrowserReady,
    BrowserWanted,
    Event,
    Instruction,
    ModelLoaded,
    ModelWanted,
    PoolOpened,
    PoolState,
    decide,
)
from recovery.failures import Category, Scope
from recovery.kinds import BrowserType, Level, ModelType
from recovery.plan import STRATEGIES
from recovery.supervision import RestartLimit
from tests.fakes import FACTS, NUMERIC, failure

LIMIT = RestartLimit(restarts_max=2, period_seconds=60.0, delay_first_seconds=1.0)
CHROME = BrowserType.CHROME
OUT_OF_TOUCH = failure(Category.CONNECTION_FAILURE, scope=Scope.PAGE)


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


def starting_story() -> Story:
    story = Story()
    story.tell(BrowserWanted("b", CHROME))
    return story


def serving_story() -> Story:
    """Browser b is ready, with model m loaded."""
    story = starting_story()
    story.ready()
    story.tell(ModelWanted("m", "digest"))
    story.tell(ModelLoaded("b", 0, "m", NUMERIC))
    return story


def serving_with(**options) -> Story:
    story = Story(**options)
    story.tell(BrowserWanted("b", CHROME))
    story.ready()
    story.tell(ModelWanted("m", "digest", ModelType.TEXT))
    story.tell(ModelLoaded("b", 0, "m", NUMERIC))
    return story
