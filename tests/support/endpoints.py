"""An HTTP endpoint in the test's own loop, and what one asks of it."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

from aiohttp import ClientSession

from ckptd.daemon.http import start_http
from ckptd.daemon.metrics import Live, Metrics

NOTHING = Live({}, queue_depth=0, sessions=0, workers=0, arena_bytes=0)


@asynccontextmanager
async def serving(view, **options):
    """Serve a view on a port of its own; yields the server, a client and the metrics."""
    metrics = Metrics(lambda: NOTHING)
    server = await start_http("127.0.0.1:0", view, metrics, **options)
    try:
        async with asyncio.timeout(10), ClientSession(f"http://{server.address}") as client:
            yield server, client, metrics
    finally:
        await server.close()


async def states(answer, count):
    """Return so many states of an event stream."""
    found = []
    while len(found) < count:
        line = await answer.content.readline()
        assert line, "the stream ended"
        if line.startswith(b"data: "):
            found.append(json.loads(line[6:]))
    return found


def refused(metrics, reason):
    """Return how many requests or connections were refused for a reason."""
    name = f'ckptd_refused_http_requests_total{{reason="{reason}"}} '
    return next(float(line[len(name) :]) for line in metrics.render().decode().splitlines() if line.startswith(name))


async def until(predicate):
    """Let the loop run until something is so."""
    async with asyncio.timeout(10):
        while not predicate():
            await asyncio.sleep(0.001)
