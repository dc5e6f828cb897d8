"""The version of the table, and those who wait for a newer one."""

import asyncio

from actors.supervisor.changes import Changes
from tests.fakes import eventually


async def test_every_change_makes_a_newer_version():
    changes = Changes(1)
    before = changes.version
    await changes.announce()
    assert changes.version == before + 1


def test_a_later_term_is_newer_than_any_change_of_the_one_before():
    assert Changes(2).version > Changes(1).version + 1_000_000_000


async def test_condition_is_asked_again_after_each_change():
    changes, values = Changes(1), [False, False, True]
    waiting = asyncio.create_task(changes.until(lambda: values.pop(0)))
    await eventually(lambda: len(values) == 2)
    await changes.announce()
    await eventually(lambda: len(values) == 1)
    assert not waiting.done()
    await changes.announce()
    await waiting


async def test_what_holds_already_is_not_waited_for():
    await Changes(1).until(lambda: True)
