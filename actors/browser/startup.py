"""The steps of one launch: server, profile, driver, browser, page, warm-up, facts.

A missing profile template is created first, by a separate launch. This module must not handle
failed steps (`actors.browser.launch` does).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from actors.browser.facts import read_facts
from actors.browser.incarnation import Incarnation
from actors.browser.page import Page
from actors.browser.process import BrowserProcess
from actors.driver.arguments import LaunchSettings
from actors.driver.binaries import Binaries, find_binaries
from actors.driver.engines import ENGINES, default_settings
from actors.driver.profiles import save_template, template_lock, template_path
from actors.messages import HostConfig, LaunchOrder
from recovery.adjustments import merge_arguments
from recovery.errors import BrowserLost, LaunchFailed
from recovery.failures import Category
from recovery.kinds import Backend, BrowserType
from recovery.records import BrowserFacts, HostRef

_QUIT_SECONDS = 10.0
_TEMPLATE_WARM_SECONDS = 5.0
_TEMPLATE_SETTLE_SECONDS = 3.0


class Startup:
    """Launches the current incarnation.

    `forget` makes all parts ignore a browser, `watch_page` makes them detect the end of its page.
    """

    def __init__(
        self,
        incarnation: Incarnation,
        page: Page,
        process: BrowserProcess,
        config: HostConfig,
        clock: Callable[[], float],
        *,
        forget: Callable[[], None],
        watch_page: Callable[[HostRef], Awaitable[None]],
    ) -> None:
        self._incarnation = incarnation
        self._page = page
        self._process = process
        self._config = config
        self._clock = clock
        self._forget = forget
        self._watch_page = watch_page
        self._probed: LaunchSettings | None = None  # settings with which the facts were determined

    async def run(self, order: LaunchOrder) -> tuple[str, dict[str, float]]:
        """Launch until the page is ready and its facts are known.

        Returns the profile's path and the seconds of each step. Raises `LaunchFailed`,
        `SetupError`, `BrowserLost`, `OSError`.
        """
        kind = self._incarnation.kind
        marks = {"begun": self._clock()}
        binaries = find_binaries(kind, headless=self._config.headless)
        self._process.binaries = binaries
        settings = _with_order(host_settings(kind, self._config), order)
        template = template_path(binaries, settings.gpu)
        if not template.is_dir():
            await self._warm_template(binaries, settings, template, order.port)
            marks["template"] = self._clock()
        profile = await self._start(binaries, settings, template, order.port)
        marks["browser"] = self._clock()
        await self._page_ready()
        marks["page"] = self._clock()
        if order.warm:
            await self._warm_page()
        facts, _ = await asyncio.gather(self._facts(order, settings), self._watch_page(order.ref))
        self._incarnation.facts = replace(
            facts,
            private_network=self._process.private_network,
            network_note=self._process.network_note,
        )
        self._probed = settings
        marks["warm"] = self._clock()
        return profile, {b: marks[b] - marks[a] for a, b in itertools.pairwise(marks)}

    async def _start(
        self, binaries: Binaries, settings: LaunchSettings, template: Path | None, port: int
    ) -> str:
        """Start the browser and have it open the page. Returns the profile's path."""
        listener = await self._process.start_driver(binaries, settings, template)
        bridge = await self._page.serve(port, listener)
        # Chromium keys its code cache by origin. A made-up host gives every slot the same origin,
        # so that one template serves them all; on the shared loopback, where each slot has a port
        # of its own, that host is made to resolve to it.
        authority = "127.0.0.1" if listener else f"127.0.0.1:{bridge.port}"
        if ENGINES[settings.kind].maps_hosts:
            authority = "tabpool.localhost"
            if not listener:
                rule = f"--host-resolver-rules=MAP tabpool.localhost:80 127.0.0.1:{bridge.port}"
                settings = settings.adjusted((rule,))
        enter = bridge.begin_epoch(self._incarnation.ref.epoch, authority)
        profile = await self._process.start_browser(binaries, settings)
        await self._process.require_session().open(f"http://{authority}{enter}")
        return profile

    async def _page_ready(self) -> None:
        opened = asyncio.ensure_future(self._page.bridge.opened())
        over = asyncio.ensure_future(self._incarnation.over.wait())
        try:
            await asyncio.wait({opened, over}, return_when=asyncio.FIRST_COMPLETED)
            if not opened.done():
                raise LaunchFailed(f"the page of {self._incarnation.kind} ended while it loaded")
            await opened
        finally:
            opened.cancel()
            over.cancel()

    async def _warm_page(self, seconds: float = 0.0) -> None:
        await self._page.ask("warm", {"backend": str(Backend.WASM), "seconds": seconds})

    async def _facts(self, order: LaunchOrder, settings: LaunchSettings) -> BrowserFacts:
        """The page's facts. Probing takes 0.3 s, which a repair of the same browser skips."""
        known, was = self._incarnation.facts, self._incarnation.ended_by
        capabilities = self._process.require_session().capabilities
        version = str(capabilities.get("browserVersion", ""))
        same = known is not None and self._probed == settings and known.version == version
        if known is None or not same or order.warm or was is Category.GPU_ERROR:
            page = (await self._page.ask("info", {})).body
            return read_facts(self._incarnation.kind, self._process.binaries, capabilities, page)
        return known

    async def _warm_template(
        self, binaries: Binaries, settings: LaunchSettings, template: Path, port: int
    ) -> None:
        """Launch once on an empty profile, let caches fill, quit cleanly, and keep the profile."""
        async with template_lock(template):
            if await asyncio.to_thread(template.is_dir):
                return  # another process created it while we waited
            profile = await self._start(binaries, settings, None, port)
            await self._page_ready()
            await self._warm_page(_TEMPLATE_WARM_SECONDS)
            # Chromium writes compiled code to its cache when no function was optimised for 2 s.
            await asyncio.sleep(_TEMPLATE_SETTLE_SECONDS)
            detached = self._process.detach()
            assert detached.session is not None
            assert detached.reaper is not None
            self._forget()
            try:
                with contextlib.suppress(BrowserLost, TimeoutError):
                    async with asyncio.timeout(_QUIT_SECONDS):
                        await detached.session.quit()
            finally:
                # Finish copying even if cancelled: the reaper removes the source.
                saving = asyncio.ensure_future(asyncio.to_thread(save_template, profile, template))
                await asyncio.wait({saving})
                detached.session.close()
                await detached.reaper.end()
            if saving.exception() is not None:  # a launch without a template is only slower
                self._page.bridge.console.append(f"no profile template: {saving.exception()}")


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


def _with_order(settings: LaunchSettings, order: LaunchOrder) -> LaunchSettings:
    """The default settings, overridden by those of the order."""
    return replace(
        settings,
        arguments=merge_arguments(settings.arguments, order.arguments),
        preferences={**settings.preferences, **order.preferences},
        environment={**settings.environment, **order.environment},
    )
