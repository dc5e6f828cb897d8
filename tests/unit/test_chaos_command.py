"""`tabpool chaos` and `tabpool replay`: what they refuse before any browser is touched."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from pool.bundles import Bundle, described, write_bundle
from pool.chaos.matrix import Cell, MatrixPlan, judged, markdown, picture, summary_lines
from pool.chaos.workload import source_of
from pool.commands.chaos import chaos_again, parse_faults
from pool.commands.main import app
from recovery.errors import BadInput
from recovery.faults import FaultKind, Intensity
from recovery.kinds import Level
from tests.unit.test_chaos_report import CRASH, fault, op, run

RUNNER = CliRunner()


def test_faults_are_chosen_and_left_out():
    assert parse_faults("all") == list(FaultKind)
    assert FaultKind.WRONG_ANSWER not in parse_faults("all,-wrong_answer")
    assert parse_faults("tab_crash, full_disk,tab_crash") == [
        FaultKind.TAB_CRASH,
        FaultKind.FULL_DISK,
    ]
    for text in ("", "all,-no_such", "crash", "tab_crash,-tab_crash"):
        with pytest.raises(BadInput):
            parse_faults(text)


def test_the_list_tells_of_every_fault():
    done = RUNNER.invoke(app, ["chaos", "--list"])
    assert done.exit_code == 0
    for kind in FaultKind:
        assert kind in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--faults", "earthquake"], "earthquake"),
        (["--intensity", "wild"], "wild"),
        (["--ops", "0"], "at least 1"),
        (["--every", "0"], "over 0"),
        (["--browsers", "lynx=1"], "lynx"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--plan", "no/such/plan.json"], "can't be read"),
        (["--browsers", "safari=1", "--faults", "gpu_process_crash"], "applies to"),
        (["--matrix", "--models", "smell"], "smell"),
        (["--matrix", "--platforms", "cuda"], "cuda"),
    ],
)
def test_what_can_not_be_is_refused_at_once(arguments, words):
    done = RUNNER.invoke(app, ["chaos", *arguments])
    assert isinstance(done.exception, BadInput)
    assert words in str(done.exception)


def test_a_matrix_is_what_it_is_asked_for():
    kinds = tuple(FaultKind)
    quick = MatrixPlan(1, kinds=kinds, quick=True).checked()
    assert quick.browsers == ("chrome",)
    assert quick.models == ("text", "audio")
    assert len(quick.kinds) == 4
    full = MatrixPlan(1, kinds=kinds, intensities=tuple(Intensity), full=True).checked()
    assert len(full.browsers) * len(full.models) == 16
    assert full.intensities == tuple(Intensity)
    assert MatrixPlan(1, kinds=kinds, intensities=tuple(Intensity)).checked().intensities == (
        Intensity.MODERATE,
    )


def cell(**more):
    told = {"browser": "chrome", "model": "text", "platform": "wasm", **more}
    return Cell(failure="tab_crash (severe)", outcome="failed", **told)


def test_a_cell_passes_only_if_all_of_it_is_true():
    pair, high = (FaultKind.TAB_CRASH, Intensity.SEVERE), Level.HIGH
    good = fault(0, CRASH, noticed=("crash",), right=True, noticed_ms=9.0, repair_seconds=1.0)
    passed = judged(cell(), run([op(0), op(1)], [good]), pair, high)
    assert (passed.outcome, passed.answered, passed.noticed) == ("passed", 2, "crash")

    def outcome(operations, faults, **more):
        return judged(cell(), run(operations, faults, **more), pair, high)

    assert outcome([op(0, success=False)], [good]).outcome == "failed"
    assert outcome([op(0, wrong=True)], [good]).outcome == "failed"
    assert outcome([op(0)], [fault(0, CRASH, outcome="unseen")]).outcome == "failed"
    assert outcome([op(0)], [fault(0, CRASH, right=False)]).outcome == "failed"
    assert outcome([op(0)], [good], repaired=False).outcome == "failed"
    none = fault(0, CRASH, outcome="impossible", why="it has none")
    assert outcome([op(0)], [none]).outcome == "impossible"
    lies = (FaultKind.WRONG_ANSWER, Intensity.SEVERE)
    lied = run([op(0, wrong=True)], [good])
    assert judged(cell(), lied, lies, high).outcome == "passed", "`high` does not promise that"
    assert judged(cell(), lied, lies, Level.CRITICAL).outcome == "failed"


def test_the_matrix_says_what_failed_and_what_was_no_test():
    cells = [cell(why="it died"), Cell("edge", "text", "wasm", "none", "simulated", "native")]
    lines = summary_lines(cells)
    assert lines[0] == "1 failed, 1 simulated"
    assert "it died" in lines[1]
    assert "| edge | text | wasm | none | simulated |" in markdown(MatrixPlan(1), cells)


def test_the_matrix_is_drawn(tmp_path):
    cells = [cell(), Cell("edge", "text", "wasm", "none", "simulated"), cell(model="audio")]
    assert (tmp_path / picture(cells, tmp_path)).read_bytes().startswith(b"\x89PNG")


def test_a_bundle_is_described_before_anything_is_run(tmp_path):
    facts = {
        "format": 1,
        "why": "failed",
        "operation": {
            "op_id": "a", "model": "m", "op": "inference", "inputs": {"x": described([1.0])},
        },
        "result": {"error": "it died", "original_error": "crash"},
        "model": {"path": "m.onnx", "digest": "0" * 64},
        "pool": {"browsers": {"chrome": 1}, "level": "medium"},
    }  # fmt: skip
    path = write_bundle(Bundle(facts), tmp_path / "b.zip")
    done = RUNNER.invoke(app, ["replay", str(path), "--show"])
    assert done.exit_code == 0
    assert "it died" in done.output
    assert isinstance(RUNNER.invoke(app, ["replay", "missing.zip"]).exception, BadInput)
    with pytest.raises(BadInput, match="incomplete"):
        chaos_again(None, {"schedule": {"seed": 1, "faults": []}})


def test_models_are_words_or_paths(tmp_path):
    with pytest.raises(BadInput, match="text, audio"):
        source_of("poetry")
    (tmp_path / "my model.onnx").touch()
    assert source_of(str(tmp_path / "my model.onnx")).name == "my-model"
