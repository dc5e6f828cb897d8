"""Every diff of docs/extending.md applies to the source, and what it adds works."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "extending.md"
PACKAGES = ("recovery", "sharding", "actors", "pool")
_BLOCK = re.compile(r"^```(diff|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES_MAX = 3  # a new file, its table, and the closed vocabulary where it has a name in the log


def sections() -> dict[str, dict[str, str]]:
    """By heading: its diff, and the check below it."""
    found = {}
    for section in DOCUMENT.read_text("utf-8").split("\n## ")[1:]:
        heading = section.splitlines()[0]
        found[heading] = dict(_BLOCK.findall(section))
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the packages, without what is only served to browsers."""
    copy = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("ort", "assets", "__pycache__")
        shutil.copytree(ROOT / package, copy / package, ignore=ignored)
    return copy


@pytest.mark.parametrize("heading", sections())
def test_what_the_document_adds_is_all_that_it_takes(heading, source, tmp_path):
    blocks = sections()[heading]
    assert set(blocks) == {"diff", "python"}
    touched = re.findall(r"^\+\+\+ b/(\S+)$", blocks["diff"], re.MULTILINE)
    new = re.findall(r"^--- /dev/null$", blocks["diff"], re.MULTILINE)
    assert len(touched) <= FILES_MAX
    assert len(new) <= 1
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    (tmp_path / "change.diff").write_text(blocks["diff"])
    applied = subprocess.run(
        ["git", "apply", "--recount", "--whitespace=nowarn", "change.diff"],
        cwd=tmp_path,
        env={"GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert applied.returncode == 0, applied.stderr
    checked = subprocess.run(
        [sys.executable, "-c", blocks["python"]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_everything_that_the_document_promises_is_there():
    assert list(sections()) == [
        "An operation",
        "A command",
        "An order of rungs",
        "A way to cut a model",
        "A fault",
        "A browser engine",
    ]
