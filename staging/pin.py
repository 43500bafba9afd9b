"""Page-locks an arena for CUDA, once, in ranges; all of the CUDA runtime that is not copying is here.

Pinned pages let the copy engine run at the bus's rate and beside the compute streams. A machine without CUDA, or one
that refuses to pin, stages from pageable memory all the same: slower, never wrong.
"""

from __future__ import annotations

import logging
from typing import Final, Protocol

import torch

logger = logging.getLogger(__name__)

# cudaHostRegister holds a driver lock for the whole call; a GiB takes some 100 ms, so the trainer gets in between.
_RANGE_BYTES: Final = 1 << 30


class HostRegistrar(Protocol):
    """The two calls of a device runtime that lock host pages; errors are returned as numbers, 0 is success."""

    def register(self, address: int, nbytes: int) -> int:
        """Lock pages."""

    def unregister(self, address: int) -> int:
        """Unlock what was registered at this address."""


class CudaRegistrar:
    """cudaHostRegister and cudaHostUnregister. Not run in CI, which has no GPU."""

    def register(self, address: int, nbytes: int) -> int:
        """Lock pages; the flag 1 makes them valid in every context of the process."""
        return int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 1))

    def unregister(self, address: int) -> int:
        """Unlock pages."""
        return int(torch.cuda.cudart().cudaHostUnregister(address))


class PinnedRanges:
    """The locked ranges of one arena.

    Args:
        address: First byte, page aligned.
        nbytes: Length in bytes.
        registrar: The device runtime.
    """

    def __init__(self, address: int, nbytes: int, *, registrar: HostRegistrar) -> None:
        self._registrar = registrar
        self._pinned: list[int] = []
        for begin in range(address, address + nbytes, _RANGE_BYTES):
            length = min(_RANGE_BYTES, address + nbytes - begin)
            status = registrar.register(begin, length)
            if status != 0:
                logger.warning("pinned %d of %d bytes (error %d): staging is slower", begin - address, nbytes, status)
                return
            self._pinned.append(begin)

    @property
    def ranges(self) -> int:
        """Number of ranges that are locked."""
        return len(self._pinned)

    def release(self) -> None:
        """Unlock everything; calling it twice does nothing."""
        while self._pinned:
            self._registrar.unregister(self._pinned.pop())


def pin(address: int, nbytes: int) -> PinnedRanges | None:
    """Lock an arena for CUDA where this process uses CUDA; None where it does not."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return PinnedRanges(address, nbytes, registrar=CudaRegistrar())
