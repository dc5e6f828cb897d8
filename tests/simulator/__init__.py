"""The whole control plane in one process, on a clock that jumps, under faults drawn from a seed.

Real are the supervisor, each client's routing and the answering loop; browsers are fake, the log is
in memory and outlives its supervisor. After every event that is applied, and again at the end, what
must always hold is checked. A seed says everything: the same one gives the same story, and

    .venv/bin/python -m tests.simulator 17 --show

tells the story of seed 17 again.

`plans` says what goes wrong and `faults` does it; `hosts`, `log` and `process` (with `supervisor`)
are what a `world` is made of; `story` tells what happens in it, while `checks`, `judging` and
`invariants` say what must hold; `running` is the whole. Nothing here may wait for real time or
touch anything real.
"""

from tests.simulator.command import main
from tests.simulator.plans import (
    BROWSERS,
    DRAWN,
    Clock,
    Fault,
    FaultPlan,
    Kind,
    case,
    make_plan,
    slots,
)
from tests.simulator.running import simulate
from tests.simulator.schedules import SEEN_OF, plan_of
from tests.simulator.story import Outcome
from tests.simulator.verdict import SimulationFailed

__all__ = [
    "BROWSERS",
    "DRAWN",
    "SEEN_OF",
    "Clock",
    "Fault",
    "FaultPlan",
    "Kind",
    "Outcome",
    "SimulationFailed",
    "case",
    "main",
    "make_plan",
    "plan_of",
    "simulate",
    "slots",
]
