"""`tabpool generate`, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pool.models.bundled import kjv_llama_folder
from recovery.errors import SetupError
from recovery.kinds import BrowserType
from tests.browser.conftest import require

pytestmark = pytest.mark.chaos


def test_text_goes_on_when_the_browser_of_a_stage_is_killed(tmp_path: Path) -> None:
    try:
        kjv_llama_folder()
    except SetupError as error:
        pytest.skip(str(error))
    for kind in (BrowserType.CHROME, BrowserType.FIREFOX):
        require(kind)
    options = "--browsers chrome=1,firefox=1 --shards 2 --max-new-tokens 16 --ignore-eos --kill 6"
    command = [sys.executable, "-m", "pool.commands.main", "generate", "--json", *options.split()]
    run = subprocess.run(
        command,
        env={**os.environ, "TABPOOL_STATE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert said["success"]
    assert len(said["tokens"]) == 16
    assert said["text"]
    assert [stage["layers"] for stage in said["stages"]] == [[0, 4], [4, 8]]
    assert said["killed"]["after"] == 6
    assert said["rebuilt"] >= 1
    dead = f"{said['killed']['browser_id']}#0"
    assert dead not in said["stages"][said["killed"]["stage"]]["browsers"]
