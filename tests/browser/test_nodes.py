"""Browsers on two nodes, one of which is killed under load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recovery.kinds import BrowserType
from tests.browser.conftest import require

pytestmark = [pytest.mark.chaos, pytest.mark.cluster]


def test_death_of_a_node_at_high_costs_no_operation(tmp_path: Path) -> None:
    require(BrowserType.CHROME)
    command = [sys.executable, "-m", "tests.browser.node_death", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()  # Ray writes there, too
    seen = json.loads(next(line for line in lines if line.startswith('{"nodes"')))
    assert seen["nodes"] == 2
    assert seen["raylet_killed"]
    assert seen["noticed_as"][:1] == ["crash"]
    assert seen["answered"] == seen["right"] == seen["asked"]
    assert seen["texts"] == seen["texts_right"] > 1
    assert seen["texts_struck"] >= 1
    assert seen["noticed_seconds"] <= seen["lease"] + 1.0
