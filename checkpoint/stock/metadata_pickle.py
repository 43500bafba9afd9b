"""The stock ``.metadata`` of a checkpoint, written as pickle opcodes without torch.

Invariant: unpickling gives what stock would have made of the same items, by the same classes in the same form
(NEWOBJ and BUILD), so every torch that reads stock's file reads ours.
Names, steps of paths and each distinct ``torch.Size`` are made once, at the head of the file; all that follows
fetches them from the memo by opcodes of fixed width, so that its rows are matrices of bytes.
Sources: torch/distributed/checkpoint/{metadata,filesystem}.py of torch 2.13.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, islice, repeat
from typing import Final

import numpy as np

from ckptd.checkpoint.indexing.columns import Index, Int64, UInt8
from ckptd.checkpoint.indexing.distinct import distinct
from ckptd.checkpoint.stock.metadata_unpickle import decode_metadata
from ckptd.checkpoint.stock.opcodes import (
    NEW,
    NEW_WITH_STATE,
    SET_STATE,
    STACK_GLOBAL,
    Bool,
    Cell,
    Memo,
    Part,
    get,
    get_each,
    push_each,
    push_int,
    push_text,
    ragged_rows,
)
from ckptd.staging.dtypes import OBJECT, by_code

__all__ = ["DCP_VERSION", "decode_metadata", "encode_metadata"]

# CURRENT_DCP_VERSION of torch 2.13; older versions do not read the field.
DCP_VERSION: Final = "1.0.0"
_MODULE: Final = "torch.distributed.checkpoint.metadata"
_FILESYSTEM: Final = "torch.distributed.checkpoint.filesystem"
# A row of opcodes is about 100 bytes; what is made of so many stays in the processor's cache.
_BLOCK_ROWS: Final = 1 << 14
_PROTOCOL_AND_FRAME: Final = b"\x80\x04\x95"


class _Words:
    """Opcodes that all items share; what they refer to is kept in the memo."""

    def __init__(self, memo: Memo) -> None:
        def new(name: str, module: str = _MODULE) -> bytes:
            return memo.named(module, name) + NEW_WITH_STATE

        self.size_class = memo.named("torch", "Size")
        self.none = memo.keep(b"N")
        self.tensor = new("TensorStorageMetadata") + memo.text("properties")
        self.tensor += memo.named(_MODULE, "TensorProperties") + NEW
        self.size, self.chunks = memo.text("size"), memo.text("chunks") + b"]("
        self.chunk = new("ChunkStorageMetadata") + memo.text("offsets")
        self.sizes = memo.text("sizes")
        self.object = memo.named(_MODULE, "BytesStorageMetadata") + NEW
        self.key, self.offset = new("MetadataIndex") + memo.text("fqn"), memo.text("offset")
        self.place = new("_StorageInfo", _FILESYSTEM) + memo.text("relative_path")
        self.length = memo.text("length")


@dataclass(frozen=True)
class _Kept:
    """Positions in the memo: of each name's string, TensorProperties' state and size, and of each item's boxes."""

    names: Int64
    states: Int64
    shapes: Int64
    offsets: Int64  # of an object: that of None
    sizes: Int64
    files: Int64
    steps: Int64  # of all paths, one behind the other
    steps_of: Int64  # not a position: the number of each path's steps


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
    kept = _keep(index, words, memo)
    body = io.BytesIO()
    body.write(_PROTOCOL_AND_FRAME + bytes(8))
    body.writelines(
        chain(
            memo.preamble,
            (push_text(_MODULE), push_text("Metadata"), STACK_GLOBAL, NEW_WITH_STATE),
            (push_text("state_dict_metadata"), b"}("),
            _state_dict_metadata(index, words, kept),
            (b"u", push_text("planner_data"), b"}("),
            _planner_data(kept),
            (b"u", push_text("storage_data"), b"}("),
            _storage_data(index, words, kept),
            (b"u", push_text("storage_meta"), _storage_meta(checkpoint_id, save_id)),
            (push_text("version"), push_text(DCP_VERSION), SET_STATE, b"."),
        )
    )
    frame_bytes = body.tell() - len(_PROTOCOL_AND_FRAME) - 8
    body.seek(len(_PROTOCOL_AND_FRAME))
    body.write(frame_bytes.to_bytes(8, "little"))
    return body.getvalue()


