"""Any tensors in any chunks come through every format bit by bit; any wrong bit of a record is ours to refuse."""

from __future__ import annotations

import io
import os
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.states import assert_same, of_every_dtype
from support.stock import load_stock, save_stock

from ckptd.checkpoint.formats.compare import compare
from ckptd.checkpoint.formats.convert import Format, convert, open_source
from ckptd.checkpoint.formats.plain import plain_value
from ckptd.checkpoint.formats.record import tensor_in_record
from ckptd.checkpoint.formats.whole import whole
from ckptd.checkpoint.verify import verify_checkpoint
from ckptd.protocol.errors import BadIndex, Unsupported

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support")
SLOW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
DTYPES = sorted(name for name in of_every_dtype() if name not in {"complex32", "complex128", "float4_e2m1fn_x2"})


@st.composite
def cut_tensors(draw):
    """A tensor, and boxes that tile it: along each axis it is cut at a few places."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    dtype = of_every_dtype()[draw(st.sampled_from(DTYPES))].dtype
    count = int(np.prod(shape)) * torch.empty(0, dtype=dtype).element_size()
    data = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2, count, np.uint8)
    raw = torch.empty(count, dtype=torch.uint8)  # from_numpy gives an empty one strides of 0
    raw[:] = torch.from_numpy(data)
    tensor = raw.view(dtype).reshape(shape)
    boxes = [((), ())]
    for size in shape:
        ends = sorted({end for end in draw(st.lists(st.integers(1, 4), max_size=2)) if end < size} | {size})
        begins = [0, *ends[:-1]]
        cuts = [(begin, end - begin) for begin, end in zip(begins, ends, strict=True)]
        boxes = [((*o, begin), (*s, length)) for o, s in boxes for begin, length in cuts]
    return tensor, boxes


@SLOW
@given(st.lists(cut_tensors(), min_size=1, max_size=4), st.integers(1, 3))
def test_a_round_through_all_formats_keeps_every_bit(cut, files):
    state = {f"t{number}": tensor for number, (tensor, _) in enumerate(cut)}
    boxes = {f"t{number}": made for number, (_, made) in enumerate(cut)}
    with tempfile.TemporaryDirectory() as folder:
        save_stock(state, f"{folder}/stock", boxes=boxes, files=files)
        steps = [("stock", "ours", Format.DCP), ("ours", "a.safetensors", Format.SAFETENSORS)]
        steps += [
            ("a.safetensors", "a.pt", Format.TORCH),
            ("a.pt", "hf", Format.SAFETENSORS),
            ("hf", "last", Format.DCP),
        ]
        for source, target, to in steps:
            with open_source(f"{folder}/{source}") as opened:
                convert(opened, f"{folder}/{target}", to)
        assert verify_checkpoint(f"{folder}/ours").good
        assert verify_checkpoint(f"{folder}/last").good
        assert_same(torch.load(f"{folder}/a.pt"), state)
        assert_same(load_stock(f"{folder}/ours"), state)
        assert_same(load_stock(f"{folder}/last"), state)
        with open_source(f"{folder}/stock") as one, open_source(f"{folder}/last") as other:
            assert list(compare(one, other)) == []


RECORD = io.BytesIO()
torch.save(torch.arange(6.0).reshape(2, 3), RECORD)
OBJECT = io.BytesIO()
torch.save({"lr": [0.1, 2]}, OBJECT)
FLIPS = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 7)), min_size=1, max_size=3)


def spoilt(data, flips):
    data = bytearray(data)
    for at, bit in flips:
        data[at % len(data)] ^= 1 << bit
    return bytes(data)


@settings(max_examples=200, deadline=None)
@given(FLIPS)
def test_wrong_bits_in_a_record_never_lead_out_of_it(flips):
    data = spoilt(RECORD.getvalue(), flips)
    with tempfile.TemporaryFile() as file:
        file.write(b"\xee" * 64 + data + b"\xee" * 64)
        file.flush()
        try:
            found = tensor_in_record(file.fileno(), "file", 64, len(data))
        except (BadIndex, Unsupported):
            return
        begin, nbytes = found.storage
        assert begin >= 64
        assert begin + nbytes <= 64 + len(data)
        last = sum((size - 1) * stride for size, stride in zip(found.shape, found.strides, strict=True))
        assert found.data_offset >= begin
        assert 0 in found.shape or found.data_offset + 4 * last < begin + nbytes or found.dtype != 11


@settings(max_examples=200, deadline=None)
@given(FLIPS)
def test_wrong_bits_in_an_object_are_no_error_but_a_no(flips):
    known, value = plain_value(spoilt(OBJECT.getvalue(), flips))
    assert known or value is None


@settings(max_examples=30, deadline=None)
@given(cut_tensors())
def test_stock_chunks_stream_as_one_tensor(cut):
    tensor, boxes = cut
    with tempfile.TemporaryDirectory() as folder:
        save_stock({"w": tensor}, os.path.join(folder, "a"), boxes={"w": boxes})
        with open_source(os.path.join(folder, "a")) as source:
            found = b"".join(bytes(piece) for piece in whole(source, source.entries[0]))
    assert found == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
