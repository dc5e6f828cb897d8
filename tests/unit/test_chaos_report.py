"""The figures of a chaos run, each computed by hand here; and that pictures are pictures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pool.chaos.records import (
    ChaosRun,
    FaultRecord,
    MemorySample,
    OpRecord,
    read_run,
    run_from_json,
)
from pool.chaos.report import (
    growth,
    markdown,
    share,
    spread,
    summary,
    table,
    verdict,
    write_report,
)
from recovery.errors import BadInput
from recovery.faults import Due, Fault, FaultKind, Injected, Intensity, Schedule

CRASH = Fault(FaultKind.TAB_CRASH, Intensity.SEVERE, "chrome-0")
HIDDEN = Fault(FaultKind.TAB_HIDDEN, Intensity.MILD, "firefox-0")


def op(number, **more):
    base = OpRecord(number, f"chaos-{number}", "text", "text", float(number), 0.1)
    told = {"success": True, "answers": 1, "engine": "chrome", "level_effective": "high", **more}
    return replace(base, **told)


def fault(number, what, **more):
    made = Injected(what, 100.0 + number, what.dose.what, what.target, 0, (7,))
    known = {"outcome": "happened", "engine": what.target.split("-")[0], "injected": made, **more}
    return FaultRecord(number, Due(10.0, what), **known)


def run(operations, faults=(), **more):
    schedule = Schedule(5, tuple(each.due for each in faults))
    settings = {"level": "high", "operations": str(len(operations))}
    return ChaosRun(
        5, 99.0, 12.0, settings, {"python": "3"}, {"chrome-0": "Chromium 1"}, schedule,
        tuple(operations), tuple(faults), **more,
    )  # fmt: skip


def failed_checks(account):
    return [words for words, kept in verdict(account) if not kept]


@pytest.mark.parametrize(
    ("of", "n", "low", "high"),
    # By the formula of Wilson (1927), as in Newcombe (1998), table I.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_wilsons(of, n, low, high):
    found = share(of, n)
    assert found.low == pytest.approx(low, abs=2e-4)
    assert found.high == pytest.approx(high, abs=2e-4)


def test_shares_and_spreads_of_nothing_say_so():
    assert str(share(0, 0)) == "-"
    assert spread([]) is spread([None]) is None
    assert spread([3.0, 1.0, None, 2.0]) == (3, 2.0, 3.0)
    assert str(share(10, 10)) == "10/10 = 100.0 % (72.2 to 100.0)"


def test_all_is_well():
    struck = op(1, recovered=True, seconds=2.0)
    crash = fault(
        0, CRASH, noticed=("crash",), noticed_ms=12.0, right=True, ladder=("2 MODERATE",),
        repair_seconds=1.5, struck=(1,),
    )  # fmt: skip
    account = run([op(0), struck, op(2)], [crash, fault(1, HIDDEN, right=True)])
    assert failed_checks(account) == []
    figures = summary(account)
    assert figures["operations"]["asked"] == figures["operations"]["answered"] == 3
    assert figures["operations"]["recovered"] == 1
    one = figures["by_fault"]["tab_crash"]
    assert one["right"] == {"of": 1, "n": 1, "low": pytest.approx(0.2065, abs=1e-3), "high": 1.0}
    assert one["noticed_ms"] == {"n": 1, "median": 12.0, "p95": 12.0}
    assert one["repair_seconds"] == {"n": 1, "median": 1.5, "p95": 1.5}
    assert one["ladders"] == {"2 MODERATE": 1}
    assert figures["by_model_and_engine"] == {"text chrome": "1/1 = 100.0 % (20.7 to 100.0)"}
    assert figures["by_fault"]["tab_hidden"]["right"]["n"] == 0


@pytest.mark.parametrize(
    ("operations", "faults", "more", "words"),
    [
        ([op(0, success=False, error="x")], [], {}, "0 answered"),
        ([op(0, wrong=True)], [], {}, "1 wrong"),
        ([op(0, answers=2)], [], {}, "1 answered twice"),
        ([op(0, simulated=True)], [], {}, "1 simulated"),
        ([op(0, answers=0, success=False)], [], {}, "1 lost"),
        ([op(0)], [], {"leaked": ("process 1",)}, "process 1"),
        ([op(0)], [], {"repaired": False}, "every browser"),
        ([op(0)], [fault(0, CRASH, right=False, noticed=("timeout",))], {}, "misdetected"),
        ([op(0)], [fault(0, CRASH, outcome="unseen", right=True)], {}, "0 of 1 faults"),
    ],
)
def test_each_promise_that_is_broken_is_said(operations, faults, more, words):
    broken = failed_checks(run(operations, faults, **more))
    assert len(broken) >= 1
    assert any(words in each for each in broken), broken


def test_a_wrong_or_simulated_answer_is_no_success():
    crash = fault(0, CRASH, noticed=("crash",), right=True, struck=(0, 1, 2, 3))
    account = run([op(0), op(1, wrong=True), op(2, simulated=True), op(3, success=False)], [crash])
    right = summary(account)["by_fault"]["tab_crash"]["right"]
    assert (right["of"], right["n"]) == (1, 4)


def test_operations_that_were_never_heard_of_are_lost():
    account = run([op(0)])
    assert summary(replace(account, settings={"operations": "3"}))["operations"]["lost"] == 2


def test_faults_that_did_not_happen_count_nowhere_and_are_listed():
    refused = FaultRecord(0, Due(1.0, CRASH), "refused", "its circuit is open")
    account = run([op(0)], [refused])
    figures = summary(account)
    assert figures["by_fault"] == {}
    assert figures["faults"] == {
        "refused": 1, "scheduled": 1, "made": 0, "noticed": 0, "noticed_as_what_they_are": 0,
        "noticed_otherwise": 0,
    }  # fmt: skip
    assert "its circuit is open" in markdown(account)


def samples(*sizes):
    return [
        MemorySample(100 * n, float(n), {"client": size, "supervisor": 100}) for n, size in sizes
    ]


def test_growth_is_from_after_warm_up_to_the_end():
    memory = samples((0, 50), *((n, 100) for n in range(1, 9)), (9, 110), (10, 110))
    found = growth(memory)
    assert found is not None
    assert found["client"] == {"before": 100, "after": 110, "growth": pytest.approx(0.1)}
    assert found["all"]["growth"] == pytest.approx(210 / 200 - 1)
    assert growth(memory[:5]) is None
    many = [op(n) for n in range(3)]
    assert any("5.0 %" in words for words in failed_checks(run(many, memory=tuple(memory))))


def test_a_run_comes_back_from_its_file(tmp_path):
    account = run([op(0)], [fault(0, CRASH, right=True, noticed=("crash",))])
    assert run_from_json(account.to_json()) == account
    with pytest.raises(BadInput, match="not the JSON of a chaos run"):
        run_from_json("{}")
    with pytest.raises(BadInput, match="can't be read"):
        read_run(tmp_path / "missing")


def test_the_report_is_written_with_pictures(tmp_path):
    crash = fault(
        0, CRASH, noticed=("crash",), noticed_ms=12.0, right=True, repair_seconds=1.0, struck=(0,)
    )
    memory = tuple(samples(*((n, 100) for n in range(11))))
    account = run([op(0), op(1, success=False)], [crash], memory=memory)
    written = write_report(account, tmp_path / "out")
    names = {path.name for path in written}
    assert {"run.json", "plan.json", "summary.json", "report.md"} < names
    pictures = [path for path in written if path.suffix == ".png"]
    assert len(pictures) == 5
    for path in pictures:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert 2_000 < len(data) < 200_000
        assert f"({path.name})" in (tmp_path / "out" / "report.md").read_text()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["seed"] == 5
    assert read_run(tmp_path / "out" / "run.json") == account


def test_a_run_without_anything_has_a_report_too(tmp_path):
    paths = write_report(run([]), tmp_path)
    assert [path.suffix for path in paths].count(".png") == 0
    assert "Too few operations" in (tmp_path / "report.md").read_text()


def test_cells_cannot_break_a_table():
    assert table(("a", "b"), [("x|y", "1\n2")])[2] == "| x\\|y | 1 2 |"
