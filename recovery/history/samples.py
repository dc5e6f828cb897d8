"""What the history stores: one sample for every operation, and for every recovery step.

Samples are facts about finished work, for statistics; nothing is replayed from them, and no answer
waits for them. This module must not store or judge them.
"""

from __future__ import annotations

from dataclasses import dataclass

from recovery.control import BrowserRecord, Repair
from recovery.failures import Category, Scope, Severity
from recovery.kinds import Backend, BrowserType, Level, ModelType, RecoveryLevel


@dataclass(frozen=True, kw_only=True)  # by name only: there are too many fields
class OperationSample:
    """One finished operation, over all its attempts.

    `at` is when it ended (wall time, seconds since the epoch). The browser, its type, epoch and
    back end are those of the last attempt, or empty if none was reached. `success` is also
    true of a simulated answer (`simulated`). `category` and `fingerprint` are those of
    its first failure; `recovered`: it had a failure, and was answered nevertheless.
    """

    at: float
    pool: str
    op_id: str
    model: str
    model_type: ModelType
    op: str
    browser_id: str
    browser_type: BrowserType | None
    epoch: int
    backend: Backend | None
    level: Level
    strategy: str  # a `Strategy`, or the name of a registered one
    success: bool
    recovered: bool
    simulated: bool
    attempts: int
    duration_ms: float
    in_page_ms: float
    queue_ms: float
    bytes_in: int
    bytes_out: int
    category: Category | None = None
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class RecoverySample:
    """One recovery step: a rung that was tried on a browser, and its outcome.

    `at` is when the step ended (wall time), so that it began `duration_ms` before. `model_type`
    is what the browser was used for, category and fingerprint those of the failure that the step
    answers. `memory_bytes`: the browser's memory when it failed, 0 if not measured.
    """

    at: float
    pool: str
    browser_id: str
    browser_type: BrowserType
    epoch: int
    model_type: ModelType
    strategy: str  # a `Strategy`, or the name of a registered one
    rung: RecoveryLevel
    category: Category
    severity: Severity
    scope: Scope
    fingerprint: str
    duration_ms: float
    success: bool
    memory_bytes: int = 0
    note: str = ""


Sample = OperationSample | RecoverySample


def recovery_samples(
    pool: str, strategy: str, record: BrowserRecord, repair: Repair, memory_bytes: int = 0
) -> list[RecoverySample]:
    """The samples of a finished repair: one for each rung of each step."""
    failure = repair.failure
    return [
        RecoverySample(
            at=step.ended,
            pool=pool,
            browser_id=record.id,
            browser_type=record.kind,
            epoch=repair.from_epoch,
            model_type=repair.model_type,
            strategy=strategy,
            rung=rung,
            category=failure.category,
            severity=failure.severity,
            scope=failure.scope,
            fingerprint=str(failure.fingerprint),
            duration_ms=(step.ended - step.began) * 1e3,
            success=rung is step.worked,
            memory_bytes=memory_bytes,
            note=step.note or repair.outcome,
        )
        for step in repair.steps
        for rung in step.rungs
    ]
