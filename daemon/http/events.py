"""The status as a stream of server-sent events.

Invariants: the status is taken once for all streams, and only while somebody listens; a stream holds no queue but only
the newest state, so a slow reader misses states and costs nobody anything; one that does not read at all is cut.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, cast

import msgspec
from aiohttp import web

from ckptd.daemon.monitoring.labels import Refusal

MOST_STREAMS: Final = 32
# Seconds between two states: while a save runs, and while nothing happens.
_BUSY_S: Final = 0.25
_QUIET_S: Final = 1.0
# Seconds for which one state may wait for its reader.
SLOW_S: Final = 10.0
_ENDED: Final = frozenset({"committed", "failed"})

_HEADERS: Final = {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}


class EventFeed:
    """The stream at ``/events``.

    Args:
        status: Returns what is to be seen; called in the event loop.
        on_refused: Called for each stream that was refused or cut.
        slow_s: Seconds for which one state may wait for its reader.
    """

    def __init__(
        self, status: Callable[[], dict[str, object]], on_refused: Callable[[Refusal], None], *, slow_s: float = SLOW_S
    ) -> None:
        self._status, self._on_refused, self._slow_s = status, on_refused, slow_s
        self._frame, self._number = b"", 0
        self._changed = asyncio.Condition()
        self._ticking: asyncio.Task[None] | None = None
        self._closed = False
        self.streams = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Send the newest state, again and again, until the reader goes or is cut."""
        if self.streams >= MOST_STREAMS or self._closed:
            self._on_refused("streams")
            return web.Response(status=503, text="too many streams; read /status\n", headers={"Retry-After": "5"})
        response = web.StreamResponse(headers=_HEADERS)
        self.streams += 1
        try:
            self._tick()
            await response.prepare(request)
            await self._send_for_ever(response)
        except TimeoutError:
            self._on_refused("slow")
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            pass  # the reader has gone
        finally:
            self.streams -= 1
            if not self.streams and self._ticking is not None:
                self._ticking.cancel()
                self._ticking = None
        return response

    async def close(self) -> None:
        """End all streams."""
        self._closed = True
        async with self._changed:
            self._changed.notify_all()

    async def _send_for_ever(self, response: web.StreamResponse) -> None:
        seen = 0
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda seen=seen: self._is_over or self._number > seen)  # type: ignore[misc]
            if self._is_over:
                return
            seen, frame = self._number, self._frame
            async with asyncio.timeout(self._slow_s):
                await response.write(frame)

    @property
    def _is_over(self) -> bool:
        return self._closed or self._ticking is None

    def _tick(self) -> None:
        """Take a state now, for the one that has come, and go on while anybody listens."""
        self._take()
        if self._ticking is None:
            self._ticking = asyncio.create_task(self._tick_for_ever())

    def _take(self) -> float:
        status = self._status()
        self._frame = b"data: " + msgspec.json.encode(status) + b"\n\n"
        self._number += 1
        return _BUSY_S if _is_busy(status) else _QUIET_S

    async def _tick_for_ever(self) -> None:
        try:
            while True:
                pause_s = self._take()
                async with self._changed:
                    self._changed.notify_all()
                await asyncio.sleep(pause_s)
        finally:  # also if the status had a bug: no stream waits for a state that will not come
            if self._ticking is asyncio.current_task():
                self._ticking = None
            async with self._changed:
                self._changed.notify_all()


def _is_busy(status: dict[str, object]) -> bool:
    jobs = cast("list[dict[str, Any]]", status.get("jobs", []))
    return any(save["state"] not in _ENDED for job in jobs for save in job["generations"])
