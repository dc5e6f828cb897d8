"""Formats an event of the control log as one line of text. This module must not read the log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pool.commands.printing import shown

_TEXT_MAX = 160
# What the parts of an event raise that is not of tabpool's form.
_MISSHAPEN = (
    ArithmeticError,
    AttributeError,
    KeyError,
    IndexError,
    OSError,
    TypeError,
    ValueError,
)


def logged_line(event: Mapping[str, Any]) -> str:
    """`event` is what `recovery.log.log.show` yields. The line can be printed, whoever wrote it."""
    try:
        return shown(_line(event))
    except _MISSHAPEN:
        return shown(f"?????  {json.dumps(event)}", _TEXT_MAX)


def _line(event: Mapping[str, Any]) -> str:
    if event["type"] == "unreadable":
        return f"?????  {event['file']} at byte {event['offset']}: {event['line'][:_TEXT_MAX]}"
    at = datetime.fromtimestamp(event["at"]).isoformat(sep=" ", timespec="milliseconds")
    body = dict(event["body"])
    return f"{event['seq']:5d}  {at}  term {event['term']}  {event['type']:20s} {_body_text(body)}"


def _body_text(body: dict[str, Any]) -> str:
    who = body.pop("browser_id", None)
    if who is not None and "epoch" in body:
        who = f"{who}#{body.pop('epoch')}"
    said = [who] if who else []
    for name, value in body.items():
        match name, value:
            case "failure", Mapping():
                said.append(f"{value['category']} ({value['severity']}): {value['message']}")
            case "facts", Mapping():
                said.append(f"{value['product']} {value['version']}")
            case "strategy", Mapping():
                said.append(f"strategy {value['name']}")
            case "breakers", Mapping():
                states = [f"{m or 'browser'} {b['breaker'][0]}" for m, b in value.items()]
                said.append("circuits: " + ", ".join(states))
            case "numeric", Mapping():
                said.append(f"on {value['backend']}")
            case _, None | False | {}:
                pass
            case _, str() | int() | float():
                said.append(f"{name} {value}")
            case _:
                pass
    return "; ".join(said)[:_TEXT_MAX]
