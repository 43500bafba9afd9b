"""Where the bytes of one file go, and the stream of records on top of it.

Invariant: a sink's file counts only after ``close`` has returned; whatever went before, ``abort`` leaves nothing.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Final, Protocol

from xxhash import xxh3_64, xxh3_64_intdigest

from ckptd.protocol.errors import CkptdError

Bytes = bytes | memoryview
_ZEROS: Final = bytes(4096)

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """One new file or object."""

    def write(self, data: Bytes) -> None:
        """Append bytes. Raises a StorageError."""

    def close(self) -> None:
        """Finish the file: durable, as far as was asked, and verified when this returns. Raises a StorageError."""

    def abort(self) -> None:
        """Remove what was written. Never raises for what is gone already."""


def abort_after_failure(sink: Sink) -> None:
    """Remove what a failed write has left. That this fails, too, is logged: its caller has a better error to tell."""
    try:
        sink.abort()
    except (CkptdError, OSError, RuntimeError) as error:
        logger.warning("could not remove a file whose write has failed: %s", error)


class RecordStream:
    """Appends payloads and what stands around them to a sink, and hashes both while they are warm.

    Attributes:
        offset: How many bytes were written.
    """

    def __init__(self, sink: Sink) -> None:
        self.offset = 0
        self._sink = sink
        self._frame = xxh3_64()

    @property
    def frame_hash(self) -> int:
        """Return the xxh3-64 of all bytes that are no payload."""
        return self._frame.intdigest()

    def frame(self, data: Bytes) -> None:
        """Append bytes that are no item's payload."""
        self._frame.update(data)
        self._append(data)

    def payload(self, data: Bytes) -> int:
        """Append an item's payload and return its xxh3-64."""
        found = xxh3_64_intdigest(data)
        self._append(data)
        return found

    def raw(self, data: Bytes) -> None:
        """Append bytes that nobody will verify by a hash of ours."""
        self._append(data)

    def pad(self, alignment_bytes: int, *, before: int = 0) -> None:
        """Append zeros, so that what follows ``before`` more bytes begins on a multiple of ``alignment_bytes``."""
        self.frame(_ZEROS[: -(self.offset + before) % alignment_bytes])

    def _append(self, data: Bytes) -> None:
        if data:
            self._sink.write(data)
            self.offset += len(data)


class RawStream(io.RawIOBase):
    """A record stream as extensions want one. They close what they write to; the file goes on, though."""

    def __init__(self, write: Callable[[Bytes], None]) -> None:
        super().__init__()
        self._write = write

    def writable(self) -> bool:
        """Return that it can be written."""
        return True

    def write(self, data: object) -> int:
        """Append bytes; ``data`` is any contiguous buffer."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]  # typeshed has no name for buffers before 3.12
        self._write(view)
        return len(view)
