"""The form of every benchmark's report, its command line, and its statistics.

`{name, machine, versions, figures: {KEY: {value, unit, baseline, ratio, goal, met}}}`. A ratio
comes from one run with both sides interleaved. A goal that is not met is printed as not met.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from pool.doctor import machine as versions


@dataclass(frozen=True)
class Figure:
    """One measured number. `goal` is in words, `met` None where there is no goal."""

    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None


@dataclass
class Report:
    """A benchmark's figures, in the order in which they were added."""

    name: str
    figures: dict[str, Figure] = field(default_factory=dict)

    def add(
        self,
        key: str,
        value: float,
        unit: str,
        *,
        baseline: float | None = None,
        ratio: float | None = None,
        goal: str = "",
        met: bool | None = None,
    ) -> None:
        self.figures[key] = Figure(value, unit, baseline, ratio, goal, met)

    def as_json(self) -> str:
        machine = {
            "cpu_count": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "platform": platform.platform(),
        }
        content = {
            "name": self.name,
            "machine": machine,
            "versions": {k: v for k, v in versions().items() if k != "executable"},
            "figures": {key: asdict(figure) for key, figure in self.figures.items()},
        }
        return json.dumps(content, indent=2)

    def show(self, console: Console) -> None:
        table = Table(title=f"benchmark {self.name}")
        for column in ("figure", "value", "baseline", "ratio", "goal", ""):
            table.add_column(column)
        for key, figure in self.figures.items():
            verdict = {True: "[green]met[/green]", False: "[red]NOT MET[/red]", None: ""}
            table.add_row(
                key,
                f"{_number(figure.value)} {figure.unit}",
                _number(figure.baseline),
                _number(figure.ratio),
                figure.goal,
                verdict[figure.met],
            )
        console.print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def quantile(values: Sequence[float], q: float) -> float:
    """The `q`-quantile (0 to 1), nearest rank."""
    ordered = sorted(values)
    return ordered[max(math.ceil(q * len(ordered)) - 1, 0)]


def run(name: str, measure: Callable[[Report, bool, Console], None]) -> int:
    """Parse the command line, measure, show and save."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="run fewer repeats")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the report there")
    options = parser.parse_args()
    console = Console(stderr=True)
    report = Report(name)
    measure(report, options.quick, console)
    report.show(Console())
    if options.json:
        options.json.write_text(report.as_json() + "\n", encoding="utf-8")
    return 0
