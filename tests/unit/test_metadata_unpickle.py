"""Stock's ``.metadata`` is read, and nothing else is."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import sys
import types

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.checkpoints import as_dict, items_of, make_checkpoint, many_items
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as stock

from ckptd.checkpoint.indexing.index import encode_index
from ckptd.checkpoint.stock.metadata_pickle import encode_metadata
from ckptd.checkpoint.stock.metadata_unpickle import decode_metadata
from ckptd.protocol.errors import BadIndex, Unsupported
from ckptd.staging.dtypes import OBJECT, by_name

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[bytes, stock.Metadata, str]:
    """A checkpoint that stock saved: its ``.metadata``, that unpickled by torch, and where it is."""
    folder = tmp_path_factory.mktemp("saved")
    state = {
        "model": {"w": torch.arange(6.0).reshape(2, 3), "s": torch.tensor(1, dtype=torch.int8)},
        "list": [torch.zeros(2, dtype=torch.float8_e5m2), {"a": 3}, "text"],
        "object": {1, 2},
        "grad": torch.nn.Parameter(torch.ones(1, 2, 1, 2)),
        **{f"many.{row}": torch.zeros(row) for row in range(1, 8)},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    data = (folder / ".metadata").read_bytes()
    return data, pickle.loads(data), str(folder)


def assert_same(index, metadata: stock.Metadata):
    assert index.names == list(metadata.state_dict_metadata)
    assert dict(zip(index.names, index.paths, strict=True)) == metadata.planner_data
    items = set()
    for name, entry in metadata.state_dict_metadata.items():
        row = index.names.index(name)
        is_object = isinstance(entry, stock.BytesStorageMetadata)
        assert (index.dtype[row] == OBJECT) == is_object
        if not is_object:
            assert index.dtype[row] == by_name(str(entry.properties.dtype)[6:]).code
            assert index.requires_grad[row] == entry.properties.requires_grad
            assert index.shape[row, : index.ndim[row]].tolist() == list(entry.size)
        boxes = [(None, ())] if is_object else [(chunk.offsets, chunk.sizes) for chunk in entry.chunks]
        for offset, sizes in boxes:
            place = metadata.storage_data[stock.MetadataIndex(name, offset)]
            padding = [0] * (index.shape.shape[1] - len(sizes))
            box = (name, (*(offset or ()), *padding), (*sizes, *padding))
            items.add((*box, place.relative_path, place.offset, place.length))
    assert items_of(index) == items


def test_a_checkpoint_of_stock_is_read(saved):
    data, metadata, folder = saved
    index = decode_metadata(data, "here")
    assert_same(index, metadata)
    assert index.header["checkpoint_id"] == folder
    assert index.header["save_id"] == metadata.storage_meta.save_id
    assert not index.has_hashes
    assert (index.data_bytes >= 0).tolist() == [index.dtype[row] == OBJECT for row in index.item_name]
    encode_index(index)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(saved, protocol):
    assert_same(decode_metadata(pickle.dumps(saved[1], protocol), "here"), saved[1])
    many = pickle.loads(encode_metadata(many_items(200), checkpoint_id="/a", save_id="c"))
    assert_same(decode_metadata(pickle.dumps(many, protocol), "here"), many)


def test_what_we_write_is_read():
    index, _ = make_checkpoint()
    decoded = decode_metadata(encode_metadata(index, checkpoint_id="/a", save_id="c"), "here")
    assert items_of(decoded) == items_of(index)
    same = ["names", "paths", "dtype", "ndim", "shape", "requires_grad", "files"]
    assert {name: as_dict(decoded)[name] for name in same} == {name: as_dict(index)[name] for name in same}


def test_properties_of_torch_before_2_3_are_read(saved):
    from torch.distributed._shard.sharded_tensor import metadata as old

    metadata = pickle.loads(saved[0])
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, stock.TensorStorageMetadata):
            entry.properties = old.TensorProperties(
                entry.properties.dtype, requires_grad=entry.properties.requires_grad
            )
    assert_same(decode_metadata(pickle.dumps(metadata), "here"), metadata)


def test_what_older_or_other_planners_leave_out_is_not_needed(saved):
    metadata = pickle.loads(saved[0])
    metadata.planner_data = None
    for field in ("storage_meta", "version"):
        delattr(metadata, field)
    index = decode_metadata(pickle.dumps(metadata), "here")
    assert index.paths == [(name,) for name in index.names]
    assert "save_id" not in index.header
    metadata.planner_data = collections.OrderedDict({"model.w": ("model", "w")})
    assert decode_metadata(pickle.dumps(metadata), "here").paths[0] == ("model", "w")


def test_objects_that_occur_twice_are_read_twice(saved):
    metadata = pickle.loads(saved[0])
    w, grad = (metadata.state_dict_metadata[name] for name in ("model.w", "grad"))
    grad.properties = w.properties
    metadata.state_dict_metadata["again"], metadata.planner_data["again"] = w, ("again",)
    key, offset = stock.MetadataIndex("again", w.chunks[0].offsets), w.chunks[0].offsets
    metadata.storage_data[key] = metadata.storage_data[stock.MetadataIndex("model.w", offset)]
    assert_same(decode_metadata(pickle.dumps(metadata), "here"), metadata)


def test_what_planners_keep_beside_the_paths_is_not_mistaken(saved):
    metadata = pickle.loads(saved[0])
    key, place = next(iter(metadata.storage_data.items()))
    chunk = metadata.state_dict_metadata["model.w"].chunks[0]
    expected = dict(metadata.planner_data)
    metadata.planner_data["mine"] = [stock.MetadataIndex("x", torch.Size((9,))), key, place, chunk]
    metadata.storage_data[stock.MetadataIndex("gone", torch.Size((5, 5, 5)))] = filesystem._StorageInfo("other", 1, 2)
    index = decode_metadata(pickle.dumps(metadata), "here")
    metadata.planner_data = expected
    assert_same(index, metadata)
    assert "other" not in index.files


@pytest.mark.parametrize(
    "argument", [b"](K\x01K\x02e", b"}", b"N", b"K\x02", b"\x8c\x02ab"], ids=lambda opcodes: opcodes[:1]
)
def test_a_size_is_made_of_a_tuple_only(argument):
    # A list that is copied again and again would let a small file fill the memory.
    data = b"\x80\x04\x8c\x05torch\x8c\x04Size\x93" + argument + b"\x85R."
    with pytest.raises(BadIndex, match="can only concatenate tuple"):
        decode_metadata(data, "here")


def test_a_stand_in_is_not_called_with_arguments():
    module = stock.__name__.encode()
    data = b"\x80\x02c" + module + b"\nChunkStorageMetadata\n](K\x01e\x85R."
    with pytest.raises(BadIndex, match="takes no arguments"):
        decode_metadata(data, "here")


def test_transformed_files_are_unsupported(saved):
    metadata = pickle.loads(saved[0])
    next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]
    with pytest.raises(Unsupported, match="transformed files"):
        decode_metadata(pickle.dumps(metadata), "here")


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


FORBIDDEN = [
    (os.system, "echo"),
    (eval, "1"),
    (getattr, "a", "b"),
    (io.open, "/dev/null"),
    (list, ()),
    (bytearray, 1 << 50),
    (types.SimpleNamespace,),
    (sys.exit,),
    (torch.load, "x"),
    (torch.zeros, 1),
]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("call", FORBIDDEN, ids=lambda call: getattr(call[0], "__name__", "call"))
def test_nothing_but_metadata_is_called(saved, call, protocol, monkeypatch):
    metadata = pickle.loads(saved[0])
    for place in (metadata, metadata.storage_data, "key"):
        if isinstance(place, stock.Metadata):
            evil = Evil(*call)
        elif isinstance(place, dict):
            metadata.planner_data = Evil(*call)
            evil = metadata
        else:
            evil = {"key": Evil(*call)}
        with pytest.raises(BadIndex):
            decode_metadata(pickle.dumps(evil, protocol), "here")


@pytest.mark.parametrize("name", ["system", "popen"])
def test_the_forbidden_class_is_named(name):
    data = pickle.dumps(Evil(getattr(os, name), "echo"))
    module = getattr(os, name).__module__
    with pytest.raises(BadIndex, match=rf"here: it wants the forbidden class {module}\.{name}"):
        decode_metadata(data, "here")


def test_a_dotted_name_reaches_no_attribute():
    data = b"\x80\x04\x8c\x05torch\x8c\x0dSize.__init__\x93."
    with pytest.raises(BadIndex, match=r"forbidden class torch\.Size\.__init__"):
        decode_metadata(data, "here")


def test_a_pickle_that_changes_a_stand_in_changes_no_other(saved):
    module = stock.__name__.encode()
    poison = b"\x80\x02c" + module + b"\nMetadataIndex\nN}X\x06\0\0\0offsetK\x07s\x86b."
    with pytest.raises(BadIndex):
        decode_metadata(poison, "here")
    assert_same(decode_metadata(saved[0], "here"), saved[1])


@pytest.mark.parametrize("position", [1 << 20, (1 << 32) - 1])
def test_a_position_of_the_memo_beyond_the_file_is_refused(position):
    # CPython would allocate 16 bytes per position, up to 64 GiB.
    with pytest.raises(BadIndex, match=r"opcode b'r' at offset 3"):
        decode_metadata(b"\x80\x02Nr" + struct.pack("<I", position) + b".", "here")


def test_every_cut_is_noticed(saved):
    for length in range(len(saved[0])):
        with pytest.raises(BadIndex):
            decode_metadata(saved[0][:length], "here")


def test_every_flipped_bit_is_refused_or_makes_an_index(saved):
    for at in range(0, len(saved[0]), 3):
        changed = bytearray(saved[0])
        changed[at] ^= 1 << at % 8
        try:
            encode_index(decode_metadata(bytes(changed), "here"))
        except (BadIndex, Unsupported):
            continue


def _set(path, value):
    def change(metadata):
        *steps, last = path
        for step in steps:
            metadata = metadata[step] if isinstance(metadata, dict | list) else getattr(metadata, step)
        if isinstance(metadata, dict | list):
            metadata[last] = value
        else:
            setattr(metadata, last, value)

    return change


W = ("state_dict_metadata", "model.w")


@pytest.mark.parametrize(
    "change",
    [
        _set(("state_dict_metadata",), []),
        _set(("state_dict_metadata", 5), stock.BytesStorageMetadata()),
        _set(("state_dict_metadata", "unstored"), stock.BytesStorageMetadata()),
        _set(W, "text"),
        _set((*W, "size"), [2, 3]),
        _set((*W, "size"), (2, "3")),
        _set((*W, "size"), (2, -3)),
        _set((*W, "size"), (2, 1 << 70)),
        _set((*W, "size"), (2, 2)),
        _set((*W, "size"), tuple(range(70))),
        _set((*W, "chunks"), (1,)),
        _set((*W, "chunks"), [1]),
        _set((*W, "chunks", 0, "sizes"), torch.Size((2, 4))),
        _set((*W, "chunks", 0, "sizes"), torch.Size((2, 3, 0))),
        _set((*W, "chunks", 0, "offsets"), torch.Size((1, 0))),
        _set((*W, "chunks", 0, "offsets"), None),
        _set((*W, "properties"), 3),
        _set((*W, "properties"), stock.BytesStorageMetadata()),
        _set((*W, "chunks", 0), filesystem._StorageInfo("a", 0, 1)),
        _set((*W, "properties", "dtype"), 255),
        _set((*W, "properties", "dtype"), 1 << 40),
        _set((*W, "properties", "dtype"), "float32"),
        _set((*W, "properties", "dtype"), torch.qint8),
        _set((*W, "properties", "requires_grad"), 1),
        _set(("planner_data", "model.w"), ["model", "w"]),
        _set(("planner_data", "model.w"), ("model", 1.5)),
        _set(("planner_data", "model.w"), ()),
        _set(("storage_data",), None),
        _set(("storage_data", stock.MetadataIndex("model.w", (0, 0))), 1),
        _set(("storage_data", stock.MetadataIndex("model.w", (0, 0))), filesystem._StorageInfo("../x", 0, 1)),
        _set(("storage_data", stock.MetadataIndex("model.w", (0, 0))), filesystem._StorageInfo(7, 0, 1)),
        _set(("storage_data", stock.MetadataIndex("model.w", (0, 0))), filesystem._StorageInfo("a", -1, 1)),
        _set(("storage_data", stock.MetadataIndex("model.w", (0, 0))), filesystem._StorageInfo("a", 0, "1")),
        _set(("storage_data", stock.MetadataIndex("model.w", (0, 0))), filesystem._StorageInfo("a", 0, 1 << 62)),
        _set(("storage_data", stock.MetadataIndex("model.w", (0, 0))), filesystem._StorageInfo("a", 0, 1 << 70)),
        _set(("storage_data", stock.MetadataIndex("model.w", (0, 0))), stock.MetadataIndex("a")),
        _set(("storage_data", stock.MetadataIndex("model.w", (0, 0))), filesystem._StorageInfo("a", True, 1)),
    ],
)
def test_metadata_that_make_no_sense_are_refused(saved, change):
    metadata = pickle.loads(saved[0])
    change(metadata)
    with pytest.raises(BadIndex, match=r"^here: "):
        decode_metadata(pickle.dumps(metadata), "here")


@pytest.mark.parametrize("value", [None, 3, [], {}, "text", (1, 2)])
def test_other_pickles_are_refused(value):
    with pytest.raises(BadIndex, match="not the metadata of a checkpoint"):
        decode_metadata(pickle.dumps(value), "here")


def test_a_path_that_grows_is_refused():
    parts = b"\x8c\xff" + b"x" * 255 + b"\x94" + b"h\0" * 10_000
    data = b"\x80\x04\x8c\x07pathlib\x8c\x09PosixPath\x93(" + parts + b"tR."
    with pytest.raises(BadIndex, match="a path is too long"):
        decode_metadata(data, "here")


def test_chunks_at_one_offset_share_their_record(saved):
    metadata = pickle.loads(saved[0])
    entry = metadata.state_dict_metadata["model.w"]
    entry.chunks.append(stock.ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((0, 3))))
    index = decode_metadata(pickle.dumps(metadata), "here")
    rows = np.flatnonzero(index.item_name == index.names.index("model.w"))
    assert len(set(index.record_offset[rows].tolist())) == 1
    assert index.item_sizes[rows, :2].tolist() == [[2, 3], [0, 3]]
