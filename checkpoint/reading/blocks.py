"""Which large blocks of a file are brought whole where rows of them are wanted. Arithmetic, no I/O.

A block that comes into the page cache in one piece costs the kernel one entry instead of 512: the read that brings it
is cheaper, and so is every later one. Invariant: rows that lie close together cover all but a 32nd of such a block.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ckptd.checkpoint.indexing.columns import Int64

# O_DIRECT needs offset, length and address aligned to the device's logical block size; 4096 covers every format in use.
BLOCK_BYTES: Final = 4096
# A page that the processor maps by one entry of the level above: x86-64, and aarch64 with pages of 4 KiB.
LARGE_BLOCK_BYTES: Final = 2 << 20
_LEFT_OUT_SHARE: Final = 1 / 32


def brings_every_block(begins: Int64, row_bytes: int) -> bool:
    """Return whether the disk brings all blocks from the first row to the last, whoever reads only the rows.

    Args:
        begins: int64[R], where each row begins in the file, in bytes, ascending.
        row_bytes: Length of each.
    """
    last = (begins[:-1] + (row_bytes - 1)) // BLOCK_BYTES
    return len(begins) > 1 and bool((begins[1:] // BLOCK_BYTES - last <= 1).all())


def whole_blocks(begins: Int64, ends: Int64) -> tuple[Int64, Int64]:
    """Return which blocks may come whole, for each of some ranges of one file.

    Args:
        begins: int64[R], where each range begins whose disk blocks are all needed, in bytes.
        ends: int64[R], one behind its last byte.

    Returns:
        Two int64[R]: begin and end of the blocks that hold a part of the range or more of the file; alike if there are
        none.
    """
    covered = _Covered(begins, ends)
    first, last = begins // LARGE_BLOCK_BYTES, -(-ends // LARGE_BLOCK_BYTES)
    first += ~covered.is_whole(first)
    last -= ~covered.is_whole(last - 1)
    return first * LARGE_BLOCK_BYTES, np.maximum(first, last) * LARGE_BLOCK_BYTES


class _Covered:
    """How much of a file ranges cover, which may overlap, up to each place."""

    def __init__(self, begins: Int64, ends: Int64) -> None:
        order = np.argsort(begins, kind="stable")
        reach = np.maximum.accumulate(ends[order])
        fresh = begins[order]
        fresh[1:] = np.maximum(fresh[1:], reach[:-1])
        self._places = np.stack([fresh, reach], axis=1).reshape(-1)
        total = np.cumsum(reach - fresh)
        self._bytes = np.stack([total - (reach - fresh), total], axis=1).reshape(-1)

    def is_whole(self, blocks: Int64) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Return of each block, by number, whether next to nothing of it is left out."""
        begins = blocks * LARGE_BLOCK_BYTES
        found = self._up_to(begins + LARGE_BLOCK_BYTES) - self._up_to(begins)
        return np.asarray(found >= (1 - _LEFT_OUT_SHARE) * LARGE_BLOCK_BYTES)

    def _up_to(self, places: Int64) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.interp(places, self._places, self._bytes)
