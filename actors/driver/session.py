"""One Selenium session, and the only module that uses Selenium.

Every driver call runs in one thread of the session's own and has a short timeout, because a
call in progress can't be cancelled: to free the thread, end the driver process. Selenium's
errors are converted here. This module must not serve pages or decide what a failure means.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.remote_connection import ChromeRemoteConnection
from selenium.webdriver.common.options import ArgOptions
from selenium.webdriver.edge.remote_connection import EdgeRemoteConnection
from selenium.webdriver.firefox.remote_connection import FirefoxRemoteConnection
from selenium.webdriver.remote.client_config import ClientConfig
from selenium.webdriver.remote.remote_connection import RemoteConnection
from tenacity import Retrying, retry_if_exception_type
from urllib3 import HTTPConnectionPool, PoolManager
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError

from actors.driver.arguments import LaunchSettings
from actors.driver.binaries import Binaries
from actors.driver.door import Connect, driver_connection
from actors.driver.engines import ENGINES
from recovery.errors import BrowserLost, LaunchFailed
from recovery.policies import DRIVER_ANSWERS

_T = TypeVar("_T")
_WINDOW = (1000, 700)  # pixels, of a restored window
CALL_SECONDS = 20  # timeout of one driver call


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def driver_command(binaries: Binaries, port: int) -> list[str]:
    """The command line that starts the driver on `port` of loopback."""
    return ENGINES[binaries.kind].command(binaries.driver, port, free_port)


def _options(settings: LaunchSettings, binaries: Binaries, profile: Path) -> ArgOptions:
    engine = ENGINES[settings.kind]
    name = engine.options(binaries.driver)
    options: Any = getattr(webdriver, name)()
    if name != "SafariOptions":  # Apple's driver takes neither a binary nor arguments
        options.binary_location = binaries.browser
        for argument in (*settings.arguments, *engine.profile_arguments(profile)):
            options.add_argument(argument)
    if engine.takes_preferences:
        for preference, value in settings.preferences.items():
            options.set_preference(preference, value)
    # The page is ready when it says so over its sockets, not when the document has loaded.
    options.page_load_strategy = "none"
    assert isinstance(options, ArgOptions)
    return options


class Session:
    """A browser under a running driver (see `ProcessReaper`)."""

    def __init__(self, settings: LaunchSettings, binaries: Binaries, profile: Path) -> None:
        self._settings = settings
        self._engine = ENGINES[settings.kind]
        self._binaries = binaries
        self._profile = profile
        self._driver: webdriver.Remote | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"selenium-{settings.kind}")
        self.capabilities: dict[str, Any] = {}
        self.driver_url = ""
        self._page = ""  # handle of the page's window, while hidden

    @property
    def id(self) -> str:
        """The WebDriver session id; empty while there is none."""
        return str(self._driver.session_id) if self._driver else ""

    async def start(self, port: int) -> None:
        """Create the session through the driver on `port`. Raises `LaunchFailed`."""
        try:
            await self._call(lambda: self._create(port))
        except (WebDriverException, HTTPError, OSError) as error:
            raise LaunchFailed(
                f"{self._settings.kind} ({self._binaries.browser}) did not start: "
                f"{_first_line(error)}. `tabpool doctor` shows what this machine has.",
                browser=str(self._settings.kind),
            ) from error

    def _create(self, port: int) -> None:
        self.driver_url = url = f"http://127.0.0.1:{port}"
        connect = driver_connection(self._profile, port)
        answers = Retrying(retry=retry_if_exception_type(OSError), **DRIVER_ANSWERS)
        answers(_driver_ready, connect)
        config = ClientConfig(url, keep_alive=True, timeout=CALL_SECONDS)
        connection = _connection(self._engine.options(self._binaries.driver), config, connect)
        self._driver = webdriver.Remote(
            command_executor=connection,
            options=_options(self._settings, self._binaries, self._profile),
        )
        self.capabilities = dict(self._driver.capabilities)

    @property
    def browser_pid(self) -> int:
        """The browser's process id if its driver reports it, else 0."""
        for name in ("goog:processID", "ms:processID", "moz:processID"):
            if name in self.capabilities:
                return int(self.capabilities[name])
        return 0

    async def open(self, url: str) -> None:
        """Begin to load `url`. Raises `BrowserLost`."""
        await self.drive(lambda driver: driver.get(url))

    async def drive(self, command: Callable[[webdriver.Remote], _T]) -> _T:
        """Run one command in the session's thread. Raises `BrowserLost` when it fails."""
        try:
            return await self._call(lambda: command(self._require()))
        except (WebDriverException, HTTPError, OSError) as error:
            raise BrowserLost(
                f"{self._settings.kind} failed a driver command: {_first_line(error)}"
            ) from error

    # -- what a user may do to a page -------------------------------------------------------------

    async def reload(self) -> None:
        # Not by the driver's commands, nor synchronously: WebKit's driver would block for a minute.
        await self._run_soon("location.reload()")

    async def leave(self) -> None:
        """Navigate away from the page."""
        await self._run_soon("location.replace('about:blank')")

    async def _run_soon(self, script: str) -> None:
        await self.drive(lambda driver: driver.execute_script(f"setTimeout(() => {script})"))

    async def hide(self) -> None:
        """Open another tab in front of the page; minimise in WebKit, where that has no effect."""

        def cover(driver: webdriver.Remote) -> None:
            if not self._engine.covers_windows:
                driver.minimize_window()
                return
            self._page = driver.current_window_handle
            driver.switch_to.new_window("tab")

        await self.drive(cover)

    async def show(self) -> None:
        """Undo `hide`."""

        def uncover(driver: webdriver.Remote) -> None:
            if not self._engine.covers_windows:
                driver.set_window_rect(width=_WINDOW[0], height=_WINDOW[1])
                return
            driver.close()
            driver.switch_to.window(self._page)

        await self.drive(uncover)

    async def screenshot(self) -> bytes:
        """A screenshot as PNG."""
        return await self.drive(lambda driver: driver.get_screenshot_as_png())

    async def quit(self) -> None:
        """Quit the browser cleanly, so that its profile is completely written."""
        await self.drive(lambda driver: driver.quit())
        self._driver = None

    def close(self) -> None:
        """Release the thread. Does not end the browser: the reaper does."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _require(self) -> webdriver.Remote:
        if self._driver is None:
            raise BrowserLost("the browser session is not open")
        return self._driver

    async def _call(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def attach(driver_url: str, session_id: str, profile: Path) -> webdriver.Remote:
    """Attach to the running session of a profile with a plain Selenium driver.

    Its owner must close it.
    """

    class _Attached(webdriver.Remote):
        def start_session(self, capabilities: dict[str, Any]) -> None:
            self.session_id = session_id

    config = ClientConfig(driver_url, keep_alive=True, timeout=CALL_SECONDS * 3)
    connect = driver_connection(profile, int(driver_url.rpartition(":")[2]))
    return _Attached(command_executor=_connection("", config, connect), options=ArgOptions())


# Drivers with commands of their own; the others speak plain WebDriver.
_CONNECTIONS: Mapping[str, type[RemoteConnection]] = {
    "ChromeOptions": ChromeRemoteConnection,
    "EdgeOptions": EdgeRemoteConnection,
    "FirefoxOptions": FirefoxRemoteConnection,
}


def _connection(options: str, config: ClientConfig, connect: Connect) -> RemoteConnection:
    kind: Any = _CONNECTIONS.get(options, RemoteConnection)

    class Connection(kind):  # type: ignore[misc]
        def _get_connection_manager(self) -> PoolManager:
            return _manager(connect, config.timeout)

    if options in _CONNECTIONS:
        connection = Connection(config.remote_server_addr, client_config=config)
    else:
        connection = Connection(client_config=config)
    assert isinstance(connection, RemoteConnection)
    return connection


def _manager(connect: Connect, seconds: float) -> PoolManager:
    """urllib3 over `connect`: never through a proxy, whatever the environment says."""

    class Connection(HTTPConnection):
        def connect(self) -> None:
            self.sock = connect(seconds)

    class Pool(HTTPConnectionPool):
        ConnectionCls = Connection

    manager = PoolManager(timeout=seconds)
    manager.pool_classes_by_scheme = {"http": Pool}
    return manager


def _driver_ready(connect: Connect) -> None:
    with _manager(connect, CALL_SECONDS) as manager:
        try:
            manager.request("GET", "http://127.0.0.1/status", retries=False)
        except HTTPError as error:
            raise ConnectionError(str(error)) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).removeprefix(
        "Message: "
    )
