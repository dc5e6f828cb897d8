"""The public API of tabpool.

from pool import BrowserPool
"""

from pool.config import PoolConfig
from pool.execution.sequence import GeneratedToken
from pool.pool import BrowserPool
from pool.repair import ProgressiveRecoveryManager, recover_browser
from pool.results import RecoveryStep, Result
from pool.view import PoolView
from recovery.breaker import BreakerConfig, RegistryConfig
from recovery.errors import SequenceLost
from recovery.history.config import HistoryConfig
from recovery.resources import ResourceLimits
from recovery.supervision import RestartLimit

__all__ = [
    "BreakerConfig",
    "BrowserPool",
    "GeneratedToken",
    "HistoryConfig",
    "PoolConfig",
    "PoolView",
    "ProgressiveRecoveryManager",
    "RecoveryStep",
    "RegistryConfig",
    "ResourceLimits",
    "RestartLimit",
    "Result",
    "SequenceLost",
    "recover_browser",
]
