"""A write item's value as bytes: the record of ``torch.save`` around them, and what is known of it."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch

from ckptd.checkpoint.stock.metadata import dtype_code
from ckptd.protocol.errors import Unsupported
from ckptd.staging.image import tensor_record


@dataclass(frozen=True)
class Payload:
    """One item's bytes.

    Attributes:
        prefix: What stands before the values in a record.
        values: The values; the whole record where the values in it are not known, or of an object.
        suffix: What stands behind them.
        known: Whether ``values`` are what an index calls payload.
    """

    prefix: bytes
    values: memoryview
    suffix: bytes
    known: bool = True


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the values of a contiguous CPU tensor, without copying them."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def tensor_payload(tensor: torch.Tensor) -> Payload:
    """Return a CPU tensor's record: ours, or torch's own where the tensor is more than its values."""
    try:
        plain = _plain(tensor)
        record = tensor_record(dtype_code(plain.dtype), tuple(plain.shape))
    except Unsupported:
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        return Payload(b"", buffer.getbuffer(), b"", known=False)
    return Payload(record.prefix, bytes_of(plain), record.suffix)


def object_payload(data: io.BytesIO) -> Payload:
    """Return an object's record, which its planner has made."""
    return Payload(b"", data.getbuffer(), b"")


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) not in {torch.Tensor, torch.nn.Parameter}:
        raise Unsupported(f"a {type(tensor).__name__}", "torch.save keeps what it is")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise Unsupported("a tensor that is not dense", "torch.save keeps what it is")
    return tensor.detach().resolve_conj().resolve_neg().contiguous()
