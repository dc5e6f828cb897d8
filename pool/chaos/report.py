"""The report of a chaos run: checks, figures and tables.

Pure except `write_report`. This module must not draw (`charts` does) nor run anything.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pool.chaos import charts
from pool.chaos.records import ChaosRun, FaultRecord, MemorySample, OpRecord
from recovery.errors import SetupError

_Z = 1.96  # of a 95 % interval
_MEMORY_OPERATIONS_MIN = 200  # below, growth is not significant
_GROWTH_MAX = 0.05
_ROWS_MAX = 50
_CHART_FOLDER_NOTE = "For charts, install matplotlib: `pip install 'tabpool[charts]'`."

# Recovery rates claimed by the documents that the project is based on, in per cent; not measured.
CLAIMED_BY_ENGINE = {"chrome": 92.5, "firefox": 94.2, "edge": 91.8, "safari": 78.3}
CLAIMED_BY_MODEL = {
    "text": {"chrome": 91.2, "firefox": 88.5, "edge": 96.8, "safari": 79.2},
    "vision": {"chrome": 95.7, "firefox": 87.3, "edge": 88.4, "safari": 80.1},
    "audio": {"chrome": 87.4, "firefox": 98.2, "edge": 84.1, "safari": 75.6},
    "multimodal": {"chrome": 93.8, "firefox": 85.4, "edge": 87.2, "safari": 74.5},
}
CLAIMED_BY_FAILURE = {
    "launch_failure": 89.7,
    "connection_failure": 94.2,
    "timeout": 96.5,
    "crash": 92.1,
    "resource_exhaustion": 87.3,
    "gpu_error": 85.8,
    "api_error": 83.4,
    "internal_error": 90.2,
}


class Share(NamedTuple):
    """`of` out of `n`, with Wilson's 95 % interval."""

    of: int
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        if not self.n:
            return "-"
        return (
            f"{self.of}/{self.n} = {100 * self.of / self.n:.1f} % "
            f"({100 * self.low:.1f} to {100 * self.high:.1f})"
        )


def share(of: int, n: int) -> Share:
    """Wilson's score interval, which is also valid where all or none succeed."""
    if not n:
        return Share(0, 0, 0.0, 1.0)
    rate, square = of / n, _Z * _Z
    middle = (rate + square / (2 * n)) / (1 + square / n)
    half = _Z * math.sqrt(rate * (1 - rate) / n + square / (4 * n * n)) / (1 + square / n)
    return Share(of, n, max(middle - half, 0.0), min(middle + half, 1.0))


class Spread(NamedTuple):
    """Median and 95th percentile of `n` values."""

    n: int
    median: float
    p95: float


def spread(values: Iterable[float | None]) -> Spread | None:
    """None if there are no values."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    return Spread(len(known), statistics.median(known), known[math.ceil(0.95 * len(known)) - 1])


def answered_right(op: OpRecord) -> bool:
    """Whether a browser answered it correctly; simulated answers don't count."""
    return op.success and not op.wrong and not op.simulated


def lost(run: ChaosRun) -> int:
    """Requested operations without any result: neither answer, failure nor refusal."""
    requested = int(run.settings.get("operations", len(run.operations)))
    silent = sum(not op.answers and not op.refused for op in run.operations)
    return silent + max(requested - len(run.operations), 0)


