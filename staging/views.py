"""A slot as torch sees it: one view per tensor item, and the bytes of the records around them.

A slot is dressed once per layout: prefixes, suffixes and zeroed gaps stay in place from save to save.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Placed(NamedTuple):
    """One item's place in an image. ``prefix`` and ``suffix`` are empty for objects; offsets in bytes."""

    record_offset: int
    data_offset: int
    data_bytes: int
    prefix: bytes
    suffix: bytes
    dtype: torch.dtype | None  # None: an object
    shape: tuple[int, ...]


class DressedSlot:
    """A slot prepared for one layout.

    Args:
        memory: The arena.
        image_offset: Where the image begins in the arena, in bytes.
        image_bytes: Length of the image.
        items: The items, in image order.
    """

    def __init__(self, memory: mmap.mmap, image_offset: int, image_bytes: int, items: Sequence[Placed]) -> None:
        self._memory, self._begin = memory, image_offset
        self._items = items
        image = torch.frombuffer(memory, dtype=torch.uint8, offset=image_offset, count=image_bytes) if items else None
        self.targets: list[torch.Tensor | None] = []
        end = 0
        for item in items:
            self._fill(end, item.record_offset)
            self._put(item.record_offset, item.prefix)
            self._put(item.data_offset + item.data_bytes, item.suffix)
            end = item.data_offset + item.data_bytes + len(item.suffix)
            self.targets.append(None if item.dtype is None or image is None else _view(image, item))
        self._fill(end, image_bytes)

    def put_object(self, position: int, data: bytes) -> None:
        """Store an object's bytes and zero what is reserved behind them."""
        item = self._items[position]
        self._put(item.data_offset, data)
        self._fill(item.data_offset + len(data), item.data_offset + item.data_bytes)

    def _put(self, offset: int, data: bytes) -> None:
        begin = self._begin + offset
        self._memory[begin : begin + len(data)] = data

    def _fill(self, begin: int, end: int) -> None:
        if end > begin:
            self._put(begin, bytes(end - begin))


def _view(image: torch.Tensor, item: Placed) -> torch.Tensor:
    assert item.dtype is not None
    data = image[item.data_offset : item.data_offset + item.data_bytes]
    return data.view(item.dtype).view(item.shape)
