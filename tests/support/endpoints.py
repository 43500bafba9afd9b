"""An HTTP endpoint in the test's own loop, and what one asks of it."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager

from aiohttp import ClientSession

from ckptd.daemon.http.server import start_http
from ckptd.daemon.monitoring.metrics import Live, Metrics

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


class Shown:
    """A view that shows what it is given."""

    def __init__(self, status):
        self.answer = status

    def status(self):
        """Return it."""
        return self.answer

    def ready(self):
        """Return that all is well."""
        return


@contextmanager
def served(view, **options):
    """Serve a view from a thread; yields the address."""
    address, loop, stop = Future(), asyncio.new_event_loop(), asyncio.Event()

    async def serve():
        async with serving_for_long(view, **options) as server:
            address.set_result(server.address)
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield address.result(10)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


@asynccontextmanager
async def serving_for_long(view, **options):
    """Serve a view without a deadline and without a client."""
    server = await start_http("127.0.0.1:0", view, Metrics(lambda: NOTHING), **options)
    try:
        yield server
    finally:
        await server.close()
