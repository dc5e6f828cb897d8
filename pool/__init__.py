"""tabpool's front door.

from pool import BrowserPool
"""

from pool.config import PoolConfig
from pool.pool import BrowserPool, PoolView
from pool.repair import ProgressiveRecoveryManager, recover_browser
from pool.results import RecoveryStep, Result

__all__ = [
    "BrowserPool",
    "PoolConfig",
    "PoolView",
    "ProgressiveRecoveryManager",
    "RecoveryStep",
    "Result",
    "recover_browser",
]
