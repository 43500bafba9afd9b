"""Pickle opcodes in bulk: rows of opcodes are matrices of bytes, filled column by column with numpy.

A million rows cost a few array operations instead of a million calls. Source: pickletools.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ckptd.checkpoint.indexing.columns import Int64, UInt8
from ckptd.checkpoint.indexing.texts import pack_texts, with_room

POP: Final = b"0"
MEMOIZE: Final = b"\x94"
STACK_GLOBAL: Final = b"\x93"
# EMPTY_TUPLE NEWOBJ: an instance of the class on the stack, __init__ not called; EMPTY_DICT MARK: its state.
NEW: Final = b")\x81"
NEW_WITH_STATE: Final = NEW + b"}("
SET_STATE: Final = b"ub"

Bool = NDArray[np.bool_]
# Part of a row: the same opcodes in each (bytes), or one line of a matrix for each.
Part = bytes | UInt8
# Parts that a row has together, and which rows have them; None for all.
Cell = tuple[list[Part], Bool | None]


class Memo:
    """Hands out positions of the unpickler's memo, in the order in which values are put there."""

    def __init__(self) -> None:
        self.size = 0
        self.preamble: list[bytes] = []

    def put(self, count: int) -> int:
        """Return the position of the first of ``count`` values that the caller memoises next."""
        self.size += count
        return self.size - count

    def keep(self, opcodes: bytes) -> int:
        """Have a value made before all others; return its position."""
        self.preamble.append(opcodes + MEMOIZE + POP)
        return self.put(1)

    def text(self, text: str) -> bytes:
        """Keep a string; return the opcode that fetches it."""
        return get(self.keep(push_text(text)))

    def named(self, module: str, name: str) -> bytes:
        """Keep a class, a function or a constant of a module; return the opcode that fetches it."""
        return get(self.keep(push_text(module) + push_text(name) + STACK_GLOBAL))

    def texts(self, texts: Sequence[str]) -> int:
        """Keep strings in their order; return the first one's position."""
        blob, ends = pack_texts(texts)
        lengths = np.diff(ends, prepend=0)
        if (lengths >= 1 << 8).any():
            each: Iterable[bytes] = (push_text(text) + MEMOIZE for text in texts)
        else:
            opcodes, begins = with_room(blob, ends, before=2, behind=1)
            opcodes[begins - 2] = 0x8C
            opcodes[begins - 1] = lengths
            opcodes[begins + lengths] = MEMOIZE[0]
            each = (opcodes.tobytes(),)
        # All of them onto the stack, and off it again as one tuple.
        self.preamble += (b"(", *each, b"t" + POP)
        return self.put(len(texts))

    def values(self, parts: Sequence[Part], count: int) -> int:
        """Keep ``count`` values, each made by a row of opcodes; return the first one's position."""
        self.preamble.append(rows([*parts, MEMOIZE + POP], count).tobytes())
        return self.put(count)


def get(position: int) -> bytes:
    """Return the opcode that fetches a position of the memo."""
    return b"h" + bytes([position]) if position < 256 else b"j" + position.to_bytes(4, "little")


def push_text(text: str) -> bytes:
    """Return the opcode that pushes a string."""
    data = text.encode()
    if len(data) < 256:
        return b"\x8c" + bytes((len(data),)) + data
    return b"X" + len(data).to_bytes(4, "little") + data


def push_int(value: int) -> bytes:
    """Return the opcode that pushes an integer of up to 64 bits."""
    if 0 <= value < 256:
        return b"K" + bytes((value,))
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def push_each(column: Int64) -> UInt8:
    """Return the opcodes that push integers >= 0, one per line, in the width that the largest needs."""
    largest = int(column.max(initial=0))
    if largest < 1 << 8:
        opcode, width = b"K", 1
    elif largest < 1 << 16:
        opcode, width = b"M", 2
    elif largest < 1 << 31:
        opcode, width = b"J", 4
    else:
        opcode, width = b"\x8a\x08", 8
    return _beside(opcode, column, width)


def get_each(positions: Int64) -> UInt8:
    """Return the opcodes that fetch positions of the memo, one per line."""
    return _beside(b"j", positions, 4)


def _beside(opcode: bytes, column: Int64, width: int) -> UInt8:
    matrix = np.empty((len(column), len(opcode) + width), np.uint8)
    matrix[:, : len(opcode)] = np.frombuffer(opcode, np.uint8)
    matrix[:, len(opcode) :] = np.ascontiguousarray(column, "<i8").view(np.uint8).reshape(-1, 8)[:, :width]
    return matrix


def rows(parts: Sequence[Part], count: int) -> UInt8:
    """Return ``count`` rows of opcodes as a matrix."""
    columns = [np.frombuffer(part, np.uint8)[None, :] if isinstance(part, bytes) else part for part in parts]
    matrix = np.empty((count, sum(column.shape[1] for column in columns)), np.uint8)
    begin = 0
    for column in columns:
        matrix[:, begin : begin + column.shape[1]] = column
        begin += column.shape[1]
    return matrix


def ragged_rows(cells: Sequence[Cell], count: int) -> bytes:
    """Return ``count`` rows of opcodes one behind the other, each without the cells that it does not have.

    Args:
        cells: Parts, and a flag per row that says whether it has them.
        count: Number of rows.
    """
    matrix = rows([part for parts, _ in cells for part in parts], count)
    if all(has is None or has.all() for _, has in cells):
        return matrix.tobytes()
    kept = np.ones(matrix.shape, np.bool_)
    begin = 0
    for parts, has in cells:
        end = begin + sum(len(part) if isinstance(part, bytes) else part.shape[1] for part in parts)
        if has is not None:
            kept[:, begin:end] = has[:, None]
        begin = end
    return matrix[kept].tobytes()
