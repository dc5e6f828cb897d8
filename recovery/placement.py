"""Which browsers load a model that not every browser loads: the shards of one that was cut.

Each has a number of copies, spread over the browsers so that no browser has more of a group than
its share. A copy whose browser died is placed anew at once where another browser has less than its
share; else it waits for the repair, and only when nobody is being repaired do others take more.
Pure: this module must not know what a browser is doing beyond the few facts it gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass


@dataclass(frozen=True)
class Placing:
    """How a model is placed. `group` names what it is a part of, `copies` are of this part."""

    copies: int
    group: str


@dataclass(frozen=True)
class Slot:
    """A browser, as far as placing goes. `refuses`: models that it could not load."""

    browser_id: str
    kind: str
    ready: bool
    has: AbstractSet[str]
    refuses: AbstractSet[str] = frozenset()


def place(placed: Mapping[str, Placing], slots: Sequence[Slot]) -> tuple[tuple[str, str], ...]:
    """What to load where, besides what is there: pairs of browser and model.

    `slots` are the browsers in service and those that are coming. While some are coming, nobody
    takes more than its share: what has no place waits for them.
    """
    has = {slot.browser_id: set(slot.has) for slot in slots}
    coming = any(not slot.ready for slot in slots)
    made: list[tuple[str, str]] = []
    for group in dict.fromkeys(placing.group for placing in placed.values()):
        parts = [model for model, placing in placed.items() if placing.group == group]
        total = sum(placed[model].copies for model in parts)
        share = -(-total // max(len(slots), 1))
        # Whoever is beyond the share comes last; while others are coming, not at all.
        for limit in (share, *(() if coming else (total,))):
            for model in parts:
                for _ in range(placed[model].copies):
                    chosen = _choose(model, parts, slots, has, placed[model].copies, limit)
                    if chosen is None:
                        break
                    has[chosen.browser_id].add(model)
                    made.append((chosen.browser_id, model))
    return tuple(made)


def _choose(
    model: str,
    parts: Sequence[str],
    slots: Sequence[Slot],
    has: Mapping[str, set[str]],
    copies: int,
    limit: int,
) -> Slot | None:
    holders = [slot for slot in slots if model in has[slot.browser_id]]
    if len(holders) >= copies:
        return None

    def load(slot: Slot) -> int:
        return sum(part in has[slot.browser_id] for part in parts)

    kinds = [slot.kind for slot in holders]
    fit = [
        slot
        for slot in slots
        if slot.ready
        and model not in has[slot.browser_id]
        and model not in slot.refuses
        and load(slot) < limit
    ]
    return min(
        fit,
        # The emptiest; then another engine than the copies there are, so that one fault of an
        # engine does not take all of them.
        key=lambda slot: (
            load(slot),
            kinds.count(slot.kind),
            len(has[slot.browser_id]),
            slot.browser_id,
        ),
        default=None,
    )
