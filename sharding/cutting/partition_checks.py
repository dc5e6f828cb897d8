"""Validation of a partition's arguments before the search: strategy, numbers, bounds.

This module must not search, nor know what fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

from recovery.errors import BadInput
from sharding.cutting.spans import Ends, Host, Layer, shards_in_words
from sharding.cutting.strategies import STRATEGIES, STRATEGY_RULES

LAYERS_MAX = 512
HOSTS_MAX = 1000

_SECONDS_MAX = 86_400.0
_SPEEDS = (1e-6, 1e6)
_BYTES_MAX = 1 << 63
_COMPONENTS_CUT_BY = "ModelShardingManager"  # what splits encoder from decoder


def check_task(
    layers: Sequence[Layer],
    ends: Ends,
    hosts: Sequence[Host],
    shards: int | None,
    strategy: str,
) -> None:
    """Raises `BadInput` for invalid arguments, saying what was expected and what was given."""
    if strategy == "component_based":
        raise BadInput(
            f"component_based cuts between models, see {_COMPONENTS_CUT_BY}; here one model is cut "
            f"between its layers, with strategy {' or '.join(map(repr, STRATEGIES))}.",
            expected=list(STRATEGIES),
            got=strategy,
        )
    if strategy not in STRATEGIES:
        raise BadInput(
            f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}.",
            expected=list(STRATEGIES),
            got=strategy,
        )
    _check_length("layers", len(layers), LAYERS_MAX, "Give each layer's time and bytes.")
    _check_length("hosts", len(hosts), HOSTS_MAX, "Give the browsers that are ready.")
    for at, layer in enumerate(layers):
        _check_seconds(f"layers[{at}].seconds", layer.seconds)
        _check_bytes(f"layers[{at}].bytes", layer.bytes)
    _check_seconds("ends.embedding_seconds", ends.embedding_seconds)
    _check_seconds("ends.head_seconds", ends.head_seconds)
    _check_bytes("ends.embedding_bytes", ends.embedding_bytes)
    _check_bytes("ends.head_bytes", ends.head_bytes)
    for at, host in enumerate(hosts):
        _check_bytes(f"hosts[{at}].capacity_bytes", host.capacity_bytes)
        _check_number(f"hosts[{at}].speed", host.speed, *_SPEEDS, "1.0 where it is unknown")
    names = [host.name for host in hosts]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadInput(
            f"two hosts are called {twice!r}: a browser takes one shard, so name each once.",
            expected="different names",
            got=names,
        )
    _check_shards(len(layers), len(hosts), shards, strategy)


def _check_shards(layers: int, hosts: int, shards: int | None, strategy: str) -> None:
    if shards is not None and (not _is_whole(shards) or shards < 1):
        raise BadInput(
            f"shards: expected a whole number from 1, or None for the fewest that fit, "
            f"got {shards!r}.",
            expected=[1, min(layers, hosts)],
            got=shards,
        )
    wanted = shards
    if wanted is None and STRATEGY_RULES[strategy].in_order:
        wanted = hosts
    if wanted is None:
        return
    if wanted > layers:
        what = "one for each host" if shards is None else "as requested"
        raise BadInput(
            f"{shards_in_words(wanted)} ({what}) are more than the {layers} layers: each needs at "
            f"least one layer, so pass shards={min(layers, hosts)} or less.",
            expected=[1, min(layers, hosts)],
            got=wanted,
        )
    if wanted > hosts:
        raise BadInput(
            f"{shards_in_words(wanted)} are more than the {hosts} hosts: each needs a browser of "
            f"its own, so add {wanted - hosts} browsers or pass shards={hosts} or less.",
            expected=[1, hosts],
            got=wanted,
        )


def _check_length(name: str, length: int, most: int, remedy: str) -> None:
    if not 1 <= length <= most:
        raise BadInput(
            f"{name}: expected from 1 to {most} of them, got {length}. {remedy}",
            expected=[1, most],
            got=length,
        )


def _check_seconds(name: str, value: float) -> None:
    _check_number(name, value, 0.0, _SECONDS_MAX, "what was measured, in seconds")


def _check_bytes(name: str, value: int) -> None:
    if not _is_whole(value):
        raise BadInput(
            f"{name}: expected a whole number of bytes, got {value!r}.",
            expected=[0, _BYTES_MAX],
            got=value,
        )
    _check_number(name, value, 0, _BYTES_MAX, "what was counted, in bytes")


def _check_number(name: str, value: object, low: float, high: float, meaning: str) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not low <= float(value) <= high:  # type: ignore[arg-type]
        raise BadInput(
            f"{name}: expected a number from {low:g} to {high:g} ({meaning}), got {value!r}.",
            expected=[low, high],
            got=value,
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
