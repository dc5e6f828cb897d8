"""Results of operations: outputs, their origin, recovery steps and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recovery.errors import OperationFailed
from recovery.failures import Failure
from recovery.kinds import Backend, BrowserType, Level


@dataclass(frozen=True)
class RecoveryStep:
    """One recovery step of an operation.

    `what`: "failed" (an attempt ended without an answer), "waited" (for a browser to be ready),
    "resubmitted" (the same operation id to another browser or incarnation). `at` is seconds
    since the operation began, `seconds` how long the step took.
    """

    what: str
    where: str
    at: float
    seconds: float
    outcome: str
    failure: Failure | None = None


@dataclass(frozen=True)
class Result:
    """The result of one operation.

    `values` are numpy arrays by name, in the order of the model's graph where they are its outputs;
    text among them is `str`, or a list of `str` (nested, where it had more dimensions).

    `metrics` holds duration_ms (as seen by the caller), in_page_ms (the model's run), queue_ms (in
    the browser's queue and worker before it), bytes_in, bytes_out, attempts.
    """

    op_id: str
    model: str
    op: str
    success: bool
    level_effective: Level
    browser_id: str = ""
    browser_type: BrowserType | None = None
    epoch: int = 0
    backend: Backend | None = None
    recovery: tuple[RecoveryStep, ...] = ()
    original_error: Failure | None = None
    error: str = ""
    simulated: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict, repr=False)
    stages: tuple[str, ...] = ()  # of a model in parts: the last browser of each part

    def __post_init__(self) -> None:
        texts = {name: value.tolist() for name, value in self.values.items() if _is_text(value)}
        if texts:  # whatever operation made them
            object.__setattr__(self, "values", {**self.values, **texts})

    @property
    def recovered(self) -> bool:
        """Whether something failed on the way to this answer."""
        return self.success and self.original_error is not None

    @property
    def outputs(self) -> Mapping[str, Any]:
        """The answer's `values` by name (arrays are read-only). Raises `OperationFailed` if it
        failed."""
        if not self.success:
            raise OperationFailed(
                f"{self.op} on {self.model} failed: {self.error}",
                failure=self.original_error,
                recovery=self.recovery,
            )
        return self.values


def _is_text(value: Any) -> bool:
    """Whether it is an array of strings: of no dimension, it could not even be sliced."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "UT"
