"""Names, placement and start of this project's actors on a Ray cluster.

A new supervisor finds actors by their names. This module must not know what they do.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.ray.connection import NAMESPACE, this_node
from actors.supervisor.records import SupervisorConfig

# Limits the browsers of a node: `ray start --resources='{"tabpool_browser": 4}'`.
BROWSER_RESOURCE = "tabpool_browser"


def start_actor(
    cls: type, name: str, *arguments: Any, max_restarts: int = 0, **options: Any
) -> Any:
    """A new actor of `cls`: named, detached, with `num_cpus=0`."""
    return (
        ray.remote(cls)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=max_restarts,
            num_cpus=0,
            **options,
        )
        .remote(*arguments)
    )


def where_browsers_go() -> dict[str, Any]:
    """Spread over the nodes; only over those with `tabpool_browser` resources, if any has."""
    options: dict[str, Any] = {"scheduling_strategy": "SPREAD"}
    if ray.cluster_resources().get(BROWSER_RESOURCE):  # type: ignore[no-untyped-call]
        options["resources"] = {BROWSER_RESOURCE: 1}
    return options


def on_this_node() -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(this_node(), soft=False)}


def supervisor_name(pool: str) -> str:
    return f"{pool}: supervisor"


def history_name(config: SupervisorConfig) -> str:
    return f"{config.name}: history ({config.run})"


def browser_name(config: SupervisorConfig, browser_id: str, epoch: int) -> str:
    """The name in Ray's dashboard, by which a new supervisor finds the actor."""
    return f"{config.name}: {browser_id} from epoch {epoch} ({config.run})"
