"""A job's cache for loads on this node: hands out the shared segment and says who reads what. Touches no byte of it.

The segment is made when the first rank of a load asks for it, and goes when the load of all ranks is over.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
import time
from typing import TYPE_CHECKING, Final, Protocol

from ckptd.daemon.session.sessions import Session
from ckptd.protocol.cache import (
    FRAME_BYTES,
    Action,
    Begun,
    CacheLimits,
    CacheRules,
    Claim,
    Done,
    Drop,
    Event,
    Left,
    Lost,
    Opened,
    ReadAlone,
    ReadIt,
    Ready,
    Skipped,
    Tick,
    Wants,
)
from ckptd.protocol.cache_messages import (
    CacheAnswer,
    CacheBegun,
    CacheClaim,
    CacheDone,
    CacheLeft,
    CacheOpened,
    CacheSkipped,
    CacheWants,
)
from ckptd.protocol.errors import BadMessage, SessionClosed, Unsupported
from ckptd.protocol.messages import (
    ClientMessage,
)
from ckptd.staging.arena import create_arena

if TYPE_CHECKING:
    from ckptd.daemon.job.crew import JobContext
    from ckptd.daemon.job.jobfiles import JobFiles
    from ckptd.protocol.session import Roster

logger = logging.getLogger(__name__)

_LOOK_S: Final = 0.1  # while claims wait; the waits that the limits set are far longer


class Owner(Protocol):
    """The job whose cache it is."""

    roster: Roster
    files: JobFiles
    sessions: dict[int, Session]


class NodeCache:
    """The cache of one job.

    Args:
        job: Whose ranks load.
        context: What the job shares with others.
    """

    def __init__(self, job: Owner, context: JobContext) -> None:
        self._job, self._context = job, context
        self._rules: CacheRules | None = None
        self._path = ""
        self._descriptor = -1
        self._made = 0
        self._making = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._read_bytes = self._served_bytes = self._alone = 0  # of the load under way, for the log

    async def open(self, session: Session, wanted_bytes: int) -> tuple[CacheOpened, int]:
        """Let a rank take part in a load, of which it wants so many bytes; the first one's wish sets the size.

        Raises:
            Unsupported: The configuration allows no cache, or the job has one rank: read alone.
            ShmTooSmall: There is no room for the segment: read alone.
        """
        frames = min(self._context.config.node_cache_bytes, wanted_bytes + FRAME_BYTES) // FRAME_BYTES
        if not frames or self._job.roster.world_size < 2:
            raise Unsupported("a node cache here", "every rank reads for itself")
        async with self._making:
            if self._rules is None:
                await self._make(frames)
            if not session.live or self._rules is None:
                raise SessionClosed("the session ended while the node cache was made")
            self._handle(Opened(session.rank))  # from now on the segment stays until this rank has left
            return CacheOpened(self._rules.limits.frames, FRAME_BYTES), self._descriptor

    async def _make(self, frames: int) -> None:
        incarnation = self._job.roster.incarnation
        self._made += 1
        files = self._job.files
        path = files.path(f"cache-{self._made}.arena")
        descriptor = await asyncio.to_thread(
            create_arena, path, slots=1, slot_bytes=frames * FRAME_BYTES, owner=files.owner
        )
        self._path, self._descriptor = path, descriptor
        if incarnation != self._job.roster.incarnation or files is not self._job.files:
            self._drop()
            return
        self._read_bytes = self._served_bytes = self._alone = 0
        wait_s = self._context.config.node_cache_wait_s
        limits = CacheLimits(frames, FRAME_BYTES, come_s=wait_s, full_s=2 * wait_s)
        self._rules = CacheRules(self._job.roster.world_size, limits)

    def on_message(self, session: Session, message: ClientMessage) -> None:
        """Take a message about the cache. Raises BadMessage if it makes no sense."""
        rank = session.rank
        match message:
            case CacheWants(file=file, ranges=column):
                if len(column) % 16:
                    raise BadMessage(f"{len(column)} bytes of ranges")
                ranges = tuple(_checked(begin, end) for begin, end in struct.iter_unpack("<qq", column))
                self._handle(Wants(rank, file, ranges))
            case CacheBegun():
                self._handle(Begun(rank))
            case CacheSkipped(file=file, begin=begin, end=end):
                self._handle(Skipped(rank, file, (begin, end)))
            case CacheClaim(number=number, file=file, begin=begin, end=end):
                if self._rules is None:
                    self._perform(ReadAlone(rank, number))
                else:
                    self._handle(Claim(rank, number, file, _checked(begin, end)))
            case CacheDone(number=number, good=good):
                self._handle(Done(rank, number, good))
            case CacheLeft():
                self._handle(Left(rank))
            case _:
                raise BadMessage(f"{type(message).__name__}, which nobody takes")

    def lose(self, session: Session) -> None:
        """A session ended."""
        self._handle(Lost(session.rank))

    def tick(self) -> None:
        """Look at what takes too long."""
        self._handle(Tick())

    def close(self) -> None:
        """Give the segment up; its pages go when the last process that maps it goes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._rules = None
        self._drop()

    def _handle(self, event: Event) -> None:
        rules = self._rules
        if rules is None:
            return
        for action in rules.handle(event, time.monotonic()):
            self._perform(action)
        if rules.is_waited_for and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self.tick()

    def _perform(self, action: Action) -> None:
        match action:
            case ReadIt(rank, number, frame, (begin, end)):
                self._read_bytes += end - begin
                self._answer(rank, CacheAnswer(number, "read", frame, begin, end))
            case Ready(rank, number, frame, nbytes):
                self._context.metrics.served_from_cache(nbytes)
                self._served_bytes += nbytes
                self._answer(rank, CacheAnswer(number, "copy", frame))
            case ReadAlone(rank, number):
                self._alone += 1
                self._answer(rank, CacheAnswer(number, "alone"))
            case Drop():
                logger.info(
                    "job %s: a load has read %d bytes through the node's cache and %d ranges past it; %d bytes served",
                    *(self._job.roster.job, self._read_bytes, self._alone, self._served_bytes),
                )
                self.close()

    def _answer(self, rank: int, answer: CacheAnswer) -> None:
        session = self._job.sessions.get(rank)
        if session is not None:
            self._context.send(session, answer)

    def _drop(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            os.unlink(self._path)
            self._descriptor = -1


def _checked(begin: int, end: int) -> tuple[int, int]:
    if not 0 <= begin < end or begin // FRAME_BYTES != (end - 1) // FRAME_BYTES:
        raise BadMessage(f"a range from {begin} to {end}, which is not in one frame")
    return begin, end
