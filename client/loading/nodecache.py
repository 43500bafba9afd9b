"""A load's bytes through the node's cache: what another rank of this node reads is copied from shared memory.

The daemon says which rank reads a range (:mod:`ckptd.protocol.cache`); the bytes go through a segment that all ranks
map. Invariant: whatever becomes of the daemon or of the other ranks, every range comes, from the disk at the worst.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from ckptd.checkpoint.indexing.columns import Int64
from ckptd.checkpoint.reading.files import Disk, SourceFile, memory_at
from ckptd.protocol.cache_messages import (
    CacheAnswer,
    CacheBegun,
    CacheClaim,
    CacheDone,
    CacheLeft,
    CacheSkipped,
    CacheWants,
)
from ckptd.protocol.errors import CkptdError
from ckptd.protocol.messages import (
    CacheMessage,
)
from ckptd.staging.arena import ArenaView

if TYPE_CHECKING:
    from ckptd.client.session.link import Link
    from ckptd.client.session.session import Session

logger = logging.getLogger(__name__)

# The rules answer within some seconds, whoever dies; a daemon that takes longer hangs itself.
_ANSWER_S: Final = 20.0


# Claims of one load must not be taken for those of another.
_numbers: Final = itertools.count(1)


@dataclass(frozen=True)
class Segment:
    """The shared memory, mapped."""

    view: ArenaView
    frame_bytes: int

    def address(self, frame: int, offset: int) -> int:
        """Return where a byte of a frame lies; ``offset`` counts in the file."""
        return self.view.address + self.view.offset(0) + frame * self.frame_bytes + offset % self.frame_bytes


class Line(Protocol):
    """A session's line to the daemon, as far as the cache needs it."""

    def open_cache(self, wanted_bytes: int) -> Segment:
        """Take part in a load of so many bytes. Raises CkptdError."""

    def send(self, message: CacheMessage) -> None:
        """Send a message, if the daemon is still there; from any thread."""


class NodeCache:
    """A source of bytes for one load of one rank.

    Args:
        line: The line to the daemon; its answers are given to :meth:`take`, its end to :meth:`fail`.
        source: Where bytes come from that no other rank has read; see :meth:`over`.
        answer_s: How long to wait for the daemon, in seconds.
    """

    name = "node cache"

    def __init__(
        self,
        line: Line,
        *,
        source: Disk | None = None,
        answer_s: float = _ANSWER_S,
    ) -> None:
        self._line, self._source, self._answer_s = line, source or Disk(), answer_s
        self._lock = threading.Lock()
        self._entering = threading.Lock()
        self._files: list[CachedFile] = []
        self._segment: Segment | None = None
        self._entered = self._failed = False
        self._asked: dict[int, Future[CacheAnswer | None]] = {}

    def open(self, path: str, ranges: Sequence[tuple[int, int]]) -> SourceFile:
        """Open a file; see :class:`ckptd.checkpoint.reading.files.Source`."""
        disk = self._source.open(path, ranges)
        file = CachedFile(self, disk, disk.identity, ranges)
        with self._lock:
            self._files.append(file)
        return file

    def over(self, disk: Disk) -> NodeCache:
        """Read from another disk what no other rank has read; before any file is opened."""
        self._source = disk
        return self

    # --- for its files -----------------------------------------------------------------------------------------------

    def segment(self) -> Segment | None:
        """Return the shared memory, asked for at the first range that is not in the page cache; None: there is none."""
        with self._entering:
            if not self._entered:
                self._entered = True
                self._enter()
        return None if self._failed else self._segment

    def _enter(self) -> None:
        try:
            self._segment = self._line.open_cache(sum(file.wanted_bytes for file in self._files))
        except CkptdError as error:
            logger.info("reading without the node's cache: %s", error)
            self._failed = True
            return
        for file in self._files:
            file.announce(self._segment.frame_bytes)
        self._line.send(CacheBegun())

    def send(self, message: CacheMessage) -> None:
        """Tell the daemon."""
        self._line.send(message)

    def claim(self, file: str, begin: int, end: int) -> CacheAnswer | None:
        """Ask what to do about a range; None: read it alone."""
        answer: Future[CacheAnswer | None] = Future()
        with self._lock:
            if self._failed:
                return None
            number = next(_numbers)
            self._asked[number] = answer
        self._line.send(CacheClaim(number, file, begin, end))
        try:
            return answer.result(self._answer_s)
        except TimeoutError:
            logger.warning("no word about the node's cache for %.0f s: reading without it", self._answer_s)
            self.fail()
            return None

    def shared(self, number: int, address: int, nbytes: int) -> memoryview:
        """Return a part of the shared memory; when it is dropped, the claim it was got by is done."""
        memory = (ctypes.c_char * nbytes).from_address(address)
        weakref.finalize(memory, self._line.send, CacheDone(number)).atexit = False
        return memoryview(memory).cast("B")

    def close(self) -> None:
        """The load is over, all files are closed."""
        if self._segment is not None:
            self._line.send(CacheLeft())
            self._segment.view.close()
            self._segment = None

    # --- news from the daemon, in the link's thread ------------------------------------------------------------------

    def take(self, answer: CacheAnswer) -> None:
        """Take an answer."""
        asked = self._asked.pop(answer.number, None)
        if asked is not None:
            asked.set_result(answer)
        elif answer.verdict != "alone":
            self._line.send(CacheDone(answer.number, good=False))  # who asked waits no more

    def fail(self) -> None:
        """Go on without the daemon."""
        with self._lock:
            self._failed = True
            asked, self._asked = self._asked, {}
        for each in asked.values():
            each.set_result(None)


