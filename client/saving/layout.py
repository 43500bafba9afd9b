"""A rank's layout as the client uses it: what is staged where, for one structure of the state dict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckptd.checkpoint.collector import collector_paused
from ckptd.checkpoint.folder.user_data import MOST_BYTES
from ckptd.checkpoint.image.layout import Layout, item_records, make_layout
from ckptd.checkpoint.planning.items import LocalPlan
from ckptd.checkpoint.stock.metadata import torch_dtype
from ckptd.client.saving.snapshot import Structure
from ckptd.staging.arena import ALIGNMENT_BYTES
from ckptd.staging.dtypes import OBJECT
from ckptd.staging.views import Placed

# Room for the encoded seal: fixed fields and a checkpoint id of at most 4096 bytes, what the user says of the
# checkpoint, and 8 bytes for each object.
_SEAL_BYTES = 8192 + MOST_BYTES


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
    job_bytes: int = 0  # size of the images of all ranks

    def code_bytes(self, object_bytes: bytes) -> int:
        """Return the length of a hand-over's pickle, which is its one object; 0 of any other save."""
        return 0 if self.code_offset is None else int.from_bytes(object_bytes[:8], "little")

    @property
    def slot_bytes(self) -> int:
        """What a slot must hold, in bytes."""
        return self.control_bytes + self.image_bytes


def make_rank_layout(
    structure: Structure, digest: str, plan: LocalPlan, assigned: bytes, *, job_bytes: int = 0
) -> RankLayout:
    """Return the layout of the items that the daemon assigned.

    Args:
        structure: The structure of the state dict.
        digest: The plan's digest.
        plan: What this rank holds.
        assigned: int64 column of the positions that it stages.
        job_bytes: Size of the images of all ranks in bytes.
    """
    items = np.frombuffer(assigned, dtype="<i8")
    layout = make_layout(plan, items)
    with collector_paused():  # a trainer's heap is large
        placed = _placed(plan, layout)
    objects = sum(item.dtype is None for item in placed)
    control_bytes = -(-(_SEAL_BYTES + 8 * objects) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return RankLayout(structure, digest, items.tolist(), placed, layout.image_bytes, control_bytes, job_bytes=job_bytes)


def _placed(plan: LocalPlan, layout: Layout) -> list[Placed]:
    shapes, kind_of, records = item_records(plan, layout.item)
    dtypes = plan.dtype[plan.item_name[layout.item]].tolist()
    known = {dtype: torch_dtype(dtype) for dtype in set(dtypes) - {OBJECT}}
    places = zip(layout.record_offset.tolist(), layout.data_offset.tolist(), layout.data_bytes.tolist(), strict=True)
    placed: list[Placed] = []
    for place, dtype, kind in zip(places, dtypes, kind_of.tolist(), strict=True):
        record = records[kind]
        placed.append(Placed(*place, record.prefix, record.suffix, known.get(dtype), shapes[kind]))
    return placed
