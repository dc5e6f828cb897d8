"""The error when no cut fits: names the layer that no host can hold, or the missing memory.

It also names a number of shards or a strategy that would fit. This module must not decide that
nothing fits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from recovery.errors import BadInput
from sharding.cutting.partition_task import Task
from sharding.cutting.spans import shards_in_words
from sharding.cutting.strategies import STRATEGY_RULES, Strategy
from sharding.models.load_memory import LOAD_OVERHEAD_BYTES, PEAK_FACTOR, peak_bytes, room

_MIB = 1 << 20
_HOSTS_SHOWN = 8  # in an error


def refusal(task: Task, strategy: Strategy, shards: int | None, counts: Sequence[int]) -> BadInput:
    """Names the layer that no host can hold, or how much memory the hosts lack."""
    return _layer_too_large(task) or _memory_too_small(task, strategy, shards, counts)


def _layer_too_large(task: Task) -> BadInput | None:
    host = max(task.hosts, key=lambda host: host.capacity_bytes)
    layer = max(range(len(task.weights)), key=lambda layer: task.weights[layer])
    needed = peak_bytes(task.weights[layer])
    if task.weights[layer] <= room(host.capacity_bytes):
        return None
    name = f"layer {layer}"
    if layer == 0 and task.ends.embedding_bytes:
        name += " with the embedding"
    if layer == len(task.weights) - 1 and task.ends.head_bytes:
        name += " with the head"
    return BadInput(
        f"{name} takes {_mib(needed)} "
        f"while it loads, and the largest host, {host.name}, has {_mib(host.capacity_bytes)}. "
        "Add a browser with more memory, or use a model with smaller weights (int8 or q4).",
        expected=host.capacity_bytes,
        got=needed,
    )


def _memory_too_small(
    task: Task, strategy: Strategy, shards: int | None, counts: Sequence[int]
) -> BadInput:
    enough = -(-peak_bytes(sum(task.weights)) // _MIB)  # on each host: anything fits
    lacking = bisect_left(
        range(enough),
        True,
        key=lambda mib: any(task.with_more(mib * _MIB).fits(n, strategy) for n in counts),
    )
    shown = [f"{host.name} {_mib(host.capacity_bytes)}" for host in task.hosts[:_HOSTS_SHOWN]]
    if len(task.hosts) > len(shown):
        shown.append(f"and {len(task.hosts) - len(shown)} others")
    count = "any number of shards" if len(counts) > 1 else shards_in_words(counts[0])
    return BadInput(
        f"{_mib(sum(task.weights))} of weights don't fit ({strategy.name}, {count}). Loading takes "
        f"{PEAK_FACTOR:g} times a shard's bytes and {_mib(LOAD_OVERHEAD_BYTES)}. The hosts "
        f"have: {', '.join(shown)}; {lacking} MiB more on each would be enough. "
        f"{_remedy(task, strategy, shards)}",
        expected=f"{lacking} MiB more on each host",
        got=[host.capacity_bytes for host in task.hosts],
    )


def _remedy(task: Task, strategy: Strategy, shards: int | None) -> str:
    most = min(len(task.weights), len(task.hosts))
    tried_all = shards is None and not strategy.in_order
    remedies = []
    for other in dict.fromkeys((strategy, STRATEGY_RULES["optimal"])):
        if other == strategy and tried_all:
            continue
        fewest = next((n for n in range(1, most + 1) if task.fits(n, other)), None)
        if fewest is not None:
            remedies.append(f"strategy={other.name!r}, shards={fewest}")
    if remedies:
        return f"It fits with {' or with '.join(remedies)}."
    return "Add browsers or memory, or use a model with smaller weights (int8 or q4)."


def _mib(size: int) -> str:
    return f"{size / _MIB:,.0f} MiB"
