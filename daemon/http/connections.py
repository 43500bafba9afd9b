"""The HTTP endpoint's connections: how many may be open, and for how long one may keep still.

Invariants: never more than the limit are open; one that is idle makes room for one that comes, so whoever asks is
served, and nobody who keeps still, however many, takes descriptors away from saves.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

logger = logging.getLogger(__name__)

# Seconds. Longer than Prometheus's default scrape interval is of no use: it connects anew.
IDLE_S: Final = 30.0
_SWEEP_S: Final = 1.0
# Seconds to wait when the system will not give us a connection, for instance for want of descriptors.
_PAUSE_S: Final = 0.1


class Connections:
    """Accepts connections on a listening socket.

    Args:
        most: How many may be open.
        idle_s: Seconds after which one without a request is cut.
        on_refused: Called for each connection that had to go, or could not come.
    """

    def __init__(self, *, most: int, on_refused: Callable[[], None], idle_s: float = IDLE_S) -> None:
        self._most, self._idle_s, self._on_refused = most, idle_s, on_refused
        self._idle: dict[asyncio.BaseTransport, float] = {}  # since when; ordered: the longest idle first
        self._busy: set[asyncio.BaseTransport] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._listener: socket.socket | None = None

    def __len__(self) -> int:
        """Return how many are open."""
        self._forget_closed()
        return len(self._idle) + len(self._busy)

    def start(self, listener: socket.socket, make: Callable[[], asyncio.BaseProtocol]) -> None:
        """Begin to accept on ``listener``, which is ours from now on; ``make`` returns a connection's protocol."""
        listener.setblocking(False)
        self._listener = listener
        self._tasks = [
            asyncio.create_task(self._accept_for_ever(listener, make)),
            asyncio.create_task(self._sweep_for_ever()),
        ]

    async def close(self) -> None:
        """Accept no more, and cut those that are idle."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        for transport in self._idle:
            _cut(transport)
        self._idle.clear()

    @contextmanager
    def busy(self, transport: asyncio.BaseTransport | None) -> Iterator[None]:
        """Spare a connection while a request of it is being answered."""
        if transport is None:
            yield
            return
        self._idle.pop(transport, None)
        self._busy.add(transport)
        try:
            yield
        finally:
            self._busy.discard(transport)
            self._idle[transport] = time.monotonic()

    async def _accept_for_ever(self, listener: socket.socket, make: Callable[[], asyncio.BaseProtocol]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
                await self._admit(connection, make)
            except OSError as error:  # it has gone already, or there are no more descriptors
                logger.warning("no HTTP connection: %s", error)
                self._cut_oldest()
                await asyncio.sleep(_PAUSE_S)

    async def _admit(self, connection: socket.socket, make: Callable[[], asyncio.BaseProtocol]) -> None:
        if len(self._idle) + len(self._busy) >= self._most and len(self) >= self._most and not self._cut_oldest():
            self._on_refused()
            connection.close()
            return
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_accepted_socket(make, connection)
        self._idle[transport] = time.monotonic()

    def _cut_oldest(self) -> bool:
        """Cut the connection that has been idle longest; False if none is."""
        oldest = next(iter(self._idle), None)
        if oldest is None:
            return False
        del self._idle[oldest]
        self._on_refused()
        _cut(oldest)
        return True

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEP_S, self._idle_s))
            self._forget_closed()
            before_s = time.monotonic() - self._idle_s
            while self._idle and next(iter(self._idle.values())) < before_s:
                self._cut_oldest()

    def _forget_closed(self) -> None:
        for transport in [transport for transport in self._idle if transport.is_closing()]:
            del self._idle[transport]


def raise_descriptor_limit() -> None:
    """Allow this process as many descriptors as the system lets it have: each session, arena and worker takes some."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _cut(transport: asyncio.BaseTransport) -> None:
    if isinstance(transport, asyncio.WriteTransport):
        transport.abort()  # close would wait for what the peer does not read
    else:
        transport.close()
