"""A safetensors file of tensors, written in one pass: the header comes from the plan, the values follow it.

Keys and metadata are those of stock's SAFETENSORS format, by which its Hugging Face reader puts chunks together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ckptd.checkpoint.storage.copy_ahead import resolved_tensors
from ckptd.checkpoint.storage.payload import bytes_of
from ckptd.checkpoint.storage.placement import FileReport, PlacedItem
from ckptd.checkpoint.storage.sink import RecordStream
from ckptd.protocol.errors import Mismatch, Unsupported

# Names of element types in the format. Source: safetensors/src/tensor.rs, enum Dtype.
_DTYPES: Final = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}
# Stock's names and values: torch/distributed/checkpoint/_hf_utils.py of torch 2.13.
_SHARDING_KEY: Final = "DCP_SHARDING_INFO"
_OFFSETS_KEY: Final = "saved_offsets"
_VERSION: Final = {"DCP_VERSION": "1.0", "format": "pt"}


def write_safetensors(
    stream: RecordStream,
    report: FileReport,
    items: Sequence[WriteItem],
    planner: SavePlanner,
    ahead_bytes: int,
    check: Callable[[], None],
) -> list[WriteResult]:
    """Write the tensors among the items as one safetensors file, at the beginning of the stream.

    Raises:
        Unsupported: The format has no such element type.
        Mismatch: A planner resolves an item to another shape or type than it planned.
    """
    tensors = [item for item in items if item.type is not WriteItemType.BYTE_IO]
    # Wide types first: the format wants values aligned to their size, and no holes.
    tensors.sort(key=lambda item: (-_data(item).properties.dtype.itemsize, item.index.fqn))
    if not tensors:
        return []
    stream.frame(_header(tensors))
    results = []
    for item, tensor in resolved_tensors(tensors, planner, ahead_bytes=ahead_bytes):
        check()
        planned = (tuple(_data(item).chunk.sizes), _data(item).properties.dtype)
        if (tuple(tensor.shape), tensor.dtype) != planned:
            raise Mismatch(item.index.fqn, f"{planned[1]}{list(planned[0])}", f"{tensor.dtype}{list(tensor.shape)}")
        values = bytes_of(tensor.resolve_conj().resolve_neg().contiguous())
        begin = stream.offset
        found = stream.payload(values)
        placed = PlacedItem(report.name, begin, len(values), None, begin, len(values), found, report)
        results.append(WriteResult(index=item.index, size_in_bytes=len(values), storage_data=placed))
    return results


def _header(items: Sequence[WriteItem]) -> bytes:
    sharding: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    end = 0
    for item in items:
        data = _data(item)
        dtype = _DTYPES.get(data.properties.dtype)
        if dtype is None:
            raise Unsupported(f"{item.index.fqn}: {data.properties.dtype} in a safetensors file", "use TORCH_SAVE")
        sizes = list(data.chunk.sizes)
        begin, end = end, end + math.prod(sizes) * data.properties.dtype.itemsize
        entries[item.index.fqn] = {"dtype": dtype, "shape": sizes, "data_offsets": [begin, end]}
        sharding[item.index.fqn] = {_OFFSETS_KEY: list(data.chunk.offsets)}
    metadata = {_SHARDING_KEY: json.dumps(sharding), **_VERSION}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the values are aligned, as safetensors' own writer does
    return len(text).to_bytes(8, "little") + text


def _data(item: WriteItem) -> Any:
    if item.tensor_data is None:
        raise Unsupported(f"{item.index.fqn}: a tensor without its shape in the plan", "give tensor_data")
    return item.tensor_data
