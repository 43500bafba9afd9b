"""A rank's layout as the client uses it: what is staged where, for one structure of the state dict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckptd.checkpoint.items import LocalPlan
from ckptd.checkpoint.layout import item_record, make_layout
from ckptd.checkpoint.metadata import torch_dtype
from ckptd.client.snapshot import Structure
from ckptd.staging.arena import ALIGNMENT_BYTES
from ckptd.staging.dtypes import OBJECT
from ckptd.staging.views import Placed

# Room for the encoded seal: fixed fields and a checkpoint id of at most 4096 bytes, and 8 bytes for each object.
_SEAL_BYTES = 8192


@dataclass(frozen=True, eq=False)
class RankLayout:
    """What this rank stages.

    Attributes:
        structure: The structure of the state dict that it holds for.
        digest: By which the daemon knows the plan.
        items: Positions in the snapshot's sources, in image order.
        placed: Where each lies in the image.
        image_bytes: Length of the image in bytes.
        control_bytes: Room before the image for the seal, in bytes.
    """

    structure: Structure
    digest: str
    items: list[int]
    placed: list[Placed]
    image_bytes: int
    control_bytes: int
    code_offset: int | None = None  # of a hand-over: where the pickle begins in the image

    def code_bytes(self, object_bytes: bytes) -> int:
        """Return the length of a hand-over's pickle, which is its one object; 0 of any other save."""
        return 0 if self.code_offset is None else int.from_bytes(object_bytes[:8], "little")

    @property
    def slot_bytes(self) -> int:
        """What a slot must hold, in bytes."""
        return self.control_bytes + self.image_bytes


def make_rank_layout(structure: Structure, digest: str, plan: LocalPlan, assigned: bytes) -> RankLayout:
    """Return the layout of the items that the daemon assigned.

    Args:
        structure: The structure of the state dict.
        digest: The plan's digest.
        plan: What this rank holds.
        assigned: int64 column of the positions that it stages.
    """
    items = np.frombuffer(assigned, dtype="<i8")
    layout = make_layout(plan, items)
    placed: list[Placed] = []
    rows = zip(
        items.tolist(),
        layout.record_offset.tolist(),
        layout.data_offset.tolist(),
        layout.data_bytes.tolist(),
        strict=True,
    )
    for item, record_offset, data_offset, data_bytes in rows:
        name = int(plan.item_name[item])
        dtype = int(plan.dtype[name])
        if dtype == OBJECT:
            placed.append(Placed(record_offset, data_offset, data_bytes, b"", b"", None, ()))
            continue
        record = item_record(plan, item)
        shape = tuple(plan.item_sizes[item, : plan.ndim[name]].tolist())
        placed.append(
            Placed(
                record_offset,
                data_offset,
                data_bytes,
                record.prefix,
                record.suffix,
                torch_dtype(dtype),
                shape,
            )
        )
    objects = sum(item.dtype is None for item in placed)
    control_bytes = -(-(_SEAL_BYTES + 8 * objects) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return RankLayout(structure, digest, items.tolist(), placed, layout.image_bytes, control_bytes)
