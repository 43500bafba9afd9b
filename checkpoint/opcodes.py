"""Pickle opcodes in bulk: rows of equal length are matrices of bytes, filled column by column with numpy.

A million rows cost a few array operations instead of a million calls. Source: pickletools.py.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ckptd.checkpoint.columns import Int64, UInt8

POP: Final = b"0"
MEMOIZE: Final = b"\x94"
STACK_GLOBAL: Final = b"\x93"
# EMPTY_TUPLE NEWOBJ: an instance of the class on the stack, __init__ not called; EMPTY_DICT MARK: its state.
NEW: Final = b")\x81"
NEW_WITH_STATE: Final = NEW + b"}("
SET_STATE: Final = b"ub"

# Part of a row: the same opcodes in each (bytes), or one line of a matrix for each.
Part = bytes | UInt8


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


def rows(parts: list[Part], count: int) -> UInt8:
    """Return ``count`` rows of opcodes as a matrix."""
    cells = [np.frombuffer(part, np.uint8)[None, :] if isinstance(part, bytes) else part for part in parts]
    matrix = np.empty((count, sum(cell.shape[1] for cell in cells)), np.uint8)
    begin = 0
    for cell in cells:
        matrix[:, begin : begin + cell.shape[1]] = cell
        begin += cell.shape[1]
    return matrix


def split(matrix: UInt8) -> list[bytes]:
    """Return each row of a matrix as bytes."""
    data, width = matrix.tobytes(), matrix.shape[1]
    return [data[begin : begin + width] for begin in range(0, len(data), width)]
