"""Samples for tests of the history, and stores with such samples in them."""

import math
from dataclasses import replace

from recovery.failures import Category, Scope, Severity
from recovery.history.config import HistoryConfig
from recovery.history.samples import OperationSample, RecoverySample
from recovery.history.store import HistoryStore
from recovery.kinds import Backend, BrowserType, Level, ModelType, RecoveryLevel, Strategy

NOW = 1_800_000_000.0
CHROME, FIREFOX, SAFARI = BrowserType.CHROME, BrowserType.FIREFOX, BrowserType.SAFARI
MINIMAL, MODERATE = RecoveryLevel.MINIMAL, RecoveryLevel.MODERATE
FALLBACK, SIMULATION = RecoveryLevel.FALLBACK, RecoveryLevel.SIMULATION

OPERATION = OperationSample(
    at=NOW - 10.123456789,
    pool="p",
    op_id="op-1",
    model="minilm",
    model_type=ModelType.TEXT,
    op="embed",
    browser_id="chrome-0",
    browser_type=CHROME,
    epoch=3,
    backend=Backend.WASM,
    level=Level.MEDIUM,
    strategy=Strategy.PROGRESSIVE,
    success=True,
    recovered=False,
    simulated=False,
    attempts=1,
    duration_ms=12.25,
    in_page_ms=9.5,
    queue_ms=0.125,
    bytes_in=2**40,
    bytes_out=1536,
)
FAILED = replace(OPERATION, success=False, category=Category.CRASH, fingerprint="f")
RECOVERED = replace(FAILED, success=True, recovered=True, attempts=2)
SIMULATED = replace(
    RECOVERED, simulated=True, recovered=False, browser_type=None, backend=Backend.NATIVE
)
STEP = RecoverySample(
    at=NOW - 10,
    pool="p",
    browser_id="chrome-0",
    browser_type=CHROME,
    epoch=3,
    model_type=ModelType.TEXT,
    strategy=Strategy.PROGRESSIVE,
    rung=MODERATE,
    category=Category.CRASH,
    severity=Severity.SEVERE,
    scope=Scope.BROWSER,
    fingerprint="f",
    duration_ms=1000.0,
    success=True,
    memory_bytes=5 * 10**9,
    note="n",
)


def opened(path=None, *samples, **config):
    store = HistoryStore(path, HistoryConfig(**config), wall=lambda: NOW)
    store.open()
    store.add(samples)
    store.flush()
    return store


def refilled(store, *samples):
    for table in store.stored:
        store._connection.execute(f"DELETE FROM {table}")
    store.add(samples)
    store.flush()
    return store


def ids(store):
    return [row["op_id"] for row in store.query("SELECT op_id FROM operations ORDER BY seq")]


def op(number):
    return replace(OPERATION, op_id=str(number))


def many(count, sample, **changes):
    return [replace(sample, **changes)] * count


def wilson_low(successes, samples):
    if not samples:
        return None
    rate, z = successes / samples, 1.96
    root = math.sqrt(rate * (1 - rate) / samples + (z / 2 / samples) ** 2)
    return (rate + z * z / 2 / samples - z * root) / (1 + z * z / samples)


def damaged(path):
    return sorted(found.name for found in path.parent.glob("*.damaged"))
