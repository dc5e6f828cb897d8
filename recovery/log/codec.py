"""Events and states as plain JSON, and back.

One line of JSON is the form of record: `{"seq", "term", "at", "type", "body"}`. The type is the
event's class name in snake case and, like every field's name, part of the format: old logs hold
it. What JSON can't carry (an object in a failure's evidence, half a surrogate pair from a page)
is approximated; `as_logged` gives what a replay decodes. This module must not
touch files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, get_args

from pydantic import ConfigDict, TypeAdapter
from typing_extensions import TypeAliasType

from recovery.control import Body, Event, PoolState
from recovery.errors import InternalError

EVENT_BYTES_MAX = 256 * 1024  # longer events are clipped: evidence may be of any size
_CLIPPED_CHARS_MAX = 1_000
_CLIPPED_ITEMS_MAX = 100


class CorruptLog(InternalError):
    """What was read is intact, but this version of tabpool can't understand it."""


def _adapter(cls: Any) -> TypeAdapter[Any]:
    # An alias, because pydantic takes no configuration for a bare dataclass.
    alias: Any = TypeAliasType(cls.__name__, cls)
    return TypeAdapter(alias, config=ConfigDict(extra="forbid", ser_json_inf_nan="strings"))


def _type_name(cls: type) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


_NAMES: Mapping[type, str] = {cls: _type_name(cls) for cls in get_args(Body)}
_BODIES: Mapping[str, TypeAdapter[Any]] = {name: _adapter(cls) for cls, name in _NAMES.items()}
# The adapters' own parts, without a layer of Python around them.
_WRITERS = {cls: (name.encode(), _BODIES[name].serializer.to_json) for cls, name in _NAMES.items()}
_READERS = {name.encode(): adapter.validator.validate_json for name, adapter in _BODIES.items()}
_STATE = _adapter(PoolState)
_HEAD = re.compile(rb'\{"seq":(\d+),"term":(\d+),"at":(-?\d[-+.e\d]*),"type":"(\w+)","body":')


# -- events ---------------------------------------------------------------------------------------


def encode(event: Event) -> bytes:
    """`event` as one line of JSON, without the newline."""
    writer = _WRITERS.get(type(event.body))
    if writer is None or not math.isfinite(event.at):
        raise InternalError(f"not an event that can be logged: {event}", event=repr(event))
    name, to_json = writer
    try:
        body = to_json(event.body, warnings="error")
    except ValueError:  # what pydantic raises for everything that it can't write
        body = _encode_slowly(name, event.body)
    if len(body) > EVENT_BYTES_MAX:
        body = _encode_slowly(name, event.body, _CLIPPED_CHARS_MAX, _CLIPPED_ITEMS_MAX)
        if len(body) > EVENT_BYTES_MAX:
            raise InternalError(
                f"an event takes {len(body)} bytes, more than {EVENT_BYTES_MAX}",
                type=name.decode(),
            )
    return b'{"seq":%d,"term":%d,"at":%a,"type":"%b","body":%b}' % (
        event.seq,
        event.term,
        float(event.at),
        name,
        body,
    )


def decode(line: bytes) -> Event:
    """The event that `encode` wrote. Raises `CorruptLog`."""
    head = _HEAD.match(line)
    if head is None or line[-1:] != b"}" or head[4] not in _READERS:
        raise CorruptLog(f"no event: {line[:200]!r}")
    seq, term, at, name = head.groups()
    try:
        body = _READERS[name](line[head.end() : -1])
        return Event(int(seq), int(term), float(at), body)
    except ValueError as error:
        raise CorruptLog(f"no event: {line[:200]!r}: {error}") from None


def to_plain(event: Event) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(encode(event))
    return plain


def event_from_plain(plain: Mapping[str, Any]) -> Event:
    """The event that `to_plain` described. Raises `CorruptLog`."""
    keys = ("seq", "term", "at", "type", "body")
    if tuple(plain) != keys:
        raise CorruptLog(f"an event holds {', '.join(keys)}, this one {', '.join(plain)}")
    return decode(json.dumps(plain, separators=(",", ":")).encode())


def as_logged(event: Event) -> Event:
    """`event` as a replay decodes it: apply this one, so that a replay gives the same state."""
    return decode(encode(event))


# -- states ---------------------------------------------------------------------------------------


def state_to_plain(state: PoolState) -> dict[str, Any]:
    """`state` as plain JSON; what came from an event is as `as_logged` leaves it."""
    try:
        plain = json.loads(_STATE.dump_json(state, warnings="error"))
    except ValueError:
        plain = _plain(state)
    assert isinstance(plain, dict)
    return plain


def state_from_plain(plain: Mapping[str, Any]) -> PoolState:
    """The state that `state_to_plain` described. Raises `CorruptLog`."""
    try:
        state: PoolState = _STATE.validate_json(json.dumps(plain))
    except (TypeError, ValueError) as error:
        raise CorruptLog(f"not a pool's state: {error}") from None
    return state


# -- values that JSON can't carry -----------------------------------------------------------------


def _encode_slowly(
    name: bytes, body: Any, chars_max: int | None = None, items_max: int | None = None
) -> bytes:
    """`body` without what JSON can't carry. Raises `InternalError` if nothing sensible is left."""
    line = json.dumps(
        _plain(body, chars_max, items_max), ensure_ascii=False, separators=(",", ":")
    ).encode()
    try:
        _READERS[name](line)
    except ValueError as error:
        raise InternalError(f"{name.decode()} can't be logged: {error}", body=repr(body)) from None
    return line


def _plain(value: Any, chars_max: int | None = None, items_max: int | None = None) -> Any:
    match value:
        case Enum():
            return value.value
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else _JSON_WORDS[str(value)]
        case str():
            return value.encode(errors="replace").decode()[:chars_max]
        case Mapping():
            items = list(value.items())[:items_max]
            return {str(_plain(k, chars_max)): _plain(v, chars_max, items_max) for k, v in items}
        case list() | tuple() | set() | frozenset():
            return [_plain(item, chars_max, items_max) for item in list(value)[:items_max]]
        case _ if is_dataclass(value):
            return {
                f.name: _plain(getattr(value, f.name), chars_max, items_max) for f in fields(value)
            }
        case _:
            return _plain(_described(value), chars_max)


_JSON_WORDS = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}  # as pydantic writes them


def _described(value: Any) -> str:
    return repr(value)[:_CLIPPED_CHARS_MAX]
