"""A load's bytes through the node's cache, with a daemon that the test plays."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ckptd.checkpoint.reading.read import Read, read_all
from ckptd.client.loading.nodecache import NodeCache, Segment
from ckptd.protocol.cache import (
    Begun,
    CacheLimits,
    CacheRules,
    Claim,
    Done,
    Left,
    Opened,
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
    CacheSkipped,
    CacheWants,
)
from ckptd.protocol.errors import ShmTooSmall
from ckptd.staging.arena import ArenaView, create_arena

FRAME = 4 << 20
CONTENT = np.random.default_rng(1).integers(0, 256, FRAME + 70_000, np.uint8).tobytes()


class Daemon:
    """The rules and a real segment; ranks are in this process, and answers come in the caller's thread."""

    def __init__(self, path, world_size=2, frames=2):
        self.rules = CacheRules(world_size, CacheLimits(frames, FRAME))
        self.path, self.frames = str(path), frames
        os.close(create_arena(self.path, slots=1, slot_bytes=frames * FRAME))
        self.lock, self.now_s = threading.RLock(), 0.0
        self.caches, self.said = {}, []

    def line(self, rank):
        return Line(self, rank)

    def hear(self, rank, message):
        with self.lock:
            self.said.append((rank, message))
            for action in self.rules.handle(self.event(rank, message), self.now_s):
                match action:
                    case ReadIt(to, number, frame, (begin, end)):
                        answer = CacheAnswer(number, "read", frame, begin, end)
                    case Ready(to, number, frame):
                        answer = CacheAnswer(number, "copy", frame)
                    case _ if hasattr(action, "number"):
                        to, answer = action.rank, CacheAnswer(action.number, "alone")
                    case _:
                        continue
                self.caches[to].take(answer)

    @staticmethod
    def event(rank, message):
        match message:
            case CacheWants(file, column):
                pairs = np.frombuffer(column, "<i8").reshape(-1, 2).tolist()
                return Wants(rank, file, tuple(map(tuple, pairs)))
            case CacheBegun():
                return Begun(rank)
            case CacheSkipped(file, begin, end):
                return Skipped(rank, file, (begin, end))
            case CacheClaim(number, file, begin, end):
                return Claim(rank, number, file, (begin, end))
            case CacheDone(number, good):
                return Done(rank, number, good)
            case CacheLeft():
                return Left(rank)
            case None:
                return Tick()

    def messages(self, kind):
        return [(rank, message) for rank, message in self.said if isinstance(message, kind)]


class Line:
    """One rank's line."""

    def __init__(self, daemon, rank):
        self.daemon, self.rank = daemon, rank

    def open_cache(self, wanted_bytes):
        self.daemon.rules.handle(Opened(self.rank), self.daemon.now_s)
        descriptor = os.open(self.daemon.path, os.O_RDWR)
        view = ArenaView(descriptor, arena=0, slots=1, slot_bytes=self.daemon.frames * FRAME)
        return Segment(view, FRAME)

    def send(self, message):
        self.daemon.hear(self.rank, message)


class Disk:
    """Some bytes, none of which are in a page cache; counts what is read."""

    name = "disk"

    def __init__(self, content=CONTENT):
        self.content, self.read_bytes, self.cached = content, 0, False

    def open(self, path, ranges):
        stat = os.stat(path)
        self.identity = f"{stat.st_dev}:{stat.st_ino}"
        return self

    def fill(self, begin, targets):
        if self.cached:
            for target in targets:
                target[:] = self.content[begin : begin + len(target)]
                begin += len(target)
        return self.cached

    def view(self, begin, end, bounce):
        bounce[: end - begin] = self.content[begin:end]
        self.read_bytes += end - begin
        return bounce[: end - begin]

    def close(self):
        pass


class Rank:
    """One rank's load of all of a file."""

    def __init__(self, daemon, rank, path, **options):
        self.disk, self.path = Disk(), str(path)
        self.cache = daemon.caches[rank] = NodeCache(daemon.line(rank), source=self.disk, **options)
        self.target = np.zeros(len(CONTENT), np.uint8)

    def load(self):
        half = len(CONTENT) // 2
        address = self.target.ctypes.data
        reads = [
            Read(self.path, 0, half, address, "one"),
            Read(self.path, half, len(CONTENT) - half, address + half, "other"),
        ]
        try:
            return read_all(reads, threads=2, source=self.cache)
        finally:
            self.cache.close()

    @property
    def is_right(self):
        return self.target.tobytes() == CONTENT


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(b"only its name is needed")
    return path


@pytest.fixture
def daemon(tmp_path):
    return Daemon(tmp_path / "segment")


