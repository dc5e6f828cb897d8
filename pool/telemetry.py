"""A snapshot of a pool as plain JSON. This module must not send requests."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import psutil

from pool.view import PoolView
from recovery.control import BrowserRecord, Repair


def telemetry(view: PoolView, models: Iterable[str]) -> dict[str, Any]:
    """One snapshot: the pool, its browsers and repairs, this client's counts, the machine."""
    memory = psutil.virtual_memory()
    return {
        "at": time.time(),
        "pool": view.name,
        "level": str(view.level),
        "level_effective": str(view.level_effective),
        "degraded": view.degraded,
        "strategy": view.control.strategy.name,
        "term": view.control.term,
        "log_trouble": view.log_trouble,
        "faults": list(view.faults),
        "models": {name: str(view.control.model_types.get(name, "unknown")) for name in models},
        "browsers": {
            record.id: _browser(record, view.memory_bytes.get(record.id, 0))
            for record in view.control.browsers.values()
        },
        "queues": {host.ref.browser_id: host.queue for host in view.hosts},
        "repairs": [_repair(repair) for repair in view.control.repairs],
        "operations": dict(view.operations),
        "machine": {
            "cpus": os.cpu_count(),
            "load_1m": os.getloadavg()[0],
            "memory_bytes": memory.total,
            "memory_available_bytes": memory.available,
        },
    }


def _browser(record: BrowserRecord, memory_bytes: int) -> dict[str, Any]:
    facts = record.facts
    return {
        "type": str(record.kind),
        "product": facts.product if facts else "",
        "version": facts.version if facts else "",
        "phase": str(record.phase),
        "epoch": record.epoch,
        "since": record.since,
        "memory_bytes": memory_bytes,
        "models": {name: str(phase) for name, phase in record.models.items()},
        "circuits": {
            model or "browser": str(snapshot.breaker.state)
            for model, snapshot in record.breakers.items()
        },
        "restarts": len(record.restarts),
        "adjusted": asdict(record.adjusted) if record.adjusted else None,
        "replaced_by": record.replaced_by,
        "failure": str(record.failure) if record.failure else "",
    }


def _repair(repair: Repair) -> dict[str, Any]:
    took = None if repair.ready is None else repair.ready - repair.began
    return {
        "browser": repair.browser_id,
        "epoch": repair.from_epoch,
        "began": repair.began,
        "seconds": took,
        "failure": str(repair.failure),
        "category": str(repair.failure.category),
        "plan": [[int(rung) for rung in step] for step in repair.plan.steps],
        "reason": repair.plan.reason,
        "steps": [
            {
                "rungs": [int(rung) for rung in step.rungs],
                "seconds": step.ended - step.began,
                "worked": step.worked and int(step.worked),
                "note": step.note,
            }
            for step in repair.steps
        ],
        "outcome": repair.outcome,
    }
