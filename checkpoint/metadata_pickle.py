"""The stock ``.metadata`` of a checkpoint, written as pickle opcodes without torch.

Invariant: unpickling gives what stock would have made of the same items, by the same classes in the same form
(NEWOBJ and BUILD), so every torch that reads stock's file reads ours.
Sources: torch/distributed/checkpoint/{metadata,filesystem}.py of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from ckptd.checkpoint.columns import Index, Int64
from ckptd.checkpoint.metadata_unpickle import decode_metadata
from ckptd.checkpoint.opcodes import (
    MEMOIZE,
    NEW,
    NEW_WITH_STATE,
    SET_STATE,
    STACK_GLOBAL,
    Memo,
    Part,
    get,
    get_each,
    push_each,
    push_int,
    push_text,
    rows,
    split,
)
from ckptd.staging.dtypes import OBJECT, by_code

__all__ = ["DCP_VERSION", "decode_metadata", "encode_metadata"]

# CURRENT_DCP_VERSION of torch 2.13; older versions do not read the field.
DCP_VERSION: Final = "1.0.0"
_MODULE: Final = "torch.distributed.checkpoint.metadata"
_FILESYSTEM: Final = "torch.distributed.checkpoint.filesystem"


class _Words:
    """Opcodes that all items share; what they refer to is kept in the memo."""

    def __init__(self, memo: Memo) -> None:
        def new(name: str, module: str = _MODULE) -> bytes:
            return memo.named(module, name) + NEW_WITH_STATE

        self.size_class = memo.named("torch", "Size")
        self.tensor = new("TensorStorageMetadata") + memo.text("properties")
        self.tensor += memo.named(_MODULE, "TensorProperties") + NEW
        self.size, self.chunks = memo.text("size"), memo.text("chunks") + b"]("
        self.chunk = new("ChunkStorageMetadata") + memo.text("offsets")
        self.sizes = memo.text("sizes")
        self.object = memo.named(_MODULE, "BytesStorageMetadata") + NEW
        self.key, self.offset = new("MetadataIndex") + memo.text("fqn"), memo.text("offset")
        self.place = new("_StorageInfo", _FILESYSTEM) + memo.text("relative_path")
        self.length = memo.text("length")

    def shape(self, boxes: Int64, ndim: int) -> list[Part]:
        """Return the parts of a row that make a torch.Size of the first ``ndim`` columns."""
        before, after = (b"(", b"t") if ndim > 3 else (b"", (b")", b"\x85", b"\x86", b"\x87")[ndim])
        return [
            self.size_class + before,
            *(push_each(boxes[:, axis]) for axis in range(ndim)),
            after + b"\x85R",
        ]


def encode_metadata(index: Index, *, checkpoint_id: str, save_id: str) -> bytes:
    """Return the bytes of the stock ``.metadata``.

    Args:
        index: A checked index.
        checkpoint_id: Where the checkpoint lies. Stock keeps a path as a PosixPath, a URL as text; so do we.
        save_id: Names the save.

    Returns:
        A pickle of ``torch.distributed.checkpoint.metadata.Metadata``, in one frame.
    """
    memo = Memo()
    words = _Words(memo)
    heads = _heads(index, words, memo)
    files = np.array([memo.keep(push_text(file)) for file in index.files], np.int64)
    first_name = memo.put(len(index.names))
    body = b"".join(
        (
            *memo.preamble,
            *(push_text(_MODULE), push_text("Metadata"), STACK_GLOBAL, NEW_WITH_STATE),
            *(push_text("state_dict_metadata"), b"}("),
            *_state_dict_metadata(index, words, heads),
            *(b"u", push_text("planner_data"), b"}("),
            *_planner_data(index, memo, first_name),
            *(b"u", push_text("storage_data"), b"}("),
            *_storage_data(index, words, files[index.item_file], first_name),
            *(b"u", push_text("storage_meta"), _storage_meta(checkpoint_id, save_id)),
            *(push_text("version"), push_text(DCP_VERSION), SET_STATE, b"."),
        )
    )
    return b"\x80\x04\x95" + len(body).to_bytes(8, "little") + body


def _property_states(index: Index, memo: Memo) -> Int64:
    """Keep the state tuples of TensorProperties; return each name's position in the memo, 0 for objects."""
    layout = memo.named("torch.serialization", "_get_layout") + push_text("torch.strided") + b"\x85R"
    layout = get(memo.keep(layout))
    memory_format = get(memo.keep(memo.named(_MODULE, "_MEM_FORMAT_ENCODING") + b"K\0\x85R"))
    kinds, kind_of = np.unique(index.dtype.astype(np.int64) * 2 + index.requires_grad, return_inverse=True)
    positions = np.zeros(len(kinds), np.int64)
    for row, (dtype, requires_grad) in enumerate(divmod(int(kind), 2) for kind in kinds):
        if dtype != OBJECT:
            grad = b"\x88" if requires_grad else b"\x89"
            name = memo.named("torch", by_code(dtype).name)
            positions[row] = memo.keep(b"(" + name + layout + grad + memory_format + b"\x89t")
    return positions[kind_of]


