"""The input and result of a partition: layers, hosts, spans.

Plain data, all of it picklable. This module must not know how a cut is found.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its time for one step, in seconds, and the bytes of its weights."""

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Ends:
    """The embedding in the first shard and the head in the last one.

    Where embedding and head are tied, each end needs the table, so count its bytes in both.
    (A single shard with both ends holds it once, and is overestimated by the table.)
    """

    embedding_bytes: int = 0
    embedding_seconds: float = 0.0
    head_bytes: int = 0
    head_seconds: float = 0.0


@dataclass(frozen=True)
class Host:
    """A browser. `capacity_bytes` is what it can hold at the peak, while a shard loads.

    `speed`: how many times as fast it is as the machine on which the layers were measured.
    """

    name: str
    capacity_bytes: int
    speed: float = 1.0


@dataclass(frozen=True)
class Span:
    """Layers `[start, end)`, counted from 0, on one host.

    `seconds` is its time for one step on that host, `bytes` its weights (`peak_bytes` of it is
    what loading takes). Both include the embedding or head, in the first and last span.
    """

    start: int
    end: int
    host: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Partition:
    """Spans in order of layers: one token takes `total_seconds`, a full pipeline gives one every
    `bottleneck_seconds`. `reason` is for people."""

    spans: tuple[Span, ...]
    bottleneck_seconds: float
    total_seconds: float
    reason: str


def shards_in_words(count: int) -> str:
    """For people."""
    return f"{count} shard{'s' * (count != 1)}"
