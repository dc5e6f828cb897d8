"""The models of a pool: loading, reloading parked ones, unloading, and their orders.

Loads and unloads are serialised. The journal decides which browser loads what, and
`actors.supervisor.loads` does it: this module must not call a host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from actors.supervisor.changes import Changes
from actors.supervisor.journal import Journal
from actors.supervisor.orders import OrderStore
from actors.supervisor.records import ModelOrder
from actors.supervisor.tasks import Tasks
from recovery.control import COMING, ModelPhase, ModelUnwanted, ModelWanted, Phase
from recovery.errors import BadInput, PoolError


class Models:
    """The model orders of a pool, in memory and in `store`.

    `require_open` raises once the pool is closing, and `admit` if a machine has too little memory
    to load a model.
    """

    def __init__(
        self,
        store: OrderStore,
        journal: Journal,
        changes: Changes,
        tasks: Tasks,
        require_open: Callable[[], None],
        admit: Callable[[ModelOrder], Awaitable[None]],
    ) -> None:
        self._store = store
        self._journal = journal
        self._changes = changes
        self._tasks = tasks
        self._require_open = require_open
        self._admit = admit
        self._orders: dict[str, ModelOrder] = {}
        self._ordering = asyncio.Lock()  # serialises loads and unloads

    def get(self, name: str) -> ModelOrder | None:
        return self._orders.get(name)

    def orders(self) -> dict[str, ModelOrder]:
        """Every model's order, by name."""
        return dict(self._orders)

    async def restore(self) -> None:
        """Read the orders of all models in the state. Models whose order is lost are dropped."""
        state = self._journal.state
        for name, digest in {**state.parked, **state.models}.items():
            order = await self._store.load(name, digest)
            if order is None:
                self._tasks.faults.append(f"model {name}: its order is lost; call load() again")
                await self._journal.happen(ModelUnwanted(name))
            else:
                self._orders[name] = order

    async def load(self, order: ModelOrder) -> None:
        """Load a model on every browser, or on those that `placing` chooses.

        Returns when each has loaded it or failed to; the table has the results.
        """
        self._require_open()
        name = order.spec.name
        async with self._ordering:
            self._require_open()
            state = self._journal.state
            known = state.models.get(name) or state.parked.get(name)
            if known is not None and known != order.spec.digest:
                raise BadInput(
                    f"this pool has a different model called {name!r}: unload it first, or choose "
                    "another name",
                    expected=known,
                    got=order.spec.digest,
                )
            if known is None:
                await self._admit(order)
            await self._store.save(order)  # also of a known model: its back ends may differ
            before = self._orders.get(name)
            self._orders[name] = order
            try:
                wanted = _wanted(order)
                await self._journal.happen(wanted, ordered=True)
            except PoolError:
                if before is None:
                    del self._orders[name]
                else:
                    self._orders[name] = before
                raise
        await self._changes.until(lambda: self._settled(name))

    async def reload(self, model: str) -> None:
        """Reload a parked model, without waiting for it. Does nothing for any other model.

        Raises `SetupError` while there is too little memory for it.
        """
        self._require_open()
        async with self._ordering:
            order = self._orders.get(model)
            if order is not None and model in self._journal.state.parked:
                await self._admit(order)
                await self._journal.happen(_wanted(order), ordered=True)

    async def unload(self, model: str) -> None:
        self._require_open()
        async with self._ordering:
            await self._journal.happen(ModelUnwanted(model), ordered=True)
            self._orders.pop(model, None)
            await self._changes.announce()
            await self._store.remove(model)

    def _settled(self, model: str) -> bool:
        """Whether every browser that may still serve `model` has loaded it, or has failed to."""
        for record in self._journal.state.browsers.values():
            if record.phase in COMING:
                return False
            if record.phase is Phase.READY and record.models.get(model) is ModelPhase.LOADING:
                return False
        return True


def _wanted(order: ModelOrder) -> ModelWanted:
    return ModelWanted(order.spec.name, order.spec.digest, order.spec.type, order.placing)
