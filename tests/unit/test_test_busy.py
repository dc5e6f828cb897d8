"""`make test-busy`: what it counts, how it ends, and that nothing of it goes on afterwards."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import psutil
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/test-busy"
WAIT_SECONDS = 120  # pytest starts twice in most of these, beside whatever else the machine does


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("busy_script", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look themselves up
    loader.exec_module(module)
    return module


def report(folder: Path, *cases: str) -> Path:
    path = folder / "report.xml"
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


def case(name: str, inner: str = "", classname: str = "tests.browser.test_pool") -> str:
    file = "tests/browser/test_pool.py"
    return f'<testcase classname="{classname}" file="{file}" name="{name}">{inner}</testcase>'


def test_a_report_says_of_each_test_what_came_of_it(script, tmp_path):
    path = report(
        tmp_path,
        case("test_a"),
        case("test_b[chrome]", '<failure message="too late&#10;more">text</failure>'),
        case("test_c", '<skipped message="no firefox"/>'),
        case("test_d", '<error message="left behind"/>'),
        case("test_e", classname="tests.browser.test_pool.TestPool"),
        '<testcase classname="" name="tests.browser.test_x"><error message="x"/></testcase>',
    )

    assert script.outcomes(path) == {
        "tests/browser/test_pool.py::test_a": ("passed", ""),
        "tests/browser/test_pool.py::test_b[chrome]": ("failed", "too late"),
        "tests/browser/test_pool.py::test_c": ("skipped", "no firefox"),
        "tests/browser/test_pool.py::test_d": ("failed", "left behind"),
        "tests/browser/test_pool.py::TestPool::test_e": ("passed", ""),
        "tests.browser.test_x": ("failed", "x"),
    }


def test_a_test_that_fails_and_then_fails_in_its_teardown_failed_once(script, tmp_path):
    tallies: dict = {}
    path = report(tmp_path, case("t", '<failure message="a"/>'), case("t", '<error message="b"/>'))

    script.add_round(tallies, 1, path)

    (tally,) = tallies.values()
    assert (tally.passed, tally.failed, tally.reasons) == (0, 1, ["round 1: a"])


def test_rounds_are_summed_up_with_what_failed_most_at_the_end(script, tmp_path):
    tallies: dict = {}
    failure = '<failure message="too late"/>'
    for number, bad in enumerate((True, False, True), 1):
        cases = (case("flaky", failure if bad else ""), case("good"), case("not", "<skipped/>"))
        script.add_round(tallies, number, report(tmp_path, *cases))

    good, skipped, flaky, first, second, last = script.summary(tallies)

    assert good.split() == ["3/3", "tests/browser/test_pool.py::good"]
    assert skipped.split() == ["skipped", "tests/browser/test_pool.py::not"]
    assert flaky.split() == ["1/3", "FAILED", "tests/browser/test_pool.py::flaky"]
    assert [first.strip(), second.strip()] == ["round 1: too late", "round 3: too late"]
    assert last == "3 tests, 1 of them failed at least once"


# --- As a process ----------------------------------------------------------


def start(folder: Path, tests: str, *arguments: str) -> subprocess.Popen[str]:
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_fake.py").write_text(tests)
    options = ["--times", "2", "--busy", "1", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *options, str(folder / "test_fake.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Without the plugins, of which the fake tests need none, pytest starts much faster.
        env={**os.environ, "TMPDIR": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )


def test_tests_that_always_pass_end_with_0(tmp_path):
    process = start(tmp_path, "def test_a(): pass\ndef test_b(): assert False", "-k", "test_a")
    output, _ = process.communicate(timeout=WAIT_SECONDS)

    assert process.returncode == 0, output
    assert "== 2 of 2 rounds beside 1 busy processes\n" in output
    assert "2/2" in output.splitlines()[-2]
    assert output.endswith("1 tests, 0 of them failed at least once\n")


def test_a_test_that_fails_in_one_round_ends_with_1(tmp_path):
    flaky = f"""
from pathlib import Path
def test_once():
    seen = Path({str(tmp_path / "seen")!r})
    if not seen.exists():
        seen.touch()
        raise AssertionError("the first time")
"""
    process = start(tmp_path, flaky)
    output, _ = process.communicate(timeout=WAIT_SECONDS)

    assert process.returncode == 1, output
    count, reason, last = output.splitlines()[-3:]
    assert count.split()[:2] == ["1/2", "FAILED"]
    assert "round 1: AssertionError: the first time" in reason
    assert last == "1 tests, 1 of them failed at least once"


def test_a_round_that_runs_no_test_is_not_repeated_and_ends_with_1(tmp_path):
    process = start(tmp_path, "def test_a(): pass", "-k", "nothing_of_the_kind")
    output, _ = process.communicate(timeout=WAIT_SECONDS)

    assert process.returncode == 1, output
    assert "round 2" not in output
    assert output.endswith("round 1: pytest ended with 5\n")


def test_a_round_that_dies_without_a_report_ends_with_1(tmp_path):
    process = start(tmp_path, "import os\ndef test_a(): os._exit(0)")
    output, _ = process.communicate(timeout=WAIT_SECONDS)

    assert process.returncode == 1, output
    assert output.endswith("round 1: pytest ended with 0\nround 2: pytest ended with 0\n")


@pytest.mark.parametrize("options", [("--times", "0"), ("--busy", "-1"), ("--busy", "many")])
def test_wrong_usage_ends_with_2(options):
    command = [sys.executable, str(SCRIPT), *options]
    assert subprocess.run(command, capture_output=True, timeout=WAIT_SECONDS).returncode == 2


def started_children(process: subprocess.Popen[str], folder: Path) -> list[psutil.Process]:
    """The spinner and pytest, once its test runs."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (folder / "runs").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    return children


def sleeping_test(folder: Path) -> str:
    return f"""
import time
from pathlib import Path
import pytest
@pytest.fixture
def browser():
    yield
    Path({str(folder / "closed")!r}).touch()
def test_a(browser):
    Path({str(folder / "runs")!r}).touch()
    time.sleep(200)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_ends_its_children_and_pytest_tears_down(tmp_path, number):
    process = start(tmp_path, sleeping_test(tmp_path))
    children = started_children(process, tmp_path)

    process.send_signal(number)
    output, _ = process.communicate(timeout=WAIT_SECONDS)

    assert process.returncode == 128 + number, output
    assert "== 1 of 2 rounds" in output
    assert (tmp_path / "closed").exists()
    assert not any(child.is_running() for child in children)


def test_spinners_end_with_a_parent_that_was_killed(tmp_path):
    process = start(tmp_path, sleeping_test(tmp_path))
    children = started_children(process, tmp_path)
    spinners = [child for child in children if "pytest" not in child.cmdline()]
    try:
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(spinners, timeout=10)
        assert len(spinners) == 1
        assert not alive
    finally:  # pytest is told by nobody.
        for child in children:
            if child.is_running():
                child.kill()
        process.stdout.close()
