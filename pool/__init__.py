"""tabpool's front door.

from pool import BrowserPool
"""

from pool.config import PoolConfig
from pool.pool import BrowserPool
from pool.repair import ProgressiveRecoveryManager, recover_browser
from pool.results import RecoveryStep, Result
from pool.sequence import GeneratedToken
from pool.view import PoolView
from recovery.errors import SequenceLost

__all__ = [
    "BrowserPool",
    "GeneratedToken",
    "PoolConfig",
    "PoolView",
    "ProgressiveRecoveryManager",
    "RecoveryStep",
    "Result",
    "SequenceLost",
    "recover_browser",
]
