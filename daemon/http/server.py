"""The daemon's HTTP endpoint: metrics, health, status, events and a page. It reads and never changes anything.

Invariant: an answer goes only to a request whose Host names this endpoint, so no foreign web page can read it
by letting its own name resolve to this machine (DNS rebinding).
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from importlib import resources
from typing import Final, Protocol

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

from ckptd.daemon.http.connections import IDLE_S, Connections
from ckptd.daemon.http.events import SLOW_S, EventFeed
from ckptd.daemon.http.gate import Access, Gate, check_exposure
from ckptd.daemon.http.sparing import Sparing
from ckptd.daemon.monitoring.metrics import CONTENT_TYPE, OPEN_CONTENT_TYPE, Metrics
from ckptd.daemon.settings.config import parse_address
from ckptd.protocol.errors import BadConfig, SystemCallFailed

# Seconds that closing waits for answers under way; none of ours takes more than milliseconds.
_CLOSE_S: Final = 1.0
# Seconds for which a body that nobody asked for is read, so that its sender hears the answer before the end.
_LINGER_S: Final = 0.2
# Seconds by which aiohttp's own time-out follows ours: however late our sweep is on a busy machine, ours comes first.
_AFTER_OURS_S: Final = 60.0

_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# A block of data in the page, not a script: no policy has to allow it. Its "<" are escaped, or a name could end it.
_FIRST: Final = b'<script id="first" type="application/json">%s</script>'
# Path, file below daemon/http/web, and content type. There are no others: no path of a request ever names a file.
_FILES: Final = (
    ("/page.css", "page.css", "text/css"),
    ("/page.js", "page.js", "text/javascript"),
    ("/icon.svg", "icon.svg", "image/svg+xml"),
)


@dataclass(frozen=True)
class Limits:
    """What readers may cost.

    Attributes:
        connections: How many may be open.
        idle_s: Seconds after which a connection without a request is cut.
        slow_s: Seconds for which an event may wait for its reader.
    """

    connections: int = 1024
    idle_s: float = IDLE_S
    slow_s: float = SLOW_S


ANYONE: Final = Access()
USUAL: Final = Limits()


class View(Protocol):
    """What the endpoint sees of the service."""

    def status(self) -> dict[str, object]:
        """Return the body of ``/status``: what JSON can hold and no more."""
        ...

    def ready(self) -> str | None:
        """Return None if clients may attach now, else one line that says why not."""
        ...


class HttpServer:
    """A running endpoint; made by :func:`start_http`."""

    def __init__(self, runner: web.AppRunner, connections: Connections, feed: EventFeed, address: str) -> None:
        self._runner, self._connections, self._feed = runner, connections, feed
        self._address = address

    @property
    def address(self) -> str:
        """The bound ``HOST:PORT``, with the actual port."""
        return self._address

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    @property
    def streams(self) -> int:
        """Event streams among them."""
        return self._feed.streams

    async def close(self) -> None:
        """Take no more requests, wait a second at most for those under way, and free the port."""
        await self._connections.close()
        await self._feed.close()
        await self._runner.cleanup()


async def start_http(
    address: str,
    view: View,
    metrics: Metrics,
    *,
    access: Access = ANYONE,
    limits: Limits = USUAL,
) -> HttpServer:
    """Serve HTTP on ``address`` until closed.

    Args:
        address: ``HOST:PORT`` or ``[IPV6]:PORT``; port 0 takes any free one.
        view: Asked at each request, in the event loop.
        metrics: Rendered at each scrape, in the event loop.
        access: Who may read.
        limits: What readers may cost.

    Raises:
        BadConfig: The address is malformed, its host is unknown, or it needs a token. Tell the user, who wrote it.
        SystemCallFailed: The address cannot be bound, for instance because another daemon has it.
    """
    host, port = parse_address(address)
    listener = _listen(address, host, port)
    bound, port = listener.getsockname()[:2]
    feed = EventFeed(view.status, metrics.refused, slow_s=limits.slow_s)
    connections = Connections(
        most=limits.connections, idle_s=limits.idle_s, on_refused=lambda: metrics.refused("crowd")
    )
    gate = Gate(port, frozenset({host.lower(), bound}), access)
    app = web.Application(middlewares=[_guard(gate, metrics, connections)])
    app.on_response_prepare.append(_add_headers)
    _Pages(view, metrics, feed).add_to(app)
    # Our own time-out comes before aiohttp's: it counts what it cuts, and also watches for a first request.
    runner = web.AppRunner(
        app,
        access_log=None,
        logger=_request_logger(metrics),
        shutdown_timeout=_CLOSE_S,
        keepalive_timeout=limits.idle_s + _AFTER_OURS_S,
        lingering_time=_LINGER_S,
    )
    try:
        check_exposure(address, bound, access.token)
        await runner.setup()
    except BaseException:
        listener.close()
        await runner.cleanup()
        raise
    assert runner.server is not None  # that is what setting up means
    connections.start(listener, runner.server)
    return HttpServer(runner, connections, feed, f"[{bound}]:{port}" if ":" in bound else f"{bound}:{port}")


class _Pages:
    """The routes. All are GET; aiohttp answers HEAD from the same handlers and 405 to the rest."""

    def __init__(self, view: View, metrics: Metrics, feed: EventFeed) -> None:
        self._view = view
        self._metrics = metrics
        self._feed = feed
        self._html = _read("page.html")
        self._sparing = Sparing()

    def add_to(self, app: web.Application) -> None:
        app.router.add_get("/", self._page)
        for path, name, content_type in _FILES:
            app.router.add_get(path, _file(name, content_type))
        app.router.add_get("/metrics", self._scrape)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/status", self._status)
        app.router.add_get("/events", self._feed.answer, allow_head=False)

    async def _page(self, _: web.Request) -> web.Response:
        status = self._encoded_status().replace(b"<", b"\\u003c")
        body = self._html.replace(_FIRST % b"null", _FIRST % status)
        return web.Response(body=body, content_type="text/html", charset="utf-8")

    async def _scrape(self, request: web.Request) -> web.Response:
        if "application/openmetrics-text" in request.headers.get("Accept", ""):
            body, content_type = self._sparing.answer("open", self._metrics.render_open), OPEN_CONTENT_TYPE
        else:
            body, content_type = self._sparing.answer("plain", self._metrics.render), CONTENT_TYPE
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, _: web.Request) -> web.Response:
        reason = self._view.ready()
        if reason is None:
            return web.Response(text="ready\n")
        return web.Response(status=503, text=f"{reason}\n")

    async def _status(self, _: web.Request) -> web.Response:
        return web.Response(body=self._encoded_status(), content_type="application/json")

    def _encoded_status(self) -> bytes:
        return self._sparing.answer("status", lambda: msgspec.json.encode(self._view.status()))


def _request_logger(metrics: Metrics) -> logging.Logger:
    """Return where aiohttp tells of errors: bugs are logged, what strangers send is counted and fills no log."""

    def is_bug(record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], HttpProcessingError):
            metrics.refused("malformed")
            return False
        return True

    logger = logging.Logger(f"{__name__}.requests", logging.WARNING)  # of this endpoint alone, as its metrics are
    logger.parent = logging.getLogger(__name__)
    logger.addFilter(is_bug)
    return logger


def _file(name: str, content_type: str) -> Handler:
    body = _read(name)

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type=content_type, charset="utf-8")

    return answer


def _read(name: str) -> bytes:
    return resources.files("ckptd.daemon.http").joinpath("web", name).read_bytes()


def _guard(gate: Gate, metrics: Metrics, connections: Connections) -> Middleware:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        with connections.busy(request.transport):
            refusal = _refusal(request, gate, metrics)
            return await handler(request) if refusal is None else refusal

    return guard


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)


def _refusal(request: web.Request, gate: Gate, metrics: Metrics) -> web.Response | None:
    """Return what a request gets instead of an answer; None if it is to be answered."""
    # request.host would invent a Host where none was sent.
    if not gate.names_us(request.headers.getall("Host", [])):
        metrics.refused("host")
        return web.Response(status=421, text="this is not the host you asked for\n")
    if gate.is_entered_by(request) and request.match_info.http_exception is None:
        # To one of our own routes, never to a path that others made up: no open redirect.
        entered = web.Response(status=303, headers={"Location": request.match_info.route.url_for().path})
        entered.set_cookie(gate.cookie_name, gate.cookie, httponly=True, samesite="Lax", path="/")
        return entered
    if not gate.admits(request):
        metrics.refused("token")
        text = "show the token: as `Authorization: Bearer TOKEN`, or once as /?token=TOKEN\n"
        return web.Response(status=401, text=text, headers={"WWW-Authenticate": "Bearer"})
    return None


def _listen(address: str, host: str, port: int) -> socket.socket:
    """Bind and listen at once: two sockets with SO_REUSEADDR may share a port until one of them listens."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise BadConfig(address, f"{error.strerror}; write an IP address of this machine") from None
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise SystemCallFailed("bind", address, error.errno or 0) from None
    return listener
