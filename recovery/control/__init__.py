"""The pool's control state: events go in, the next state and instructions come out.

`records` holds the state, `events` the events, `instructions` the instructions; `decide` maps a
state and an event to the next state and instructions, with `models` and `repairs` for its parts.
`reconcile` compares the state with what workers report. Other packages import from here.
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
