"""What runs beside is waited for, and what it raised is told."""

from __future__ import annotations

import asyncio

from pool.background import BackgroundTasks


async def test_what_still_runs_is_waited_for_and_its_errors_are_returned():
    tasks, ended = BackgroundTasks(), []
    gate = asyncio.Event()

    async def end(error: Exception | None) -> None:
        await gate.wait()
        ended.append(error)
        if error is not None:
            raise error

    error = ValueError("it broke")
    tasks.start(end(None), "well")
    tasks.start(end(error), "badly")
    asyncio.get_running_loop().call_soon(gate.set)
    assert await tasks.finish() == [error]
    assert len(ended) == 2
    assert await tasks.finish() == []


async def test_what_was_cancelled_raised_nothing():
    tasks = BackgroundTasks()
    running = tasks.start(asyncio.sleep(60.0), "long")
    asyncio.get_running_loop().call_soon(running.cancel)
    assert await tasks.finish() == []
