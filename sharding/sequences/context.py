"""What all parts of one stage of one sequence share: its sequence, hosts, rules and events.

This module must not hold anything that changes with a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from recovery.failures import Failure
from recovery.records import HostRef
from sharding.sequences.events import Events
from sharding.sequences.hosts import StageHosts
from sharding.sequences.rules import PipelineRules
from sharding.sequences.stages import Stage


@dataclass(frozen=True)
class StageContext:
    """Stage number `index` of a sequence."""

    sequence: str
    index: int
    stage: Stage
    hosts: StageHosts
    rules: PipelineRules
    events: Events

    def record(
        self,
        what: str,
        where: HostRef,
        position: int,
        since: float,
        outcome: str,
        failure: Failure | None = None,
    ) -> None:
        """As `Events.record`, for this stage."""
        self.events.record(what, self.index, str(where), position, since, outcome, failure)