def _by_ndim(ndim: np.ndarray[tuple[int], np.dtype[np.uint8]], chosen: Int64) -> Iterator[tuple[int, Int64]]:
    for dimensions in np.unique(ndim[chosen]).tolist():
        yield dimensions, chosen[ndim[chosen] == dimensions]


def _heads(index: Index, words: _Words, memo: Memo) -> list[bytes]:
    """Return, for each name, its metadata up to the list of chunks."""
    states = _property_states(index, memo)
    heads = [words.object] * len(index.names)
    for ndim, chosen in _by_ndim(index.ndim, np.flatnonzero(index.dtype != OBJECT)):
        shape = words.shape(index.shape[chosen], ndim)
        parts = [words.tensor, get_each(states[chosen]), b"b" + words.size, *shape, words.chunks]
        for name, head in zip(chosen.tolist(), split(rows(parts, len(chosen))), strict=True):
            heads[name] = head
    return heads


def _state_dict_metadata(index: Index, words: _Words, heads: list[bytes]) -> Iterator[bytes]:
    chunks, ends = _chunks(index, words)
    begin = 0
    for name, head, end in zip(index.names, heads, ends, strict=True):
        yield push_text(name) + MEMOIZE + head
        if head is not words.object:
            yield from chunks[begin:end]
            yield b"e" + SET_STATE
        begin = end


def _chunks(index: Index, words: _Words) -> tuple[list[bytes], list[int]]:
    """Return the chunks of all tensors in the order of names, and where each name's end."""
    is_tensor = index.dtype[index.item_name] != OBJECT
    items = np.flatnonzero(is_tensor)
    items = items[np.argsort(index.item_name[items], kind="stable")]
    chunks = [b""] * len(items)
    ndim = index.ndim[index.item_name[items]]
    for dimensions, chosen in _by_ndim(ndim, np.arange(len(items))):
        offsets = words.shape(index.item_offsets[items[chosen]], dimensions)
        sizes = words.shape(index.item_sizes[items[chosen]], dimensions)
        parts = [words.chunk, *offsets, words.sizes, *sizes, SET_STATE]
        for row, chunk in zip(chosen.tolist(), split(rows(parts, len(chosen))), strict=True):
            chunks[row] = chunk
    counts = np.bincount(index.item_name[items], minlength=len(index.names))
    return chunks, np.cumsum(counts).tolist()


def _planner_data(index: Index, memo: Memo, first_name: int) -> Iterator[bytes]:
    fetch_name = split(get_each(np.arange(first_name, first_name + len(index.names), dtype=np.int64)))
    known: dict[str | int, bytes] = {}
    for name, fetch, path in zip(index.names, fetch_name, index.paths, strict=True):
        yield fetch
        if len(path) == 1 and path[0] == name:
            yield fetch + b"\x85"
            continue
        yield b"("
        for element in path:
            opcodes = known.get(element)
            if opcodes is None:
                opcodes = known[element] = _element(element, memo)
                if isinstance(element, str):
                    yield push_text(element) + MEMOIZE
                    continue
            yield opcodes
        yield b"t"


def _element(element: str | int, memo: Memo) -> bytes:
    """Return what fetches an element of a path the next time."""
    return push_int(element) if isinstance(element, int) else get(memo.put(1))


def _storage_data(index: Index, words: _Words, files: Int64, first_name: int) -> Iterator[bytes]:
    """Yield the places of all items; the order within stock's dict means nothing.

    What is None in stock's objects is left out, because the classes have it as their default.
    """
    names, is_object = index.item_name, index.dtype[index.item_name] == OBJECT
    groups: list[tuple[int, Int64]] = [(-1, np.flatnonzero(is_object))]
    groups += _by_ndim(index.ndim[names], np.flatnonzero(~is_object))
    for ndim, chosen in groups:
        offset = [words.offset, *words.shape(index.item_offsets[chosen], ndim)] if ndim >= 0 else []
        parts = [words.key, get_each(first_name + names[chosen]), *offset, SET_STATE, words.place]
        parts += [get_each(files[chosen]), words.offset, push_each(index.record_offset[chosen])]
        parts += [words.length, push_each(index.record_bytes[chosen]), SET_STATE]
        yield rows(parts, len(chosen)).tobytes()


def _storage_meta(checkpoint_id: str, save_id: str) -> bytes:
    path = push_text(checkpoint_id)
    if "://" not in checkpoint_id:
        path = push_text("pathlib") + push_text("PosixPath") + STACK_GLOBAL + path + b"\x85R"
    fields = (("checkpoint_id", path), ("save_id", push_text(save_id)), ("load_id", b"N"), ("modules", b"]"))
    state = b"".join(push_text(name) + value for name, value in fields)
    return push_text(_MODULE) + push_text("StorageMeta") + STACK_GLOBAL + NEW_WITH_STATE + state + SET_STATE
