"""The hash of a range that comes in pieces: follows them in order, whatever the order in which they land."""

from __future__ import annotations

import threading

from xxhash import xxh3_64

from ckptd.checkpoint.reading.files import memory_at
from ckptd.checkpoint.reading.requests import Piece, Read


class FollowingHash:
    """The hash of one read. One thread hashes at a time, and none waits for it."""

    def __init__(self, read: Read) -> None:
        self._read, self._at = read, read.offset
        self._hasher = xxh3_64()
        self._landed: dict[int, int] = {}
        self._busy = False
        self._lock = threading.Lock()

    def claim(self, piece: Piece) -> bool:
        """Say that the caller is about to hash a piece part by part; False if it is not this one's turn."""
        with self._lock:
            if self._busy or self._at != piece.begin:
                return False
            self._busy = True
            return True

    def update(self, part: memoryview) -> None:
        """Hash the next part of the piece that the caller has claimed."""
        self._hasher.update(part)

    def end(self, piece: Piece) -> int | None:
        """Say that a claimed piece is hashed whole; else as :meth:`follow`."""
        self._at = piece.end
        return self._catch_up()

    def follow(self, piece: Piece) -> int | None:
        """Hash what has landed without a gap; return the hash if that was the rest."""
        with self._lock:
            self._landed[piece.begin] = piece.end
            if self._busy:
                return None
            self._busy = True
        return self._catch_up()

    def _catch_up(self) -> int | None:
        read = self._read
        while self._at != read.offset + read.nbytes:
            with self._lock:
                end = self._landed.pop(self._at, None)
                if end is None:
                    self._busy = False
                    return None
            self._hasher.update(memory_at(read.address + self._at - read.offset, end - self._at))
            self._at = end
        return self._hasher.intdigest()
