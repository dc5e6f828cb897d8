"""The clocks of a simulation: a loop whose time jumps, and the wall clock of its supervisor.

This module must not wait for real time.
"""

from __future__ import annotations

import asyncio

from tests.fakes import VirtualTimeLoop
from tests.simulator.verdict import SimulationFailed

TURN_SECONDS = 1e-9  # that a turn of the loop takes: a clock that stands still rounds for ever
TURNS_MAX = 20_000  # of the loop in one millisecond: more is a busy wait


class Loop(VirtualTimeLoop):
    """Virtual time that notices when it has come to a stop."""

    def __init__(self) -> None:
        super().__init__()
        self._turns, self._moment = 0, -1.0

    def _run_once(self) -> None:
        super()._run_once()
        now = self.time()
        self._turns = self._turns + 1 if now - self._moment < 0.001 else 0
        if not self._turns:
            self._moment = now
        self._virtual += TURN_SECONDS
        if self._turns > TURNS_MAX:
            self._turns = 0
            raise SimulationFailed(f"busy waiting at {now:.3f} s")


class Clocks:
    """What time it is, in seconds since the simulation began."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ahead = 0.0  # of the supervisor's wall clock

    @property
    def now(self) -> float:
        return self._loop.time()

    def wall(self) -> float:
        """The supervisor's wall clock."""
        return self._loop.time() + self._ahead

    def step(self, seconds: float) -> None:
        """Set the supervisor's wall clock forward or back."""
        self._ahead += seconds
