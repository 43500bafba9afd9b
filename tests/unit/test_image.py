"""What the image puts around data is what stock torch reads."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ckptd.protocol.errors import Unsupported
from ckptd.staging.dtypes import DTYPES, by_name
from ckptd.staging.image import scalar_record, scalar_value, tensor_record

SHAPES = [
    (),
    (0,),
    (1,),
    (3, 0, 5),
    (2, 3),
    (2, 1, 3),
    (2, 3, 1, 2),
    (1, 2, 1, 2, 3),
    (300,),
    (70_000,),
    (1,) * 12,
]
FLOAT32 = by_name("float32").code
# 5 GiB, so that the size of the data, the place of the directory and the file all need 64 bits.
HUGE = (5, 1 << 30)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_torch_loads_a_record_of_every_dtype_and_shape(dtype):
    for shape in SHAPES:
        record = tensor_record(dtype.code, shape)
        data = np.random.default_rng(7).integers(0, 2, record.nbytes, np.uint8).tobytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch itself warns of complex32
            loaded = torch.load(io.BytesIO(record.prefix + data + record.suffix), weights_only=True)
        assert loaded.dtype is getattr(torch, dtype.name)
        assert loaded.shape == shape
        assert loaded.is_contiguous()
        assert loaded.stride() == torch.empty(shape).stride()
        assert not loaded.requires_grad
        assert _raw(loaded) == data
        assert record.record_bytes == len(record.prefix + data + record.suffix)


def _raw(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return flat.numpy().tobytes()


def test_a_loaded_tensor_equals_the_one_torch_saves():
    tensor = torch.randn(4, 5)
    record = tensor_record(FLOAT32, (4, 5))
    stock = io.BytesIO()
    torch.save(tensor, stock)
    ours = torch.load(io.BytesIO(record.prefix + tensor.numpy().tobytes() + record.suffix), weights_only=True)
    assert torch.equal(ours, torch.load(io.BytesIO(stock.getvalue()), weights_only=True))


@pytest.mark.parametrize("bits", range(30, 34))
@pytest.mark.parametrize("less", [0, 1, 400, 1000])
def test_sizes_around_4_gib_are_in_the_directory(tmp_path, bits, less):
    shape = ((1 << bits) - less,)
    path = _sparse(tmp_path, tensor_record(by_name("uint8").code, shape))
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("archive/data/0")
        assert info.file_size == info.compress_size == shape[0]
        assert archive.read("archive/version") == b"3\n"


def test_the_64_bit_end_of_the_directory_states_its_size():
    suffix = tensor_record(by_name("uint8").code, HUGE).suffix
    end64, locator = suffix.index(b"PK\6\6"), suffix.index(b"PK\6\7")
    assert struct.unpack_from("<Q", suffix, end64 + 4) == (locator - end64 - 12,)


def test_torch_maps_a_record_beyond_4_gib(tmp_path):
    path = _sparse(tmp_path, tensor_record(by_name("uint8").code, HUGE), at_end=b"\1\2\3")
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded.shape == HUGE
    assert loaded[-1, -3:].tolist() == [1, 2, 3]


def _sparse(folder: Path, record, at_end: bytes = b"") -> Path:
    path = folder / "record"
    with path.open("wb") as file:
        file.write(record.prefix)
        file.seek(record.nbytes - len(at_end), io.SEEK_CUR)
        file.write(at_end + record.suffix)
    return path


def test_an_unknown_dtype_is_refused():
    with pytest.raises(Unsupported):
        tensor_record(200, (1,))


INTS = [
    0,
    1,
    255,
    256,
    65535,
    65536,
    -1,
    -128,
    2**31 - 1,
    2**31,
    -(2**31),
    -(2**31) - 1,
    2**63,
    -(2**63),
    2**2040,
]
SCALARS = [
    *INTS,
    *[True, False, None, "", "a", "päth/\0/\U0001f600", "\ud800", "x" * 70_000],
    *[0.0, -0.0, 1.5, math.inf, -math.inf, math.nan, 5e-324],
]


@pytest.mark.parametrize("value", SCALARS, ids=lambda value: repr(value)[:24])
def test_torch_and_we_read_a_scalar_back(value):
    record = scalar_record(value)
    found, ours = scalar_value(memoryview(record))
    theirs = torch.load(io.BytesIO(record), weights_only=False)
    assert found
    for loaded in (ours, theirs):
        assert type(loaded) is type(value)
        if isinstance(value, float):
            assert struct.pack("<d", loaded) == struct.pack("<d", value)
        else:
            assert loaded == value


def test_equal_values_of_other_types_have_records_of_their_own():
    assert len({scalar_record(value) for value in (1, True, 1.0, "1")}) == 4
    assert len({scalar_record(value) for value in (0, False, 0.0, -0.0, None, "")}) == 6
    payloads = [struct.unpack("<d", struct.pack("<Q", 0x7FF8 << 48 | n))[0] for n in range(3)]
    assert len({scalar_record(value) for value in payloads}) == 3


@pytest.mark.parametrize("value", [np.float64(1), np.str_("a"), b"a", (1,), 1j])
def test_other_types_are_refused(value):
    with pytest.raises(Unsupported, match=type(value).__name__):
        scalar_record(value)


@pytest.mark.parametrize("value", [7, 2**70, 1.5, "word", True, None], ids=repr)
def test_a_changed_byte_is_never_taken_for_another_scalar(value):
    record = scalar_record(value)
    for at in range(len(record)):
        for flip in (1, 0x80):
            changed = bytearray(record)
            changed[at] ^= flip
            assert scalar_value(bytes(changed)) == (False, None)
    for cut in (0, 1, 40, len(record) - 1):
        assert scalar_value(record[:cut]) == (False, None)
    assert scalar_value(record + b"\0") == (False, None)


@pytest.mark.parametrize("value", [3, [1, 2], {"a": 1}])
def test_what_torch_saves_is_not_ours(value):
    stock = io.BytesIO()
    torch.save(value, stock)
    assert scalar_value(stock.getvalue()) == (False, None)