def _keep(index: Index, words: _Words, memo: Memo) -> _Kept:
    states = _property_states(index, memo)
    is_tensor = index.dtype != OBJECT
    ndim = index.ndim[index.item_name]
    offsets = _boxes(index.item_offsets, ndim, words, memo)
    steps_of = np.fromiter(map(len, index.paths), np.int64, len(index.paths))
    first_name = memo.texts(index.names)
    return _Kept(
        names=first_name + np.arange(len(index.names)),
        states=states,
        shapes=_boxes(index.shape, index.ndim, words, memo),
        offsets=np.where(is_tensor[index.item_name], offsets, words.none),
        sizes=_boxes(index.item_sizes, ndim, words, memo),
        files=memo.texts(index.files) + np.arange(len(index.files)),
        steps_of=steps_of,
        steps=_steps(index, steps_of, first_name, memo),
    )


def _property_states(index: Index, memo: Memo) -> Int64:
    """Keep the state tuples of TensorProperties; return each name's position in the memo, 0 for objects."""
    layout = memo.named("torch.serialization", "_get_layout") + push_text("torch.strided") + b"\x85R"
    layout = get(memo.keep(layout))
    memory_format = get(memo.keep(memo.named(_MODULE, "_MEM_FORMAT_ENCODING") + b"K\0\x85R"))
    kinds: Int64 = index.dtype.astype(np.int64) * 2 + index.requires_grad
    positions = np.zeros(2 * (OBJECT + 1), np.int64)
    for kind in np.flatnonzero(np.bincount(kinds)).tolist():
        dtype, requires_grad = divmod(kind, 2)
        if dtype != OBJECT:
            grad = b"\x88" if requires_grad else b"\x89"
            name = memo.named("torch", by_code(dtype).name)
            positions[kind] = memo.keep(b"(" + name + layout + grad + memory_format + b"\x89t")
    return positions[kinds]


def _boxes(boxes: Int64, ndim: UInt8, words: _Words, memo: Memo) -> Int64:
    """Keep each distinct torch.Size of the first ``ndim`` columns; return each row's position in the memo."""
    example, kind_of = distinct(ndim.astype(np.int64), boxes)
    positions = np.zeros(len(example), np.int64)
    for dimensions in np.unique(ndim[example]).tolist():
        chosen = np.flatnonzero(ndim[example] == dimensions)
        before, after = (b"(", b"t") if dimensions > 3 else (b"", (b")", b"\x85", b"\x86", b"\x87")[dimensions])
        numbers = [push_each(boxes[example[chosen], axis]) for axis in range(dimensions)]
        first = memo.values([words.size_class + before, *numbers, after + b"\x85R"], len(chosen))
        positions[chosen] = first + np.arange(len(chosen))
    return positions[kind_of]


def _steps(index: Index, steps_of: Int64, first_name: int, memo: Memo) -> Int64:
    """Keep each distinct step of a path; return the positions of all paths' steps, one path behind the other."""
    # A path of one step is that of a name at the top level, which is kept already.
    known = dict(zip(index.names, count(), strict=False)) if (steps_of == 1).any() else {}
    code: dict[str | int, int] = defaultdict(count(len(known)).__next__)
    code.update(known)
    steps = chain.from_iterable(index.paths)
    codes = np.fromiter(map(code.__getitem__, steps), np.int64, int(steps_of.sum()))
    new = list(islice(code, len(known), None))
    is_text = np.fromiter(map(isinstance, new, repeat(str)), np.bool_, len(new))
    texts = [step for step in new if isinstance(step, str)]
    positions = np.empty(len(new), np.int64)
    positions[is_text] = memo.texts(texts) + np.arange(len(texts))
    positions[~is_text] = [memo.keep(push_int(int(new[at]))) for at in np.flatnonzero(~is_text)]
    return np.concatenate([first_name + np.arange(len(known)), positions])[codes]


