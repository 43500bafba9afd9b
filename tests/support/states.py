"""State dicts with everything in them, blanks to load them into, and what equal means."""

from __future__ import annotations

import collections
import datetime
import pathlib

import torch

from ckptd.staging.dtypes import DTYPES

FIRST = 11


def of_every_dtype():
    """Return a tensor of each element type, zero elements and packed ones among them."""
    found = {}
    for number, dtype in enumerate(DTYPES):
        kind = getattr(torch, dtype.name)
        data = (torch.arange(FIRST * 16) * 7 + number).to(torch.uint8)
        if kind is torch.bool:
            found[dtype.name] = data % 3 == 0
        else:
            found[dtype.name] = data[: FIRST * dtype.itemsize_bytes].view(kind)
    found["int4_packed"] = (torch.arange(32) % 16).to(torch.uint8).reshape(2, 16)
    return found


def everything(number=1):
    """Return a state dict with every kind of value that a trainer may hold."""
    storage = torch.arange(600.0) + number
    matrix = torch.arange(200_000.0).reshape(400, 500) * number
    tied = torch.full((3, 4), float(number))
    return {
        "model": {"deep": {"er": {"w": matrix.clone()}}, "b": torch.tensor([number, 2.0], dtype=torch.bfloat16)},
        "list": [torch.arange(4) * number, {"a": 1.5, "t": torch.ones(2)}, [torch.zeros(1), "text"]],
        "shared": {"one": storage[:400], "two": storage[200:], "tied": tied, "tied_again": tied},
        "views": {
            "transposed": matrix.t(),
            "strided": matrix[::3, 1::2],
            "expanded": torch.tensor([float(number)]).expand(5, 3),
            "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
            "channels_last": torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
            "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
            "negative": torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        },
        "empty": {"none": torch.empty(0), "rows": torch.empty(0, 3), "columns": torch.empty(4, 0, 2)},
        "zero_d": {"float": torch.tensor(3.25 * number), "int": torch.tensor(number), "bool": torch.tensor(True)},
        "grad": torch.nn.Parameter(torch.ones(3, 2) * number),
        "dtypes": of_every_dtype(),
        "scalars": {"int": number, "big": 1 << 80, "float": 0.1, "inf": float("-inf"), "bool": True, "none": None},
        "text": {"plain": "text", "wide": "ü\u2028\U0001f600", "": "empty key"},
        "objects": {
            "bytes": bytes(range(256)) * 20,
            "tuple": (1, "two", None, (3.0,)),
            "set": {1, 2, 3},
            "list": [1, 2, [3, "x"]],
            "time": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
            "path": pathlib.PurePosixPath("/a/b"),
            "counter_like": collections.deque([1, 2], maxlen=3),
            "type": pathlib.PurePosixPath,
            "random": torch.get_rng_state(),
        },
    }


def blank(value):
    """Return a state dict of the same structure with nothing of the content in it."""
    if isinstance(value, torch.Tensor):
        nbytes = value.numel() * value.element_size()
        return torch.full((nbytes,), 1, dtype=torch.uint8).view(value.dtype).reshape(value.shape)
    if isinstance(value, dict):
        return {key: blank(inner) for key, inner in value.items()}
    if isinstance(value, list) and _walked(value):
        return [blank(inner) for inner in value]
    return None


def _walked(values):
    return any(isinstance(v, torch.Tensor | dict) or (isinstance(v, list) and _walked(v)) for v in values)


def assert_same(found, wanted, where="state"):
    """Equal in structure, types, shapes, dtypes and every bit."""
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor), where
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), where
        assert torch.equal(bits(found), bits(wanted)), where
    elif isinstance(wanted, dict):
        assert set(found) == set(wanted), where
        for key, value in wanted.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(wanted, list) and _walked(wanted):
        assert len(found) == len(wanted), where
        for position, value in enumerate(wanted):
            assert_same(found[position], value, f"{where}.{position}")
    else:
        assert type(found) is type(wanted), where
        assert found == wanted, where


def bits(tensor):
    """Return the bytes of a tensor's values."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)
