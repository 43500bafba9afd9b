"""Loads from shared memory: the images of a job's last commit, as long as a daemon of this node still holds them.

Invariant: it costs a load a moment at most, and never an error: whatever is wrong with daemon, memory or bytes, the
load reads from the disk what it would have read there anyway.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ckptd.checkpoint.reading.images import ImageFile
from ckptd.checkpoint.reading.read import Read, ReadCount, read_all
from ckptd.client.session.embedded import find_attach_socket
from ckptd.protocol import messages
from ckptd.protocol.errors import BadMessage, CkptdError, MissingFile
from ckptd.protocol.messages import ATTACH_FRAME_LIMIT_BYTES, PROTOCOL_VERSION, AttachRequest
from ckptd.protocol.retained import (
    IMAGES_AT_MOST,
    OpenRetained,
    Outcome,
    RetainedClosed,
    RetainedImage,
    RetainedOpened,
)
from ckptd.staging.arena import SlotState, read_slot

logger = logging.getLogger(__name__)

_FRAME_LENGTH: Final = struct.Struct("<I")
# A daemon answers within a millisecond; one that hangs must not hold a load up.
ANSWER_WITHIN_S: Final = 0.2


@dataclass(frozen=True)
class _Held:
    """An image, and the arena that it lies in."""

    image: RetainedImage
    descriptor: int

    def is_intact(self) -> bool:
        return read_slot(self.descriptor, self.image.slot)[::2] == (SlotState.RETAINED, self.image.sequence)

    def is_ours(self) -> bool:
        """Return whether the memory belongs to our user: a daemon may be anybody's."""
        return os.fstat(self.descriptor).st_uid == os.geteuid()


class RetainedSave:
    """A save in memory: a source of bytes for one load.

    Args:
        path: Directory of the checkpoint, as its files' paths begin.
        connection: To the daemon that holds it; closed by :meth:`read`.
        images: What it holds.
    """

    name = "memory"

    def __init__(self, path: str, connection: socket.socket, images: Iterable[_Held]) -> None:
        self._path, self._connection = path, connection
        self._images = {held.image.file: held for held in images}

    def open(self, path: str, ranges: Sequence[tuple[int, int]]) -> ImageFile:
        """Open a file; see :class:`ckptd.checkpoint.reading.files.Source`."""
        del ranges
        held = self._images.get(path.removeprefix(self._path).lstrip("/"))
        if held is None:
            raise MissingFile(path)
        return ImageFile(path, held.descriptor, begin=held.image.offset, nbytes=held.image.nbytes)

    def read(self, reads: Sequence[Read]) -> ReadCount | None:
        """Perform the reads of a load, and let the memory go.

        Returns:
            What was read; None if it does not count: the owner has taken the slot for its next save, or bytes are
            wrong. Targets hold anything then, and reads that have made buffers cannot be used again.
        """
        outcome: Outcome = "damaged"
        count = None
        try:
            found = read_all(reads, source=self, in_memory=True)
            # The owner says so before it changes a byte, so what was read before this look is what was committed.
            if all(held.is_intact() for held in self._images.values()):
                count, outcome = found, "served"
            else:
                outcome = "overwritten"
                logger.info("%s: a new save was staged over it in memory: loading it from the disk", self._path)
        except CkptdError as error:
            if not all(held.is_intact() for held in self._images.values()):
                outcome = "overwritten"
            logger.warning("%s: it was %s in memory (%s): loading it from the disk", self._path, outcome, error)
        finally:
            self._close(outcome, 0 if count is None else count.read_bytes)
        return count

    def _close(self, outcome: Outcome, read_bytes: int) -> None:
        try:
            _send(self._connection, RetainedClosed(PROTOCOL_VERSION, outcome, read_bytes))
        except OSError as error:
            logger.debug("the daemon will not count this load: %s", error)
        self._connection.close()
        for held in self._images.values():
            os.close(held.descriptor)


def open_retained(path: str, save_id: str, *, runtime: str | None = None) -> RetainedSave | None:
    """Return a save that a daemon holds in memory, or None if none does. Starts no daemon.

    Args:
        path: Directory of the checkpoint.
        save_id: Name of the save, as its index tells it: another one under the same id does not match.
        runtime: Runtime directory of the daemon that this process knows; None looks for one.
    """
    deadline_s = time.monotonic() + ANSWER_WITHIN_S
    connection: socket.socket | None = None
    try:
        connection = find_attach_socket(runtime, timeout_s=ANSWER_WITHIN_S)
        if connection is None:
            return None
        held = _ask(connection, OpenRetained(PROTOCOL_VERSION, _text(path), _text(save_id)), deadline_s)
    except (CkptdError, OSError, EOFError) as error:
        logger.info("%s: not looked for in memory: %s", path, error)
        held = []
    if not held:
        if connection is not None:
            connection.close()
        return None
    assert connection is not None
    return RetainedSave(path, connection, held)


def _ask(connection: socket.socket, request: OpenRetained, deadline_s: float) -> list[_Held]:
    """Return the images that the daemon tells of, their descriptors open; none if anything about them is odd."""
    _send(connection, request)
    connection.settimeout(max(1e-3, deadline_s - time.monotonic()))
    head, descriptors, _, _ = socket.recv_fds(
        connection, _FRAME_LENGTH.size, IMAGES_AT_MOST, flags=socket.MSG_CMSG_CLOEXEC
    )
    held: list[_Held] = []
    try:
        (length,) = _FRAME_LENGTH.unpack(head + _receive(connection, _FRAME_LENGTH.size - len(head), deadline_s))
        if length > ATTACH_FRAME_LIMIT_BYTES:
            raise BadMessage(f"an attach frame of {length} bytes")
        reply = messages.decode_attach_reply(_receive(connection, length, deadline_s))
        # A daemon before this message refuses it, and descriptors beyond our own limit do not arrive.
        if isinstance(reply, RetainedOpened) and len(reply.images) == len(descriptors):
            found = [_Held(*pair) for pair in zip(reply.images, descriptors, strict=True)]
            held = found if all(each.is_ours() for each in found) else []
        return held
    finally:
        if not held:
            for descriptor in descriptors:
                os.close(descriptor)


def _text(name: str) -> str:
    """Return a name that a message can carry: paths need not be valid Unicode."""
    return name.encode("utf-8", "replace").decode()


def _send(connection: socket.socket, message: AttachRequest) -> None:
    frame = messages.encode(message)
    connection.sendall(_FRAME_LENGTH.pack(len(frame)) + frame)


def _receive(connection: socket.socket, nbytes: int, deadline_s: float) -> bytes:
    data = b""
    while len(data) < nbytes:
        connection.settimeout(max(1e-3, deadline_s - time.monotonic()))
        part = connection.recv(nbytes - len(data))
        if not part:
            raise EOFError("the daemon closed the connection")
        data += part
    return data
