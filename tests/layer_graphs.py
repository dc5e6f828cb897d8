"""Exported models as graphs, with what is found in them on the way to their layers."""

from functools import cache
from pathlib import Path

from sharding.cutting.attentions import (
    attention_anchors,
    attention_levels,
    cache_anchors,
    find_caches,
)
from sharding.cutting.graph import Graph, read_graph
from sharding.cutting.liveness import Live, find_live

DECODERS = Path(__file__).parent / "assets" / "decoders"


@cache
def graph_of(name: str) -> Graph:
    return read_graph(DECODERS / f"{name}.onnx")


@cache
def live_of(name: str) -> Live:
    return find_live(graph_of(name), tuple(find_caches(graph_of(name))))


@cache
def anchors_of(name: str) -> frozenset[int]:
    graph, live = graph_of(name), live_of(name)
    caches = tuple(find_caches(graph))
    return cache_anchors(graph, live, caches) if caches else attention_anchors(graph, live)


@cache
def levels_of(name: str) -> dict[int, int]:
    return attention_levels(live_of(name), anchors_of(name))
