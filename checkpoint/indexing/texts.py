"""Tables of strings: one blob of UTF-8, and where each ends in it. A million of them are a few array operations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np

from ckptd.checkpoint.indexing.columns import Int64, UInt8

# What may stand between strings while they are taken apart; one that occurs in none of them is enough.
_SEPARATORS: Final = (b"\0", b"\n", b"\x1f", b"\x7f")


def pack_texts(texts: Sequence[str]) -> tuple[UInt8, Int64]:
    """Return all strings as one blob of UTF-8, and where each ends in it, in bytes.

    Raises:
        UnicodeEncodeError: A string is not valid Unicode.
    """
    joined = "".join(texts)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    if not joined.isascii():
        lengths = np.fromiter(map(len, map(str.encode, texts)), np.int64, len(texts))
    return np.frombuffer(joined.encode(), np.uint8), np.cumsum(lengths)


def unpack_texts(blob: UInt8, ends: Int64) -> list[str]:
    """Return the strings of a table.

    Args:
        blob: UTF-8.
        ends: Where each string ends; ascending, the last one at the end of the blob.

    Raises:
        UnicodeDecodeError: A string is not UTF-8.
    """
    if len(ends) == 0:
        return []
    data = blob.tobytes()
    separator = next((each for each in _SEPARATORS if each not in data), None)
    if separator is None:
        return [data[begin:end].decode() for begin, end in pairwise([0, *ends.tolist()])]
    separated, begins = with_room(blob, ends, before=0, behind=1)
    separated[begins[1:] - 1] = separator[0]
    # A separator within a character is an error to the decoder, so no string can end there.
    return separated[:-1].tobytes().decode().split(separator.decode())


def with_room(blob: UInt8, ends: Int64, *, before: int, behind: int) -> tuple[UInt8, Int64]:
    """Return a table's strings with room around each: the bytes (the room not set), and where each string begins.

    Args:
        blob: All strings.
        ends: Where each ends.
        before: Bytes of room before each string.
        behind: Bytes of room behind it.
    """
    lengths = np.diff(ends, prepend=0)
    begins = ends - lengths + np.arange(len(ends)) * (before + behind) + before
    room = np.empty(len(blob) + len(ends) * (before + behind), np.uint8)
    is_text = np.ones(len(room), np.bool_)
    for step in range(before):
        is_text[begins - 1 - step] = False
    for step in range(behind):
        is_text[begins + lengths + step] = False
    room[is_text] = blob
    return room, begins
