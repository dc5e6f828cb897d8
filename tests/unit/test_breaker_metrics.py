import json

import pytest

from recovery.errors import BrowserLost
from tests.circuits import Shell, crash


@pytest.fixture
def shell() -> Shell:
    return Shell()


def test_metrics_of_an_outage_and_its_recovery(shell):
    for _ in range(7):
        shell.execute(int)
    shell.trip()
    shell.repaired("restart")
    shell.clock.now += 10.0
    shell.execute(int)
    shell.clock.now += 5.0
    shell.execute(int)
    metrics = shell.get_metrics()
    assert metrics["current_state"] == "closed"
    assert (metrics["executions"], metrics["successes"], metrics["failures"]) == (12, 9, 3)
    assert metrics["success_rate"] == pytest.approx(0.75)
    assert metrics["enough_samples"]
    assert (metrics["circuit_open_count"], metrics["recoveries"]) == (1, 1)
    assert (metrics["recovery_rate"], metrics["avg_downtime_seconds"]) == (1.0, 15.0)
    assert metrics["current_downtime_seconds"] == 0.0
    (recovery,) = metrics["recovery_history"]
    assert recovery == {
        "timestamp": "2001-09-09T01:46:40+00:00",
        "recovery_method": "restart",
        "browser": "chrome-0",
        "downtime_seconds": 15.0,
    }
    json.dumps(metrics)


def test_metrics_while_open(shell):
    shell.trip()
    shell.clock.now += 4.0
    metrics = shell.get_metrics()
    assert (metrics["current_state"], metrics["seconds_in_state"]) == ("open", 4.0)
    assert (metrics["retry_after_seconds"], metrics["current_downtime_seconds"]) == (6.0, 4.0)
    assert (metrics["recovery_rate"], metrics["avg_downtime_seconds"]) == (0.0, 0.0)


def test_metrics_of_nothing_claim_nothing(shell):
    metrics = shell.get_metrics()
    assert (metrics["success_rate"], metrics["enough_samples"]) == (0.0, False)
    assert metrics["recovery_history"] == []


def test_success_rate_is_that_of_the_latest_calls():
    shell = Shell(metrics_window_size=4, failure_threshold=100)
    for _ in range(4):
        with pytest.raises(BrowserLost):
            shell.execute(crash)
    for _ in range(3):
        shell.execute(int)
    assert shell.get_metrics()["success_rate"] == 0.75


def test_history_of_recoveries_is_bounded():
    shell = Shell(recovery_history_max=2, success_threshold=1)
    for _ in range(5):
        shell.trip()
        shell.clock.now += 10.0
        shell.execute(int)
    metrics = shell.get_metrics()
    assert (metrics["recoveries"], len(metrics["recovery_history"])) == (5, 2)
