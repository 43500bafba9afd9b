"""Writes an image that comes in waves: each to its place in the file, and at the end the file is made durable.

A wave's slot is given back when it is in the file, so its bytes must not be lost with a worker: O_DIRECT has handed
them to the device, and where the page cache is used, a wave is synced before it counts, which also keeps dirty pages
within the size of a wave. What a device may still hold in its own cache is flushed by the one fsync at the end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ckptd.checkpoint.image.frame import frame_hash, frame_ranges
from ckptd.checkpoint.image.write import Pace, Payloads, Writing, check_room, open_image
from ckptd.checkpoint.system import named, preallocate
from ckptd.protocol.errors import TruncatedFile

_NOTHING = Payloads(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.bool_))


@dataclass(frozen=True)
class Place:
    """Where a wave goes. ``begin``: its offset in the file; ``image_bytes``: the file's size; ``first``: make it."""

    begin: int
    image_bytes: int
    first: bool


def write_wave(
    path: str, wave: memoryview, place: Place, *, pace: Pace, on_progress: Callable[[int], None]
) -> tuple[float, bool]:
    """Write one wave.

    Args:
        path: The image's file.
        wave: The bytes; length and address are multiples of 4096.
        place: Where they go.
        pace: Threads and chunk size.
        on_progress: Called with the number of bytes of this wave written so far, from any thread.

    Returns:
        Seconds it took, and whether the page cache was passed by.

    Raises:
        DiskFull: The volume has too little room for the whole image; nothing was written.
        SystemCallFailed: A call failed; the file is incomplete.
    """
    if place.first:
        check_room(os.path.dirname(path), place.image_bytes)
    begun = time.perf_counter()
    descriptor, direct = open_image(path, new=place.first)
    try:
        if place.first:
            preallocate(descriptor, place.image_bytes, path)
        writing = Writing(path, descriptor, wave, _NOTHING, pace.chunk_bytes, on_progress)
        writing.direct, writing.file_offset = direct, place.begin
        writing.run_all(pace.threads)
        if not writing.direct:
            named("fdatasync", path, lambda: os.fdatasync(descriptor))
    finally:
        os.close(descriptor)
    return time.perf_counter() - begun, writing.direct


def finish_waves(path: str, image_bytes: int) -> float:
    """Make a file durable whose waves are all written, and return the seconds that took.

    Raises:
        TruncatedFile: It is not as long as the image.
        SystemCallFailed: It is gone, or cannot be synced.
    """
    descriptor = named("open", path, lambda: os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    try:
        found_bytes = os.fstat(descriptor).st_size
        if found_bytes != image_bytes:
            raise TruncatedFile(path, image_bytes, found_bytes)
        begun = time.perf_counter()
        named("fsync", path, lambda: os.fsync(descriptor))
        return time.perf_counter() - begun
    finally:
        os.close(descriptor)


def frame_of_file(path: str, items: Payloads, image_bytes: int) -> int:
    """Return the frame's hash as the file has it, for a plan in which not every item is named."""
    with open(path, "rb", buffering=0) as file:
        ranges = frame_ranges(items.offsets[items.indexed], items.lengths[items.indexed], image_bytes)
        return frame_hash(ranges, lambda begin, end: os.pread(file.fileno(), end - begin, begin))
