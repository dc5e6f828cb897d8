"""Which browsers load a model that not every browser loads: the shards of a cut model.

Each has a number of copies, spread over the browsers so that no browser has more of a group than
its share. A copy whose browser died is placed again at once if another browser has less than its
share; else it waits for the repair, and only when no browser is being repaired do others exceed
their share. Pure: this module must not know of a browser more than a `Slot` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass


@dataclass(frozen=True)
class Placing:
    """How a model is placed. `group` is the cut model, `copies` those of this part."""

    copies: int
    group: str


@dataclass(frozen=True)
class Slot:
    """What placement needs to know of a browser. `refuses`: models that it failed to load."""

    browser_id: str
    kind: str
    ready: bool
    has: AbstractSet[str]
    refuses: AbstractSet[str] = frozenset()


def place(placed: Mapping[str, Placing], slots: Sequence[Slot]) -> tuple[tuple[str, str], ...]:
    """What to load in addition to what is loaded: pairs of browser and model.

    `slots` are the browsers in service and those that are starting. While some are starting, no
    browser exceeds its share: copies without a place wait for them.
    """
    has = {slot.browser_id: set(slot.has) for slot in slots}
    coming = any(not slot.ready for slot in slots)
    made: list[tuple[str, str]] = []
    for group in dict.fromkeys(placing.group for placing in placed.values()):
        parts = [model for model, placing in placed.items() if placing.group == group]
        total = sum(placed[model].copies for model in parts)
        share = -(-total // max(len(slots), 1))
        # Browsers may exceed the share only in the second pass, and only if none is starting.
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
        # The least loaded; then a browser type that has no copy yet, so that one engine fault does
        # not take all copies.
        key=lambda slot: (
            load(slot),
            kinds.count(slot.kind),
            len(has[slot.browser_id]),
            slot.browser_id,
        ),
        default=None,
    )
