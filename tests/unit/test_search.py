"""The exact search by itself, in ticks and bytes."""

import pytest

from recovery.errors import BadInput
from sharding.cutting import search as module
from sharding.cutting.partition import partition
from sharding.cutting.search import Search
from sharding.cutting.spans import Host
from tests.partitions import NO_ENDS, evenly, room_for


def test_too_many_different_browsers_are_refused_rather_than_searched_for_ever():
    hosts = [Host(f"b{at}", room_for(900 - at), 1 + at / 64) for at in range(32)]
    with pytest.raises(BadInput, match=r"are too many to search.*'browser_based'") as caught:
        partition(evenly(32), NO_ENDS, hosts, shards=16, strategy="optimal")
    assert caught.value.fields["got"] > caught.value.fields["expected"] == module.STATES_MAX
    assert partition(evenly(32), NO_ENDS, hosts, shards=16, strategy="browser_based")
    assert partition(evenly(32), NO_ENDS, hosts, shards=2, strategy="optimal")


def searched(**changes) -> Search:
    """Four layers of a byte and a tick each, for two hosts that are alike."""
    wanted = {
        "weights": range(5),
        "ticks": [range(5)] * 2,
        "rooms": [4, 4],
        "classes": [[0, 1]],
        "in_order": False,
        "shards": 2,
        "sizes": (1, 4),
    }
    return Search(**{**wanted, **changes})


def test_hosts_that_are_alike_are_one_state_however_many_are_taken():
    assert searched().states() == 3
    assert searched(classes=[[0], [1]]).states() == 4
    assert searched(classes=[[0], [1]], in_order=True).states() == 3


def test_best_cut_is_hosts_and_where_their_shards_end():
    assert searched().best() == ((0, 1), (2, 4))
    slow = searched(ticks=[range(0, 15, 3), range(5)], classes=[[0], [1]])
    assert slow.best() == ((0, 1), (1, 4))


def test_sizes_and_rooms_bound_every_shard():
    assert searched(sizes=(2, 2), rooms=[1, 4]).best() is None
    assert searched(rooms=[1, 4], classes=[[0], [1]], in_order=True).best() == ((0, 1), (1, 4))
    assert not searched(rooms=[1, 2], classes=[[0], [1]]).fits()