@dataclass(frozen=True)
class _Rows:
    """Groups of rows, laid out one behind the other; a group without a row has an empty one."""

    group: Int64
    member: Int64  # position of the row within its group's rows; -1 if the group has none
    is_first: Bool
    is_last: Bool

    @classmethod
    def of(cls, counts: Int64) -> _Rows:
        lengths = np.maximum(counts, 1)
        group = np.repeat(np.arange(len(counts)), lengths)
        ends = np.cumsum(lengths)
        is_first, is_last = np.zeros((2, len(group)), np.bool_)
        is_first[ends - lengths] = True
        is_last[ends - 1] = True
        filled = counts[group] > 0
        return cls(group, np.where(filled, np.cumsum(filled) - 1, -1), is_first, is_last)

    def blocks(self) -> Iterator[tuple[_Rows, int]]:
        for begin in range(0, len(self.group), _BLOCK_ROWS):
            part = slice(begin, begin + _BLOCK_ROWS)
            group = self.group[part]
            yield _Rows(group, self.member[part], self.is_first[part], self.is_last[part]), len(group)


def _state_dict_metadata(index: Index, words: _Words, kept: _Kept) -> Iterator[bytes]:
    """Yield the names with their metadata; the chunks of a tensor are the rows of its group."""
    items = np.argsort(index.item_name, kind="stable")
    chunks = _Rows.of(np.bincount(index.item_name, minlength=len(index.names)))
    for block, length in chunks.blocks():
        name, item = block.group, items[block.member] if len(items) else block.member
        is_tensor = index.dtype[name] != OBJECT
        states, shapes = get_each(kept.states[name]), get_each(kept.shapes[name])
        head: Cell = [words.tensor, states, b"b" + words.size, shapes, words.chunks], block.is_first & is_tensor
        box = (b"", b"") if not len(items) else (get_each(kept.offsets[item]), get_each(kept.sizes[item]))
        chunk: Cell = [words.chunk, box[0], words.sizes, box[1], SET_STATE], (block.member >= 0) & is_tensor
        cells: list[Cell] = [
            ([get_each(kept.names[name])], block.is_first),
            ([words.object], block.is_first & ~is_tensor),
            head,
            chunk,
            ([b"e" + SET_STATE], block.is_last & is_tensor),
        ]
        yield ragged_rows(cells, length)


def _planner_data(kept: _Kept) -> Iterator[bytes]:
    """Yield the names with their paths; the steps of a path are the rows of its group."""
    for block, length in _Rows.of(kept.steps_of).blocks():
        name = get_each(kept.names[block.group])
        cells: list[Cell] = [([name, b"("], block.is_first), ([get_each(kept.steps[block.member])], None)]
        yield ragged_rows([*cells, ([b"t"], block.is_last)], length)


def _storage_data(index: Index, words: _Words, kept: _Kept) -> Iterator[bytes]:
    """Yield the places of all items.

    What is None in each of stock's objects is left out, because the classes have it as their default.
    """
    for begin in range(0, len(index.item_name), _BLOCK_ROWS):
        part = slice(begin, begin + _BLOCK_ROWS)
        names = index.item_name[part]
        key: list[Part] = [
            words.key,
            get_each(kept.names[names]),
            words.offset,
            get_each(kept.offsets[part]),
            SET_STATE,
        ]
        place: list[Part] = [words.place, get_each(kept.files[index.item_file[part]])]
        place += [words.offset, push_each(index.record_offset[part])]
        place += [words.length, push_each(index.record_bytes[part]), SET_STATE]
        yield ragged_rows([(key + place, None)], len(names))


def _storage_meta(checkpoint_id: str, save_id: str) -> bytes:
    path = push_text(checkpoint_id)
    if "://" not in checkpoint_id:
        path = push_text("pathlib") + push_text("PosixPath") + STACK_GLOBAL + path + b"\x85R"
    fields = (("checkpoint_id", path), ("save_id", push_text(save_id)), ("load_id", b"N"), ("modules", b"]"))
    state = b"".join(push_text(name) + value for name, value in fields)
    return push_text(_MODULE) + push_text("StorageMeta") + STACK_GLOBAL + NEW_WITH_STATE + state + SET_STATE
