"""The real supervisor, in a process that can be killed.

The only module of the simulator that looks inside a supervisor. It must not decide when one dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from actors.supervisor.supervisor import Supervisor
from tests.simulator.verdict import Verdict


class SimSupervisor(Supervisor):
    """The real one, looked at after every event."""

    def __init__(
        self,
        look: Callable[[SimSupervisor], None],
        verdict: Verdict,
        *arguments: Any,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.look = look
        self.verdict = verdict
        self.spawned: dict[asyncio.Task[None], None] = {}  # in their order, as no set has it

    @property
    def has_unlogged(self) -> bool:
        """Whether something was decided that the log, which is full, does not have yet."""
        return bool(self._unlogged)

    @property
    def happening(self) -> tuple[asyncio.Task[None], ...]:
        """Events on their way into log and state."""
        return tuple(self._happening)

    async def _announce(self) -> None:
        self.look(self)
        await super()._announce()

    def _spawn(self, work: Callable[[], Any], name: str) -> asyncio.Task[None]:
        task = super()._spawn(work, name)
        self.spawned[task] = None
        task.add_done_callback(self.spawned.pop)
        return task

    async def _guarded(self, work: Callable[[], Any], name: str) -> None:
        try:
            await super()._guarded(work, name)
        except Exception as error:
            self.verdict.violated(f"the supervisor's task {name} ended with {error!r}")


@dataclass
class Incarnation:
    """One life of the supervisor's process, and what it is asked meanwhile."""

    supervisor: SimSupervisor
    calls: dict[asyncio.Task[Any], None] = field(default_factory=dict)
    lives: bool = True
    open: bool = False  # whether clients may call

    def kill(self) -> None:
        self.lives = False
        # Events first: they would outlive whoever waits for them.
        for task in (*self.supervisor.happening, *self.calls, *self.supervisor.spawned):
            task.cancel()
