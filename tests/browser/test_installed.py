"""What a user gets: the built wheel away from the checkout, the README's example, the doctor."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recovery.kinds import BrowserType
from tests.browser.conftest import require

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built now and unpacked into a directory of its own."""
    built, site = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built)]
    subprocess.run(build, cwd=_ROOT, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(wheel)], check=True)
    return site


def run_away_from_checkout(site: Path, where: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *command], cwd=where, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_example_runs_from_the_wheel_and_prints_what_it_says(
    wheel_site: Path, tmp_path: Path
) -> None:
    require(BrowserType.CHROME)
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    said = re.search(r"prints\n\n```\n(.*?)```", text, re.DOTALL)
    assert code is not None
    assert said is not None
    where = run_away_from_checkout(
        wheel_site, tmp_path, "-c", "import pool, actors; print(pool.__file__, actors.__file__)"
    )
    assert where.count(str(wheel_site)) == 2, "the checkout was imported, not the wheel"
    script = tmp_path / "example.py"
    script.write_text(code.group(1))
    assert run_away_from_checkout(wheel_site, tmp_path, str(script)) == said.group(1)


def test_doctor_says_in_json_what_this_machine_has(wheel_site: Path, tmp_path: Path) -> None:
    require(BrowserType.CHROME)
    command = "from pool.commands.main import main; main()"
    said = json.loads(
        run_away_from_checkout(
            wheel_site, tmp_path, "-c", command, "doctor", "--json", "--browsers", "chrome,edge"
        )
    )
    chrome, edge = said["browsers"]
    assert said["can_run"] is True
    assert chrome["usable"]
    assert chrome["facts"]["wasm_simd"]
    assert chrome["facts"]["wasm_threads"]
    assert chrome["facts"]["version"]
    if not edge["usable"]:
        assert "Edge" in edge["remedy"]


def test_doctor_fails_when_no_browser_is_usable(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pool.commands.main", "doctor", "--browsers", "firefox"]
    nowhere = {**os.environ, "TABPOOL_FIREFOX": str(tmp_path / "firefox")}
    done = subprocess.run(command, env=nowhere, cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "apt-get install firefox-esr" in done.stdout
