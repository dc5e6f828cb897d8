"""Access control: admits one page, of the current epoch, from its own origin, with its token.

The page enters once with a single-use ticket and gets the token in a cookie; sockets also carry it
as a subprotocol, and every request's Host and Origin are checked. The page itself is served once
only, so that a reloaded page (without models) can't replace the first.
This module must not serve anything.
"""

from __future__ import annotations

import hmac
import math
import secrets
from collections.abc import Callable

from aiohttp import web

_COOKIE = "tabpool"


class Admission:
    """The secrets of the current page, and whether a fault blocks it.

    Refusals raise aiohttp's HTTP errors. `socket_paths` are those whose requests carry the token
    themselves.
    """

    def __init__(self, socket_paths: frozenset[str], clock: Callable[[], float]) -> None:
        self._socket_paths = socket_paths
        self._clock = clock
        self._host = ""
        self._epoch = -1
        self._token = ""
        self._ticket = ""
        self._served = False  # the page of this epoch
        self._away_until = -math.inf  # requests of this page are refused until then

    @property
    def host(self) -> str:
        """The authority under which the browser sees this server."""
        return self._host

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def token(self) -> str:
        """The token of the current page; empty: there is none."""
        return self._token

    def begin(self, epoch: int, host: str) -> str:
        """Expect a page of `epoch`; returns its entry path."""
        self._epoch, self._host = epoch, host
        self._token, self._ticket = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        self._served = False
        self._away_until = -math.inf
        return f"/enter/{self._ticket}"

    def end(self) -> None:
        """Refuse the current page from now on."""
        self._token = self._ticket = ""

    def stay_away(self, seconds: float) -> None:
        """Refuse all requests of this page for `seconds` (fault injection)."""
        self._away_until = self._clock() + seconds

    def check(self, request: web.Request) -> None:
        """Check any request. Raises an HTTP error if it is refused."""
        # The Host check defeats DNS rebinding, the Origin check pages of other origins.
        if request.host != self._host:
            raise web.HTTPForbidden(text="wrong host")
        if self._clock() < self._away_until:
            raise web.HTTPServiceUnavailable(text="blocked by fault injection")
        origin = request.headers.get("Origin")
        if origin is not None and origin != f"http://{self._host}":
            raise web.HTTPForbidden(text="wrong origin")
        # A socket carries the token itself, and gets the cookie with it: a browser whose network
        # process died has lost it.
        enters = request.path.startswith("/enter/")
        needs_cookie = not enters and request.path not in self._socket_paths
        if needs_cookie and not self._is_token(request.cookies.get(_COOKIE, "")):
            raise web.HTTPForbidden(text="no token")

    def check_socket(self, request: web.Request) -> str:
        """Also check a socket's request; returns the token. Raises an HTTP error if refused."""
        offered = [p.strip() for p in request.headers.get("Sec-WebSocket-Protocol", "").split(",")]
        if len(offered) != 2 or not self._is_token(offered[1]):
            raise web.HTTPForbidden(text="no token")
        if request.headers.get("Origin") is None:
            raise web.HTTPForbidden(text="no origin")
        return self._token

    def _is_token(self, offered: str) -> bool:
        return bool(self._token) and hmac.compare_digest(offered.encode(), self._token.encode())

    def take_ticket(self, offered: str) -> None:
        """Use the page's ticket, which is valid once. Raises an HTTP error if it is invalid."""
        ticket, self._ticket = self._ticket, ""
        if not (ticket and hmac.compare_digest(offered.encode(), ticket.encode())):
            raise web.HTTPForbidden(text="no ticket")

    def take_page(self) -> None:
        """Mark the page as served. Raises an HTTP error the second time."""
        if self._served:
            raise web.HTTPForbidden(text="the page was served already")
        self._served = True

    def give_cookie(self, response: web.StreamResponse) -> None:
        response.set_cookie(_COOKIE, self._token, httponly=True, samesite="Strict", path="/")
