"""Charts of a chaos run, as PNG files. The only module that imports matplotlib, an optional extra.

This module must not compute figures: `report` does.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pool.chaos.records import ChaosRun
from recovery.errors import SetupError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 100
_WIDTH = 10.0  # inches
_GOOD, _BAD, _MARK = "#2a7f62", "#c0392b", "#34495e"
_NOTICE_GOAL_MS = 20.0
_ROWS = 8  # height of a chart without rows
_OUTCOMES = {"passed": _GOOD, "failed": _BAD, "impossible": "#cccccc", "simulated": "#e0a030"}


def draw_charts(
    run: ChaosRun, by_fault: Mapping[str, Mapping[str, Any]], folder: Path
) -> dict[str, str]:
    """Draw the charts that have data; returns file names by title. `by_fault` is that of
    `report.summary`.

    Raises `SetupError` if matplotlib is not installed, and `OSError`.
    """
    drawn: dict[str, str] = {}
    drawings: Sequence[tuple[str, str, int, Callable[[Axes], bool]]] = (
        (
            "Operations hit by a fault and answered correctly",
            "answered.png",
            max(len(by_fault), 3),
            partial(_answered, by_fault),
        ),
        ("Repair time", "repaired.png", max(len(by_fault), 3), partial(_repaired, run)),
        ("Detection time", "noticed.png", max(len(by_fault), 3), partial(_noticed, run)),
        ("Operations over time", "timeline.png", _ROWS, partial(_timeline, run)),
        ("Memory of the control plane", "memory.png", _ROWS, partial(_memory, run)),
    )
    for title, name, rows, draw in drawings:
        figure = _figure(_WIDTH, 1.6 + 0.3 * rows)
        axes = figure.add_subplot()
        if draw(axes):
            axes.set_title(title, loc="left", fontsize=11)
            axes.spines[["top", "right"]].set_visible(False)
            figure.savefig(folder / name)
            drawn[title] = name
    return drawn


def draw_grid(
    rows: Sequence[str], columns: Sequence[str], outcomes: Mapping[tuple[str, str], str], path: Path
) -> None:
    """Draw the outcome of each cell of a table as a coloured square, with a legend.

    Raises `SetupError` if matplotlib is not installed, and `OSError`.
    """
    figure = _figure(2.5 + 0.5 * len(columns), 2.6 + 0.3 * len(rows))
    axes = figure.add_subplot()
    for outcome, colour in _OUTCOMES.items():
        places = [
            (x, y)
            for y, row in enumerate(rows)
            for x, column in enumerate(columns)
            if outcomes.get((row, column)) == outcome
        ]
        if places:
            across, down = zip(*places, strict=True)
            axes.scatter(across, down, marker="s", s=160, color=colour, label=outcome)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.margins(0.08)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.legend(frameon=False, loc="outside upper center", ncols=len(_OUTCOMES))
    figure.savefig(path)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SetupError("charts need matplotlib: pip install 'tabpool[charts]'") from error
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _values(run: ChaosRun, value: Callable[[Any], float | None]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for fault in run.faults:
        number = value(fault)
        if fault.injected is not None and number is not None:
            found.setdefault(str(fault.due.fault.kind), []).append(max(number, 1e-3))
    return dict(sorted(found.items(), key=lambda item: -statistics.median(item[1])))


def _dots(axes: Axes, values: Mapping[str, Sequence[float]], label: str) -> bool:
    """Every value as a dot, the median as a bar, a row for each kind."""
    for row, (_, numbers) in enumerate(values.items()):
        axes.plot(numbers, [row] * len(numbers), "o", color=_MARK, alpha=0.45, markersize=5)
        axes.plot([statistics.median(numbers)], [row], "|", color=_BAD, markersize=18, mew=2.5)
    axes.set_yticks(
        range(len(values)), [f"{name} ({len(numbers)})" for name, numbers in values.items()]
    )
    axes.set_xscale("log")
    axes.set_xlabel(f"{label}; the bar is the median")
    axes.grid(axis="x", color="#dddddd")
    return bool(values)


def _answered(by_fault: Mapping[str, Mapping[str, Any]], axes: Axes) -> bool:
    rows = [(kind, one["right"]) for kind, one in by_fault.items() if one["right"]["n"]]
    for row, (_, right) in enumerate(rows):
        rate = 100 * right["of"] / right["n"]
        axes.barh(row, rate, color=_GOOD if right["of"] == right["n"] else _BAD, height=0.6)
        axes.plot([100 * right["low"], 100 * right["high"]], [row, row], color="black", lw=1.2)
    axes.set_yticks(
        range(len(rows)), [f"{kind} ({right['of']} of {right['n']})" for kind, right in rows]
    )
    axes.set_xlim(0, 101)
    axes.set_xlabel(
        "per cent of operations hit by a fault that were answered correctly; line: 95 % interval"
    )
    return bool(rows)


def _repaired(run: ChaosRun, axes: Axes) -> bool:
    values = _values(run, lambda fault: fault.repair_seconds)
    return _dots(axes, values, "seconds until the browser or its replacement was ready")


def _noticed(run: ChaosRun, axes: Axes) -> bool:
    values = _values(run, lambda fault: fault.noticed_ms)
    axes.axvline(_NOTICE_GOAL_MS, color=_GOOD, lw=1, ls="--")
    return _dots(axes, values, "milliseconds until detected (dashed: 20 ms)")


def _timeline(run: ChaosRun, axes: Axes) -> bool:
    for good, colour, size in ((True, _GOOD, 8), (False, _BAD, 30)):
        chosen = [op for op in run.operations if (op.success and not op.wrong) is good]
        at, took = [op.at for op in chosen], [max(op.seconds, 1e-3) for op in chosen]
        axes.scatter(
            at,
            took,
            s=size,
            color=colour,
            alpha=0.6,
            label="correct" if good else "failed or wrong",
        )
    for fault in run.faults:
        if fault.injected is not None:
            axes.axvline(fault.injected.at - run.began, color="#bbbbbb", lw=0.6, zorder=0)
    axes.set_yscale("log")
    axes.set_xlabel("seconds since the run began; grey lines are faults")
    axes.set_ylabel("duration of an operation in seconds")
    if any(not op.success or op.wrong for op in run.operations):
        axes.legend(frameon=False)
    return bool(run.operations)


def _memory(run: ChaosRun, axes: Axes) -> bool:
    names = sorted({name for sample in run.memory for name in sample.control})
    for name in names:
        points = [
            (s.operations, s.control[name] / 2**20) for s in run.memory if s.control.get(name)
        ]
        axes.plot(*zip(*points, strict=True), label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("operations")
    axes.set_ylabel("resident MiB")
    if names:
        axes.legend(frameon=False)
    return bool(names)
