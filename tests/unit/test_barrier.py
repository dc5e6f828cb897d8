"""The meeting point: closed while anybody rebuilds, however that ends."""

import asyncio

import pytest

from sharding.sequences.barrier import Barrier


async def passes(together: Barrier) -> bool:
    try:
        async with asyncio.timeout(0.01):
            await together.passable()
    except TimeoutError:
        return False
    return True


async def test_it_is_passable_while_nobody_rebuilds():
    assert await passes(Barrier())


async def test_all_wait_until_the_last_has_rebuilt():
    together = Barrier()
    with together.rebuilding():
        with together.rebuilding():
            assert not await passes(together)
        assert not await passes(together)
    assert await passes(together)


async def test_rebuilding_that_fails_lets_the_others_go_on():
    together = Barrier()
    with pytest.raises(OSError, match="lost"), together.rebuilding():
        raise OSError("lost")
    assert await passes(together)
