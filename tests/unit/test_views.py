"""A dressed slot is the file: records around views, zeros between them."""

from __future__ import annotations

import io
import mmap

import numpy as np
import pytest
import torch
from support.plans import Held, local_plan

from ckptd.checkpoint.image.layout import item_record, make_layout
from ckptd.checkpoint.stock.metadata import torch_dtype
from ckptd.staging.dtypes import DTYPES, OBJECT
from ckptd.staging.image import scalar_record
from ckptd.staging.views import DressedSlot, Placed

IMAGE_OFFSET = 3 * 4096


def placed(plan, layout) -> list[Placed]:
    items = []
    for row, item in enumerate(layout.item.tolist()):
        name = int(plan.item_name[item])
        where = (int(layout.record_offset[row]), int(layout.data_offset[row]), int(layout.data_bytes[row]))
        if plan.dtype[name] == OBJECT:
            items.append(Placed(*where, b"", b"", None, ()))
        else:
            record = item_record(plan, item)
            shape = tuple(plan.item_sizes[item, : plan.ndim[name]].tolist())
            items.append(Placed(*where, record.prefix, record.suffix, torch_dtype(int(plan.dtype[name])), shape))
    return items


class Dressed:
    """A slot full of an older save's bytes, dressed for some items."""

    def __init__(self, held: dict[str, Held | int]) -> None:
        plan = local_plan(held)
        self.layout = make_layout(plan, np.arange(plan.items))
        self.items = placed(plan, self.layout)
        self.memory = mmap.mmap(-1, IMAGE_OFFSET + self.layout.image_bytes + 4096)
        self.memory[:] = b"\xee" * len(self.memory)
        self.slot = DressedSlot(self.memory, IMAGE_OFFSET, self.layout.image_bytes, self.items)

    def image(self) -> bytes:
        assert set(self.memory[:IMAGE_OFFSET]) == {0xEE}
        assert set(self.memory[IMAGE_OFFSET + self.layout.image_bytes :]) == {0xEE}
        return self.memory[IMAGE_OFFSET : IMAGE_OFFSET + self.layout.image_bytes]

    def record(self, row: int) -> bytes:
        begin = int(self.layout.record_offset[row])
        return self.image()[begin : begin + int(self.layout.record_bytes[row])]


def test_what_is_copied_into_a_view_is_read_by_torch_from_the_image():
    shapes = [(3, 5), (), (2048,), (0, 3), (1, 2, 1)]
    dressed = Dressed({f"w{n}": Held(shape) for n, shape in enumerate(shapes)})
    sources = [torch.randn(shape) for shape in shapes]
    for target, source in zip(dressed.slot.targets, sources, strict=True):
        assert target.shape == source.shape
        target.copy_(source)
    for row, source in enumerate(sources):
        assert torch.equal(torch.load(io.BytesIO(dressed.record(row)), weights_only=True), source)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_there_is_a_view_of_every_dtype(dtype):
    dressed = Dressed({"o": 77, "w": Held((2, 3), dtype=dtype.name)})
    target = dressed.slot.targets[1]
    assert (target.dtype, tuple(target.shape)) == (getattr(torch, dtype.name), (2, 3))
    assert target.is_contiguous()


def test_no_byte_of_an_older_save_is_left_but_in_the_views():
    dressed = Dressed({"s": Held(()), "o": 768, "large": Held((2048,)), "t": Held((3,))})
    for target in dressed.slot.targets:
        if target is not None:
            target.zero_()
    dressed.slot.put_object(1, scalar_record(7))
    image, end = dressed.image(), 0
    for item in dressed.items:
        assert not any(image[end : item.record_offset])
        end = item.data_offset + item.data_bytes + len(item.suffix)
    assert not any(image[end:])


def test_an_object_is_put_in_its_place_and_the_rest_of_it_zeroed():
    dressed = Dressed({"s": Held(()), "o": 2048, "t": Held(())})
    before, behind = dressed.record(0), dressed.record(2)
    for value in ("a long text" * 40, 5):
        record = scalar_record(value)
        dressed.slot.put_object(1, record)
        assert dressed.record(1) == record + bytes(2048 - len(record))
    assert (dressed.record(0), dressed.record(2)) == (before, behind)


def test_an_object_has_no_view():
    assert Dressed({"o": 300}).slot.targets == [None]


def test_a_slot_of_nothing_can_be_dressed():
    dressed = Dressed({})
    assert dressed.slot.targets == []
    assert dressed.image() == b""
