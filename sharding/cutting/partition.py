"""Which browser gets which layers: contiguous cuts of a decoder, by measured time and memory.

Pure functions of what was measured. All strategies are one exact search: they differ in which host
may come next and how many layers a shard may have. A shard's time is that of its layers; hand-offs
between shards (about a millisecond each) are not counted, being the same for every cut into as many
shards. This module must not read a model, look at a clock, or ask a browser.
"""

from __future__ import annotations

from collections.abc import Sequence

from sharding.cutting.partition_checks import check_task
from sharding.cutting.partition_task import Task
from sharding.cutting.refusals import refusal
from sharding.cutting.spans import Ends, Host, Layer, Partition
from sharding.cutting.strategies import STRATEGY_RULES


def partition(
    layers: Sequence[Layer],
    ends: Ends,
    hosts: Sequence[Host],
    *,
    shards: int | None,
    strategy: str,
) -> Partition:
    """Cut `layers` into contiguous spans, each on a host of its own that can load it.

    - `layer_based`: equal counts of layers, differing by at most one.
    - `browser_based`: the hosts in the given order, one shard each; with `shards`, the first ones.
    - `optimal`: any cut.

    Within that, the slowest shard is as fast as can be, over all cuts and (but for
    `browser_based`) all assignments of hosts. Of equals, the one with the fewest seconds in all
    is taken, then the one with earlier hosts, then the most even. With `shards` None it is the
    fewest that fit (`browser_based`: as many as hosts). Equal input gives an equal answer.

    The search is exact, to a picosecond a layer. Above `HOSTS_EXACT` hosts a tie may go to a later
    but faster host, where layers take no time at all.

    Raises `BadInput`, saying what was expected and what was given: an unknown strategy, no layers
    or hosts or too many of them, two hosts of one name, a number that is negative, no number or out
    of range, `shards` below 1 or above the number of layers or hosts, layers that don't fit, and
    (only above `HOSTS_EXACT`) too many different hosts to search.
    """
    check_task(layers, ends, hosts, shards, strategy)
    shards = None if shards is None else int(shards)
    weights = [int(layer.bytes) for layer in layers]
    seconds = [float(layer.seconds) for layer in layers]
    # From here on the ends are part of their layers: the first shard always has layer 0.
    weights[0] += int(ends.embedding_bytes)
    weights[-1] += int(ends.head_bytes)
    seconds[0] += float(ends.embedding_seconds)
    seconds[-1] += float(ends.head_seconds)
    plain_hosts = tuple(
        Host(host.name, int(host.capacity_bytes), float(host.speed)) for host in hosts
    )
    task = Task(tuple(weights), tuple(seconds), ends, plain_hosts)

    rule = STRATEGY_RULES[strategy]
    counts = task.counts(rule, shards)
    for count in counts:
        if shards is None and not task.may_fit(count):
            continue  # so usually only one count has to be searched
        search = task.search(count, rule)
        search.check_states()
        if (found := search.best()) is not None:
            return task.result(found, rule.why(shards, count))
    raise refusal(task, rule, shards, counts)
