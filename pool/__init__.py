"""tabpool's front door.

from pool import BrowserPool
"""

from pool.config import PoolConfig
from pool.operations.generate import GeneratedToken
from pool.pool import BrowserPool, PoolView
from pool.repair import ProgressiveRecoveryManager, recover_browser
from pool.results import RecoveryStep, Result
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
