"""The models of a browser: loading, verifying, warming up and releasing them.

A model's files are described by its spec; the page gets their digests. This module must not run
an operation.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from actors.assets import integrity, model_url
from actors.browser.breakers import HostBreakers
from actors.browser.incarnation import Incarnation
from actors.browser.page import Page
from actors.browser.page_process import PageProcess
from actors.browser.probes import Probes
from actors.injection.injector import BrowserFailureInjector
from actors.messages import HostConfig
from recovery.errors import PageError
from recovery.kinds import Backend
from recovery.records import BrowserFacts, HostRef, NumericId
from sharding.models.known_answers import ASK_NOTHING, KnownAnswer, difference, question
from sharding.models.signature import ModelSpec, digest_of

_CHECKED_MAX = 1024  # files of models that are known to be unchanged


class LoadedModels:
    """The models of the current incarnation. Loads and unloads run one at a time, in order."""

    def __init__(
        self,
        incarnation: Incarnation,
        page: Page,
        process: PageProcess,
        breakers: HostBreakers,
        injector: BrowserFailureInjector,
        config: HostConfig,
        clock: Callable[[], float],
    ) -> None:
        self.probes = Probes()
        self.numeric: dict[str, NumericId] = {}  # by model
        self.specs: dict[str, ModelSpec] = {}
        self._incarnation = incarnation
        self._page = page
        self._process = process
        self._breakers = breakers
        self._injector = injector
        self._config = config
        self._clock = clock
        self._warm_runs = config.warm_runs
        self._used_at: dict[str, float] = {}
        self._checked: dict[tuple[str, str], tuple[int, ...]] = {}
        self._latest: ModelSpec | None = None  # last loaded or released: its end may be judged late
        self._turn = asyncio.Lock()  # an unload must not overtake an earlier load

    def begin(self, *, warm: bool) -> None:
        """A new incarnation, without models. `warm`: whether to run each several times at load."""
        self._warm_runs = self._config.warm_runs if warm else 1
        self.numeric, self.specs, self._latest = {}, {}, None
        self.probes.clear()

    @property
    def busy(self) -> bool:
        """Whether a model is being loaded or released."""
        return self._turn.locked()

    def used(self, model: str) -> None:
        """Note that an operation of the model has just ended."""
        self._used_at[model] = self._clock()

    def idle_seconds(self, since: float) -> dict[str, float]:
        """Idle time of each model; since `since` for those never used."""
        now = self._clock()
        return {name: now - self._used_at.get(name, since) for name in self.numeric}

    def facts_of(self, model: str) -> dict[str, str]:
        """Facts of a model to include in its failures, as far as they are known."""
        facts = {"model": model}
        spec = self.specs.get(model) or self._latest
        if spec is not None and spec.name == model:
            facts["model_type"] = str(spec.type)
        if model in self.numeric:
            numeric = self.numeric[model]
            facts |= {"backend": str(numeric.backend), "adapter": numeric.adapter}
        return facts

    async def load(
        self,
        ref: HostRef,
        spec: ModelSpec,
        backends: tuple[Backend, ...],
        known: KnownAnswer | None,
    ) -> NumericId:
        """Load a model and warm it up; see `BrowserHost.load`."""
        async with self._turn:
            self._incarnation.require(ref)
            self._latest = spec
            return await self._load(ref, spec, backends, known)

    async def _load(
        self,
        ref: HostRef,
        spec: ModelSpec,
        backends: tuple[Backend, ...],
        known: KnownAnswer | None,
    ) -> NumericId:
        self._page.bridge.register(spec)
        await asyncio.to_thread(check_unchanged, spec, self._checked)
        used = self._process.measure()
        asked = question(spec, known)
        if known == ASK_NOTHING:
            known = None
        try:
            async with asyncio.timeout(self._config.load_seconds):
                reply = await self._page.ask("load", self._order(spec, backends), asked)
        except TimeoutError as error:
            raise PageError(
                f"{spec.name} was not loaded and warmed up within {self._config.load_seconds:g} s; "
                "raise `load_seconds`, pass `example=` (made-up inputs may be slow ones) or cut "
                "the model into shards",
                what="load_failed",
            ) from error
        numeric = self._numeric_id(reply.body)
        self._incarnation.require(ref)
        warmed = not reply.body.get("warmError")  # else there is no answer to compare
        if known is not None and warmed and (wrong := difference(known, reply.tensors)):
            await self._page.ask("unload", {"model": spec.name})
            raise PageError(
                f"{spec.name} computes a different answer here than native onnxruntime: {wrong}",
                what="wrong_answer",
                model=spec.name,
            )
        self.probes.learn(spec, numeric, asked, reply.tensors if known and warmed else {})
        await self._injector.page_is_ready(partial(self._page.ask, "fault"))
        # The process that loaded and warmed up the model serves the page.
        self._process.name(used)
        self.numeric[spec.name], self.specs[spec.name] = numeric, spec
        self.used(spec.name)
        return numeric

    def _order(self, spec: ModelSpec, backends: tuple[Backend, ...]) -> dict[str, object]:
        return {
            "model": spec.name,
            "digest": spec.digest,
            "files": [
                {
                    "url": model_url(spec, number),
                    "paths": [file.name, *file.spellings],
                    "integrity": integrity(file),
                }
                for number, file in enumerate(spec.files)
            ],
            "backends": [str(each) for each in worth_trying(backends, self._incarnation.facts)],
            "caches": [asdict(cache) for cache in spec.caches],
            "warm": {"warmRuns": self._warm_runs, "warmMs": self._config.warm_ms},
        }

    def _numeric_id(self, body: Mapping[str, object]) -> NumericId:
        facts = self._incarnation.facts
        assert facts is not None
        backend = Backend(str(body["backend"]))
        return NumericId(
            ort_build=str(body["build"]),
            backend=backend,
            threads=facts.threads,
            adapter=facts.webgpu_adapter if backend is Backend.WEBGPU else "",
        )

    async def unload(self, ref: HostRef, model: str) -> None:
        """Release a model's session. Unknown models are no error."""
        async with self._turn:
            self._incarnation.require(ref)
            self.numeric.pop(model, None)
            self._used_at.pop(model, None)
            self.probes.forget(model)
            self._breakers.forget(model)
            spec = self.specs.pop(model, None)
            if spec is not None:
                self._latest = spec
                await self._page.ask("unload", {"model": model})
                self._page.bridge.unregister(spec)


