"""One item of a load: the range that is read for it, and what becomes of the bytes.

Values whose place is known are read straight into their target, or through a buffer that lives only while it is needed;
of a record that only ``torch.load`` understands the whole is read.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, cast

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from ckptd.checkpoint.reading.read import Read
from ckptd.checkpoint.storage.known_payloads import Known
from ckptd.protocol.errors import Mismatch, Unsupported, WrongBits


@dataclass
class Task:
    """One item: its read, and what is done with it in the caller's thread once all reads are done."""

    read: Read
    commit: Callable[[LoadPlanner], None]


class _Buffer:
    """Memory for a range, made when its read begins and gone once it was taken."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._bytes: torch.Tensor | None = None

    def make(self) -> int:
        """Allocate it and return its address."""
        self._bytes = torch.empty(self._nbytes, dtype=torch.uint8)
        return self._bytes.data_ptr()

    def take(self) -> torch.Tensor:
        """Return the bytes and forget them."""
        found, self._bytes = self._bytes, None
        return torch.empty(0, dtype=torch.uint8) if found is None else found


def make_task(
    item: ReadItem,
    place: _StorageInfo,
    file: str,
    planner: LoadPlanner,
    *,
    known: Known | None,
    registry: ExtensionRegistry,
) -> Task:
    """Return what loads an item.

    Args:
        item: What is wanted.
        place: Where its record lies.
        file: Path or URL of its file.
        planner: Resolves the target.
        known: What the index knows of it.
        registry: Finds the extensions that undo what was done to the record.

    Raises:
        Mismatch: The target's size is not that of what is wanted.
        UnknownExtension: Something has transformed the record that the registry does not know.
    """
    extensions = registry.from_descriptor_list(place.transform_descriptors or ())
    undo = _undoing([each for each in extensions if isinstance(each, StreamTransformExtension)], file, item, place)
    if item.type is LoadItemType.BYTE_IO:
        return _object_task(item, place, file, known, undo)
    target = planner.resolve_tensor(item).detach()
    if tuple(target.size()) != tuple(item.lengths):
        raise Mismatch(item.storage_index.fqn, str(tuple(target.size())), str(tuple(item.lengths)))
    read = _record_read(item, place, file, target, undo) if known is None else _values_read(item, known, file, target)
    return Task(read, lambda planner: planner.commit_tensor(item, target))


def _object_task(
    item: ReadItem, place: _StorageInfo, file: str, known: Known | None, undo: Callable[[torch.Tensor], io.BytesIO]
) -> Task:
    buffer = _Buffer(place.length)
    expected = known.item_hash if known is not None and known.nbytes == place.length else None
    read = Read(file, place.offset, place.length, 0, item.storage_index.fqn, expected, make=buffer.make)
    return Task(read, lambda planner: planner.load_bytes(item, undo(buffer.take())))


def _values_read(item: ReadItem, known: Known, file: str, target: torch.Tensor) -> Read:
    """Return the read of an item whose values lie at a known place."""
    assert known.dtype is not None
    name = item.storage_index.fqn
    offsets, lengths = tuple(item.storage_offsets), tuple(item.lengths)
    whole = lengths == known.sizes
    dtype, run = known.dtype, None if whole else _run(offsets, lengths, known.sizes)
    begin, nbytes = known.offset, known.nbytes
    if run is not None:
        begin, nbytes = begin + run[0] * dtype.itemsize, run[1] * dtype.itemsize
    expected = known.item_hash if run is None else None
    if (whole or run is not None) and _takes_bytes(target, dtype):
        return Read(file, begin, nbytes, target.data_ptr(), name, expected)
    buffer = _Buffer(nbytes)

    def copy() -> None:
        values = buffer.take().view(dtype)
        if run is not None or whole:
            _copy(target, values.view(lengths))
        else:
            _copy(target, narrow_tensor_by_index(values.view(known.sizes), offsets, lengths))

    return Read(file, begin, nbytes, 0, name, expected, then=copy, make=buffer.make)


def _record_read(
    item: ReadItem, place: _StorageInfo, file: str, target: torch.Tensor, undo: Callable[[torch.Tensor], io.BytesIO]
) -> Read:
    """Return the read of a record that only torch.load understands."""
    buffer = _Buffer(place.length)
    name = item.storage_index.fqn

    def copy() -> None:
        record = undo(buffer.take())
        try:
            tensor = torch.load(record, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise Unsupported(
                f"{name}: a record that torch.load refuses ({error})"[:300], "load it with torch"
            ) from error
        except (RuntimeError, EOFError, ValueError) as error:
            raise WrongBits(file, name, place.offset) from error
        _copy(target, narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths))

    return Read(file, place.offset, place.length, 0, name, then=copy, make=buffer.make)


def _undoing(
    extensions: list[StreamTransformExtension], file: str, item: ReadItem, place: _StorageInfo
) -> Callable[[torch.Tensor], io.BytesIO]:
    """Return what makes a record of the bytes that were read."""

    def undo(data: torch.Tensor) -> io.BytesIO:
        raw = cast("Any", data.numpy().data)
        try:
            return _undone(raw, extensions)
        except Exception as error:  # noqa: BLE001  # an extension may raise anything at bytes that are damaged
            failure = error
        if len(extensions) > 1:
            # Stock applies several extensions in another order than its descriptors say.
            with contextlib.suppress(Exception):
                return _undone(raw, extensions[::-1])
        raise WrongBits(file, item.storage_index.fqn, place.offset) from failure

    return undo


def _undone(raw: bytes, extensions: list[StreamTransformExtension]) -> io.BytesIO:
    stream: IO[bytes] = io.BytesIO(raw)
    for extension in extensions:
        stream = extension.transform_from(stream)
    return stream if isinstance(stream, io.BytesIO) else io.BytesIO(stream.read(-1))


def _run(offsets: tuple[int, ...], lengths: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, int] | None:
    """Return first element and number of a box's elements, if they lie one behind the other; else None."""
    begin, split = 0, 0
    for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        begin = begin * size + offset
        if lengths[axis] != 1 and not split:
            split = axis + 1
    behind = slice(split or len(sizes), None)
    if lengths[behind] != sizes[behind]:
        return None
    return begin, math.prod(lengths)


def _takes_bytes(target: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether a file's bytes can be read straight into a tensor."""
    plain = target.device.type == "cpu" and target.layout is torch.strided and target.dtype == dtype
    return plain and target.is_contiguous() and not target.is_conj() and not target.is_neg()


def _copy(target: torch.Tensor, values: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(values)
