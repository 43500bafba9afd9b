"""A DCP checkpoint, ours or stock's, as a source for the tools. Loads torch only for objects that are not plain."""

from __future__ import annotations

import io
import os
from itertools import pairwise

import numpy as np
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.formats.objects import load_pickle, object_value
from ckptd.checkpoint.formats.record import StoredTensor, read_exactly, tensor_in_record
from ckptd.checkpoint.formats.source import Box, Entry, Source
from ckptd.checkpoint.indexing.columns import Index
from ckptd.checkpoint.indexing.open import read_index
from ckptd.checkpoint.system import named
from ckptd.protocol.errors import BadIndex, MissingFile, SystemCallFailed, Unsupported, WrongBits


class CheckpointSource(Source):
    """A checkpoint's directory.

    Args:
        path: The directory.

    Raises:
        UnknownCheckpoint, BadIndex, Unsupported, SystemCallFailed: As :func:`ckptd.checkpoint.indexing.open.read_index`
        does.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.index: Index = read_index(path)
        self.entries = entries_of(self.index)
        self._descriptors: dict[str, int] = {}
        self._stored: dict[int, StoredTensor | None] = {}  # by item
        self._held: tuple[int, memoryview] | None = None

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        self._held = None

    def place(self, entry: Entry, box: Box) -> str:
        """Return the file of a box."""
        del entry
        return f"{self.path}/{self.index.files[int(self.index.item_file[box.item])]}"

    def position(self, box: Box) -> int:
        """Return where a box's values begin in its file, or its record where only that is known."""
        return int(self.index.data_offset[box.item])

    def fill(self, entry: Entry, box: Box, begin: int, target: memoryview) -> None:
        """Read a part of a box; see :class:`Source`."""
        file = self.place(entry, box)
        if self.index.data_bytes[box.item] >= 0:
            read_exactly(self._open(file), file, int(self.index.data_offset[box.item]) + begin, target)
            return
        stored = self._find(entry, box)
        if stored is not None and stored.is_contiguous:
            read_exactly(self._open(file), file, stored.data_offset + begin, target)
        else:
            # A record whose values are in another order is held while it is read; one at a time.
            if self._held is None or self._held[0] != box.item:
                self._held = (box.item, self._in_order(entry, box))
            target[:] = self._held[1][begin : begin + len(target)]

    def object_bytes(self, entry: Entry) -> bytes:
        """Return an object's record; see :class:`Source`."""
        (box,) = entry.boxes
        file, item = self.place(entry, box), box.item
        data = bytearray(int(self.index.data_bytes[item]))
        read_exactly(self._open(file), file, int(self.index.data_offset[item]), memoryview(data))
        if box.xxh3_64 is not None and xxh3_64_intdigest(data) != box.xxh3_64:
            raise WrongBits(file, entry.name, int(self.index.data_offset[item]))
        return bytes(data)

    def object_value(self, entry: Entry, *, trust: bool) -> object:
        """Return an object; see :class:`Source`."""
        return object_value(self.object_bytes(entry), entry.name, self.path, trust=trust)

    def _open(self, file: str) -> int:
        descriptor = self._descriptors.get(file)
        if descriptor is None:
            try:
                # Nobody writes a pipe here for a good reason, and opening one must not wait for ever.
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
                descriptor = named("open", file, lambda: os.open(file, flags))
            except SystemCallFailed as error:
                raise error if os.path.lexists(file) else MissingFile(file) from None
            self._descriptors[file] = descriptor
        return descriptor

    def _record(self, box: Box) -> tuple[int, int]:
        return int(self.index.record_offset[box.item]), int(self.index.record_bytes[box.item])

    def _find(self, entry: Entry, box: Box) -> StoredTensor | None:
        """Return where stock's record has the values, or None if only torch can tell."""
        if box.item in self._stored:
            return self._stored[box.item]
        file = self.place(entry, box)
        try:
            stored = tensor_in_record(self._open(file), file, *self._record(box))
        except Unsupported:
            self._stored[box.item] = None
            return None
        if (stored.dtype, stored.shape) != (entry.dtype, box.sizes):
            raise BadIndex(file, f"the record of {entry.name} holds another tensor than the metadata says")
        self._stored[box.item] = stored
        return stored

    def _in_order(self, entry: Entry, box: Box) -> memoryview:
        """Return all values of a box in C order, from a record that has them otherwise."""
        stored, file = self._find(entry, box), self.place(entry, box)
        if stored is None:
            return self._by_torch(entry, box)
        storage = memoryview(bytearray(stored.storage[1]))
        read_exactly(self._open(file), file, stored.storage[0], storage)
        element = np.dtype((np.void, entry.itemsize_bytes))
        strides = [stride * element.itemsize for stride in stored.strides]
        values = np.ndarray(stored.shape, element, storage, stored.data_offset - stored.storage[0], strides)
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data

    def _by_torch(self, entry: Entry, box: Box) -> memoryview:
        import torch

        file, (offset, nbytes) = self.place(entry, box), self._record(box)
        record = memoryview(bytearray(nbytes))
        read_exactly(self._open(file), file, offset, record)
        tensor = load_pickle(io.BytesIO(record), f"{file}: {entry.name}", trust=False, mmap=False)
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != box.sizes:
            raise BadIndex(file, f"the record of {entry.name} holds another tensor than the metadata says")
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        return plain.reshape(-1).view(torch.uint8).numpy().data


def entries_of(index: Index) -> list[Entry]:
    """Return an index's names with their boxes, in the order of the index."""
    order = np.argsort(index.item_name, kind="stable")
    bounds = np.searchsorted(index.item_name[order], np.arange(len(index.names) + 1)).tolist()
    items = order.tolist()
    offsets, sizes = index.item_offsets.tolist(), index.item_sizes.tolist()
    hashes = index.item_hash.tolist() if index.has_hashes else [None] * len(items)
    dtypes, ndims, grads, shapes = (
        column.tolist() for column in (index.dtype, index.ndim, index.requires_grad, index.shape)
    )
    return [
        Entry(
            name,
            index.paths[row],
            dtypes[row],
            tuple(shapes[row][: ndims[row]]),
            bool(grads[row]),
            tuple(
                Box(tuple(offsets[item][: ndims[row]]), tuple(sizes[item][: ndims[row]]), item, hashes[item])
                for item in items[begin:end]
            ),
        )
        for row, (name, (begin, end)) in enumerate(zip(index.names, pairwise(bounds), strict=True))
    ]
