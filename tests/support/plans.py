"""Local plans, and the images of a job plan, made without a state dict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckptd.checkpoint.image.layout import item_record
from ckptd.checkpoint.planning.items import BALANCED, LocalPlan
from ckptd.checkpoint.planning.plan import JobPlan
from ckptd.staging.dtypes import OBJECT, by_code, by_name
from ckptd.staging.image import scalar_record

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Held:
    """A tensor of which a rank holds some boxes, given by offsets and sizes; all of it if none are named."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...] | None = None
    dtype: str = "float32"
    requires_grad: bool = False

    def held(self) -> tuple[Box, ...]:
        return (((0,) * len(self.shape), self.shape),) if self.boxes is None else self.boxes


def rows(first: int, last: int, *, of: tuple[int, ...], dtype: str = "float32") -> Held:
    """Return a shard of a tensor: its rows ``first`` to ``last``."""
    box = ((first,) + (0,) * (len(of) - 1), (last - first, *of[1:]))
    return Held(of, (box,), dtype)


def local_plan(held: dict[str, Held | int], *, settings: str = BALANCED) -> LocalPlan:
    """Return the plan of a rank that holds tensors, and objects for which so many bytes are reserved."""
    kinds = [(OBJECT, (), False) if isinstance(h, int) else _kind(h) for h in held.values()]
    items: list[tuple[int, tuple[int, ...], tuple[int, ...], int]] = []
    for name, thing in enumerate(held.values()):
        if isinstance(thing, int):
            items.append((name, (), (), thing))
        else:
            items.extend((name, offsets, sizes, 0) for offsets, sizes in thing.held())
    wide = max((len(shape) for _, shape, _ in kinds), default=0)

    def matrix(boxes):
        return np.array([(*box, *[0] * (wide - len(box))) for box in boxes], np.int64).reshape(len(boxes), wide)

    return LocalPlan(
        settings=settings,
        names=list(held),
        paths=[tuple(name.split(".")) for name in held],
        dtype=np.array([code for code, _, _ in kinds], np.uint8),
        ndim=np.array([len(shape) for _, shape, _ in kinds], np.uint8),
        shape=matrix([shape for _, shape, _ in kinds]),
        requires_grad=np.array([grad for _, _, grad in kinds], np.uint8),
        item_name=np.array([item[0] for item in items], np.int64),
        item_offsets=matrix([item[1] for item in items]),
        item_sizes=matrix([item[2] for item in items]),
        capacity=np.array([item[3] for item in items], np.int64),
    )


def _kind(held: Held) -> tuple[int, tuple[int, ...], bool]:
    return by_name(held.dtype).code, held.shape, held.requires_grad


def assigned_names(plans: list[LocalPlan], job: JobPlan) -> list[list[str]]:
    """Return the names of the items that each rank writes, in image order."""
    return [[plan.names[plan.item_name[item]] for item in mine] for plan, mine in zip(plans, job.assigned, strict=True)]


def index_places(job: JobPlan) -> set[tuple[object, ...]]:
    """Return what the index of a plan says of each item: name, box, file and place of the payload."""
    index = job.index
    return {
        (
            index.names[index.item_name[row]],
            tuple(index.item_offsets[row, : index.ndim[index.item_name[row]]].tolist()),
            tuple(index.item_sizes[row, : index.ndim[index.item_name[row]]].tolist()),
            index.files[index.item_file[row]],
            int(index.data_offset[row]),
            int(index.data_bytes[row]),
        )
        for row in range(len(index.item_name))
    }


def make_image(plan: LocalPlan, job: JobPlan, rank: int, *, seed: int = 0) -> tuple[bytes, bytes]:
    """Return a rank's image with random tensors and small objects in it, and the column of the objects' lengths."""
    layout = job.layouts[rank]
    image, lengths = bytearray(layout.image_bytes), []
    generator = np.random.default_rng(seed + rank)
    for row, item in enumerate(layout.item.tolist()):
        begin = int(layout.record_offset[row])
        if plan.dtype[plan.item_name[item]] == OBJECT:
            content = scalar_record(seed)
            lengths.append(len(content))
        else:
            record = item_record(plan, item)
            data = generator.integers(0, 2, record.nbytes, np.uint8).tobytes()
            content = record.prefix + data + record.suffix
        image[begin : begin + len(content)] = content
    return bytes(image), np.array(lengths, "<i8").tobytes()


def item_bytes(plan: LocalPlan, item: int) -> int:
    """Return the length of an item's values, or what is reserved for an object."""
    name = plan.item_name[item]
    if plan.dtype[name] == OBJECT:
        return int(plan.capacity[item])
    return int(np.prod(plan.item_sizes[item, : plan.ndim[name]])) * by_code(int(plan.dtype[name])).itemsize_bytes
