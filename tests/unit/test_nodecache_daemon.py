"""The daemon's side of the node's cache: its segment comes and goes, and no message breaks it."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace

import pytest

from ckptd.daemon.job.jobfiles import JobFiles
from ckptd.daemon.job.nodecache import NodeCache
from ckptd.daemon.settings.config import Config
from ckptd.protocol.cache import FRAME_BYTES
from ckptd.protocol.cache_messages import (
    CacheAnswer,
    CacheBegun,
    CacheClaim,
    CacheDone,
    CacheLeft,
    CacheWants,
)
from ckptd.protocol.errors import BadMessage, SessionClosed, Unsupported
from ckptd.protocol.messages import (
    Heartbeat,
)


class Job:
    """A job of some ranks, and what is sent to them."""

    def __init__(self, folder, *, world_size=2, **settings):
        self.roster = SimpleNamespace(world_size=world_size, incarnation=1, job="job")
        self.files = JobFiles(str(folder), None, on_made=lambda: None)
        self.sessions = {rank: SimpleNamespace(rank=rank, live=True) for rank in range(world_size)}
        self.sent, self.served = [], []
        context = SimpleNamespace(
            config=Config(**settings),
            metrics=SimpleNamespace(served_from_cache=self.served.append),
            send=lambda session, message: self.sent.append((session.rank, message)),
        )
        self.cache = NodeCache(self, context)
        self._folder = folder

    async def open(self, rank, wanted_bytes=100):
        opened, descriptor = await self.cache.open(self.sessions[rank], wanted_bytes)
        assert os.fstat(descriptor).st_size > opened.frames * opened.frame_bytes
        return opened

    def say(self, rank, *messages):
        for message in messages:
            self.cache.on_message(self.sessions[rank], message)

    def segments(self):
        return list(self._folder.rglob("cache-*"))


def test_a_segment_is_as_large_as_the_load_and_no_larger_than_configured(tmp_path):
    async def run():
        for wanted_bytes, frames in ((100, 1), (FRAME_BYTES, 2), (100 * FRAME_BYTES, 2)):
            job = Job(tmp_path, node_cache_bytes=2 * FRAME_BYTES)
            assert (await job.open(0, wanted_bytes)).frames == frames
            assert (await job.open(1, 1)).frames == frames
            job.cache.close()

    asyncio.run(run())


def test_ranks_share_and_the_segment_goes_with_the_last_of_them(tmp_path):
    async def run():
        job = Job(tmp_path)
        for rank in (0, 1):
            await job.open(rank)
            job.say(rank, CacheWants("f", (0).to_bytes(8, "little") + (9).to_bytes(8, "little")), CacheBegun())
        job.say(0, CacheClaim(1, "f", 0, 9))
        job.say(1, CacheClaim(2, "f", 0, 9))
        assert job.sent == [(0, CacheAnswer(1, "read", 0, 0, 9))]
        job.say(0, CacheDone(1))
        assert job.sent[1:] == [(1, CacheAnswer(2, "copy", 0))]
        assert job.served == [9]
        job.say(1, CacheDone(2), CacheLeft())
        assert len(job.segments()) == 1
        job.say(0, CacheLeft())
        assert job.segments() == []

    asyncio.run(run())


@pytest.mark.parametrize("settings", [{"node_cache_bytes": 0}, {"world_size": 1}])
def test_where_it_is_of_no_use_there_is_none(tmp_path, settings):
    with pytest.raises(Unsupported, match="reads for itself"):
        asyncio.run(Job(tmp_path, **settings).open(0))
    assert list(tmp_path.rglob("cache-*")) == []


def test_a_session_that_ends_meanwhile_gets_none(tmp_path):
    job = Job(tmp_path)
    job.sessions[0].live = False
    with pytest.raises(SessionClosed):
        asyncio.run(job.open(0))
    job.cache.close()


@pytest.mark.parametrize(
    "message",
    [
        CacheWants("f", b"\0" * 15),
        CacheWants("f", b"\0" * 16),
        CacheWants("f", (9).to_bytes(8, "little") + (1).to_bytes(8, "little")),
        CacheClaim(1, "f", 5, 5),
        CacheClaim(1, "f", 0, FRAME_BYTES + 1),
        Heartbeat(),
    ],
)
def test_a_message_that_makes_no_sense_is_refused(tmp_path, message):
    async def run():
        job = Job(tmp_path)
        await job.open(0)
        with pytest.raises(BadMessage):
            job.say(0, message)
        job.cache.close()

    asyncio.run(run())


def test_claims_after_the_end_are_answered(tmp_path):
    job = Job(tmp_path)
    job.say(0, CacheClaim(7, "f", 0, 9), CacheDone(3), CacheLeft())
    assert job.sent == [(0, CacheAnswer(7, "alone"))]
