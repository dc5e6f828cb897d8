"""The register of workers."""

from actors.messages import LaunchReport
from actors.supervisor.hosts import Hosts
from tests.fakes import FACTS, FakeHost, failure


async def test_port_and_report_outlive_the_worker():
    hosts, host = Hosts(), FakeHost("b-0")
    report = LaunchReport(FACTS, 4000, {}, {}, "")
    assert (hosts.port("b-0"), hosts.report("b-0")) == (0, None)
    hosts.put("b-0", host)
    hosts.launched("b-0", report)
    hosts.remove("b-0")
    assert "b-0" not in hosts
    assert hosts.get("b-0") is None
    assert (hosts.port("b-0"), hosts.report("b-0")) == (4000, report)
    assert hosts.reports() == {"b-0": report}


def test_death_of_a_worker_is_remembered_until_another_has_launched():
    hosts, death = Hosts(), failure()
    hosts.died("b-0", death)
    assert hosts.death("b-0") is death
    hosts.launched("b-0", LaunchReport(FACTS, 4000, {}, {}, ""))
    assert hosts.death("b-0") is None


def test_worker_that_is_not_there_can_be_removed():
    Hosts().remove("b-0")
