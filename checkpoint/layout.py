"""Where each item lies in a rank's image: a pure function of the rank's assigned items.

Invariant: records do not overlap, and a tensor of at least a page starts on a page, so that it can be read with
O_DIRECT or mapped without a copy. Small tensors share pages: a scalar must not cost 4 KiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from ckptd.checkpoint.items import Int64, LocalPlan
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
    columns = np.zeros((4, len(assigned)), dtype=np.int64)
    names = plan.item_name[assigned]
    dtypes, ndims = plan.dtype[names].tolist(), plan.ndim[names].tolist()
    sizes, capacities = plan.item_sizes[assigned].tolist(), plan.capacity[assigned].tolist()
    rows: list[tuple[int, int, int, int]] = []
    end = 0
    for dtype, ndim, size, capacity in zip(dtypes, ndims, sizes, capacities, strict=True):
        if dtype == OBJECT:
            begin = -(-end // SMALL_ALIGNMENT_BYTES) * SMALL_ALIGNMENT_BYTES
            rows.append((begin, capacity, begin, capacity))
            end = begin + capacity
            continue
        record = tensor_record(dtype, tuple(size[:ndim]))
        alignment = ALIGNMENT_BYTES if record.nbytes >= ALIGNMENT_BYTES else SMALL_ALIGNMENT_BYTES
        data = -(-(end + len(record.prefix)) // alignment) * alignment
        begin = data - len(record.prefix)
        length = len(record.prefix) + record.nbytes + len(record.suffix)
        rows.append((begin, length, data, record.nbytes))
        end = begin + length
    if rows:
        columns = np.array(rows, dtype=np.int64).T
    image_bytes = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return Layout(assigned, columns[0], columns[1], columns[2], columns[3], image_bytes)