def summary(run: ChaosRun) -> dict[str, Any]:
    """All figures of a run, as plain data."""
    operations, faults = run.operations, run.faults
    happened = [fault for fault in faults if fault.injected is not None]
    return {
        "operations": {
            "asked": len(operations),
            "answered": sum(op.success for op in operations),
            "recovered": sum(op.recovered for op in operations),
            "failed": sum(not op.success and not op.refused for op in operations),
            "refused": sum(op.refused for op in operations),
            "wrong": sum(op.wrong for op in operations),
            "simulated": sum(op.simulated for op in operations),
            "lost": lost(run),
            "answered_twice": sum(op.answers > 1 for op in operations),
            "right": share(sum(map(answered_right, operations)), len(operations))._asdict(),
        },
        "faults": {
            **dict(Counter(fault.outcome for fault in faults)),
            "scheduled": len(run.schedule.faults),
            "made": len(happened),
            "noticed": sum(bool(fault.noticed) for fault in happened),
            "noticed_as_what_they_are": sum(fault.right is True for fault in happened),
            "noticed_otherwise": sum(fault.right is False for fault in happened),
        },
        "by_fault": _by(run, lambda fault: str(fault.due.fault.kind)),
        "by_engine": _by(run, lambda fault: fault.engine or "supervisor"),
        "by_failure": _by(run, lambda fault: fault.noticed[-1] if fault.noticed else "unnoticed"),
        "by_model_and_engine": {
            f"{model} {engine}": str(one)
            for (model, engine), one in sorted(by_model_and_engine(run).items())
        },
        "level": run.settings.get("level", ""),
        "levels_effective": dict(Counter(op.level_effective for op in operations)),
        "memory": growth(run.memory),
        "leaked": list(run.leaked),
        "seconds": run.seconds,
        "seed": run.seed,
    }


def _by(run: ChaosRun, key: Callable[[FaultRecord], str]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[FaultRecord]] = {}
    for fault in run.faults:
        if fault.injected is not None:
            groups.setdefault(key(fault), []).append(fault)
    return {name: _figures(run, group) for name, group in sorted(groups.items())}


def _figures(run: ChaosRun, faults: Sequence[FaultRecord]) -> dict[str, Any]:
    ops = {op.number: op for op in run.operations}
    struck = [ops[number] for fault in faults for number in fault.struck if number in ops]
    noticed = spread(fault.noticed_ms for fault in faults)
    repair = spread(fault.repair_seconds for fault in faults)
    slow = spread(op.seconds for op in struck)
    ladders = Counter(" > ".join(fault.ladder) for fault in faults if fault.ladder)
    return {
        "faults": len(faults),
        "happened": sum(fault.outcome == "happened" for fault in faults),
        "right": share(sum(map(answered_right, struck)), len(struck))._asdict(),
        "noticed_ms": noticed._asdict() if noticed else None,
        "repair_seconds": repair._asdict() if repair else None,
        "struck_seconds": slow._asdict() if slow else None,
        "noticed_as": dict(Counter(f.noticed[0] for f in faults if f.noticed)),
        "ladders": dict(ladders.most_common()),
    }


def by_model_and_engine(run: ChaosRun) -> dict[tuple[str, str], Share]:
    """Operations that lost an attempt to a fault and were answered correctly, by the model's type
    and the engine hit by the fault."""
    ops = {op.number: op for op in run.operations}
    cells: dict[tuple[str, str], list[bool]] = {}
    for fault in run.faults:
        for number in fault.struck:
            if number in ops and fault.engine:
                cell = cells.setdefault((ops[number].model_type, fault.engine), [])
                cell.append(answered_right(ops[number]))
    return {key: share(sum(cell), len(cell)) for key, cell in cells.items()}


def growth(memory: Sequence[MemorySample]) -> dict[str, Any] | None:
    """Growth of resident memory after warm-up, in total and by process; None: too few samples.

    From the median of the samples between 10 and 20 % of the operations to that of the last 10 %.
    A process that was restarted meanwhile counts only in the total.
    """
    if len(memory) < 10:
        return None
    last = memory[-1].operations
    early = [sample for sample in memory if 0.1 * last <= sample.operations <= 0.2 * last]
    late = [sample for sample in memory if sample.operations >= 0.9 * last]
    if not early or not late or last < _MEMORY_OPERATIONS_MIN:
        return None

    def bytes_of(samples: Sequence[MemorySample], name: str) -> float:
        values = [
            sum(sample.control.values()) if not name else sample.control.get(name, 0)
            for sample in samples
            if all(sample.control.values())
        ]
        return statistics.median(values) if values else 0.0

    found: dict[str, Any] = {}
    for name in ("", *memory[0].control):
        before, after = bytes_of(early, name), bytes_of(late, name)
        if before:
            found[name or "all"] = {
                "before": before,
                "after": after,
                "growth": after / before - 1,
            }
    return found or None


