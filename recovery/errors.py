"""The error tree: every class says where the cause lies, and can be pickled.

`CallerError`: in the call (fix it). `SetupError`: in the machine (install or
switch on something). `BrowserError`: in a browser, its driver or the network (the
pool recovers by itself; you see one only inside a failed result). `InternalError`:
in tabpool (please report it). Errors of Selenium, Ray, onnx and DuckDB
stop at the module that talks to them and are raised again as one of these.

This module must not import anything of the project.
"""

from __future__ import annotations

from typing import Any


class PoolError(Exception):
    """Root of the tree.

    `message` is the whole sentence a person reads; `fields` are the same facts for
    programs. Both cross a pickle unchanged, whatever a subclass adds (Ray re-creates
    errors from `args`, which loses keyword fields: ray-project/ray#28436).
    """

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.fields)

    def __str__(self) -> str:
        return self.message


def _rebuild(cls: type[PoolError], message: str, fields: dict[str, Any]) -> PoolError:
    return cls(message, **fields)


class CallerError(PoolError):
    """The call is invalid. Nothing was changed; fix the call."""


class BadInput(CallerError):
    """A name, dtype, shape or value is not what the model or option takes."""


class UnknownModel(CallerError):
    """No model of that name is loaded in this pool."""


class UnknownOperation(CallerError):
    """No operation of that name is registered."""


class NotAModel(CallerError):
    """The path holds no ONNX model that can be read."""


class MessageTooLarge(CallerError):
    """One message would exceed the pool's limit on message size."""


class FaultRefused(CallerError):
    """A fault was not injected, and nothing was changed. `fields["what"]` says why: "circuit_open",
    "impossible" (here, or for this engine), "not_ours", or "off" (the pool allows no faults)."""


class PoolClosed(CallerError):
    """The pool is closed, or was never opened."""


class PoolBusy(PoolError):
    """Every queue that could take the operation is full (back-pressure).

    Not an error of the call: slow down, wait (`when_full="wait"`), or add browsers.
    """


class SetupError(PoolError):
    """This machine lacks something. The message names what to install or switch on."""


class BrowserMissing(SetupError):
    """A browser or its driver is not installed."""


class LevelUnavailable(SetupError):
    """These browsers cannot satisfy the fault-tolerance level that was asked for."""


class BrowserError(PoolError):
    """A browser, its driver or its page failed."""


class LaunchFailed(BrowserError):
    """A browser or driver that is installed did not start."""


class BrowserLost(BrowserError):
    """The browser died, hung past its deadline, or was replaced."""


class PageError(BrowserError):
    """The page is alive and reported an error of onnxruntime-web or of its own."""


class OperationFailed(PoolError):
    """`Result.outputs` of an operation that failed; `failure` says why."""

    @property
    def failure(self) -> Any:
        return self.fields.get("failure")


class SequenceLost(OperationFailed):
    """A sequence can't continue: one of its stages did not answer, and the repairs that its level
    allows failed. Resume it with the prompt's tokens, those generated so far, and the seed."""


class InternalError(PoolError):
    """A bug in tabpool."""


class IllegalTransition(InternalError):
    """A state machine was given an event that its state does not allow."""


class StaleTerm(InternalError):
    """An order from a supervisor incarnation that has been superseded."""


class BadFrame(InternalError):
    """A frame is malformed, or belongs to another epoch."""


def named_error(name: str) -> type[PoolError] | None:
    """The error class of that name, as failures carry it in their evidence; None if it is none."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, PoolError) else None
