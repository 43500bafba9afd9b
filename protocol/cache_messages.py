"""Messages of the node's cache for loads; the rest, and the rule of change, are in :mod:`ckptd.protocol.messages`."""

from __future__ import annotations

from typing import Literal

from ckptd.protocol.wire import Count, Message, Name, NBytes


class CacheWants(Message, frozen=True, tag="cache_wants"):
    """The rank will claim these ranges of a file, each within one frame's length (int64 column: begin, end, ...)."""

    file: Name
    ranges: bytes


class CacheBegun(Message, frozen=True, tag="cache_begun"):
    """All that the rank wants has been said."""


class CacheSkipped(Message, frozen=True, tag="cache_skipped"):
    """The rank has got a range in another way."""

    file: Name
    begin: NBytes
    end: NBytes


class CacheClaim(Message, frozen=True, tag="cache_claim"):
    """The rank needs a range now. Answer: CacheAnswer."""

    number: NBytes
    file: Name
    begin: NBytes
    end: NBytes


class CacheDone(Message, frozen=True, tag="cache_done"):
    """The rank touches the frame that it was told of no more. ``good``: what it was to read is there."""

    number: NBytes
    good: bool = True


class CacheLeft(Message, frozen=True, tag="cache_left"):
    """The rank's load is over."""


class CacheAnswer(Message, frozen=True, tag="cache_answer"):
    """What to do about a claim: copy from a frame, read a range into it (reply to both: CacheDone), or read alone."""

    number: NBytes
    verdict: Literal["copy", "read", "alone"]
    frame: NBytes = 0
    begin: NBytes = 0
    end: NBytes = 0


class OpenCache(Message, frozen=True, tag="open_cache"):
    """Client to daemon: let this rank use the node's cache for a load of so many bytes."""

    wanted_bytes: NBytes


class CacheOpened(Message, frozen=True, tag="cache_opened"):
    """Daemon to client: the descriptor of the cache's segment comes with this frame."""

    frames: Count
    frame_bytes: NBytes
