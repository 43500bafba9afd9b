"""Fills slots with ranges of an image that is larger than they are. Allocates nothing of the state's size.

A range may begin and end anywhere in an item. Waves begin on pages and items on 64 bytes, so that no element is cut.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import torch

from ckptd.staging.copy import Pair
from ckptd.staging.views import Placed

Source = torch.Tensor | bytes


class WaveFiller:
    """One image, cut as it is staged.

    Args:
        items: The items, in image order.
        sources: What each of them holds, in the same order.
    """

    def __init__(self, items: Sequence[Placed], sources: Sequence[Source]) -> None:
        self._items, self._sources = items, sources
        self._begins = [item.record_offset for item in items]

    def fill(self, memory: mmap.mmap, at: int, begin: int, end: int) -> list[Pair]:
        """Put every byte of ``[begin, end)`` of the image that is no tensor's into place.

        Args:
            memory: The arena.
            at: Where byte ``begin`` of the image goes, in bytes.
            begin: First byte of the range, a multiple of the page size.
            end: Its end.

        Returns:
            Pairs of targets and sources: the copies that complete the range.
        """
        wave = torch.frombuffer(memory, dtype=torch.uint8, offset=at, count=end - begin)
        window = _Window(memory, at, begin, end)
        pairs: list[Pair] = []
        done = begin
        for position in range(max(0, bisect_right(self._begins, begin) - 1), len(self._items)):
            item, source = self._items[position], self._sources[position]
            if item.record_offset >= end:
                break
            data_end = item.data_offset + item.data_bytes
            window.zero(done, item.record_offset)
            window.put(item.record_offset, item.prefix)
            if isinstance(source, bytes):
                window.put(item.data_offset, source)
                window.zero(item.data_offset + len(source), data_end)
            else:
                pairs.extend(_pairs(wave, begin, item, source))
            window.put(data_end, item.suffix)
            done = max(done, data_end + len(item.suffix))
        window.zero(done, end)
        return pairs


class _Window:
    """The range of the image that a slot holds: what lies outside of it is left out."""

    def __init__(self, memory: mmap.mmap, at: int, begin: int, end: int) -> None:
        self._memory, self._shift, self._begin, self._end = memory, at - begin, begin, end

    def put(self, offset: int, data: bytes) -> None:
        first, last = max(offset, self._begin), min(offset + len(data), self._end)
        if first < last:
            self._memory[first + self._shift : last + self._shift] = data[first - offset : last - offset]

    def zero(self, begin: int, end: int) -> None:
        first, last = max(begin, self._begin), min(end, self._end)
        if first < last:
            self._memory[first + self._shift : last + self._shift] = bytes(last - first)


def _pairs(wave: torch.Tensor, begin: int, item: Placed, source: torch.Tensor) -> Iterator[Pair]:
    """Yield the copies of a tensor's elements that lie in a wave, which begins at ``begin`` of the image."""
    assert item.dtype is not None
    first = max(item.data_offset, begin)
    last = min(item.data_offset + item.data_bytes, begin + len(wave))
    if first >= last:
        return
    itemsize = item.dtype.itemsize
    origin = item.data_offset - begin  # of element 0, which may lie before the wave
    for element, part in pieces(source, (first - item.data_offset) // itemsize, (last - item.data_offset) // itemsize):
        at = origin + element * itemsize
        yield wave[at : at + part.numel() * itemsize].view(item.dtype).view(part.shape), part


def pieces(source: torch.Tensor, begin: int, end: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield views that together hold elements ``[begin, end)`` of a tensor in C order, each with its first element.

    A tensor that is not contiguous is cut by rows, and rows by theirs: none of it is copied here.
    """
    if begin == 0 and end == source.numel():
        yield 0, source
    elif source.is_contiguous():
        yield begin, source.view(-1)[begin:end]
    else:
        row_elements = source.numel() // source.shape[0]
        row, inside = divmod(begin, row_elements)
        if inside:
            stop = min(end, (row + 1) * row_elements)
            for element, part in pieces(source[row], inside, stop - row * row_elements):
                yield row * row_elements + element, part
            begin, row = stop, row + 1
        rows = (end - begin) // row_elements
        if rows > 0:
            yield begin, source[row : row + rows]
            begin, row = begin + rows * row_elements, row + rows
        if begin < end:
            for element, part in pieces(source[row], 0, end - begin):
                yield begin + element, part
