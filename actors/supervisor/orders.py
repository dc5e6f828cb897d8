"""Stores model orders in memory or on disk, beside the log, for the next supervisor.

On disk: one JSON file per model, written to a temporary file, synced and renamed before the
model's event is logged. The log has names and digests only, because an order may be large. This
module must not load a model.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter, ValidationError

from actors.supervisor.records import ModelOrder
from recovery.bounded_files import read_bounded
from recovery.errors import BadInput
from recovery.log.segments import LogUnavailable

_ORDER = TypeAdapter(ModelOrder)
ORDER_BYTES_MAX = 32 << 20


class OrderStore(Protocol):
    """Keeps model orders for the next supervisor. Every method may raise `LogUnavailable`."""

    async def save(self, order: ModelOrder) -> None: ...
    async def load(self, name: str, digest: str) -> ModelOrder | None: ...
    async def remove(self, name: str) -> None: ...


class MemoryOrders:
    """Model orders in memory, lost with the supervisor."""

    def __init__(self) -> None:
        self._orders: dict[str, ModelOrder] = {}

    async def save(self, order: ModelOrder) -> None:
        self._orders[order.spec.name] = order

    async def load(self, name: str, digest: str) -> ModelOrder | None:
        order = self._orders.get(name)
        return order if order is not None and order.spec.digest == digest else None

    async def remove(self, name: str) -> None:
        self._orders.pop(name, None)


class DiskOrders:
    """An order store in its own folder, created on demand."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def save(self, order: ModelOrder) -> None:
        """Raises `LogUnavailable` if it can't be written."""
        await asyncio.to_thread(self._save, order)

    async def load(self, name: str, digest: str) -> ModelOrder | None:
        """The order for this digest of the model; None if there is none or it is unreadable."""
        return await asyncio.to_thread(self._load, name, digest)

    async def remove(self, name: str) -> None:
        """Forget a model. Unknown ones are no error."""
        await asyncio.to_thread(self._path(name).unlink, missing_ok=True)

    def _path(self, name: str) -> Path:
        return (
            self._folder / f"{name}.json"
        )  # model names hold no separators: `pool.models.registry`

    def _save(self, order: ModelOrder) -> None:
        data = _ORDER.dump_json(order)
        if len(data) > ORDER_BYTES_MAX:
            raise LogUnavailable(
                f"the order of {order.spec.name} takes {len(data)} bytes, over the limit of "
                f"{ORDER_BYTES_MAX}"
            )
        path = self._path(order.spec.name)
        aside = path.with_suffix(".new")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError as error:
            raise LogUnavailable(f"{path} can't be written: {error}") from error

    def _load(self, name: str, digest: str) -> ModelOrder | None:
        try:
            order = _ORDER.validate_json(read_bounded(self._path(name), ORDER_BYTES_MAX))
        except (BadInput, ValidationError):
            return None
        return order if order.spec.digest == digest else None
