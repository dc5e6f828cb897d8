"""One task of cutting: which hosts are searched, and what comes of the search."""

import pytest
from hypothesis import given

from recovery.errors import BadInput
from sharding.cutting import partition_task as module
from sharding.cutting.partition_task import Task
from sharding.cutting.spans import Ends, Host
from sharding.cutting.strategies import STRATEGY_RULES
from sharding.models.load_memory import room
from tests.partitions import MIB, cases, cut, hosts_for, quickly, room_for

LAYERS, ORDER, ANY = (STRATEGY_RULES[n] for n in ("layer_based", "browser_based", "optimal"))


def task(hosts: list[Host], layers: int = 4) -> Task:
    return Task((10 * MIB,) * layers, (1.0,) * layers, Ends(), tuple(hosts))


def test_hosts_that_are_alike_are_one_class_unless_they_come_in_order():
    hosts = [*hosts_for(40, 40), Host("b2", room_for(40), 2.0)]
    assert task(hosts).search(2, ANY).classes == [[0, 1], [2]]
    assert task(hosts).search(2, ORDER).classes == [[0], [1]]
    assert task(hosts).search(2, LAYERS).sizes == (2, 2)


def test_of_many_hosts_those_that_can_never_be_needed_are_left_out():
    many = hosts_for(*range(51, 39, -1))  # the earlier, the larger
    assert task(many).search(1, ANY).classes == [[0]]
    assert task(many).search(2, ANY).classes == [[0], [1]]
    few = many[:10]
    assert len(task(few).search(1, ANY).classes) == len(few)


def test_memory_of_all_hosts_together_is_the_first_question():
    assert task(hosts_for(20, 20)).may_fit(2)
    assert not task(hosts_for(20, 19)).may_fit(2)
    assert not task(hosts_for(20, 20)).fits(1, ANY)
    more = task(hosts_for(20, 19)).with_more(2 * MIB)
    assert [room(host.capacity_bytes) // MIB for host in more.hosts] == [21, 20]
    assert more.fits(2, ANY)


@quickly
@given(case=cases(seconds_min=1))
def test_hosts_left_out_of_a_large_pool_are_never_missed(case):
    fewest = case.fewest("optimal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HOSTS_EXACT", 0)
        if fewest is None:
            with pytest.raises(BadInput):
                case.run("optimal")
        else:
            assert cut(case.run("optimal")) == case.best("optimal", fewest)
