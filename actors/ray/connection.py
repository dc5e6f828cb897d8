"""The connection of this process to Ray: joined or started, shared by its pools, and closed.

A process has one at most. This module must not know of pools.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from typing import Any

import ray

from recovery.errors import SetupError

NAMESPACE = "tabpool"
# Ray keeps arguments and results up to this size in the call itself instead of its object
# store. Measured here for 602 KB each way: 5 ms instead of 13 ms.
_INLINE_BYTES = 4 << 20
# Ray runs its workers, and so their browsers, at niceness 15: beside eight busy processes that is a
# hundredth of a processor, and a supervisor does not answer within a minute.
_SYSTEM = {"max_direct_call_object_size": _INLINE_BYTES, "worker_niceness": 0}

# Ray has one connection per process, which several pools of the process share.
_connecting = threading.Lock()
_users = 0
_own = False  # whether this process started the cluster
_made = False  # whether the connection was made here, not by the application


@dataclass(frozen=True)
class RaySession:
    """A connection to Ray. `local`: this process started the cluster and will end it."""

    local: bool
    dashboard_url: str


def connect(address: str | None, dashboard: bool) -> RaySession:
    """Join the Ray cluster at `address`, or start one in this process when it is None.

    A connection that the process already has is used as it is. Raises `SetupError`.
    """
    with _connecting:
        return _connect(address, dashboard)


def _connect(address: str | None, dashboard: bool) -> RaySession:
    global _users, _own, _made
    if ray.is_initialized():
        _users += 1
        return RaySession(_own, "")
    # Both must be set before Ray starts: metrics would be exported twice (as counter and gauge).
    os.environ.setdefault("RAY_EXPORT_COUNTER_AS_GAUGE", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    own = address is None
    options: dict[str, Any] = {"_system_config": _SYSTEM} if own else {}
    try:
        context = ray.init(
            address="local" if own else address,
            namespace=NAMESPACE,
            include_dashboard=dashboard if own else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **options,
        )
    except Exception as error:  # a plain one if Ray's node takes over 30 s to start
        raise SetupError(
            f"Ray could not be reached or started ({error}). With `address=` given, check that "
            "the cluster runs (`ray status`) and that RAY_AUTH_TOKEN matches; without it, check "
            "free memory and /dev/shm, and that the machine is not too busy."
        ) from error
    _users, _own, _made = _users + 1, own, True
    url = context.dashboard_url
    return RaySession(own, f"http://{url}" if url else "")


def disconnect(session: RaySession) -> None:
    """Disconnect from Ray, if connected here; the last call stops a cluster started here.

    A process that stayed would be ended with the cluster, without a word.
    """
    global _users, _made
    with _connecting:
        _users = max(_users - 1, 0)
        if (session.local or _made) and not _users and ray.is_initialized():
            ray.shutdown()
            _made = False


def cluster_address() -> str:
    """The address by which other processes can join this process's Ray cluster."""
    return str(ray.get_runtime_context().gcs_address)


def this_node() -> str:
    """The id of the Ray node that this process is on."""
    return str(ray.get_runtime_context().get_node_id())