def verdict(run: ChaosRun) -> list[tuple[str, bool]]:
    """The checks, in words, and whether each passes."""
    total = summary(run)["operations"]
    misdetected = [fault for fault in run.faults if fault.right is False]
    unseen = [fault for fault in run.faults if fault.outcome == "unseen"]
    checks = [
        (
            (
                f"{total['asked']} operations requested, {total['answered']} answered, "
                f"{total['recovered']} of them after a fault"
            ),
            total["answered"] == total["asked"] - total["refused"],
        ),
        (f"{total['wrong']} wrong", not total["wrong"]),
        (f"{total['lost']} lost", not total["lost"]),
        (f"{total['answered_twice']} answered twice", not total["answered_twice"]),
        (f"{total['simulated']} simulated", not total["simulated"]),
        ("every browser repaired or replaced at the end", run.repaired),
        (
            "no leaked processes, profiles or ports"
            if not run.leaked
            else f"leaked: {', '.join(run.leaked)}",
            not run.leaked,
        ),
        (
            (
                f"{len(run.faults) - len(unseen)} of {len(run.faults)} faults confirmed by other "
                "sources than the injector, refused or impossible"
            ),
            not unseen,
        ),
        (
            "every fault detected as the right category"
            if not misdetected
            else f"misdetected: {', '.join(str(f.due.fault) for f in misdetected[:5])}",
            not misdetected,
        ),
    ]
    grown = growth(run.memory)
    if grown is not None:
        by = grown["all"]["growth"]
        words = f"the control plane's memory grew by {100 * by:.1f} % after warm-up (limit: 5)"
        checks.append((words, by < _GROWTH_MAX))
    return checks


