"""The frame of an image: every byte that is no item's payload, so record headers, tails and padding.

Items have hashes of their own; the frame has one for the whole file. Together they leave no byte of a checkpoint
unwatched: a bit that turns in a zip header would not harm our load, but stock's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from xxhash import xxh3_64

from ckptd.checkpoint.indexing.columns import Index, Int64

# Keys in the index's header.
FRAME_HASHES: Final = "frame_hashes"
METADATA_HASH: Final = "metadata_hash"

_STEP_BYTES: Final = 8 << 20


def frame_ranges(offsets: Int64, lengths: Int64, file_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each stretch that is no item's payload.

    Args:
        offsets: Where each payload begins, in any order; they do not overlap.
        lengths: Their lengths in bytes.
        file_bytes: Size of the file.
    """
    order = np.argsort(offsets, kind="stable")
    end = 0
    for begin, length in zip(offsets[order].tolist(), lengths[order].tolist(), strict=True):
        if begin > end:
            yield end, begin
        end = max(end, begin + length)
    if file_bytes > end:
        yield end, file_bytes


def frame_hash(ranges: Iterator[tuple[int, int]], read: Callable[[int, int], bytes | memoryview]) -> int:
    """Return xxh3-64 over the stretches in order; ``read(begin, end)`` returns at most some MiB of the file."""
    digest = xxh3_64()
    for begin, end in ranges:
        for at in range(begin, end, _STEP_BYTES):
            digest.update(read(at, min(at + _STEP_BYTES, end)))
    return digest.intdigest()


def frame_header(hashes: list[int]) -> dict[str, str]:
    """Return the header entry that keeps the frames' hashes, in the order of the index's files."""
    return {FRAME_HASHES: json.dumps([f"{value:016x}" for value in hashes])}


def frame_hashes(index: Index) -> list[int]:
    """Return each file's frame hash, or nothing where the index has none (a stock checkpoint)."""
    try:
        texts = json.loads(index.header.get(FRAME_HASHES, "[]"))
        found = [int(text, 16) for text in texts]
    except (ValueError, TypeError):
        return []
    return found if len(found) == len(index.files) else []
