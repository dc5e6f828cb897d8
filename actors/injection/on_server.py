"""Faults of the server that a page talks to: connections dropped, out of reach, wrong bytes."""

from __future__ import annotations

import signal

from actors.injection.target import Hit, Injection
from recovery.faults import Intensity

_AWAY_SECONDS = {Intensity.MILD: 0.3, Intensity.MODERATE: 1.0, Intensity.SEVERE: 10.0}
_SOCKETS = {
    Intensity.MILD: ("control",),
    Intensity.MODERATE: ("data",),
    Intensity.SEVERE: ("control", "data"),
}
_SPOILT = {Intensity.MILD: "500", Intensity.MODERATE: "half", Intensity.SEVERE: "wrong"}


async def go_out_of_reach(it: Injection) -> Hit:
    seconds = _AWAY_SECONDS[it.intensity]
    it.target.server.stay_away(seconds)
    return Hit(seconds=seconds)


async def drop_sockets(it: Injection) -> Hit:
    it.target.server.drop(_SOCKETS[it.intensity])
    return Hit()


async def spoil_model_files(it: Injection) -> Hit:
    """The page is killed, and the next one gets a model file that is not what it should be."""
    it.target.server.spoil([_SPOILT[it.intensity]])
    return it.send(it.target.processes.pages(), signal.SIGKILL)