def write_report(run: ChaosRun, folder: Path) -> list[Path]:
    """Write run.json, plan.json, summary.json, charts and report.md. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = summary(run)
    written = {
        "run.json": run.to_json(),
        "plan.json": run.schedule.to_json(),
        "summary.json": json.dumps(figures, indent=1),
    }
    drawn: Mapping[str, str] = {}
    note = ""
    try:
        drawn = charts.draw_charts(run, figures["by_fault"], folder)
    except SetupError:
        note = _CHART_FOLDER_NOTE
    written["report.md"] = markdown(run, drawn, note)
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in (*written, *drawn.values())]


# -- words -----------------------------------------------------------------------------------------


def markdown(run: ChaosRun, drawn: Mapping[str, str] | None = None, note: str = "") -> str:
    """The report as Markdown. `drawn`: file names of charts by their titles."""
    drawn, figures = drawn or {}, summary(run)
    settings = ", ".join(f"{name} {value}" for name, value in run.settings.items())
    lines = [
        "# Chaos report",
        "",
        *(f"- {'ok' if holds else '**FAILED**'}: {words}" for words, holds in verdict(run)),
        "",
        (
            f"Seed {run.seed}, {run.seconds:.0f} s: {settings}. The faults are in `plan.json`; "
            "`tabpool chaos --plan plan.json` with the same options repeats them."
        ),
        "",
        (
            f"Browsers: {', '.join(sorted(set(run.browsers.values())))}. Versions: "
            f"{', '.join(f'{n} {v}' for n, v in run.versions.items() if n != 'executable')}."
        ),
        "",
        (
            f"All operations answered correctly: {_share(figures['operations']['right'])}, with a "
            "95 % interval."
        ),
        "",
    ]
    if note:
        lines += [note, ""]
    for title, name in drawn.items():
        lines += [f"![{title}]({name})", ""]
    lines += ["## By fault", "", *_fault_table(figures["by_fault"]), ""]
    lines += ["## By engine", "", *_engine_table(figures["by_engine"]), ""]
    lines += ["## By detected category", "", *_failure_table(figures["by_failure"]), ""]
    lines += ["## By model and engine", "", *_model_table(by_model_and_engine(run)), ""]
    lines += ["## Memory of the control plane", "", *_memory_table(figures["memory"]), ""]
    lines += _odd_faults(run.faults)
    lines += [f"- {note}" for note in run.notes]
    return "\n".join(lines).rstrip() + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _share(plain: Mapping[str, Any]) -> str:
    return str(Share(**plain))


def _pair(plain: Mapping[str, Any] | None, digits: int) -> str:
    if plain is None:
        return "-"
    return f"{plain['median']:.{digits}f} / {plain['p95']:.{digits}f} ({plain['n']})"


def _fault_table(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    head = (
        "fault",
        "injected",
        "confirmed",
        "first detected as",
        "detected after, ms: median / p95 (n)",
        "repaired after, s: median / p95 (n)",
        "operations hit and answered correctly",
        "most frequent rungs",
    )
    rows = [
        (
            name,
            one["faults"],
            one["happened"],
            ", ".join(f"{what} {n}" for what, n in one["noticed_as"].items()) or "-",
            _pair(one["noticed_ms"], 0),
            _pair(one["repair_seconds"], 1),
            _share(one["right"]),
            next(iter(one["ladders"]), "-"),
        )
        for name, one in groups.items()
    ]
    return table(head, rows)


def _engine_table(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    head = (
        "engine",
        "faults",
        "detected after, ms: median / p95 (n)",
        "repaired after, s: median / p95 (n)",
        "operations hit and answered correctly",
        "claimed by the source documents, not measured",
    )
    rows = [
        (
            name,
            one["faults"],
            _pair(one["noticed_ms"], 0),
            _pair(one["repair_seconds"], 1),
            _share(one["right"]),
            f"{CLAIMED_BY_ENGINE[name]} %" if name in CLAIMED_BY_ENGINE else "-",
        )
        for name, one in groups.items()
    ]
    return table(head, rows)


def _failure_table(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    head = (
        "last detected as",
        "faults",
        "operations hit and answered correctly",
        "claimed by the source documents, not measured",
    )
    rows = [
        (
            name,
            one["faults"],
            _share(one["right"]),
            f"{CLAIMED_BY_FAILURE[name]} %" if name in CLAIMED_BY_FAILURE else "-",
        )
        for name, one in groups.items()
    ]
    return table(head, rows)


def _model_table(cells: Mapping[tuple[str, str], Share]) -> list[str]:
    head = ("model", "engine", "operations hit and answered correctly", "claimed, not measured")
    rows = []
    for (model, engine), one in sorted(cells.items()):
        claimed = CLAIMED_BY_MODEL.get(model, {}).get(engine)
        rows.append((model, engine, one, "-" if claimed is None else f"{claimed} %"))
    return table(head, rows)


def _memory_table(grown: Mapping[str, Any] | None) -> list[str]:
    if grown is None:
        return ["Too few operations."]
    rows = [
        (
            name,
            f"{one['before'] / 2**20:.1f}",
            f"{one['after'] / 2**20:.1f}",
            f"{100 * one['growth']:+.1f} %",
        )
        for name, one in grown.items()
    ]
    return table(("process", "MiB after warm-up", "MiB at the end", "growth"), rows)


def _odd_faults(faults: Sequence[FaultRecord]) -> list[str]:
    odd = [fault for fault in faults if fault.outcome != "happened" or fault.right is False]
    if not odd:
        return []
    rows = [
        (
            fault.number + 1,
            fault.due.fault,
            fault.outcome,
            fault.why or (f"detected as {', '.join(fault.noticed) or 'nothing'}"),
        )
        for fault in odd[:_ROWS_MAX]
    ]
    more = [f"{len(odd) - _ROWS_MAX} more."] if len(odd) > _ROWS_MAX else []
    head = ("fault", "what", "outcome", "why")
    return [
        "## Faults that did not happen, or were detected as another category",
        "",
        *table(head, rows),
        "",
        *more,
    ]
