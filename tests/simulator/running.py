"""One simulation, from a plan to its outcome.

This module must not wait for real time or touch anything real.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from types import SimpleNamespace
from unittest import mock

import pool.execution.answering
import pool.routing
from recovery.kinds import Level
from recovery.supervision import RestartLimit
from tests.simulator.clocks import Loop
from tests.simulator.plans import BROWSERS, FaultPlan
from tests.simulator.story import Outcome, Story
from tests.simulator.verdict import SimulationFailed
from tests.simulator.world import LIMIT, World


def simulate(
    plan: FaultPlan,
    browsers: Mapping[str, int] = BROWSERS,
    level: Level = Level.MEDIUM,
    strategy: str = "progressive",
    operations: int = 150,
    concurrency: int = 9,
    seed: int | None = None,
    limit: RestartLimit = LIMIT,
) -> Outcome:
    """Run one simulation. Raises `SimulationFailed`, which says how to see it again.

    `seed` is of the operations' own chances, the plan's if not given.
    """
    seed = plan.seed if seed is None else seed
    worlds: list[World] = []

    async def whole() -> Outcome:
        world = World(plan, browsers, level, strategy, limit)
        worlds.append(world)
        story = asyncio.current_task()
        assert story is not None
        story.set_name("simulation")
        rng = random.Random(f"operations {seed}")
        telling = asyncio.create_task(Story(world).tell(operations, concurrency, rng), name="story")
        await asyncio.wait({telling, world.verdict.failed}, return_when=asyncio.FIRST_COMPLETED)
        if world.verdict.failed.done():
            telling.cancel()
            raise SimulationFailed(f"at {world.now:.3f} s: {world.verdict.failed.result()}")
        return telling.result()

    again = (
        f"simulate({plan!r}, browsers={dict(browsers)!r}, level={str(level)!r}, "
        f"strategy={str(strategy)!r}, operations={operations}, concurrency={concurrency}, "
        f"seed={seed}, limit={limit!r})"
    )
    try:
        with asyncio.Runner(loop_factory=Loop) as runner:
            loop = runner.get_loop()
            clock = SimpleNamespace(monotonic=loop.time, time=loop.time)
            with (
                mock.patch.object(pool.execution.answering, "time", clock),
                mock.patch.object(pool.routing, "time", clock),
            ):
                return runner.run(whole())
    except Exception as error:
        lines = worlds[0].store.lines if worlds else []
        raise SimulationFailed(
            f"seed {plan.seed}: {error if isinstance(error, SimulationFailed) else repr(error)}\n\n"
            "faults:\n  "
            + "\n  ".join(map(str, plan.faults))
            + f"\n\nthe last of {len(lines)} events:\n  "
            + "\n  ".join(line.decode()[:400] for line in lines[-12:])
            + f"\n\nagain: .venv/bin/python -m tests.simulator {plan.seed}  # if made by `case`, or"
            + f"\n  {again}\n"
        ) from error
