"""The table of element types agrees with torch."""

from __future__ import annotations

import warnings

import pytest
import torch

from ckptd.protocol.errors import Unsupported
from ckptd.staging.dtypes import DTYPES, OBJECT, by_code, by_name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_torch_has_the_dtype_with_the_same_size(dtype):
    theirs = getattr(torch, dtype.name)
    assert str(theirs) == f"torch.{dtype.name}"
    assert theirs.itemsize == dtype.itemsize_bytes
    assert by_name(dtype.name) is by_code(dtype.code) is DTYPES[dtype.code] is dtype


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.storage], ids=lambda dtype: dtype.name)
def test_the_legacy_storage_is_of_the_dtype(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the class that it still writes into files
        assert getattr(torch, dtype.storage)().dtype is getattr(torch, dtype.name)


def test_codes_are_for_ever():
    names = [dtype.name for dtype in DTYPES]
    assert names[:6] == ["bool", "uint8", "int8", "int16", "int32", "int64"]
    assert names[6:13] == ["uint16", "uint32", "uint64", "float16", "bfloat16", "float32", "float64"]
    assert names[13:18] == ["complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"]
    assert names[18:22] == ["float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"]


@pytest.mark.parametrize("code", [-1, len(DTYPES), OBJECT])
def test_an_unknown_code_is_refused(code):
    with pytest.raises(Unsupported, match=f"dtype code {code} is not supported"):
        by_code(code)


def test_an_unknown_name_is_refused():
    with pytest.raises(Unsupported, match=r"torch\.qint8 is not supported; convert"):
        by_name("qint8")
