"""The daemon's HTTP endpoint: metrics, health, status and a page. It reads and never changes anything.

Invariant: an answer goes only to a request whose Host names this endpoint, so no foreign web page can read it
by letting its own name resolve to this machine (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Collection
from html import escape
from typing import Any, Final, Protocol, cast

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from ckptd.daemon.config import parse_address
from ckptd.daemon.metrics import CONTENT_TYPE, Metrics
from ckptd.protocol.errors import BadConfig, SystemCallFailed

# Seconds that closing waits for answers under way; none of ours takes more than milliseconds.
_CLOSE_S: Final = 1.0
_BACKLOG: Final = 128

_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}

_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>ckptd</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: .3rem .6rem }}
th, td {{ text-align: left; vertical-align: top; overflow-wrap: anywhere }}
</style>
</head>
<body>
<h1>ckptd</h1>
<p>{summary}</p>
<p><a href="/status">status</a> · <a href="/metrics">metrics</a> · <a href="/readyz">ready</a></p>
{jobs}
</body>
</html>
"""
_COLUMNS: Final = ("Save", "Checkpoint", "State", "Ranks sealed", "Progress", "Seconds", "Error")


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

    def __init__(self, runner: web.AppRunner, address: str) -> None:
        self._runner = runner
        self._address = address

    @property
    def address(self) -> str:
        """The bound ``HOST:PORT``, with the actual port."""
        return self._address

    async def close(self) -> None:
        """Take no more requests, wait a second at most for those under way, and free the port."""
        await self._runner.cleanup()


async def start_http(address: str, view: View, metrics: Metrics) -> HttpServer:
    """Serve HTTP on ``address`` until closed.

    Args:
        address: ``HOST:PORT`` or ``[IPV6]:PORT``; port 0 takes any free one.
        view: Asked at each request, in the event loop.
        metrics: Rendered at each scrape, in the event loop.

    Raises:
        BadConfig: The address is malformed or its host is unknown. Tell the user, who wrote it.
        SystemCallFailed: The address cannot be bound, for instance because another daemon has it.
    """
    host, port = parse_address(address)
    listener = _listen(address, host, port)
    bound, port = listener.getsockname()[:2]
    names = frozenset({host.lower(), bound})
    app = web.Application(middlewares=[_refuse_foreign_hosts(port, names)])
    _Pages(view, metrics).add_to(app)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_CLOSE_S)
    try:
        await runner.setup()
        await web.SockSite(runner, listener).start()
    except BaseException:
        listener.close()
        await runner.cleanup()
        raise
    return HttpServer(runner, f"[{bound}]:{port}" if ":" in bound else f"{bound}:{port}")


def is_our_host(header: str, *, port: int, names: Collection[str]) -> bool:
    """Say whether a Host header names this endpoint.

    Args:
        header: Value of the header; a missing port means 80.
        port: The bound port.
        names: The host as configured and as bound. If one is a wildcard (0.0.0.0 or ::), every literal IP
            and this node's name are ours too, or no other node could scrape: a rebinding page always comes
            with a name of its own.
    """
    try:
        host, asked_port = parse_address(header if re.search(r":\d+$", header) else f"{header}:80")
    except BadConfig:
        return False
    host = host.lower()
    if asked_port != port:
        return False
    if host == "localhost" or host in names:
        return True
    wildcard = any(ip.is_unspecified for ip in map(_literal_ip, names) if ip)
    if ip := _literal_ip(host):
        return ip.is_loopback or wildcard
    return wildcard and host == socket.gethostname().lower()


def render_page(status: dict[str, object]) -> str:
    """Return the page that shows a status; every text in it is escaped."""
    jobs = cast("list[dict[str, Any]]", status.get("jobs", []))
    summary = f"version {status.get('version')}, pid {status.get('pid')}, mode {status.get('mode')}"
    return _PAGE.format(summary=escape(summary), jobs="\n".join(map(_job, jobs)) or "<p>No jobs.</p>")


class _Pages:
    """The routes. All are GET; aiohttp answers HEAD from the same handlers and 405 to the rest."""

    def __init__(self, view: View, metrics: Metrics) -> None:
        self._view = view
        self._metrics = metrics

    def add_to(self, app: web.Application) -> None:
        app.router.add_get("/", self._page)
        app.router.add_get("/metrics", self._scrape)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/status", self._status)

    async def _page(self, _: web.Request) -> web.Response:
        return web.Response(text=render_page(self._view.status()), content_type="text/html")

    async def _scrape(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _ready(self, _: web.Request) -> web.Response:
        reason = self._view.ready()
        if reason is None:
            return web.Response(text="ready\n")
        return web.Response(status=503, text=f"{reason}\n")

    async def _status(self, _: web.Request) -> web.Response:
        body = msgspec.json.encode(self._view.status())
        return web.Response(body=body, content_type="application/json")


def _refuse_foreign_hosts(port: int, names: Collection[str]) -> Middleware:
    @web.middleware
    async def refuse(request: web.Request, handler: Handler) -> web.StreamResponse:
        hosts = request.headers.getall("Host", [])  # request.host would invent one where none was sent
        if len(hosts) != 1 or not is_our_host(hosts[0], port=port, names=names):
            return web.Response(status=421, text="this is not the host you asked for\n", headers=_HEADERS)
        response = await handler(request)
        response.headers.update(_HEADERS)
        return response

    return refuse


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
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise SystemCallFailed("bind", address, error.errno or 0) from None
    return listener


def _literal_ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _job(job: dict[str, Any]) -> str:
    title = f"{job['job']} (incarnation {job['incarnation']})"
    ranks = f"{len(job['sessions'])} of {job['world_size']} ranks attached, uid {job['uid']}"
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = "\n".join(_generation(generation) for generation in job["generations"])
    return (
        f"<h2>{escape(title)}</h2>\n<p>{escape(ranks)}</p>\n<table>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    )


def _generation(generation: dict[str, Any]) -> str:
    seconds = generation["seconds"]
    cells = (
        generation["sequence"],
        generation["checkpoint_id"],
        generation["state"],
        generation["ranks_sealed"],
        f"{generation['bytes_done']} of {generation['bytes_total']} bytes",
        "" if seconds is None else f"{seconds:.1f}",
        generation["error"] or "",
    )
    return "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"
