"""Circuit breakers: what they are set to, how they change, and which a pool has.

This is the front door: code outside the package imports from here.
"""

from recovery.breaker.circuit import Change, CircuitBreaker, CircuitOpenError, Snapshot
from recovery.breaker.config import BreakerConfig, RegistryConfig
from recovery.breaker.metrics import registry_metrics
from recovery.breaker.registry import BreakerKey, CircuitBreakerRegistry, open_max
from recovery.breaker.state import (
    Abandoned,
    Asked,
    Breaker,
    BreakerSwitch,
    CircuitState,
    Event,
    Failed,
    Permit,
    Repaired,
    Succeeded,
    Switched,
    Ticked,
    admit,
    is_recorded,
    open_seconds,
    retry_at,
    step,
    succeed,
)

__all__ = [
    "Abandoned",
    "Asked",
    "Breaker",
    "BreakerConfig",
    "BreakerKey",
    "BreakerSwitch",
    "Change",
    "CircuitBreaker",
    "CircuitBreakerRegistry",
    "CircuitOpenError",
    "CircuitState",
    "Event",
    "Failed",
    "Permit",
    "RegistryConfig",
    "Repaired",
    "Snapshot",
    "Succeeded",
    "Switched",
    "Ticked",
    "admit",
    "is_recorded",
    "open_max",
    "open_seconds",
    "registry_metrics",
    "retry_at",
    "step",
    "succeed",
]
