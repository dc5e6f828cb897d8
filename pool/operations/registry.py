"""The table of operations: by name, what can be asked of models.

This module must not know what one does.
"""

from __future__ import annotations

from collections.abc import Callable

from pool.operations.base import Operation
from pool.operations.embed import EMBED
from pool.operations.generate import Generate
from pool.operations.graph import INFERENCE, Finish, GraphOperation, Prepare, prepare_inference
from pool.operations.read import Read
from recovery import checks
from recovery.errors import BadInput, UnknownOperation

BUILT_IN: tuple[Operation, ...] = (INFERENCE, EMBED, Generate(), Read())


class OperationRegistry:
    """Operations by name; it begins with those that are built in."""

    def __init__(self) -> None:
        self._operations = {operation.name: operation for operation in BUILT_IN}

    def __repr__(self) -> str:
        return f"<OperationRegistry [{', '.join(self._operations)}]>"

    def register(self, operation: Operation) -> Operation:
        """Adds an operation and returns it. Raises `BadInput` if the name is empty or taken."""
        kind = "an object of a class below pool.operations.base.Operation"
        given: object = operation
        if not isinstance(given, Operation):
            raise checks.refusal("operation", kind, operation)
        name: object = operation.name
        if not isinstance(name, str) or not name or name in self._operations:
            raise BadInput(
                f"An operation cannot be called {name!r}: expected a name other than "
                f"{', '.join(self._operations)}.",
                expected="a new name",
                got=name,
            )
        self._operations[operation.name] = operation
        return operation

    def operation(
        self, name: str, *, prepare: Prepare = prepare_inference
    ) -> Callable[[Finish], Finish]:
        """Registers the decorated function as the `finish` of an operation around one run.

        @operations.operation("classify")
        def classify(entry, prepared, outputs):
            return {"label": outputs["logits"].argmax(axis=-1)}
        """

        def register(finish: Finish) -> Finish:
            for what, function in (("prepare", prepare), ("finish", finish)):
                if not callable(function):
                    raise checks.refusal(what, "a function", function)
            self.register(GraphOperation(name, prepare, finish))
            return finish

        return register

    def get(self, name: str) -> Operation:
        """Raises `UnknownOperation`, naming the known ones."""
        try:
            return self._operations[name]
        except (KeyError, TypeError):
            known = list(self._operations)
            raise UnknownOperation(
                f"No operation {checks.shown(name)} is registered; known: {', '.join(known)}.",
                expected=known,
                got=name,
            ) from None

    def names(self) -> tuple[str, ...]:
        return tuple(self._operations)