class CachedFile:
    """One file, of which other ranks may want the same. Called from several threads at once."""

    def __init__(self, cache: NodeCache, disk: SourceFile, identity: str, ranges: Sequence[tuple[int, int]]) -> None:
        self._cache, self._disk, self._identity = cache, disk, identity
        self._ranges = list(ranges)
        self._skipped: set[tuple[int, int]] = set()  # what was not claimed before it could be announced
        self._announced = False
        self._lock = threading.Lock()

    @property
    def read_bytes(self) -> int:
        """What came from the disk."""
        return self._disk.read_bytes

    @property
    def wanted_bytes(self) -> int:
        """How much of the file is wanted."""
        return sum(end - begin for begin, end in self._ranges)

    def announce(self, frame_bytes: int) -> None:
        """Tell the daemon what will be claimed."""
        with self._lock:
            self._announced = True
            ranges = [r for r in self._ranges if r not in self._skipped and _in_one_frame(*r, frame_bytes)]
            self._ranges = []
        if ranges:
            self._cache.send(CacheWants(self._identity, np.array(ranges, "<i8").tobytes()))

    def fill(self, begin: int, targets: Sequence[memoryview]) -> bool:
        """Copy from the page cache, if it holds all of the range: no disk is asked then."""
        if not self._disk.fill(begin, targets):
            return False
        self._skip(begin, begin + sum(map(len, targets)))
        return True

    def view(self, begin: int, end: int, bounce: memoryview) -> memoryview:
        """Return the bytes of a range, which some rank of this node has read.

        They may lie in the shared memory; the frame is given back when the last view of them goes.
        """
        segment = self._cache.segment()
        if segment is None or not _in_one_frame(begin, end, segment.frame_bytes):
            return self._disk.view(begin, end, bounce)
        answer = self._cache.claim(self._identity, begin, end)
        if answer is None or answer.verdict == "alone":
            return self._disk.view(begin, end, bounce)
        address = segment.address(answer.frame, begin)
        if answer.verdict == "copy":
            return self._cache.shared(answer.number, address, end - begin)
        good = False
        try:
            data = self._disk.view(answer.begin, answer.end, bounce)
            _copy(memory_at(segment.address(answer.frame, answer.begin), len(data)), data)
            good = True
        finally:
            self._cache.send(CacheDone(answer.number, good))
        return data[begin - answer.begin : end - answer.begin]

    def fill_rows(self, begins: Int64, row_bytes: int, target: memoryview, *, blocks: tuple[int, int]) -> None:
        """Read rows from the disk: ranks that want columns want other ones each."""
        self._disk.fill_rows(begins, row_bytes, target, blocks=blocks)

    def close(self) -> None:
        """Close the file."""
        self._disk.close()

    def _skip(self, begin: int, end: int) -> None:
        with self._lock:
            if not self._announced:
                self._skipped.add((begin, end))
                return
        self._cache.send(CacheSkipped(self._identity, begin, end))


class _SessionLine:
    """A session, seen as a line."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def open_cache(self, wanted_bytes: int) -> Segment:
        opened, view = self._link.open_cache(wanted_bytes)
        return Segment(view, opened.frame_bytes)

    def send(self, message: CacheMessage) -> None:
        if self._link.live:
            self._link.send(message)


@contextlib.contextmanager
def cache_of(session: Session | None) -> Iterator[NodeCache | None]:
    """Give the node's cache for one load of the ranks of a session.

    None where it would be of no use: without a session or other ranks, or while another thread of this process loads
    through it.
    """
    if session is None or session.identity.world_size < 2 or not session.loading.acquire(blocking=False):
        yield None
        return
    cache = NodeCache(_SessionLine(session.link))
    session.on_cache_news = lambda news: cache.fail() if news is None else cache.take(news)
    try:
        if not session.live:
            cache.fail()
        yield cache
    finally:
        cache.close()
        session.loading.release()


def _in_one_frame(begin: int, end: int, frame_bytes: int) -> bool:
    return begin < end and begin // frame_bytes == (end - 1) // frame_bytes


def _copy(target: memoryview, source: memoryview) -> None:
    """Copy all of a source, without the interpreter's lock."""
    to, of = (np.frombuffer(view, np.uint8).__array_interface__["data"][0] for view in (target, source))
    ctypes.memmove(to, of, len(source))
