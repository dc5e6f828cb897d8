"""What every operation is: one object that checks inputs, then asks a placed model.

A new operation is a class of this kind in a module of its own, and a row in
`pool.operations.registry.BUILT_IN` (or, a user's, a call of `BrowserPool.operations.register`).
This module must not import one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from pool.execution.placed import PlacedModel
from pool.execution.sequence import Generating
from pool.models.registry import ModelEntry
from pool.models.tokens import TextEncoder
from pool.results import Result
from recovery.errors import BadInput


class Operation(ABC):
    """One operation, for every model and every call. Keeps no state between calls.

    It must be pure but for what it asks of the model: an operation that is run again, elsewhere,
    must come to the same answer.
    """

    name: str = ""

    @abstractmethod
    def prepare(
        self, entry: ModelEntry, inputs: Mapping[str, Any], encoder: TextEncoder | None
    ) -> Any:
        """What `run` takes, of the caller's `inputs`; `encoder` is the model's tokenizer, if any.

        Nothing is asked here. Raises `BadInput` for inputs, or a model, that do not suit it.
        """

    @abstractmethod
    async def run(self, model: PlacedModel, prepared: Any) -> Result:
        """The one result. Asks the model only through `model`, within `model.answer`."""

    def stream(self, model: PlacedModel, prepared: Any) -> Generating:
        """The answer as it is made. Raises `BadInput` for an operation that gives none so."""
        raise BadInput(
            f"{self.name} gives its answer at once: call run_with_recovery.", got=self.name
        )
