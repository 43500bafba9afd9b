"""Which of a rank's items go into which file. Pure: looks at sizes, touches no data."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from ckptd.checkpoint.storage.options import SerializationFormat, WriterOptions


def chunk_bytes(item: WriteItem) -> int:
    """Return how many bytes of values an item has; 0 for an object, whose size is not known before it is resolved."""
    data = item.tensor_data
    return 0 if data is None else math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def distribute(items: Sequence[WriteItem], options: WriterOptions) -> list[list[WriteItem]]:
    """Return the items of each file; no file is empty.

    With one file per thread, tensors are balanced by bytes, the largest first, and objects dealt out in turn.
    """
    if not options.single_file_per_rank:
        return [[item] for item in items]
    if options.serialization_format is SerializationFormat.SAFETENSORS:
        return _distribute_safetensors(items, options.thread_count)
    return _balanced(items, options.thread_count)


def _balanced(items: Sequence[WriteItem], files: int) -> list[list[WriteItem]]:
    buckets: list[list[WriteItem]] = [[] for _ in range(files)]
    objects = [item for item in items if item.type is WriteItemType.BYTE_IO]
    tensors = [item for item in items if item.type is not WriteItemType.BYTE_IO]
    for turn, item in enumerate(objects):
        buckets[turn % files].append(item)
    if files > 1:
        tensors.sort(key=chunk_bytes, reverse=True)
    loads = [(0, number) for number in range(files)]
    for item in tensors:
        load, number = loads[0]
        buckets[number].append(item)
        heapq.heapreplace(loads, (load + chunk_bytes(item), number))
    return [bucket for bucket in buckets if bucket]


def _distribute_safetensors(items: Sequence[WriteItem], files: int) -> list[list[WriteItem]]:
    """Objects lie apart, since a safetensors file holds tensors only, and a name stands once in each file.

    Stock puts objects before the file's header and writes the last chunk of a name only: neither can be read.
    """
    objects = [item for item in items if item.type is WriteItemType.BYTE_IO]
    rounds: list[list[WriteItem]] = []
    seen: dict[str, int] = {}
    for item in items:
        if item.type is not WriteItemType.BYTE_IO:
            number = seen.get(item.index.fqn, 0)
            seen[item.index.fqn] = number + 1
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(item)
    buckets = [bucket for chunks in rounds for bucket in _balanced(chunks, files)]
    return [*buckets, objects] if objects else buckets
