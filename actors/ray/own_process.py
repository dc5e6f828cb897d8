"""What an actor may do about its own worker process: end it, call itself, ask whether it is new.

For use within an actor only. This module must not look at any other.
"""

from __future__ import annotations

import threading

import ray

_CLAIM_SECONDS = 60.0  # for a maker to give a new worker its first order


def end_this_actor() -> None:
    """End this worker process now; the actor is not restarted."""
    ray.kill(ray.get_runtime_context().current_actor)


def was_restarted() -> bool:
    if not ray.is_initialized():
        return False  # not in a worker at all
    context = ray.get_runtime_context()
    return bool(context.get_actor_id()) and bool(context.was_current_actor_reconstructed)


def call_myself(method: str) -> None:
    getattr(ray.get_runtime_context().current_actor, method).remote()


def end_unless_claimed(lease_seconds: float) -> threading.Timer:
    """End this worker if its maker dies before it gives the first order: then nobody knows it.

    On a busy machine that order may come much later than the lease would allow.
    """
    return end_in(max(2 * lease_seconds, _CLAIM_SECONDS))


def end_in(seconds: float) -> threading.Timer:
    """End this worker after `seconds`, unless the timer is cancelled before."""
    timer = threading.Timer(seconds, end_this_actor)
    timer.daemon = True
    timer.start()
    return timer
