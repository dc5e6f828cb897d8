"""Every retry policy of the project, as tenacity arguments, written once.

A policy says when to stop and how long to wait; the caller adds what to retry on. Restarts of
browsers are not here: they are decided event by event in `recovery.control.decide`.
"""

from __future__ import annotations

from typing import Any

from tenacity import (
    stop_after_attempt,
    stop_after_delay,
    stop_never,
    wait_exponential,
    wait_fixed,
)

# A driver that was just started opens its port within some 20 to 200 ms.
DRIVER_ANSWERS: dict[str, Any] = {
    "stop": stop_after_delay(15),
    "wait": wait_fixed(0.01),
    "reraise": True,
}

# A slot's port may be held for a moment by the browser that is being replaced.
PORT_FREES: dict[str, Any] = {
    "stop": stop_after_attempt(20),
    "wait": wait_exponential(multiplier=0.01, max=0.5),
    "reraise": True,
}

# Warming a template takes another browser some 10 s; a launch has a time limit of its own.
TEMPLATE_FREES: dict[str, Any] = {
    "stop": stop_after_delay(120),
    "wait": wait_fixed(0.1),
    "reraise": True,
}

# Ray restarts a dead supervisor, which has read its log within some 3 to 6 s.
SUPERVISOR_RETURNS: dict[str, Any] = {
    "stop": stop_after_delay(20),
    "wait": wait_fixed(0.2),
    "reraise": True,
}

# A "forget" for a page whose queue is full, or that is disconnected, is sent again a little later.
SEQUENCE_FORGOTTEN: dict[str, Any] = {
    "stop": stop_after_attempt(8),
    "wait": wait_exponential(multiplier=0.02, max=2.0),
}

# A long-running order is sent again whenever the supervisor restarts; the sender has its own limit.
SUPERVISOR_MAY_TAKE_LONG: dict[str, Any] = {**SUPERVISOR_RETURNS, "stop": stop_never}
