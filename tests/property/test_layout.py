"""Any set of items has a place each, and no two share a byte."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.plans import Held, item_bytes, local_plan

from ckptd.checkpoint.image.layout import SMALL_ALIGNMENT_BYTES, make_layout
from ckptd.staging.arena import ALIGNMENT_BYTES

tensors = st.builds(
    Held,
    st.lists(st.sampled_from([0, 1, 3, 17, 64, 4096]), max_size=3).map(tuple),
    dtype=st.sampled_from(["uint8", "float32", "complex128", "float8_e4m3fn"]),
)
held = st.lists(tensors | st.integers(1, 9000), max_size=12)


@settings(max_examples=50, deadline=None)
@given(held, st.randoms())
def test_records_never_overlap_and_are_aligned(things, random):
    plan = local_plan({f"n{number}": thing for number, thing in enumerate(things)})
    assigned = np.array(sorted(random.sample(range(plan.items), random.randint(0, plan.items))), np.int64)
    layout = make_layout(plan, assigned)
    again = make_layout(plan, assigned.copy())
    end = 0
    for row, item in enumerate(assigned.tolist()):
        begin, data = int(layout.record_offset[row]), int(layout.data_offset[row])
        assert end <= begin <= data
        end = begin + int(layout.record_bytes[row])
        assert data + layout.data_bytes[row] <= end
        assert layout.data_bytes[row] == item_bytes(plan, item)
        is_page = layout.data_bytes[row] >= ALIGNMENT_BYTES and isinstance(things[item], Held)
        assert data % (ALIGNMENT_BYTES if is_page else SMALL_ALIGNMENT_BYTES) == 0
    assert end <= layout.image_bytes < end + ALIGNMENT_BYTES
    assert layout.image_bytes % ALIGNMENT_BYTES == 0
    assert all(np.array_equal(vars(layout)[name], vars(again)[name]) for name in vars(layout))
