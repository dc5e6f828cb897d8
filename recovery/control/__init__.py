"""The pool's control state: events go in, the next state and instructions come out.

`records` is the state, `events` what happens to it, `instructions` what is to be done about it;
`decide` turns the first two into the next state and the third, with `models` and `repairs` for
its parts. `reconcile` compares the state with the living. Whoever is outside imports from here.
"""

from recovery.control.decide import (
    apply,
    decide,
)
from recovery.control.events import (
    Body,
    BreakersMoved,
    BrowserFailed,
    BrowserFound,
    BrowserReady,
    BrowserReconnected,
    BrowserRecycled,
    BrowserStopped,
    BrowserUnwanted,
    BrowserWanted,
    Event,
    ModelFailed,
    ModelLoaded,
    ModelParked,
    ModelUnwanted,
    ModelWanted,
    PoolClosing,
    PoolOpened,
    TermBegan,
)
from recovery.control.instructions import (
    Decision,
    Drain,
    Instruction,
    Launch,
    Load,
    Reconnect,
    Stop,
    Unload,
)
from recovery.control.models import (
    LOAD_AGAIN_SECONDS,
)
from recovery.control.reconcile import (
    Reconciliation,
    Seen,
    reconcile,
)
from recovery.control.records import (
    ALIVE,
    COMING,
    Adjusted,
    BrowserRecord,
    BrowserStateManager,
    ModelPhase,
    Phase,
    PoolState,
    Repair,
    StepOutcome,
)
from recovery.control.repairs import (
    DEAD_MAX,
    HISTORY_MAX,
    TALLIES_MAX,
)

__all__ = [
    "ALIVE",
    "COMING",
    "DEAD_MAX",
    "HISTORY_MAX",
    "LOAD_AGAIN_SECONDS",
    "TALLIES_MAX",
    "Adjusted",
    "Body",
    "BreakersMoved",
    "BrowserFailed",
    "BrowserFound",
    "BrowserReady",
    "BrowserReconnected",
    "BrowserRecord",
    "BrowserRecycled",
    "BrowserStateManager",
    "BrowserStopped",
    "BrowserUnwanted",
    "BrowserWanted",
    "Decision",
    "Drain",
    "Event",
    "Instruction",
    "Launch",
    "Load",
    "ModelFailed",
    "ModelLoaded",
    "ModelParked",
    "ModelPhase",
    "ModelUnwanted",
    "ModelWanted",
    "Phase",
    "PoolClosing",
    "PoolOpened",
    "PoolState",
    "Reconciliation",
    "Reconnect",
    "Repair",
    "Seen",
    "StepOutcome",
    "Stop",
    "TermBegan",
    "Unload",
    "apply",
    "decide",
    "reconcile",
]
