"""Length-prefixed frames over a stream, for the worker and attach sockets."""

from __future__ import annotations

import asyncio
import struct
from typing import Final

from ckptd.protocol.errors import BadMessage

FRAME_LENGTH: Final = struct.Struct("<I")


async def read_frame(reader: asyncio.StreamReader, *, limit_bytes: int) -> bytes:
    """Return the next frame.

    Raises:
        EOFError: The peer is gone.
        BadMessage: The frame is longer than ``limit_bytes``; nothing more can be read from this peer.
    """
    try:
        (length,) = FRAME_LENGTH.unpack(await reader.readexactly(FRAME_LENGTH.size))
        if length > limit_bytes:
            raise BadMessage(f"a frame of {length} bytes, at most {limit_bytes} are taken")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        raise EOFError from None
