"""The simulator as a command: seeds or a saved schedule in, what came of them out.

This module must not simulate anything itself.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

from recovery.faults import read_schedule
from recovery.kinds import Level
from tests.simulator.plans import case
from tests.simulator.running import simulate
from tests.simulator.schedules import plan_of
from tests.simulator.verdict import SimulationFailed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Simulate the control plane.")
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--schedule", help="a plan.json of `tabpool chaos`, in place of a seed")
    parser.add_argument("--level", default="high", help="of the pool, with --schedule")
    parser.add_argument("count", type=int, nargs="?", default=1, help="of seeds, from that on")
    parser.add_argument("--show", action="store_true", help="print the events, too")
    options = parser.parse_args(arguments)
    if options.schedule:
        plan = plan_of(read_schedule(options.schedule))
        cases = [(plan.seed, {"plan": plan, "level": Level(options.level)})]
    else:
        seeds = itertools.islice(itertools.count(options.seed), options.count)
        cases = [(seed, case(seed)) for seed in seeds]
    failures = 0
    for seed, wanted in cases:
        try:
            outcome = simulate(**wanted)
        except SimulationFailed as error:
            failures += 1
            sys.stdout.write(f"{error}\n")
            continue
        if options.show:
            sys.stdout.write("".join(f"{line.decode()}\n" for line in outcome.log))
        sys.stdout.write(
            f"seed {seed}: {len(outcome.results)} operations, {outcome.recovered} recovered, "
            f"{outcome.failed} failed, {len(outcome.log)} events, {outcome.terms} terms, "
            f"{outcome.seconds:.0f} s; given up: {dict(outcome.given_up)}\n"
        )
    raise SystemExit(bool(failures))
