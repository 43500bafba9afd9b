"""Admits arenas: measures, counts what is being made at the same time, and reserves before a thread begins.

Invariant: measuring and reserving happen in one step of the daemon's loop, so that of two ranks for which there is only
room once, one is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from ckptd.daemon.settings.config import Config
from ckptd.protocol.admission import Limit, Reserve, admit
from ckptd.staging.memory import memory_limits

Measure = Callable[[str, Iterable[int]], list[Limit]]

_STAT_BLOCK_BYTES = 512  # st_blocks counts these whatever the file system: stat(2)


class Admission:
    """The daemon's account of shared memory that it has promised and the kernel does not show yet.

    Args:
        config: What is kept in reserve.
        measure: Returns all limits for a directory and some processes.
    """

    def __init__(self, config: Config, *, measure: Measure = memory_limits) -> None:
        self._reserve = Reserve(config.memory_reserve_bytes, config.memory_reserve_fraction)
        self._measure = measure
        self._making: dict[str, int] = {}

    @contextmanager
    def reserve(self, path: str, nbytes: int, *, pid: int) -> Iterator[None]:
        """Promise ``nbytes`` to the arena at ``path`` for as long as the block lasts, in which it must be made.

        Args:
            path: The arena's file, not yet there.
            nbytes: Its size.
            pid: The trainer that asks.

        Raises:
            ShmTooSmall: It does not fit; nothing was promised.
        """
        # In this order: a page that is taken between the two looks is counted twice, never left out.
        making_bytes = sum(_missing_bytes(made, size) for made, size in self._making.items())
        limits = self._measure(os.path.dirname(path), (os.getpid(), pid))
        admit(nbytes, limits, self._reserve, making_bytes=making_bytes, path=os.path.dirname(path))
        self._making[path] = nbytes
        try:
            yield
        finally:
            del self._making[path]


def _missing_bytes(path: str, nbytes: int) -> int:
    """Return how many bytes of an arena that is being made have no page yet."""
    try:
        return max(0, nbytes - os.stat(path).st_blocks * _STAT_BLOCK_BYTES)
    except FileNotFoundError:
        return nbytes
