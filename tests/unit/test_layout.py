"""Where items lie in an image."""

from __future__ import annotations

import io

import numpy as np
import torch
from support.plans import Held, local_plan

from ckptd.checkpoint.image.layout import SMALL_ALIGNMENT_BYTES, item_record, make_layout
from ckptd.staging.arena import ALIGNMENT_BYTES


def layout_of(held, assigned=None):
    plan = local_plan(held)
    return plan, make_layout(plan, np.arange(plan.items) if assigned is None else np.array(assigned, np.int64))


def test_nothing_makes_an_empty_image():
    _, layout = layout_of({"w": Held((3,))}, assigned=[])
    assert layout.image_bytes == len(layout.item) == len(layout.data_offset) == 0


def test_a_large_tensor_begins_on_a_page_with_its_record_before_it():
    plan, layout = layout_of({"small": Held((3,)), "large": Held((1024,))})
    record = item_record(plan, 1)
    assert layout.data_offset[1] == ALIGNMENT_BYTES
    assert layout.record_offset[1] == ALIGNMENT_BYTES - len(record.prefix)
    assert layout.record_bytes[1] == record.record_bytes
    assert layout.data_bytes.tolist() == [12, 4096]


def test_a_page_of_bytes_is_large_and_one_byte_less_is_not():
    _, layout = layout_of({"less": Held((4095,), dtype="uint8"), "page": Held((4096,), dtype="uint8")})
    assert layout.data_offset[0] % ALIGNMENT_BYTES != 0
    assert layout.data_offset[1] % ALIGNMENT_BYTES == 0


def test_small_tensors_share_pages():
    _, layout = layout_of({f"s{n}": Held((), dtype="int64") for n in range(100)})
    assert layout.image_bytes < 100 * 1024
    assert (layout.data_offset % SMALL_ALIGNMENT_BYTES == 0).all()


def test_an_object_has_no_record_but_the_room_reserved_for_it():
    _, layout = layout_of({"s": Held(()), "o": 768, "t": Held(())})
    assert layout.record_offset[1] == layout.data_offset[1]
    assert layout.record_bytes[1] == layout.data_bytes[1] == 768
    assert layout.record_offset[2] >= layout.record_offset[1] + 768


def test_an_empty_tensor_has_a_record():
    _, layout = layout_of({"e": Held((0, 3))})
    assert layout.data_bytes.tolist() == [0]
    assert layout.record_bytes[0] > 0


def test_the_same_items_lie_at_the_same_places():
    held = {"a": Held((5, 5)), "o": 256, "b": Held((4096,), dtype="bfloat16")}
    (_, one), (_, other) = layout_of(held), layout_of(held)
    assert all(np.array_equal(vars(one)[name], vars(other)[name]) for name in vars(one))


def test_a_chunk_has_the_record_of_its_own_shape():
    plan, layout = layout_of({"w": Held((8, 4), (((2, 0), (3, 4)),))})
    record = item_record(plan, 0)
    loaded = torch.load(io.BytesIO(record.prefix + bytes(record.nbytes) + record.suffix), weights_only=True)
    assert loaded.shape == (3, 4)
    assert layout.data_bytes.tolist() == [48]
