"""Bytes as numbers: what numpy and torch say of the same tensor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.states import bits, of_every_dtype
from support.stock import save_stock

from ckptd.checkpoint.formats import source as source_module
from ckptd.checkpoint.formats.checkpoint import CheckpointSource
from ckptd.checkpoint.formats.numbers import Statistics, numbers, paired, statistics
from ckptd.protocol.errors import Unsupported
from ckptd.staging.dtypes import by_name

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support")
NUMBERS = {name: tensor for name, tensor in of_every_dtype().items() if "int4" not in name and "float4" not in name}


@pytest.mark.parametrize("name", NUMBERS)
def test_each_type_means_what_torch_means(name):
    tensor = NUMBERS[name]
    found = numbers(bits(tensor).numpy().data, by_name(name).code)
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    if tensor.dtype is torch.complex32:
        tensor = tensor.to(torch.complex64)
    wanted = (tensor.to(torch.float32) if "float8" in name else tensor).to(wide).numpy()
    np.testing.assert_array_equal(found.astype(wanted.dtype), wanted)


def test_packed_types_are_no_numbers():
    with pytest.raises(Unsupported, match="float4"):
        numbers(memoryview(b"ab"), by_name("float4_e2m1fn_x2").code)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_statistics_are_torchs(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(source_module, "PIECE_BYTES", 64)  # many pieces
    values = torch.randn(501, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[3], values[4], values[5] = math.nan, -math.inf, 0
    save_stock({"w": values}, tmp_path / "a")
    with CheckpointSource(str(tmp_path / "a")) as source:
        found = statistics(source, source.entry("w"))
    finite = values[torch.isfinite(values)].double()
    assert (found.elements, found.nan, found.infinite, found.zeros) == (501, 1, 1, int((values == 0).sum()))
    assert (found.minimum, found.maximum) == (finite.min(), finite.max())
    assert found.mean == pytest.approx(finite.mean().item())
    assert found.std == pytest.approx(finite.std(correction=0).item())


def test_statistics_of_integers_and_complex_numbers():
    found = Statistics()
    found.add(np.array([-3, 0, 5], np.int64))
    assert found.facts() == {
        **{"elements": 3, "nan": 0, "infinite": 0, "zeros": 1, "min": -3, "max": 5},
        **{"mean": pytest.approx(2 / 3), "std": pytest.approx(np.std([-3, 0, 5]))},
    }
    found = Statistics()
    found.add(np.array([3 + 4j]))
    assert (found.minimum, found.maximum) == (5, 5)


@pytest.mark.parametrize("values", [[], [math.nan]])
def test_statistics_of_nothing(values):
    found = Statistics()
    found.add(np.array(values))
    assert [found.facts()[name] for name in ("min", "max", "mean", "std")] == [None] * 4


def test_what_is_beyond_float64_is_not_told():
    found = Statistics()
    found.add(np.array([1e308, 1e308]))
    assert (found.mean, found.std, found.maximum) == (None, None, 1e308)


def test_streams_are_cut_to_equal_pieces():
    one = iter([memoryview(b"abc"), memoryview(b"defgh")])
    other = iter([memoryview(b"ab"), memoryview(b"cdef"), memoryview(b"gh")])
    pieces = [(bytes(left), bytes(right)) for left, right in paired(one, other)]
    assert all(left == right for left, right in pieces)
    assert b"".join(left for left, _ in pieces) == b"abcdefgh"
