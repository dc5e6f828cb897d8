"""tabpool's front door.

from pool import BrowserPool
"""

from pool.config import PoolConfig
from pool.pool import BrowserPool, PoolView
from pool.results import RecoveryStep, Result

__all__ = ["BrowserPool", "PoolConfig", "PoolView", "RecoveryStep", "Result"]