def worth_trying(backends: tuple[Backend, ...], facts: BrowserFacts | None) -> tuple[Backend, ...]:
    """The back ends that this page has; a single (forced) one is tried in any case.

    A software WebGPU adapter is 7 to 25 times slower than WASM, so it must be forced.
    """
    if len(backends) == 1 or facts is None:
        return backends
    has = {
        Backend.WASM: True,
        Backend.WEBGPU: facts.webgpu and not facts.webgpu_software,
        Backend.WEBNN: facts.webnn,
    }
    return tuple(backend for backend in backends if has.get(backend, False))


def check_unchanged(spec: ModelSpec, checked: dict[tuple[str, str], tuple[int, ...]]) -> None:
    """Raises `PageError` if a file of the model is no longer the one that was registered.

    `checked` caches verified files by path and digest, so that a repair need not read unchanged
    files again.
    """
    for file in spec.files:
        for packed in (f"{file.path}.gz", f"{file.path}.br"):
            if os.path.exists(packed):
                raise PageError(
                    f"{packed} is beside the model, and the server would send it instead: "
                    "move it to another folder",
                    what="load_failed",
                )
        stat = os.stat(file.path)
        seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if checked.get((file.path, file.digest)) == seen:
            continue
        if digest_of(Path(file.path))[1] != file.digest:
            raise PageError(
                f"{file.path} has changed since {spec.name} was loaded: unload the model and "
                "load it again",
                what="load_failed",
            )
        if len(checked) >= _CHECKED_MAX:
            checked.clear()
        checked[file.path, file.digest] = seen
