"""The loaded models of a pool, as known to one client.

Loading sends the order for a model, or each of its parts, to the supervisor, and waits until every
browser has loaded its own; other clients' loads and unloads are read from the routing table. This
module must not run a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.supervisor.records import ModelOrder
from pool.config import backend_order
from pool.connection import Connection
from pool.models.loading import Part, load_options, read_parts
from pool.models.registry import ModelEntry, ModelRegistry, entry_from_plain, entry_to_plain
from pool.models.tokens import TextEncoder, encoder_for
from recovery.control import COMING, ModelPhase, PoolState
from recovery.errors import (
    BadInput,
    CallerError,
    LevelUnavailable,
    PageError,
    PoolError,
    UnknownModel,
)
from recovery.kinds import Backend, Level, ModelType
from recovery.levels import BROWSERS_NEEDED, LEVELS_ASCENDING
from recovery.placement import Placing
from sharding.models.inputs import check_inputs
from sharding.models.known_answers import Recorded
from sharding.models.signature import ModelSpec
from sharding.sequences.stages import STAGE_MARK

_LOG = logging.getLogger("tabpool")


class ModelCatalog:
    """Loaded models by name, with their tokenizers."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._registry = ModelRegistry()
        self._encoders: dict[str, TextEncoder | None] = {}
        self._loading: dict[str, int] = {}  # loads in progress, by model

    async def load(
        self,
        name: str,
        path: str | Path,
        *,
        type: str | ModelType | None,  # noqa: A002
        backend: str | None,
        example: Mapping[str, Any] | None,
        shards: int | None,
        strategy: str | None,
    ) -> ModelEntry:
        """See `BrowserPool.load`."""
        connection = self._connection
        asked = load_options(name, path, type, example, shards, strategy)
        backends = backend_order(connection.config.backend if backend is None else backend)
        connection.require()
        entry, parts = await asyncio.to_thread(
            read_parts, asked.name, asked.path, asked.type, asked.shards, asked.strategy
        )
        if asked.example is not None:
            if entry.in_parts:
                raise BadInput(
                    "example: not supported for a model in parts; omit example=.", got="example"
                )
            parts = (replace(parts[0], tried=check_inputs(entry.spec, asked.example)),)
        self._adopt()
        known = name in self._registry.names()
        self._keep(entry)
        supervisor, routing = connection.require()
        self._loading[name] = self._loading.get(name, 0) + 1
        try:
            recorded = [await self._recorded(part) for part in parts]
            entry = replace(entry, warnings=_warnings(entry, parts, recorded))
            orders = [
                self._order(entry, part, backends, answer)
                for part, answer in zip(parts, recorded, strict=True)
            ]
            loads = asyncio.gather(*map(supervisor.load, orders))
            await routing.unless_gone(loads)
            table = await connection.table_when(
                lambda table: all(_settled(table.state, part) for part in entry.parts),
                connection.config.load_seconds,
            )
        except BaseException as error:
            # It may have been unloaded meanwhile, the pool closed, or another loaded by that name.
            now = self._registry.get(name) if name in self._registry.names() else None
            if not known and (now is None or now.spec.digest == entry.spec.digest):
                if now is not None:
                    self._forget(name)
                if not isinstance(error, CallerError):  # withdraw the order
                    with contextlib.suppress(PoolError):  # keep the first error
                        for part in entry.parts:
                            await routing.unless_gone(supervisor.unload(part))
            raise
        finally:
            self._loading[name] -= 1
            if not self._loading[name]:
                del self._loading[name]
        for part in entry.parts:
            why = self._too_few(table.state, part)
            if why is not None:
                if not known:
                    await self.unload(name)
                raise why
        return entry

    async def _recorded(self, part: Part) -> Recorded:
        """Its known answer, if browsers are asked any. Who stops waiting stops the recording."""
        if not self._probes:
            return Recorded(None)
        recording = part.recording()
        try:
            return await asyncio.to_thread(recording.run)
        finally:
            recording.stop()

    def _order(
        self, entry: ModelEntry, part: Part, backends: tuple[Backend, ...], recorded: Recorded
    ) -> ModelOrder:
        copies = BROWSERS_NEEDED[self._connection.level]
        placing = Placing(copies, entry.name) if entry.in_parts else None
        return ModelOrder(part.spec, backends, entry_to_plain(entry), recorded.answer, placing)

    @property
    def _probes(self) -> bool:
        """Whether to probe known answers: from level medium on, unless probe_seconds is 0."""
        level, config = self._connection.level, self._connection.config
        return (
            LEVELS_ASCENDING.index(level) >= LEVELS_ASCENDING.index(Level.MEDIUM)
            and config.probe_seconds > 0
        )

    def _too_few(self, state: PoolState, part: str) -> PoolError | None:
        """The error if a model, or a part of one, is on fewer browsers than the level needs."""
        config = self._connection.config
        records = [r for r in state.browsers.values() if part in r.models]
        loaded = sum(r.models[part] is ModelPhase.LOADED for r in records)
        needed = BROWSERS_NEEDED[self._connection.level] if config.strict else 1
        if loaded >= needed:
            return None
        why = "; ".join(
            f"{r.id}: {r.load_failures.get(part, r.phase)}"
            for r in records
            if r.models[part] is not ModelPhase.LOADED
        )
        if loaded:
            return LevelUnavailable(
                f"level {config.level} needs {part} on {needed} browsers, and {loaded} "
                f"could load it ({why}). Pass strict=False to run below that level.",
                level=config.level,
            )
        return PageError(
            f"no browser could load {part}: {why or 'none is running'}", what="load_failed"
        )

    async def order_again(self, name: str) -> None:
        """Repeat the order to load a model; changes nothing where it is loaded.

        Raises `UnknownModel`, and `PoolError` while the order can't be logged.
        """
        supervisor, routing = self._connection.require()
        orders = [routing.models().get(part) for part in self._loaded(name).parts]
        known = [order for order in orders if order is not None]
        await routing.unless_gone(asyncio.gather(*map(supervisor.load, known)))

    async def unload(self, name: str) -> None:
        """Unload a model from every browser. Raises `UnknownModel`."""
        supervisor = self._connection.supervisor
        parts = self._loaded(name).parts
        self._forget(name)
        for part in parts:
            await supervisor.unload(part)
        await self._connection.table_when(
            lambda table: not table.models.keys() & set(parts), self._connection.config.lease
        )

    def clear(self) -> None:
        """Forget all models, when the client disconnects."""
        self._registry = ModelRegistry()
        self._encoders.clear()

    def names(self) -> tuple[str, ...]:
        """The names of the loaded models."""
        self._adopt()
        return tuple(self._registry.names())

    def entry(self, name: str) -> ModelEntry:
        """The model of this name: a loaded one, or a component of one.

        Raises `UnknownModel`.
        """
        whole, mark, _ = str(name).partition(STAGE_MARK)
        if not mark:
            return self._loaded(name)
        components = {one.name: one for one in self._loaded(whole).component_entries()}
        if name not in components:
            raise UnknownModel(
                f"{whole} has no component {name!r}; it has {', '.join(components) or 'none'}.",
                expected=list(components),
                got=name,
            )
        return components[name]

    def encoder(self, name: str) -> TextEncoder | None:
        """The tokenizer of a model, if it has one."""
        return self._encoders.get(name)

    def part_specs(self, entry: ModelEntry) -> tuple[ModelSpec, ...]:
        """The specs that browsers load for it now. Raises `UnknownModel` if a part was unloaded."""
        orders = self._connection.routing.models()
        for part in entry.parts:
            if part not in orders:  # unloaded by another client
                raise UnknownModel(
                    f"{part} is no longer loaded: another client unloaded it.", got=part
                )
        return tuple(orders[part].spec for part in entry.parts)

    def _loaded(self, name: str) -> ModelEntry:
        try:
            return self._registry.get(name)
        except UnknownModel:
            self._adopt()
            return self._registry.get(name)

    def _adopt(self) -> None:
        """Add models that other clients loaded, and remove those that they unloaded."""
        routing = self._connection.known_routing
        if routing is None or routing.table is None:
            return
        plain = {str(order.entry["spec"]["name"]): order for order in routing.models().values()}
        for name in self._registry.names():
            known = self._registry.get(name).spec.digest
            if name not in self._loading and (
                name not in plain or plain[name].entry["spec"]["digest"] != known
            ):
                self._forget(name)
        for name, order in plain.items():
            if name not in self._registry.names():
                self._keep(entry_from_plain(order.entry))

    def _keep(self, entry: ModelEntry) -> None:
        self._registry.add(entry)
        for one in (entry, *entry.component_entries()):
            self._encoders[one.name] = encoder_for(one)

    def _forget(self, name: str) -> None:
        entry = self._registry.remove(name)
        for one in (entry, *entry.component_entries()):
            self._encoders.pop(one.name, None)


def _warnings(
    entry: ModelEntry, parts: Sequence[Part], recorded: Sequence[Recorded]
) -> tuple[str, ...]:
    """What each part without a known answer is loaded without, and why; logged, too."""
    remedy = "" if entry.in_parts else " Pass valid inputs of a usual size to load() as example=."
    found = tuple(
        f"{part.spec.name} has no known answer, so its browsers are not compared with native "
        f"onnxruntime: {each.why}.{remedy}"
        for part, each in zip(parts, recorded, strict=True)
        if each.why
    )
    for warning in found:
        _LOG.warning(warning)
    return found


def _settled(state: PoolState, model: str) -> bool:
    return model in state.models and not any(
        record.phase in COMING or record.models.get(model) is ModelPhase.LOADING
        for record in state.browsers.values()
    )
