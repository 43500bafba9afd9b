"""What has to be read for a state dict: wanted chunks against stored ones, as reads and what is done after them.

Most tensors are wanted as they are stored: those are planned from columns, one short loop for all of them.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ckptd.checkpoint.indexing.columns import Index, Int64
from ckptd.checkpoint.planning.chunks import Chunk, Extent, chunks_of, is_plain
from ckptd.checkpoint.reading.read import Read
from ckptd.checkpoint.stock.metadata import torch_dtype
from ckptd.client.loading.boxes import Overlap, Part, overlap_of, part_of
from ckptd.client.loading.match import Leaves, Match
from ckptd.protocol.errors import BadIndex
from ckptd.staging.dtypes import OBJECT


@dataclass
class LoadPlan:
    """The reads of a load.

    Attributes:
        reads: All ranges.
        objects: Bytes of each object by name, complete once the reads are done.
    """

    reads: list[Read] = field(default_factory=list)
    objects: dict[str, bytearray] = field(default_factory=dict)


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
        self._files = [os.path.join(path, file) for file in index.files]
        self._order = np.argsort(index.item_name, kind="stable")
        self._bounds = np.searchsorted(index.item_name[self._order], np.arange(len(index.names) + 1))
        self._plan = LoadPlan()

    def plan(self, leaves: Leaves, match: Match) -> LoadPlan:
        """Return the reads for the leaves of a state dict.

        Args:
            leaves: Path and value by name; tensors are the targets.
            match: Which of them are to be loaded.

        Raises:
            BadIndex: The checkpoint does not hold all of a tensor.
        """
        index, reads = self._index, self._plan.reads
        rows = np.array(match.rows, np.int64)
        if match.names and not len(index.item_name):
            raise BadIndex(self._path, f"{match.names[0]}: it holds nothing of it")
        items, whole = self._first_items(rows)
        codes = index.dtype[rows].tolist()
        dtypes = {code: torch_dtype(code) for code in set(codes) - {OBJECT}}
        hashes = index.item_hash[items].tolist() if self._verify else [None] * len(rows)
        places = [column[items].tolist() for column in (index.item_file, index.data_offset, index.data_bytes)]
        columns = zip(match.names, match.rows, codes, whole, *places, hashes, strict=True)
        for name, row, code, is_whole, file, offset, nbytes, expected in columns:
            value = leaves[name][1]
            if code == OBJECT:
                self._add_object(name, row)
            elif is_whole and is_plain(value) and value.dtype is dtypes[code] and _is_plain_memory(value):
                if nbytes:
                    reads.append(Read(self._files[file], offset, nbytes, value.data_ptr(), name, expected))
            else:
                for chunk in chunks_of(name, value):
                    self._add_chunk(name, row, chunk, dtypes[code])
        return self._plan

    def _first_items(self, rows: Int64) -> tuple[Int64, list[bool]]:
        """Return one item of each name, and whether it is all of its tensor and known by its bytes."""
        index = self._index
        first, count = self._bounds[rows], self._bounds[rows + 1] - self._bounds[rows]
        items = self._order[np.minimum(first, len(self._order) - 1)]
        same = (index.item_sizes[items] == index.shape[rows]).all(axis=1)
        return items, ((count == 1) & same & (index.data_bytes[items] >= 0)).tolist()

    def _items(self, row: int) -> Int64:
        return self._order[self._bounds[row] : self._bounds[row + 1]]

    def _add_object(self, name: str, row: int) -> None:
        index = self._index
        items = self._items(row).tolist()
        if not items:
            raise BadIndex(self._path, f"{name}: it holds no record of this object")
        for item in items:
            nbytes = int(index.record_bytes[item])
            data = bytearray(nbytes)
            self._plan.objects[name] = data
            if nbytes:
                address = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
                place = (self._files[index.item_file[item]], int(index.record_offset[item]), nbytes, address)
                self._plan.reads.append(Read(*place, name, self._expected(item)))

    def _add_chunk(self, name: str, row: int, wanted: Chunk, dtype: torch.dtype) -> None:
        index = self._index
        ndim = int(index.ndim[row])
        items = self._items(row)
        offsets, sizes = index.item_offsets[items, :ndim], index.item_sizes[items, :ndim]
        want = np.array(wanted.offsets, np.int64)
        touched = ((offsets < want + np.array(wanted.sizes, np.int64)) & (offsets + sizes > want)).all(axis=1)
        found = 0
        for at in np.flatnonzero(touched).tolist():
            stored = (tuple(offsets[at].tolist()), tuple(sizes[at].tolist()))
            overlap = overlap_of(stored, (wanted.offsets, wanted.sizes))
            if overlap is not None:
                found += math.prod(overlap.sizes)
                target = _narrow(wanted.data, overlap.in_wanted, overlap.sizes)
                self._add_overlap(int(items[at]), stored[1], overlap, target=target, dtype=dtype)
        if found != math.prod(wanted.sizes):
            raise BadIndex(self._path, f"{name}: it holds {found} of {math.prod(wanted.sizes)} wanted elements")

    def _add_overlap(
        self, item: int, sizes: Extent, overlap: Overlap, *, target: torch.Tensor, dtype: torch.dtype
    ) -> None:
        if self._index.data_bytes[item] < 0:
            self._add_record(item, overlap, target)
            return
        part = part_of(sizes, overlap.in_stored, overlap.sizes, itemsize=dtype.itemsize)
        if part.sizes == overlap.sizes and target.dtype == dtype and _is_plain_memory(target):
            self._add_part(item, part, address=target.data_ptr())
            return
        scratch = _Scratch(part.nbytes)

        def values(data: torch.Tensor) -> torch.Tensor:
            return _narrow(data.view(dtype).view(part.sizes), part.corner, overlap.sizes)

        self._add_part(item, part, scratch=scratch, then=scratch.copy_to(target, values))

    def _add_part(
        self,
        item: int,
        part: Part,
        *,
        address: int = 0,
        scratch: _Scratch | None = None,
        then: Callable[[], None] | None = None,
    ) -> None:
        index = self._index
        whole = part.nbytes == index.data_bytes[item]
        self._plan.reads.append(
            Read(
                self._files[index.item_file[item]],
                int(index.data_offset[item]) + part.begin,
                part.nbytes,
                address,
                index.names[index.item_name[item]],
                self._expected(item) if whole else None,
                then,
                None if scratch is None else scratch.make,
                part.rows,
            )
        )

    def _add_record(self, item: int, overlap: Overlap, target: torch.Tensor) -> None:
        """Read a stock record, whose inner layout only torch knows, and load it with torch."""
        index = self._index
        offset, nbytes = int(index.record_offset[item]), int(index.record_bytes[item])
        file, scratch = self._files[index.item_file[item]], _Scratch(nbytes)

        def values(record: torch.Tensor) -> torch.Tensor:
            return _narrow(_load_record(record, file), overlap.in_stored, overlap.sizes)

        then, name = scratch.copy_to(target, values), index.names[index.item_name[item]]
        self._plan.reads.append(Read(file, offset, nbytes, 0, name, None, then, scratch.make))

    def _expected(self, item: int) -> int | None:
        return int(self._index.item_hash[item]) if self._verify else None


def _narrow(data: torch.Tensor, begins: Extent, sizes: Extent) -> torch.Tensor:
    for dimension, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        data = data.narrow(dimension, begin, size)
    return data


def _is_plain_memory(target: torch.Tensor) -> bool:
    """Return whether a tensor's bytes lie in memory as a file holds them."""
    strided = target.layout is torch.strided and target.is_cpu
    return strided and target.is_contiguous() and not (target.is_conj() or target.is_neg())


def _load_record(buffer: torch.Tensor, file: str) -> torch.Tensor:
    try:
        loaded = torch.load(io.BytesIO(buffer.numpy().data), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  # whatever torch makes of damaged bytes
        raise BadIndex(file, f"a record cannot be read ({error})") from None
    if not isinstance(loaded, torch.Tensor):
        raise BadIndex(file, "a record holds no tensor")
    return loaded