def test_two_ranks_read_every_byte_once(daemon, file):
    ranks = [Rank(daemon, rank, file) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        counts = list(pool.map(Rank.load, ranks))
    assert [rank.is_right for rank in ranks] == [True, True]
    assert sum(count.read_bytes for count in counts) == sum(rank.disk.read_bytes for rank in ranks) == len(CONTENT)


def test_a_rank_that_comes_later_reads_nothing(daemon, file):
    first, second = (Rank(daemon, rank, file) for rank in range(2))
    first.load()
    second.load()
    assert (first.is_right, second.is_right) == (True, True)
    assert (first.disk.read_bytes, second.disk.read_bytes) == (len(CONTENT), 0)


def test_what_is_in_the_page_cache_needs_no_daemon(daemon, file):
    rank = Rank(daemon, 0, file)
    rank.disk.cached = True
    rank.load()
    assert rank.is_right
    assert daemon.said == []


def test_what_is_in_the_page_cache_in_part_is_not_claimed(daemon, file):
    rank = Rank(daemon, 0, file)
    opened = rank.cache.open(str(file), [(0, 100), (100, 200), (200, 300)])
    bounce = memoryview(bytearray(FRAME))
    rank.disk.cached = True
    assert opened.fill(0, [bounce[:100]])
    assert opened.view(100, 200, bounce) == CONTENT[100:200]
    assert opened.fill(200, [bounce[:100]])
    [(_, wants)] = daemon.messages(CacheWants)
    assert np.frombuffer(wants.ranges, "<i8").tolist() == [100, 200, 200, 300]
    [(_, skipped)] = daemon.messages(CacheSkipped)
    assert (skipped.begin, skipped.end) == (200, 300)


def test_a_file_is_known_by_what_it_is_and_not_by_its_name(daemon, file, tmp_path):
    rank = Rank(daemon, 0, file)
    one = rank.cache.open(str(file), [(0, 9)])
    (tmp_path / "link").hardlink_to(file)
    same = rank.cache.open(str(tmp_path / "link"), [(0, 9)])
    (tmp_path / "new").write_bytes(b"only its name is needed")
    os.replace(tmp_path / "new", file)
    other = rank.cache.open(str(file), [(0, 9)])
    assert one._identity == same._identity != other._identity


def test_without_room_for_a_segment_everything_is_read_alone(daemon, file):
    rank = Rank(daemon, 0, file)

    def refuse(wanted_bytes):
        raise ShmTooSmall("/dev/shm", wanted_bytes, 0)

    rank.cache._line.open_cache = refuse
    rank.load()
    assert rank.is_right
    assert daemon.said == []


def test_a_daemon_that_says_nothing_is_not_waited_for_twice(daemon, file):
    rank = Rank(daemon, 0, file, answer_s=0.05)
    daemon.caches[0] = NodeCache(daemon.line(9))  # answers go astray
    rank.load()
    assert rank.is_right
    assert len(daemon.messages(CacheClaim)) <= 2  # one for each of the two readers


def test_a_daemon_that_goes_away_lets_all_who_wait_go_on(daemon, file):
    rank = Rank(daemon, 0, file)
    claimed = threading.Event()

    def send(message):
        if isinstance(message, CacheClaim):
            claimed.set()

    rank.cache._line.send = send
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(rank.load)
        assert claimed.wait(20)
        rank.cache.fail()
        loading.result(20)
    assert rank.is_right


def test_a_late_answer_gives_its_frame_back(daemon, file):
    rank = Rank(daemon, 0, file)
    rank.cache.take(CacheAnswer(77, "copy", 1))
    rank.cache.take(CacheAnswer(78, "alone"))
    assert daemon.said == [(0, CacheDone(77, good=False))]


def test_a_read_that_fails_is_told_and_raised(daemon, file):
    rank = Rank(daemon, 0, file)

    def view(begin, end, bounce):
        raise OSError("the disk is gone")

    rank.disk.view = view
    with pytest.raises(OSError, match="the disk is gone"):
        rank.load()
    assert daemon.messages(CacheDone)
    assert not any(message.good for _, message in daemon.messages(CacheDone))
    assert daemon.said[-1] == (0, CacheLeft())


def test_a_frame_is_given_back_when_the_last_view_of_it_goes(daemon, file):
    first, second = (Rank(daemon, rank, file) for rank in range(2))
    first.load()
    opened = second.cache.open(str(file), [(0, 100)])
    view = opened.view(0, 100, memoryview(bytearray(100)))
    part = view[40:60]
    done = [message for rank, message in daemon.messages(CacheDone) if rank == 1]
    assert done == []
    del view
    assert bytes(part) == CONTENT[40:60]
    assert [message for rank, message in daemon.messages(CacheDone) if rank == 1] == []
    del part
    [done] = [message for rank, message in daemon.messages(CacheDone) if rank == 1]
    assert done.good


def test_ranks_that_want_overlapping_ranges_get_each_its_own(daemon, file):
    bounce = memoryview(bytearray(FRAME))
    first, second = (Rank(daemon, rank, file) for rank in range(2))
    one, other = first.cache.open(str(file), [(0, 100)]), second.cache.open(str(file), [(40, 140)])
    assert second.cache.segment() is not None  # it has said what it wants
    assert bytes(one.view(0, 100, bounce)) == CONTENT[:100]
    assert bytes(other.view(40, 140, bounce)) == CONTENT[40:140]
    assert (first.disk.read_bytes, second.disk.read_bytes) == (140, 0)
