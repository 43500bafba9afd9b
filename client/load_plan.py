"""What has to be read for a state dict: wanted chunks against stored ones, as reads and what is done after them."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ckptd.checkpoint.chunks import Chunk, Extent, chunks_of
from ckptd.checkpoint.columns import Index
from ckptd.checkpoint.metadata import torch_dtype
from ckptd.checkpoint.read import Read
from ckptd.client.flatten import Path
from ckptd.protocol.errors import BadIndex, Mismatch, MissingKeys
from ckptd.staging.dtypes import OBJECT

Leaves = Mapping[str, tuple[Path, Any]]


@dataclass(frozen=True)
class Overlap:
    """A box that two chunks share: its corner in each of them, and its extent, in elements."""

    in_stored: Extent
    in_wanted: Extent
    sizes: Extent


@dataclass
class LoadPlan:
    """The reads of a load.

    Attributes:
        reads: All ranges.
        objects: Bytes of each object by name, complete once the reads are done.
        keep: Views of them that must live until then.
    """

    reads: list[Read]
    objects: dict[str, bytearray]
    keep: list[torch.Tensor]


class _Scratch:
    """A buffer between file and target: made when its read begins, gone when it has been copied on."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._buffer: torch.Tensor | None = None

    def make(self) -> int:
        """Allocate the buffer and return its address."""
        self._buffer = torch.empty(self._nbytes, dtype=torch.uint8)
        return self._buffer.data_ptr()

    def copy_to(self, target: torch.Tensor, values: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        """Return what copies the buffer, seen through ``values``, into the target and frees it."""

        def copy() -> None:
            buffer, self._buffer = self._buffer, None
            assert buffer is not None
            with torch.no_grad():
                target.copy_(values(buffer))

        return copy


def overlap_of(stored: tuple[Extent, Extent], wanted: tuple[Extent, Extent]) -> Overlap | None:
    """Return the box that two chunks, each given by offsets and sizes, share; None if they share nothing."""
    in_stored, in_wanted, sizes = [], [], []
    for at, extent, want, length in zip(*stored, *wanted, strict=True):
        begin, end = max(at, want), min(at + extent, want + length)
        if begin >= end:
            return None
        in_stored.append(begin - at)
        in_wanted.append(begin - want)
        sizes.append(end - begin)
    return Overlap(tuple(in_stored), tuple(in_wanted), tuple(sizes))


def byte_span(sizes: Extent, overlap: Overlap, itemsize: int) -> tuple[int, int, bool]:
    """Return first byte and length of the range that holds a box of a row-major chunk, and whether it is the box alone.

    Args:
        sizes: Extent of the stored chunk in elements.
        overlap: The box.
        itemsize: Bytes of an element.
    """
    strides = row_major(sizes)
    first = sum(at * stride for at, stride in zip(overlap.in_stored, strides, strict=True))
    last = first + sum((size - 1) * stride for size, stride in zip(overlap.sizes, strides, strict=True))
    exact = last - first + 1 == math.prod(overlap.sizes)
    return first * itemsize, (last - first + 1) * itemsize, exact


def row_major(sizes: Extent) -> Extent:
    """Return the strides of a contiguous tensor, in elements."""
    strides: list[int] = []
    stride = 1
    for size in reversed(sizes):
        strides.append(stride)
        stride *= size
    return tuple(reversed(strides))


class LoadPlanner:
    """Makes the reads for one state dict.

    Args:
        path: Directory of the checkpoint.
        index: Its index.
        verify: Whether items that are read whole are held against their hash.
    """

    def __init__(self, path: str, index: Index, *, verify: bool) -> None:
        self._path, self._index = path, index
        self._verify = verify and index.has_hashes
        self._name_at = {name: position for position, name in enumerate(index.names)}
        order = np.argsort(index.item_name, kind="stable")
        bounds = np.searchsorted(index.item_name[order], np.arange(len(index.names) + 1))
        self._order, self._bounds = order.tolist(), bounds.tolist()
        self._plan = LoadPlan([], {}, [])

    def plan(self, leaves: Leaves, *, partial: bool) -> LoadPlan:
        """Return the reads for the leaves of a state dict.

        Args:
            leaves: Path and value by name; tensors are the targets.
            partial: Whether names that the checkpoint lacks are left alone.

        Raises:
            MissingKeys: Names are lacking and ``partial`` is false; nothing has been read.
            Mismatch: A tensor has another shape, or is no tensor on one side.
        """
        missing = [name for name in leaves if name not in self._name_at]
        if missing and not partial:
            raise MissingKeys(self._path, len(missing), missing[0])
        for name, (_, value) in leaves.items():
            position = self._name_at.get(name)
            if position is not None:
                self._add(name, position, value)
        return self._plan

    def _add(self, name: str, position: int, value: Any) -> None:
        index = self._index
        stored_shape = tuple(index.shape[position, : index.ndim[position]].tolist())
        is_object = index.dtype[position] == OBJECT
        if not isinstance(value, torch.Tensor):
            if not is_object:
                raise Mismatch(name, f"an object of type {type(value).__name__}", f"a tensor of shape {stored_shape}")
            self._add_object(name, position)
            return
        if is_object or tuple(value.size()) != stored_shape:
            stored = "an object" if is_object else f"shape {stored_shape}"
            raise Mismatch(name, f"shape {tuple(value.size())}", stored)
        for chunk in chunks_of(name, value):
            self._add_chunk(name, position, chunk)

    def _items(self, position: int) -> list[int]:
        items: list[int] = self._order[self._bounds[position] : self._bounds[position + 1]]
        return items

    def _add_object(self, name: str, position: int) -> None:
        index = self._index
        for item in self._items(position):
            nbytes = int(index.record_bytes[item])
            data = bytearray(nbytes)
            self._plan.objects[name] = data
            if nbytes:
                buffer = torch.frombuffer(data, dtype=torch.uint8)
                self._plan.keep.append(buffer)
                self._read(item, int(index.record_offset[item]), buffer, whole=True)

    def _add_chunk(self, name: str, position: int, wanted: Chunk) -> None:
        index = self._index
        ndim = int(index.ndim[position])
        items = self._items(position)
        if len(items) == 1 and self._add_whole(position, items[0], wanted):
            return
        found = 0
        for item in items:
            offsets = tuple(index.item_offsets[item, :ndim].tolist())
            sizes = tuple(index.item_sizes[item, :ndim].tolist())
            overlap = overlap_of((offsets, sizes), (wanted.offsets, wanted.sizes))
            if overlap is not None:
                found += math.prod(overlap.sizes)
                self._add_overlap(position, item, (sizes, overlap), _region(wanted.data, overlap))
        if found != math.prod(wanted.sizes):
            raise BadIndex(self._path, f"{name}: it holds {found} of {math.prod(wanted.sizes)} wanted elements")

    def _add_whole(self, position: int, item: int, wanted: Chunk) -> bool:
        """Read a tensor that is stored and wanted in one piece; return whether it is. Most are, so this is short."""
        index, target = self._index, wanted.data
        offset, nbytes = int(index.data_offset[item]), int(index.data_bytes[item])
        whole = index.item_sizes[item, : index.ndim[position]].tolist() == list(wanted.sizes)
        same = target.nbytes == nbytes and target.dtype == torch_dtype(int(index.dtype[position]))
        if whole and same and _is_plain_memory(target):
            if nbytes:
                self._read(item, offset, target, whole=True)
            return True
        return False

    def _add_overlap(self, position: int, item: int, stored: tuple[Extent, Overlap], target: torch.Tensor) -> None:
        index, (sizes, overlap) = self._index, stored
        dtype = torch_dtype(int(index.dtype[position]))
        if index.data_bytes[item] < 0:
            self._add_record(item, overlap, target)
            return
        begin, nbytes, exact = byte_span(sizes, overlap, dtype.itemsize)
        whole = nbytes == index.data_bytes[item]
        offset = int(index.data_offset[item]) + begin
        if exact and target.dtype == dtype and _is_plain_memory(target):
            self._read(item, offset, target, whole=whole)
            return
        strides = row_major(sizes)
        scratch = _Scratch(nbytes)
        then = scratch.copy_to(target, lambda data: torch.as_strided(data.view(dtype), overlap.sizes, strides))
        self._read_scratch(item, (offset, nbytes), scratch, whole=whole, then=then)

    def _add_record(self, item: int, overlap: Overlap, target: torch.Tensor) -> None:
        """Read a stock record, whose inner layout only torch knows, and load it with torch."""
        index = self._index
        offset, nbytes = int(index.record_offset[item]), int(index.record_bytes[item])
        file, scratch = self._file(item), _Scratch(nbytes)

        def values(record: torch.Tensor) -> torch.Tensor:
            return _narrow(_load_record(record, file), overlap.in_stored, overlap.sizes)

        self._read_scratch(item, (offset, nbytes), scratch, whole=False, then=scratch.copy_to(target, values))

    def _file(self, item: int) -> str:
        return os.path.join(self._path, self._index.files[self._index.item_file[item]])

    def _read(self, item: int, offset: int, target: torch.Tensor, *, whole: bool) -> None:
        name, expected = self._index.names[self._index.item_name[item]], self._expected(item, whole=whole)
        self._plan.reads.append(Read(self._file(item), offset, target.nbytes, target.data_ptr(), name, expected))

    def _read_scratch(
        self, item: int, span: tuple[int, int], scratch: _Scratch, *, whole: bool, then: Callable[[], None]
    ) -> None:
        name, expected = self._index.names[self._index.item_name[item]], self._expected(item, whole=whole)
        self._plan.reads.append(Read(self._file(item), *span, 0, name, expected, then, scratch.make))

    def _expected(self, item: int, *, whole: bool) -> int | None:
        return int(self._index.item_hash[item]) if whole and self._verify else None


def _region(data: torch.Tensor, overlap: Overlap) -> torch.Tensor:
    return _narrow(data, overlap.in_wanted, overlap.sizes)


def _narrow(data: torch.Tensor, begins: Extent, sizes: Extent) -> torch.Tensor:
    for dimension, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        data = data.narrow(dimension, begin, size)
    return data


def _is_plain_memory(target: torch.Tensor) -> bool:
    return target.device.type == "cpu" and target.is_contiguous() and not (target.is_conj() or target.is_neg())


def _load_record(buffer: torch.Tensor, file: str) -> torch.Tensor:
    try:
        loaded = torch.load(io.BytesIO(buffer.numpy().data), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  # whatever torch makes of damaged bytes
        raise BadIndex(file, f"a record cannot be read ({error})") from None
    if not isinstance(loaded, torch.Tensor):
        raise BadIndex(file, "a record holds no tensor")
    return loaded
