"""The real supervisor, in a process that can be killed.

The only module of the simulator that looks inside a supervisor. It must not decide when one dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from actors.supervisor.changes import Changes
from actors.supervisor.supervisor import Supervisor
from actors.supervisor.tasks import Tasks
from tests.simulator.verdict import Verdict


class SimTasks(Tasks):
    """The real ones, and none may end with an error that nobody foresaw."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__()
        self._verdict = verdict
        self.spawned: dict[asyncio.Task[None], None] = {}  # in their order, as no set has it

    def spawn(self, work: Callable[[], Any], name: str) -> asyncio.Task[None]:
        task = super().spawn(work, name)
        self.spawned[task] = None
        task.add_done_callback(self.spawned.pop)
        return task

    async def guarded(self, work: Callable[[], Any], name: str) -> None:
        try:
            await super().guarded(work, name)
        except Exception as error:
            self._verdict.violated(f"the supervisor's task {name} ended with {error!r}")


class SimChanges(Changes):
    """The real ones; before anybody hears of one, `look` looks at it."""

    def __init__(self, term: int, look: Callable[[], None]) -> None:
        super().__init__(term)
        self._look = look

    async def announce(self) -> None:
        self._look()
        await super().announce()


class SimSupervisor(Supervisor):
    """The real one, looked at after every event."""

    def __init__(
        self,
        look: Callable[[SimSupervisor], None],
        verdict: Verdict,
        term: int,
        *arguments: Any,
        **options: Any,
    ) -> None:
        self._own = SimTasks(verdict)
        super().__init__(
            *arguments,
            term=term,
            tasks=self._own,
            changes=SimChanges(term, lambda: look(self)),
            **options,
        )

    @property
    def has_unlogged(self) -> bool:
        """Whether something was decided that the log, which is full, does not have yet."""
        return self._journal.is_behind

    @property
    def happening(self) -> tuple[asyncio.Task[None], ...]:
        """Events on their way into log and state."""
        return self._journal.under_way

    @property
    def spawned(self) -> tuple[asyncio.Task[None], ...]:
        return tuple(self._own.spawned)


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
