"""The README's example as another user, who is not root, and behind proxies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.driver.profiles import templates_root
from pool.models.bundled import minilm_folder

ROOT = Path(__file__).parents[2]
NOBODY = 65534
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
EXAMPLE = """
import json, sys
from pool import BrowserPool
with BrowserPool({"chrome": 1}, backend="wasm", dashboard=False).blocking() as pool:
    pool.load("minilm", sys.argv[1])
    result = pool.run_with_recovery("minilm", "embed", {"text": ["A cat sat on the mat."]})
    facts = pool.state().launches["chrome-0"].facts
    print(json.dumps([result.outputs["embedding"].shape, facts.private_network]))
"""
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root can act as another user"
)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tabpool-nobody-", dir="/tmp") as name:
        made = Path(name)
        os.chown(made, NOBODY, NOBODY)
        yield made


def environment(folder: Path) -> dict[str, str]:
    packages = sysconfig.get_paths()["purelib"]
    proxies = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    return {
        "PATH": os.defpath,
        "PYTHONPATH": f"{ROOT}:{packages}",
        "HOME": str(folder),  # where Ray keeps its token
        "TMPDIR": str(folder),
        "TABPOOL_STATE": str(folder / "state"),
        "TABPOOL_CACHE": str(folder / "cache"),
        **dict.fromkeys(proxies, "http://127.0.0.1:9"),
    }


def test_example_runs_as_another_user_behind_a_proxy(folder: Path) -> None:
    version = ".".join(map(str, sys.version_info[:2]))
    python = shutil.which(f"python{version}", path="/usr/local/bin:/usr/bin")
    if python is None:
        pytest.skip(f"no Python {version} that every user can run")
    settings = environment(folder)
    try:
        command = [*AS_NOBODY, python, "-c", "import pool"]
        subprocess.run(command, env=settings, check=True, capture_output=True, timeout=60)
    except subprocess.CalledProcessError:
        pytest.skip("another user can't read this checkout and its packages")
    _copy_for_nobody(minilm_folder(), folder / "model")
    if templates_root().is_dir():  # else each is made anew: some 15 s
        _copy_for_nobody(templates_root(), folder / "cache" / "profiles")
    command = [*AS_NOBODY, python, "-c", EXAMPLE, str(folder / "model")]
    done = subprocess.run(
        command, env=settings, check=False, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] in ("[[1, 384], true]", "[[1, 384], false]")


def _copy_for_nobody(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True)
    for path in (target.parent, target, *target.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
