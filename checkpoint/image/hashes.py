"""Hashes of an image seen in pieces: those that :func:`ckptd.checkpoint.image.write.write_image` makes of the whole.

An item that spans pieces is hashed as it comes; so is the frame, which is all that is no item's payload.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64, xxh3_64_intdigest


class ImageHashes:
    """The hashes of one image.

    Args:
        offsets: Where each payload begins, in rising order.
        lengths: Their lengths in bytes; they do not overlap.
    """

    def __init__(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        self._offsets, self._lengths = offsets, lengths
        self._hashes = np.full(len(offsets), xxh3_64_intdigest(b""), np.uint64)
        self._frame = xxh3_64()
        self._open: xxh3_64 | None = None  # of the item that the last piece did not end
        self._next = 0  # the first item whose end has not been seen
        self._seen_bytes = 0

    def update(self, data: memoryview) -> None:
        """Take the next bytes of the image."""
        begin, at = self._seen_bytes, 0
        while self._next < len(self._offsets):
            first = self._offsets[self._next] - begin
            last = first + self._lengths[self._next]
            if first >= len(data):
                break
            if at < first:
                self._frame.update(data[at:first])
                at = first
            if last > len(data):
                self._open = self._open or xxh3_64()
                self._open.update(data[at:])
                at = len(data)
                break
            self._hashes[self._next] = self._digest(data[at:last])
            at = max(at, last)
            self._next += 1
        if at < len(data):
            self._frame.update(data[at:])
        self._seen_bytes += len(data)

    def _digest(self, rest: memoryview) -> int:
        """Return the hash of an item that ends with these bytes."""
        if self._open is None:
            return xxh3_64_intdigest(rest)
        self._open.update(rest)
        digest, self._open = self._open.intdigest(), None
        return digest

    @property
    def items(self) -> NDArray[np.uint64]:
        """xxh3-64 of each payload, once all bytes were seen."""
        return self._hashes

    @property
    def frame(self) -> int:
        """xxh3-64 of all other bytes."""
        return self._frame.intdigest()
