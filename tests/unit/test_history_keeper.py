"""What can be asked of a pool's history, and by which words."""

import asyncio
from functools import partial

import pytest

from actors.history import HistoryKeeper
from recovery.errors import BadInput
from recovery.history.config import HistoryConfig
from recovery.history.questions import QUESTIONS
from recovery.history.schema import VIEWS
from recovery.history.store import HistoryStore
from recovery.history.tracker import PerformanceHistoryTracker
from tests.histories import OPERATION, STEP, many


@pytest.fixture
async def keeper(tmp_path):
    made = HistoryKeeper(tmp_path / "a.duckdb", tmp_path / "b.duckdb")
    assert await made.open()
    yield made
    await made.close()


def test_every_view_is_a_question_and_every_other_question_a_method():
    assert set(VIEWS) < set(QUESTIONS)
    for question in set(QUESTIONS) - set(VIEWS):
        assert callable(getattr(PerformanceHistoryTracker, question))


async def test_every_question_is_answered_from_what_was_just_added(keeper):
    keeper.add([*many(5, STEP), *many(5, OPERATION)])
    options = {
        "recommend_browser": {"model_type": "text"},
        "rung_outcomes": {"fingerprint": "f"},
    }
    for question in QUESTIONS:
        found = await keeper.ask(question, **options.get(question, {}))
        assert found is not None, question
    assert (await keeper.ask("strategy_scores", error_type="crash"))[0]["samples"] == 5


async def test_unknown_question_is_refused_with_those_that_there_are(keeper):
    for question in ("record", "view", "nothing", "operations"):
        with pytest.raises(BadInput, match=r"history answers .*strategy_scores"):
            await keeper.ask(question)


async def test_limits_of_a_pool_reach_its_store(tmp_path):
    make = partial(HistoryStore, config=HistoryConfig(answer_rows_max=30))
    keeper = HistoryKeeper(tmp_path / "a.duckdb", tmp_path / "b.duckdb", make)
    await keeper.open()
    try:
        keeper.add(many(40, STEP))
        await asyncio.sleep(0)
        with pytest.raises(BadInput, match="more than 30 rows"):
            await keeper.ask("recovery_performance")
        assert len(await keeper.ask("recovery_performance", limit=30)) == 30
    finally:
        await keeper.close()


@pytest.mark.parametrize("options", [{"rows_max": 0}, {"threads": "1"}, {"buffer_max": True}])
def test_limit_that_is_none_is_refused(options):
    with pytest.raises(BadInput, match=next(iter(options))):
        HistoryConfig(**options)
