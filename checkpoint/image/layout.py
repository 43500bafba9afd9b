"""Where each item lies in a rank's image: a pure function of the rank's assigned items.

Invariant: records do not overlap, and a tensor of at least a page starts on a page, so that it can be read with
O_DIRECT or mapped without a copy. Small tensors share pages: a scalar must not cost 4 KiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from ckptd.checkpoint.indexing.distinct import distinct
from ckptd.checkpoint.planning.items import MAX_DIMENSIONS, Int64, LocalPlan
from ckptd.staging.arena import ALIGNMENT_BYTES
from ckptd.staging.dtypes import OBJECT
from ckptd.staging.image import Record, tensor_record

# torch aligns its own storages to 64 bytes (c10/core/alignment.h), a cache line.
SMALL_ALIGNMENT_BYTES: Final = 64


@dataclass(frozen=True)
class Layout:
    """Offsets and lengths in bytes, one entry per assigned item, in image order.

    Attributes:
        item: Position of the item in the rank's local plan.
        record_offset: Where the ``torch.save`` record, or the object, begins.
        record_bytes: Length of the record; for an object the bytes reserved for it.
        data_offset: Where the values begin.
        data_bytes: Length of the values; for an object the bytes reserved for it.
        image_bytes: Length of the image, a multiple of :data:`ALIGNMENT_BYTES`.
    """

    item: Int64
    record_offset: Int64
    record_bytes: Int64
    data_offset: Int64
    data_bytes: Int64
    image_bytes: int


def item_record(plan: LocalPlan, item: int) -> Record:
    """Return the bytes around a tensor item's values."""
    name = int(plan.item_name[item])
    shape = tuple(plan.item_sizes[item, : plan.ndim[name]].tolist())
    return tensor_record(int(plan.dtype[name]), shape)


def make_layout(plan: LocalPlan, assigned: Int64) -> Layout:
    """Place the assigned items one behind the other.

    Args:
        plan: What the rank holds.
        assigned: ``[K]`` positions of the items that it writes.
    """
    names = plan.item_name[assigned]
    is_object = plan.dtype[names] == OBJECT
    _, kind_of, records = item_records(plan, assigned)
    columns = np.array([(len(r.prefix), r.nbytes, len(r.suffix)) for r in records], np.int64).reshape(-1, 3)[kind_of]
    columns[is_object] = 0
    columns[is_object, 1] = plan.capacity[assigned][is_object]
    prefix, nbytes, suffix = columns.T
    is_page = ~is_object & (nbytes >= ALIGNMENT_BYTES)
    alignments = np.where(is_page, ALIGNMENT_BYTES, SMALL_ALIGNMENT_BYTES)
    begins: list[int] = []
    end = 0
    for before, length, alignment in zip(prefix.tolist(), (nbytes + suffix).tolist(), alignments.tolist(), strict=True):
        begin = -(-(end + before) // alignment) * alignment
        begins.append(begin)
        end = begin + length
    data = np.array(begins, np.int64)
    image_bytes = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return Layout(assigned, data - prefix, prefix + nbytes + suffix, data, nbytes, image_bytes)


def item_records(plan: LocalPlan, items: Int64) -> tuple[list[tuple[int, ...]], Int64, list[Record]]:
    """Return the distinct records of some items with their shapes, and which of them each item has.

    An object has none; its kind says nothing.
    """
    names = plan.item_name[items]
    label = plan.dtype[names].astype(np.int64) * (MAX_DIMENSIONS + 1) + plan.ndim[names]
    example, kind_of = distinct(label, plan.item_sizes[items])
    shapes, records = [], []
    for item in items[example].tolist():
        name = int(plan.item_name[item])
        shapes.append(tuple(plan.item_sizes[item, : plan.ndim[name]].tolist()))
        dtype = int(plan.dtype[name])
        records.append(Record(b"", 0, b"") if dtype == OBJECT else tensor_record(dtype, shapes[-1]))
    return shapes, kind_of, records
