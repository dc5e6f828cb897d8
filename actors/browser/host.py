"""One browser: the owner of its processes, its Selenium session and its bridge.

A plain class, wrapped as a Ray actor in `actors.ray.workers`. It launches when ordered, answers
operations, notices every death at once and reports it; it bounds its own queue, and refuses what
its circuit breakers refuse. What it reports is numbered and kept until a supervisor acknowledges
it, so that none is lost with a supervisor. It must not decide what follows from a failure: the
supervisor does.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import math
import os
import sys
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from actors.assets import integrity, model_url
from actors.bridge import Bridge, BridgeEvent, PageConfig
from actors.browser.breakers import Admission, HostBreakers
from actors.browser.probes import Probes
from actors.dataplane import DataServer
from actors.driver.arguments import Gpu, LaunchSettings, default_settings
from actors.driver.binaries import Binaries, find_binaries
from actors.driver.death_watch import DeathWatch
from actors.driver.processes import (
    BrowserProcesses,
    Warden,
    WardenOrder,
    busiest,
    cpu_seconds,
    page_processes,
)
from actors.driver.profiles import new_profile_path, save_template, template_lock, template_path
from actors.driver.session import Session, driver_command, free_port
from actors.injector import BrowserFailureInjector, Victim
from actors.messages import (
    Examination,
    HostConfig,
    HostEvent,
    HostReport,
    LaunchOrder,
    LaunchReport,
    RunReply,
    RunRequest,
    Wear,
)
from recovery.adjustments import merge_arguments
from recovery.breaker import BreakerKey, CircuitState, Snapshot
from recovery.errors import (
    BrowserError,
    BrowserLost,
    CallerError,
    LaunchFailed,
    PageError,
    PoolError,
    SetupError,
    StaleTerm,
)
from recovery.failures import Category, Failure, Scope, categorize_browser_failure
from recovery.faults import Fault, Injected
from recovery.kinds import Backend, BrowserType, Readiness
from recovery.records import BrowserFacts, HostRef, HostStatus, NumericId
from recovery.resources import BrowserLoad, NodeLoad
from recovery.sequences import ELSEWHERE
from sharding.models.frames import Frame
from sharding.models.known_answers import KnownAnswer, difference, question
from sharding.models.signature import ModelSpec

_OUTAGE_JUDGED_SECONDS = 0.15  # after which an outage is one, and no death
_SOCKET_TO_EXIT_SECONDS = 0.005  # a process's sockets close a moment before its exit is visible
_PAGE_EXIT_SECONDS = 1.0  # a page process that ended within so much before a close explains it
_NAME_AGAIN_SECONDS = 0.5  # between two looks at which process serves the page
_PING_AGAIN_SECONDS = 0.005
_EVENTS_MAX = 256  # not yet acknowledged
_CHECKED_MAX = 1024  # files of models that are known to be unchanged
_WATCHDOG_SECONDS_MAX = 0.5
_WATCHDOG_SECONDS_MIN = 0.01
_XVFB_ARGUMENTS = ("-screen", "0", "1024x768x24", "-nolisten", "tcp", "-noreset")
_QUIT_SECONDS = 10.0
_SCREENSHOT_SECONDS = 3.0
_TEMPLATE_WARM_SECONDS = 5.0
_TEMPLATE_SETTLE_SECONDS = 3.0


def host_settings(kind: BrowserType, config: HostConfig) -> LaunchSettings:
    """The launch settings of a healthy browser of this kind on this machine."""
    return default_settings(
        kind,
        headless=config.headless,
        gpu=config.gpu,
        root=hasattr(os, "geteuid") and os.geteuid() == 0,
        small_shm=_shm_bytes() < 1 << 30,
    )


def _shm_bytes() -> int:
    try:
        stat = os.statvfs("/dev/shm")
    except (OSError, AttributeError):
        return 1 << 30
    return stat.f_frsize * stat.f_blocks


class BrowserHost:
    """A slot of the pool, in all its incarnations while this process lives."""

    def __init__(
        self,
        browser_id: str,
        kind: BrowserType,
        config: HostConfig,
        on_lease_lost: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        node: str = "",
    ) -> None:
        self._ref = HostRef(browser_id, -1)
        self._node = node
        self._data = DataServer(self.run, config.message_bytes_max)
        self._kind = kind
        self._config = config
        self._on_lease_lost = on_lease_lost
        self._clock = clock
        self._wall = wall
        self._term = 0
        self._readiness = Readiness.STARTING
        self._injector = BrowserFailureInjector(config.faults, wall)
        self._binaries: Binaries | None = None
        self._bridge: Bridge | None = None
        self._warden: Warden | None = None
        self._session: Session | None = None
        self._watch = DeathWatch()
        self._cleanups: set[asyncio.Task[None]] = set()
        self._lease_until = 0.0
        self._lease_task: asyncio.Task[None] | None = None
        self._watchdog_task: asyncio.Task[None] | None = None
        self._events: deque[HostEvent] = deque(maxlen=_EVENTS_MAX)  # the oldest is dropped
        self._seq = 0
        self._news = asyncio.Event()  # set, and replaced, with every event
        self._breakers = HostBreakers(browser_id, config.breaker, self._on_breakers, clock, wall)
        self._outage: asyncio.Task[None] | None = None  # from a socket's close to both being open
        self._out_of_touch: Failure | None = None  # while it lasts
        self._page_ended = asyncio.Event()
        self._judged = asyncio.Event()  # clear while it isn't known what an outage is
        self._judged.set()
        self._page_ended_at = -math.inf
        self._probing: asyncio.Task[None] | None = None
        self._page_pids: tuple[int, ...] = ()  # processes that may serve the page
        self._page_pid = 0  # the one that does, once it has shown by its work
        self._cpu_used: dict[int, float] = {}  # by each of them, when last looked at
        self._named_at = -math.inf
        self._memory_bytes = 0
        self._cause: Failure | None = None  # why the present incarnation is over
        self._ended_by: Category | None = None  # the incarnation before it
        self._probed: LaunchSettings | None = None  # what `_facts` were probed with
        self._models: dict[str, NumericId] = {}
        self._probes = Probes()
        self._ready_at = self._clock()
        self._used_at = -math.inf  # when an operation was last sent here
        self._model_used_at: dict[str, float] = {}
        self._served_before = 0  # by earlier incarnations
        self._specs: dict[str, ModelSpec] = {}
        self._checked: dict[tuple[str, str], tuple[int, ...]] = {}
        self._in_flight: OrderedDict[str, asyncio.Task[RunReply]] = OrderedDict()
        self._steps: dict[str, asyncio.Future[None]] = {}  # of sequences, under way
        self._answers: OrderedDict[str, RunReply] = OrderedDict()
        self._answer_bytes = 0
        self._served = 0
        self._asked = 0
        self._pings: set[asyncio.Task[None]] = set()
        self._page_closed: asyncio.Future[None] | None = None
        self._pids: dict[str, int] = {}
        self._facts: BrowserFacts | None = None
        self._warm_runs = config.warm_runs
        self._launching: asyncio.Task[LaunchReport] | None = None
        self._launched: asyncio.Task[LaunchReport] | None = None  # the same, with its errors told
        self._report: LaunchReport | None = None  # while the incarnation is ready
        self._loading = asyncio.Lock()  # an unload must not overtake the load before it

    # -- launching --------------------------------------------------------------------------------

    async def launch(self, order: LaunchOrder) -> LaunchReport:
        """Become the incarnation `order.ref`, with whatever was there before ended.

        The launch goes on when this call is abandoned. The same order again joins it, or gets
        what it came to. Raises `StaleTerm`, `SetupError` (something is not installed),
        `LaunchFailed`, or `BrowserLost` if the incarnation was launched and has ended.
        """
        self._accept_term(order.term)
        if order.ref != self._ref or self._launched is None:
            self._begin_launch(order)
        assert self._launched is not None
        report = await asyncio.shield(self._launched)
        if order.ref != self._ref or self._report is None:
            raise self._why_ended(order.ref)
        return report

    def _begin_launch(self, order: LaunchOrder) -> None:
        if order.ref.epoch <= self._ref.epoch:
            raise StaleTerm(f"{order.ref} was ordered, but {self._ref} has been here")
        fresh = self._launched is None
        self._retire()
        self._ended_by = self._cause.category if self._cause else None
        self._ref, self._cause = order.ref, None
        self._warm_runs = self._config.warm_runs if order.warm else 1
        self._readiness = Readiness.STARTING
        self._models, self._specs = {}, {}
        self._probes.clear()
        if fresh:  # else this worker's own breakers know better
            self._breakers.restore(order.breakers)
            if order.death is not None:
                self._breakers.observe(order.death)
        self._launching = asyncio.create_task(self._launch(order), name=f"launch {order.ref}")
        self._launched = asyncio.create_task(
            self._launch_in_time(order.ref, self._launching), name="launched"
        )
        self._launched.add_done_callback(_note_error)

    async def _launch_in_time(
        self, ref: HostRef, launching: asyncio.Task[LaunchReport]
    ) -> LaunchReport:
        try:
            async with asyncio.timeout(self._config.launch_seconds):
                report = await launching
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                self._retire_if(ref)
                raise  # the event loop ends
            raise self._why_not_launched(ref) from None
        except TimeoutError as error:
            self._retire_if(ref)
            raise LaunchFailed(
                f"{self._kind} was not ready within {self._config.launch_seconds:g} s. "
                "The machine may be overloaded: raise `launch_seconds`, or see `tabpool doctor`.",
                console=self._console(),
            ) from error
        except OSError as error:
            self._retire_if(ref)
            raise SetupError(
                f"{self._kind} could not be launched: {error}. Check that the cache directory "
                "(TABPOOL_CACHE) and the temporary directory can be written and have space."
            ) from error
        except PoolError as error:
            self._retire_if(ref)
            if isinstance(error, BrowserLost):  # lost while launching is not launched
                raise LaunchFailed(str(error), console=self._console()) from error
            raise
        if self._ref != ref or self._readiness is not Readiness.STARTING:
            raise self._why_not_launched(ref)  # it ended in the moment it was ready
        self._readiness, self._report = Readiness.READY, report
        self._ready_at, self._served_before = self._clock(), self._served
        return report

    def _why_not_launched(self, ref: HostRef) -> BrowserError:
        cause = self._cause
        if cause is not None and cause.ref == ref:
            return LaunchFailed(f"{ref} ended while it launched: {cause.message}")
        return BrowserLost(f"{ref} was stopped while it launched")

    def _why_ended(self, ref: HostRef) -> BrowserError:
        cause = self._cause
        if cause is not None and cause.ref == ref:
            what = cause.evidence.get("what", "page_closed")
            return BrowserLost(f"{ref} was launched, and has ended: {cause.message}", what=what)
        return BrowserLost(f"{ref} was launched, and was stopped", what="replaced")

    async def _launch(self, order: LaunchOrder) -> LaunchReport:
        marks = {"begun": self._clock()}
        binaries = find_binaries(self._kind, headless=self._config.headless)
        self._binaries = binaries
        settings = _with_order(host_settings(self._kind, self._config), order)
        if not self._data.address:
            await self._data.start()
        if self._bridge is None:
            bridge = Bridge(
                PageConfig(
                    self._config.threads,
                    self._config.message_bytes_max,
                    probe=self._config.gpu is not Gpu.OFF,
                    faults=self._config.faults,
                ),
                self._on_bridge_event,
            )
            await bridge.start(order.port)
            self._bridge = bridge
        template = template_path(binaries, settings.gpu)
        if not template.is_dir():
            await self._warm_template(binaries, settings, template)
            marks["template"] = self._clock()
        profile = await self._start_browser(binaries, settings, template)
        marks["browser"] = self._clock()
        await self._page_ready()
        marks["page"] = self._clock()
        if order.warm:
            await self._warm_page()
        facts, _ = await asyncio.gather(
            self._facts_of(order, settings), self._watch_page(order.ref)
        )
        self._facts, self._probed = facts, settings
        marks["warm"] = self._clock()
        self._watchdog_task = asyncio.create_task(self._watchdog(order.ref), name="watchdog")
        if self._config.probe_seconds:
            self._probing = asyncio.create_task(self._probe_loop(order.ref), name="probes")
        names = list(marks)
        seconds = {b: marks[b] - marks[a] for a, b in itertools.pairwise(names)}
        return LaunchReport(
            facts,
            self._bridge.port,
            seconds,
            dict(self._pids),
            profile,
            self._node,
            self._data.address,
            self._data.token,
            self._session.driver_url if self._session else "",
            self._session.id if self._session else "",
        )

    async def _start_browser(
        self, binaries: Binaries, settings: LaunchSettings, template: Path | None
    ) -> str:
        """Start driver, browser and page on a new profile, and watch their processes.

        Returns the profile's path. Raises `LaunchFailed`.
        """
        bridge = self._require_bridge()
        # Chromium keys its code cache by origin. A made-up host that resolves to the slot's port
        # gives every slot the same origin, so that one template serves them all.
        host = f"127.0.0.1:{bridge.port}"
        if settings.kind in (BrowserType.CHROME, BrowserType.EDGE):
            rule = f"--host-resolver-rules=MAP tabpool.localhost:80 127.0.0.1:{bridge.port}"
            settings, host = settings.adjusted((rule,)), "tabpool.localhost"
        self._page_closed = asyncio.get_running_loop().create_future()
        enter = bridge.begin_epoch(self._ref.epoch, host)
        warden = self._warden = Warden()
        profile = new_profile_path()
        port = free_port()
        environment = {**settings.environment, **_private_directories(binaries, Path(profile))}
        command = driver_command(binaries, port)
        xvfb = [binaries.xvfb, *_XVFB_ARGUMENTS] if binaries.xvfb else None
        order = WardenOrder(
            command, xvfb, profile, str(template) if template else None, environment
        )
        await warden.start(order, self._on_exit(self._ref, warden))
        started = self._injector.launched_with(binaries, Path(profile))
        session = self._session = Session(settings, started, Path(profile))
        self._pids = {"driver": warden.driver_pid}  # a driver that ends at once is noticed at once
        await session.start(port)
        self._pids = {
            "driver": warden.driver_pid,
            "browser": session.browser_pid or _only_child(warden),
            "warden": warden.pid,
            "worker": os.getpid(),
        }
        ref = self._ref
        for name in ("driver", "browser"):
            if self._pids[name]:
                self._watch.add(self._pids[name], partial(self._lost, ref, f"{name}_exited"))
        await session.open(f"http://{host}{enter}")
        return profile

    async def _page_ready(self) -> None:
        assert self._page_closed is not None
        opened = asyncio.ensure_future(self._require_bridge().opened())
        try:
            await asyncio.wait({opened, self._page_closed}, return_when=asyncio.FIRST_COMPLETED)
            if not opened.done():
                raise LaunchFailed(f"the page of {self._kind} ended while it loaded")
            await opened
        finally:
            opened.cancel()

    async def _watch_page(self, ref: HostRef) -> None:
        """Notice when a process ends that may be the page's. Whether it was, its sockets tell."""
        if self._warden is None or sys.platform != "linux":
            return  # elsewhere each watch costs a thread: there a reconnect that fails must do
        processes = await asyncio.to_thread(page_processes, self._warden.tree, self._kind)
        if ref == self._ref and self._readiness is not Readiness.DEAD:
            self._page_pids = tuple(pid for pid in processes if pid not in self._pids.values())
            for pid in self._page_pids:
                self._watch.add(pid, partial(self._page_process_ended, ref, pid))

    async def _warm_page(self, seconds: float = 0.0) -> None:
        await self._ask("warm", {"backend": str(Backend.WASM), "seconds": seconds})

    async def _facts_of(self, order: LaunchOrder, settings: LaunchSettings) -> BrowserFacts:
        """What the page has. Probing takes 0.3 s, which a repair of the same browser can save."""
        known, was = self._facts, self._ended_by
        same = known is not None and self._probed == settings and known.version == self._version()
        if known is None or not same or order.warm or was is Category.GPU_ERROR:
            return await self._page_facts()
        return known

    def _version(self) -> str:
        capabilities = self._session.capabilities if self._session else {}
        return str(capabilities.get("browserVersion", ""))

    async def _page_facts(self) -> BrowserFacts:
        page = (await self._ask("info", {})).body
        assert self._session is not None
        capabilities = self._session.capabilities
        driver = capabilities.get("chrome", {}).get("chromedriverVersion", "") or capabilities.get(
            "moz:geckodriverVersion", ""
        )
        return BrowserFacts(
            product=_product(self._kind, self._binaries, capabilities),
            version=self._version(),
            driver=str(driver).split(" ")[0],
            isolated=bool(page.get("isolated")),
            wasm_simd=bool(page.get("wasmSimd")),
            wasm_threads=bool(page.get("wasmThreads")),
            threads=int(page.get("threads", 1)),
            webgpu=bool(page.get("webgpu")),
            webgpu_adapter=str(page.get("webgpuAdapter", page.get("webgpuNote", ""))),
            webgpu_software=bool(page.get("webgpuSoftware")),
            webgpu_features=tuple(page.get("webgpuFeatures", ())),
            webnn=bool(page.get("webnn")),
            webnn_note=str(page.get("webnnNote", "")),
            user_agent=str(page.get("userAgent", "")),
        )

    async def _warm_template(
        self, binaries: Binaries, settings: LaunchSettings, template: Path
    ) -> None:
        """Launch once on an empty profile, let caches fill, quit in order, keep the profile."""
        async with template_lock(template):
            if await asyncio.to_thread(template.is_dir):
                return  # another browser has warmed it while we waited
            profile = await self._start_browser(binaries, settings, None)
            await self._page_ready()
            await self._warm_page(_TEMPLATE_WARM_SECONDS)
            # Chromium writes compiled code to its cache when no function was optimised for 2 s.
            await asyncio.sleep(_TEMPLATE_SETTLE_SECONDS)
            session, warden = self._session, self._warden
            assert session is not None
            assert warden is not None
            self._session = self._warden = None
            self._forget()
            try:
                with contextlib.suppress(BrowserLost, TimeoutError):
                    async with asyncio.timeout(_QUIT_SECONDS):
                        await session.quit()
            finally:
                # Copied to its end, whatever happens meanwhile: the warden removes the source.
                saving = asyncio.ensure_future(asyncio.to_thread(save_template, profile, template))
                await asyncio.wait({saving})
                session.close()
                await warden.end()
            if saving.exception() is not None:  # a launch without a template is only slower
                bridge = self._require_bridge()
                bridge.console.append(f"no profile template: {saving.exception()}")

    # -- models -----------------------------------------------------------------------------------

    async def load(
        self,
        ref: HostRef,
        term: int,
        spec: ModelSpec,
        backends: tuple[Backend, ...],
        known: KnownAnswer | None = None,
    ) -> NumericId:
        """Load a model and warm it up; returns what decides its numbers here.

        With a `known` answer the warm-up asks for it, and so will probes later on. Raises
        `BrowserLost` (also when `ref` is not the present incarnation) or `PageError`, whose `what`
        is `wrong_answer` if the page computes something else.
        """
        self._accept_term(term)
        async with self._loading:
            return await self._load(ref, spec, backends, known)

    async def _load(
        self,
        ref: HostRef,
        spec: ModelSpec,
        backends: tuple[Backend, ...],
        known: KnownAnswer | None,
    ) -> NumericId:
        self._require_ref(ref)
        bridge, facts = self._require_bridge(), self._facts
        assert facts is not None
        bridge.register(spec)
        body = {
            "model": spec.name,
            "digest": spec.digest,
            "files": [
                {"url": model_url(spec, number), "path": file.name, "integrity": integrity(file)}
                for number, file in enumerate(spec.files)
            ],
            "backends": [str(backend) for backend in self._worth_trying(backends)],
            "caches": [asdict(cache) for cache in spec.caches],
            "warm": {"warmRuns": self._warm_runs, "warmMs": self._config.warm_ms},
        }
        await asyncio.to_thread(_check_unchanged, spec, self._checked)
        used = {} if self._page_pid else cpu_seconds(self._page_pids)
        asked = question(spec, known)
        try:
            async with asyncio.timeout(self._config.load_seconds):
                reply = await self._ask("load", body, asked)
        except TimeoutError as error:
            raise PageError(
                f"{spec.name} was not loaded within {self._config.load_seconds:g} s; "
                "raise `load_seconds` or cut the model into shards",
                what="load_failed",
            ) from error
        numeric = NumericId(
            ort_build=str(reply.body["build"]),
            backend=Backend(reply.body["backend"]),
            threads=facts.threads,
            adapter=facts.webgpu_adapter if reply.body["backend"] == Backend.WEBGPU else "",
        )
        self._require_ref(ref)
        warmed = not reply.body.get("warmError")  # else there is no answer to be judged
        if known is not None and warmed and (wrong := difference(known, reply.tensors)):
            await self._ask("unload", {"model": spec.name})
            raise PageError(
                f"{spec.name} computes something else here than natively: {wrong}",
                what="wrong_answer",
                model=spec.name,
            )
        self._probes.learn(spec, numeric, asked, reply.tensors if known and warmed else {})
        await self._injector.page_is_ready(partial(self._ask, "fault"))
        # Whichever process loaded and warmed the model is the page's: its end is the page's.
        self._name_page(used)
        self._models[spec.name], self._specs[spec.name] = numeric, spec
        self._model_used_at[spec.name] = self._clock()
        return numeric

    def _worth_trying(self, backends: tuple[Backend, ...]) -> tuple[Backend, ...]:
        """Of several back ends those that this page has; a forced one is tried in any case.

        A software WebGPU adapter is 7 to 25 times slower than WASM, so it must be forced.
        """
        facts = self._facts
        if len(backends) == 1 or facts is None:
            return backends
        has = {
            Backend.WASM: True,
            Backend.WEBGPU: facts.webgpu and not facts.webgpu_software,
            Backend.WEBNN: facts.webnn,
        }
        return tuple(backend for backend in backends if has.get(backend, False))

    async def unload(self, ref: HostRef, term: int, model: str) -> None:
        """Release a model's session. Unknown models are no error."""
        self._accept_term(term)
        async with self._loading:
            self._require_ref(ref)
            self._models.pop(model, None)
            self._model_used_at.pop(model, None)
            self._probes.forget(model)
            self._breakers.forget(model)
            spec = self._specs.pop(model, None)
            if spec is not None:
                await self._ask("unload", {"model": model})
                self._require_bridge().unregister(spec)

    # -- operations -------------------------------------------------------------------------------

    async def run(
        self, request: RunRequest, tensors: Mapping[str, np.ndarray[Any, Any]]
    ) -> RunReply:
        """Answer one operation, once: a repeat of an id gets the same answer again.

        Never raises for what a browser does; raises `CallerError` (a message over the limit).
        """
        if request.stage is not None:
            return await self._take_step(request, tensors)
        spec = self._specs.get(request.model)
        digest = request.digest or (spec.digest if spec else "")
        key = f"run:{request.op_id}:{digest[:16]}:{request.model}:{_fingerprint(tensors):08x}"
        answered = self._answers.get(key)
        if answered is not None:
            return replace(answered, status=self.status(), repeated=True)
        running = self._in_flight.get(key)
        if running is None:
            refusal = self._refusal(request)
            if refusal is not None:
                return refusal
            admission = self._breakers.admit(request.model)
            if admission is None:
                return RunReply(self.status(), busy=True)  # `status.blocked` says by what
            running = asyncio.create_task(self._run(key, request, tensors, admission), name=key)
            self._in_flight[key] = running
            running.add_done_callback(lambda _: self._run_ended(key, request.model))
        return replace(await asyncio.shield(running), status=self.status())

    async def _take_step(
        self, request: RunRequest, tensors: Mapping[str, np.ndarray[Any, Any]]
    ) -> RunReply:
        """A step of a sequence. Whether it was taken before, the page knows, which has the caches:
        so nothing is remembered of it here, and each is asked under a name of its own."""
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        admission = self._breakers.admit(request.model)
        if admission is None:
            return RunReply(self.status(), busy=True)
        self._asked += 1
        key = f"step:{request.op_id}:{self._asked}"
        self._steps[key] = asyncio.get_running_loop().create_future()
        try:
            return await self._run(key, request, tensors, admission)
        finally:
            self._steps.pop(key).set_result(None)
            self._run_ended(key, request.model)

    def _name_page(self, used: Mapping[int, float]) -> None:
        """Find out which process serves the page: the one that has worked since `used`.

        The first load is the best evidence, as it compiles the runtime, too; where another
        process was busy meanwhile, the operations that follow tell.
        """
        if self._page_pid or not self._page_pids:
            return
        now = cpu_seconds(self._page_pids)
        self._page_pid = busiest(used, now)
        self._cpu_used, self._named_at = now, self._clock()

    def _run_ended(self, key: str, model: str) -> None:
        self._in_flight.pop(key, None)
        self._used_at = self._model_used_at[model] = self._clock()
        if not self._page_pid and self._used_at - self._named_at > _NAME_AGAIN_SECONDS:
            self._name_page(self._cpu_used)

    def _refusal(self, request: RunRequest) -> RunReply | None:
        if request.ref != self._ref or self._readiness is not Readiness.READY:
            failure = self._failure(
                f"{request.ref} is not here; {self._ref} is {self._readiness}",
                "replaced",
                request.op_id,
            )
            return RunReply(self.status(), failure=failure)
        spec = self._specs.get(request.model)
        if spec is None or (request.digest and request.digest != spec.digest):
            failure = self._failure(f"{request.model} is not loaded", "not_loaded", request.op_id)
            return RunReply(self.status(), failure=failure)
        full = self._queued() >= self._config.queue_max
        return RunReply(self.status(), busy=True) if full else None

    async def _run(
        self,
        key: str,
        request: RunRequest,
        tensors: Mapping[str, np.ndarray[Any, Any]],
        admission: Admission,
    ) -> RunReply:
        ref, begun, queued = self._ref, self._clock(), self._queued()
        if admission.on_trial and (wrong := await self._probe(ref, request.model)) is not None:
            admission.failed(wrong, cured=not request.last)
            return RunReply(self.status(), failure=replace(wrong, op_id=request.op_id))
        stage = request.stage
        body = {"model": request.model, **({"stage": asdict(stage)} if stage else {})}
        position = stage.position if stage else 0
        frame = Frame("run", key, ref.epoch, position=position, body=body, tensors=tensors)
        try:
            async with asyncio.timeout(request.seconds):
                answer = await self._require_bridge().request(frame, self._config.hang_seconds)
        except TimeoutError:
            message = f"no answer within {request.seconds:.1f} s"
            failure = self._failure(
                message, "deadline_passed", request.op_id, ref, model=request.model
            )
            if self._bridge is not None and self._bridge.connected:
                admission.failed(failure, cured=not request.last)
            else:
                admission.abandoned()  # the model can't answer while its page is away
            return RunReply(self.status(), failure=failure)
        except PageError as error:
            return RunReply(self.status(), failure=self._page_failed(error, request, admission))
        except BaseException as error:
            admission.abandoned()
            if isinstance(error, PoolError) and not isinstance(error, CallerError):
                return RunReply(self.status(), failure=await self._failure_of(error, ref, request))
            raise
        admission.succeeded()
        self._served += 1
        reply = RunReply(
            self.status(),
            outputs=answer.tensors,
            answered=True,
            backend=self._models[request.model].backend if request.model in self._models else None,
            in_page_ms=float(answer.body.get("inPageMs", 0.0)),
            host_ms=(self._clock() - begun) * 1e3,
            queued=queued,
        )
        if request.stage is None:
            self._remember(key, reply)
        return reply

    # -- known answers ----------------------------------------------------------------------------

    async def _probe(self, ref: HostRef, model: str) -> Failure | None:
        """Ask for a known answer; why this incarnation is over, if it is not given.

        Only an answer that is wrong says so: a page that is gone or hangs is noticed otherwise.
        """
        known = self._probes.of(model)
        if known is None:
            return None
        self._asked += 1
        body = {"model": model}
        frame = Frame("run", f"probe:{self._asked}", ref.epoch, body=body, tensors=known.asked)
        try:
            reply = await self._require_bridge().request(frame, self._config.hang_seconds)
        except PoolError:
            return None
        wrong = self._probes.judge(known, reply.tensors)
        if not wrong or ref != self._ref or self._readiness is not Readiness.READY:
            return None
        failure = self._failure(
            f"a known answer of {model} came out wrong: {wrong}",
            "wrong_answer",
            "",
            ref,
            model=model,
        )
        self._give_up(failure)
        return failure

    async def _probe_loop(self, ref: HostRef) -> None:
        """While nobody uses it, ask the browser what is known, one model after the other."""
        pause = self._config.probe_seconds
        while self._ref == ref and self._readiness is not Readiness.DEAD:
            await asyncio.sleep(pause)
            free = not self._in_flight and not self._steps and not self._loading.locked()
            idle = free and self._clock() - self._used_at >= pause / 2
            model = self._probes.next_model()
            if idle and model and self._readiness is Readiness.READY:
                await self._probe(ref, model)

    async def inject(
        self, ref: HostRef, fault: Fault | Mapping[str, Any], *, gated: bool = True
    ) -> Injected | None:
        """Break this browser on purpose, as `fault` says; or have the page fail in exactly the
        way that a mapping says (see `actors.faults`).

        Raises `FaultRefused`, `BrowserLost` for another incarnation, or `PageError`.
        """
        self._require_ref(ref)
        if isinstance(fault, Fault):
            victim = self._victim()
            return await self._injector.inject(victim, fault, use_circuit_breaker=gated)
        await self._ask("fault", fault)
        return None

    async def examine(self, *, screenshot: bool = True) -> Examination:
        """What is known of the page now, or was last, for whoever looks into a failure."""
        bridge, session = self._bridge, self._session
        picture = b""
        # WebKitGTK's driver never answers to that, and would be deaf to all else meanwhile.
        seen = screenshot and self._kind is not BrowserType.SAFARI
        if seen and session is not None and self._readiness is not Readiness.DEAD:
            with contextlib.suppress(BrowserLost, TimeoutError):
                async with asyncio.timeout(_SCREENSHOT_SECONDS):
                    picture = await session.screenshot()
        return Examination(
            self._ref,
            self._readiness,
            bridge.visibility if bridge else "",
            self._console(),
            tuple(bridge.frames) if bridge else (),
            self._cause or self._out_of_touch,
            picture,
        )

    def _victim(self) -> Victim:
        if self._session is None:
            raise BrowserLost(f"{self._ref} is not running")
        own = self._breakers.snapshots().get("")
        return Victim(
            self._ref,
            BrowserProcesses(self._kind, dict(self._pids), self._pids.get("warden", 0)),
            self._require_bridge(),
            partial(self._ask, "fault"),
            self._session,
            own.breaker.state if own else CircuitState.CLOSED,
            self._config.message_bytes_max,
            any(numeric.backend is Backend.WEBGPU for numeric in self._models.values()),
        )

    def _page_failed(self, error: PageError, request: RunRequest, admission: Admission) -> Failure:
        what = str(error.fields.get("what", "run_failed"))
        facts = {**error.fields, "model": request.model}
        facts.pop("what", None)
        failure = self._failure(str(error), what, request.op_id, request.ref, **facts)
        if what in ELSEWHERE:  # it was unloaded meanwhile, say: nothing has failed
            admission.abandoned()
        else:
            admission.failed(failure, cured=not request.last)
        if failure.scope is Scope.PAGE:
            self._give_up(failure)  # out of memory, say: it would fail every other one, too
        return failure

    async def _failure_of(self, error: PoolError, ref: HostRef, request: RunRequest) -> Failure:
        # The page is gone, or only its socket; what took it is known a moment later.
        if self._ref == ref and self._cause is None and self._judged.is_set():
            await asyncio.sleep(_SOCKET_TO_EXIT_SECONDS)
        await self._judged.wait()
        if self._cause is not None and self._cause.ref == ref:
            return replace(self._cause, op_id=request.op_id)
        what = str(error.fields.get("what", "page_closed"))
        return self._failure(str(error), what, request.op_id, ref)

    def _remember(self, op_id: str, reply: RunReply) -> None:
        if reply.bytes > self._config.answers_kept_bytes_max:
            return
        self._answers[op_id] = reply
        self._answer_bytes += reply.bytes
        while (
            len(self._answers) > self._config.answers_kept_max
            or self._answer_bytes > self._config.answers_kept_bytes_max
        ):
            self._answer_bytes -= self._answers.popitem(last=False)[1].bytes

    # -- life and death ---------------------------------------------------------------------------

    def _queued(self) -> int:
        """Operations that are not answered, and abandoned ones that the page still computes."""
        under_way = len(self._in_flight) + len(self._steps)
        return max(under_way, self._bridge.outstanding if self._bridge else 0)

    def status(self) -> HostStatus:
        return HostStatus(
            self._ref,
            self._kind,
            self._readiness,
            queue=self._queued(),
            queue_max=self._config.queue_max,
            models=dict(self._models),
            served=self._served,
            term=self._term,
            blocked=self._breakers.blocked(),
            memory_bytes=self._memory_bytes,
        )

    def wear(self) -> Wear:
        """Age, use and memory (as last looked at) of the browser, and memory of the machine."""
        now, memory = self._clock(), psutil.virtual_memory()
        used = max(self._used_at, self._ready_at)
        return Wear(
            BrowserLoad(
                self._ref.browser_id,
                self._ref.epoch,
                self._node,
                age_seconds=now - self._ready_at,
                served=self._served - self._served_before,
                memory_bytes=self._memory_bytes,
                queue=self.status().queue,
                idle_seconds=now - used,
                ready=self._readiness is Readiness.READY,
                kind=str(self._kind),
                models={name: now - self._model_used_at.get(name, used) for name in self._models},
            ),
            NodeLoad(self._node, memory.total, memory.available),
        )

    async def memory_bytes(self) -> int:
        """Resident bytes of the browser's whole process tree; `status` has the latest, too."""
        ref, warden = self._ref, self._warden
        found = await asyncio.to_thread(warden.memory_bytes) if warden else 0
        if ref == self._ref:
            self._memory_bytes = found
        return found

    async def next_event(
        self,
        term: int,
        seconds: float,
        after: int = 0,
        peers: Mapping[BreakerKey, CircuitState] | None = None,
    ) -> HostEvent | None:
        """The first event that is newer than `after`, or None when there was none for `seconds`.

        Events up to `after` are acknowledged and forgotten; others are kept. A number that this
        worker has not reached is another worker's, and acknowledges nothing. `peers` are the
        circuits of the pool's other browsers, for the cap on how many may be open.
        """
        self._accept_term(term)
        if peers is not None:
            self._breakers.note_peers(peers)
        if after > self._seq:
            after = 0
        while self._events and self._events[0].seq <= after:
            self._events.popleft()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    for event in self._events:
                        if event.seq > after:
                            return event
                    await self._news.wait()
        return None

    async def hello(self, term: int) -> HostReport:
        """What is here, for a supervisor whose term begins. Its events are kept as they were."""
        self._accept_term(term)
        return HostReport(
            self._ref,
            self._readiness,
            seq=self._seq,
            launch=self._report,
            models=dict(self._models),
            digests={name: spec.digest for name, spec in self._specs.items()},
            cause=self._cause or self._out_of_touch,
            breakers=self._breakers.snapshots(),
        )

    async def reconnect(self, ref: HostRef, term: int) -> None:
        """Return when the page has its sockets again and answers; at once if it has them.

        Raises `BrowserLost`: its `what` is `socket_closed` if the page did not come back within
        `reconnect_seconds`. The browser is left as it is: what follows is the caller's to decide.
        """
        self._accept_term(term)
        self._require_ref(ref)
        bridge, limit = self._require_bridge(), self._config.reconnect_seconds
        try:
            async with asyncio.timeout(limit):
                await _answers(bridge)
        except TimeoutError as error:
            raise BrowserLost(
                f"the page of {ref} did not open its sockets again within {limit:g} s",
                what="socket_closed",
            ) from error
        self._require_ref(ref)

    async def drain(self, term: int) -> None:
        """Admit nothing more; returns when everything in flight is answered."""
        self._accept_term(term)
        if self._readiness is Readiness.READY:
            self._readiness = Readiness.DRAINING
        under_way: list[asyncio.Future[Any]] = [*self._in_flight.values(), *self._steps.values()]
        if under_way:
            await asyncio.wait(under_way)

    async def stop(self) -> None:
        """End the browser and everything that belongs to it; returns when all is gone.

        The lease runs on: should nobody end this worker, it ends itself.
        """
        self._retire()
        if self._launched is not None:
            await asyncio.wait({self._launched})
        await self._data.stop()
        if self._bridge is not None:
            await self._bridge.stop()
            self._bridge = None
        while self._cleanups:
            await asyncio.gather(*self._cleanups)

    def _accept_term(self, term: int) -> None:
        """Obey the newest supervisor only. Any order of its own also extends the lease."""
        if term < self._term:
            raise StaleTerm(f"term {term} was superseded by {self._term}")
        self._term = term
        self._lease_until = self._clock() + self._config.lease_seconds
        if self._lease_task is None:
            self._lease_task = asyncio.create_task(self._lease_loop(), name="lease")

    async def _lease_loop(self) -> None:
        # The lease is renewed far more often than it ends, so look only when it might have.
        while (left := self._lease_until - self._clock()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
        self._lease_task = None
        await self.stop()
        self._on_lease_lost()

    async def _watchdog(self, ref: HostRef) -> None:
        """See that the page works: its main thread answers pings, its worker ends what it began.

        The main thread never computes, so silence there means that it hangs; a busy worker is
        only hung when it has been at one operation for longer than that may take. An idle one is
        asked now and then for nothing.
        """
        ping: asyncio.Task[None] | None = None
        pause = min(self._config.ping_interval_seconds, _WATCHDOG_SECONDS_MAX)
        bridge = self._require_bridge()
        while self._ref == ref and self._readiness is not Readiness.DEAD:
            await asyncio.sleep(max(min(pause, bridge.overdue()[0]), _WATCHDOG_SECONDS_MIN))
            left, what = bridge.overdue()
            if left <= 0:
                self._lost(ref, "page_hung", f"the worker is stuck in {what.split(':')[0]}")
            if ping is None or ping.done():
                ping = self._pinging(self._ping(ref, bridge))
            if not bridge.outstanding:
                self._pinging(self._ping_worker(bridge))

    def _pinging(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name="ping")
        self._pings.add(task)
        task.add_done_callback(self._pings.discard)
        return task

    async def _ping_worker(self, bridge: Bridge) -> None:
        """Ask a worker that has nothing to do for nothing: should it hang, that is overdue soon."""
        with contextlib.suppress(PoolError):
            self._asked += 1
            frame = Frame("ping", f"ping:{self._asked}", self._ref.epoch)
            await bridge.request(frame, self._config.hang_seconds)

    async def _ping(self, ref: HostRef, bridge: Bridge) -> None:
        limit = self._config.ping_seconds
        try:
            async with asyncio.timeout(limit):
                await bridge.ping()
        except TimeoutError:
            self._lost(ref, "page_hung", f"the main thread was silent for {limit:g} s")
        except BrowserError:
            pass  # its closing has been seen

    def _on_exit(self, ref: HostRef, warden: Warden) -> Callable[[int, int], None]:
        def on_exit(pid: int, status: int) -> None:
            if pid == warden.driver_pid and warden is self._warden:  # else it was let go
                self._lost(ref, "driver_exited", f"the driver ended with {status}", status=status)

        return on_exit

    def _on_bridge_event(self, event: BridgeEvent) -> None:
        if event.epoch != self._ref.epoch or self._readiness is Readiness.DEAD:
            return
        if event.what == "device_lost":
            self._lost(
                self._ref, "device_lost", "the page lost its GPU device", device_lost=event.facts
            )
        closed = event.what in ("closed", "data_closed")
        if event.what == "worker_failed" or (closed and self._readiness is Readiness.STARTING):
            asyncio.get_running_loop().call_later(
                _SOCKET_TO_EXIT_SECONDS, self._page_is_gone, self._ref, event
            )
        elif closed and (self._outage is None or self._outage.done()):
            self._judged = asyncio.Event()
            self._outage = asyncio.create_task(
                self._bear_outage(self._ref, event, self._judged), name="outage"
            )

    async def _bear_outage(self, ref: HostRef, event: BridgeEvent, judged: asyncio.Event) -> None:
        """Tell once what an outage is: the page's death, or only that of a connection.

        Lasts until the page has both sockets again, or is ended.
        """
        bridge = self._require_bridge()
        try:
            await self._either_back_or_dead(bridge)
            if self._clock() - self._page_ended_at < _PAGE_EXIT_SECONDS:
                self._page_is_gone(ref, event)
                return
            what = f"the page's {event.facts.get('socket', 'data')} socket closed"
            failure = self._failure(what, "socket_closed", "", ref, page=dict(event.facts))
            self._breakers.observe(failure)
            self._put_event(failure=failure)
            self._out_of_touch = failure
        finally:
            judged.set()
        try:
            with contextlib.suppress(BrowserLost):
                await bridge.reconnected()
        finally:
            self._out_of_touch = None

    async def _either_back_or_dead(self, bridge: Bridge) -> None:
        """Wait until an outage can be judged: the page is back, or a process has ended.

        A large process that is killed closes its sockets up to 0.1 s before its end is visible.
        The end of browser or driver ends the outage itself, and with it this wait.
        """
        if self._clock() - self._page_ended_at < _PAGE_EXIT_SECONDS:
            return
        self._page_ended.clear()
        ways = {
            asyncio.ensure_future(bridge.reconnected()),
            asyncio.ensure_future(self._page_ended.wait()),
        }
        try:
            await asyncio.wait(
                ways, timeout=_OUTAGE_JUDGED_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    def _page_process_ended(self, ref: HostRef, pid: int) -> None:
        """A spare one, perhaps: unless it is known to be the page's, alone it means nothing.

        In an outage it was the page's.
        """
        if ref != self._ref:
            return
        self._page_pids = tuple(other for other in self._page_pids if other != pid)
        if pid == self._page_pid:
            # What it said last may be waiting to be read, and tell why.
            asyncio.get_running_loop().call_later(
                _SOCKET_TO_EXIT_SECONDS,
                self._page_is_gone,
                ref,
                BridgeEvent("process_ended", ref.epoch),
            )
            return
        if self._page_pid:
            return  # a spare one: it says nothing about the page
        self._page_ended_at = self._clock()
        self._page_ended.set()
        if self._judged.is_set() and self._outage is not None and not self._outage.done():
            self._page_is_gone(ref, BridgeEvent("closed", ref.epoch))

    def _page_is_gone(self, ref: HostRef, event: BridgeEvent) -> None:
        if ref == self._ref and self._page_closed is not None and not self._page_closed.done():
            self._page_closed.set_result(None)
        self._lost(ref, "page_closed", f"the page is gone ({event.what})", page=dict(event.facts))

    def _lost(self, ref: HostRef, what: str, message: str = "", **evidence: Any) -> None:
        """This incarnation is over. Only its first cause counts; the rest are its echoes."""
        if ref != self._ref or self._cause is not None:
            return
        message = message or what.replace("_", " ")
        self._give_up(self._failure(message, what, "", ref, console=self._console(), **evidence))

    def _give_up(self, failure: Failure) -> None:
        """End this incarnation because of `failure`, and have the supervisor know."""
        if failure.ref != self._ref or self._cause is not None:
            return
        self._cause = failure
        if self._page_closed is not None and not self._page_closed.done():
            self._page_closed.set_result(None)
        if self._readiness is not Readiness.STARTING:  # else `launch` itself reports it
            self._breakers.observe(failure)  # once, whatever else ends with it
            self._put_event(failure=failure)
        self._retire()

    def _on_breakers(self, moved: Mapping[str, Snapshot]) -> None:
        self._put_event(breakers=moved)

    def _put_event(
        self, failure: Failure | None = None, breakers: Mapping[str, Snapshot] | None = None
    ) -> None:
        self._seq += 1
        self._events.append(HostEvent(self._ref, self._seq, failure, breakers))
        self._news.set()
        self._news = asyncio.Event()

    def _retire_if(self, ref: HostRef) -> None:
        if ref == self._ref:  # else another was launched meanwhile
            self._retire()

    def _retire(self) -> None:
        """Stop using the present browser and end it in the background. Does not wait."""
        self._readiness, self._report, self._memory_bytes = Readiness.DEAD, None, 0
        if self._launching is not None:
            self._launching.cancel()
        survivors = [self._pids[name] for name in ("driver", "browser") if self._pids.get(name)]
        session, self._session = self._session, None
        warden, self._warden = self._warden, None
        self._forget()
        if session is not None:
            session.close()
        if warden is not None:
            task = asyncio.ensure_future(warden.end(survivors))
            self._cleanups.add(task)
            task.add_done_callback(self._cleanups.discard)

    def _forget(self) -> None:
        """Take no more notice of the present browser: what it does now is no event."""
        self._watch.close()
        self._pids = {}
        self._page_ended_at = -math.inf
        self._page_pids, self._page_pid = (), 0
        if self._outage is not None:
            self._outage.cancel()
            self._outage = None
        self._judged.set()
        if self._watchdog_task is not None:
            self._watchdog_task.cancel()
            self._watchdog_task = None
        if self._probing is not None and self._probing is not asyncio.current_task():
            self._probing.cancel()
        self._probing = None
        if self._bridge is not None:
            self._bridge.end_page("the browser is gone")

    # -- small things -----------------------------------------------------------------------------

    async def _ask(
        self,
        kind: str,
        body: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> Frame:
        self._asked += 1
        op_id = f"{kind}:{self._asked}"
        frame = Frame(kind, op_id, self._ref.epoch, body=body, tensors=tensors or {})
        return await self._require_bridge().request(frame, self._config.load_seconds)

    def _failure(
        self, message: str, what: str, op_id: str, ref: HostRef | None = None, **evidence: Any
    ) -> Failure:
        context = {
            **evidence,
            "what": what,
            "ref": ref or self._ref,
            "op_id": op_id,
            "at": self._wall(),
            "browser": str(self._kind),
            "version": self._facts.version if self._facts else "",
        }
        model = context.get("model")
        if model in self._models:
            numeric, spec = self._models[model], self._specs[model]
            context |= {
                "backend": str(numeric.backend),
                "adapter": numeric.adapter,
                "model_type": str(spec.type),
            }
        return categorize_browser_failure(message, context)

    def _console(self) -> tuple[str, ...]:
        return tuple(self._bridge.console) if self._bridge else ()

    def _require_bridge(self) -> Bridge:
        if self._bridge is None:
            raise BrowserLost(f"{self._ref} was never launched, or is stopped")
        return self._bridge

    def _require_ref(self, ref: HostRef) -> None:
        if ref != self._ref or self._readiness is Readiness.DEAD:
            raise BrowserLost(f"{ref} is not here; {self._ref} is {self._readiness}")


def _with_order(settings: LaunchSettings, order: LaunchOrder) -> LaunchSettings:
    """What was ordered wins over what a healthy browser of this kind starts with."""
    return replace(
        settings,
        arguments=merge_arguments(settings.arguments, order.arguments),
        preferences={**settings.preferences, **order.preferences},
        environment={**settings.environment, **order.environment},
    )


async def _answers(bridge: Bridge) -> None:
    """Return when both sockets of the page are open and a ping was answered."""
    while True:
        await bridge.reconnected()
        try:
            await bridge.ping()
        except BrowserLost as error:
            if error.fields.get("what") != "socket_closed":
                raise
            await asyncio.sleep(_PING_AGAIN_SECONDS)  # it closed again
        else:
            return


def _note_error(task: asyncio.Task[LaunchReport]) -> None:
    if not task.cancelled():
        task.exception()  # whoever ordered it may have gone; that is no unseen error


def _fingerprint(tensors: Mapping[str, np.ndarray[Any, Any]]) -> int:
    """Tells two questions apart that came under one operation id (CRC-32 of names and values)."""
    total = 0
    for name, array in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, total)
    return total


def _check_unchanged(spec: ModelSpec, checked: dict[tuple[str, str], tuple[int, ...]]) -> None:
    """Raises `PageError` if a file of the model is no longer the one that was registered.

    `checked` remembers files by path and digest, so that a repair need not read one again that
    nobody has written to since.
    """
    for file in spec.files:
        for packed in (f"{file.path}.gz", f"{file.path}.br"):
            if os.path.exists(packed):
                raise PageError(
                    f"{packed} lies beside the model, and the server would send it instead: "
                    "move it elsewhere",
                    what="load_failed",
                )
        stat = os.stat(file.path)
        seen = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if checked.get((file.path, file.digest)) == seen:
            continue
        with open(file.path, "rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != file.digest:
                raise PageError(
                    f"{file.path} has changed since {spec.name} was loaded: unload the model and "
                    "load it again",
                    what="load_failed",
                )
        if len(checked) >= _CHECKED_MAX:
            checked.clear()
        checked[file.path, file.digest] = seen


def _private_directories(binaries: Binaries, profile: Path) -> dict[str, str]:
    """WebKitGTK takes no profile argument: its caches and data follow the XDG variables."""
    if binaries.kind is not BrowserType.SAFARI:
        return {}
    names = {"XDG_CACHE_HOME": "cache", "XDG_DATA_HOME": "data", "XDG_CONFIG_HOME": "config"}
    return {variable: str(profile / name) for variable, name in names.items()}


def _only_child(warden: Warden) -> int:
    """The browser's pid where its driver does not tell: the driver's first child."""
    children = [p for p in warden.tree() if p.ppid() == warden.driver_pid]
    return children[0].pid if children else 0


def _product(kind: BrowserType, binaries: Binaries | None, capabilities: Mapping[str, Any]) -> str:
    """What the browser really is: neither Chromium nor WebKitGTK is passed off as another."""
    name = str(capabilities.get("browserName", kind))
    path = binaries.browser.lower() if binaries else ""
    if "chromium" in path:
        return "Chromium"
    return "WebKitGTK MiniBrowser" if "minibrowser" in path else name.capitalize()
