"""The file ``.ckptd``: what goes in comes out, and what is wrong is named."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from support.checkpoints import as_dict, make_checkpoint, many_items

from ckptd.checkpoint.indexing.columns import Index
from ckptd.checkpoint.indexing.index import check_index, decode_index, encode_index, pack_index
from ckptd.protocol.errors import BadIndex, Unsupported


@pytest.fixture(scope="module")
def index() -> Index:
    return make_checkpoint()[0]


@pytest.fixture(scope="module")
def empty() -> Index:
    return dataclasses.replace(
        many_items(0), header={"a": "ä"}, files=[], shape=np.zeros((0, 0), np.int64), **_no_boxes(0)
    )


def _no_boxes(items):
    return {name: np.zeros((items, 0), np.int64) for name in ("item_offsets", "item_sizes")}


@pytest.mark.parametrize("name", ["index", "empty"])
def test_what_is_encoded_is_decoded(name, request):
    index = request.getfixturevalue(name)
    decoded = decode_index(encode_index(index), "here")
    assert as_dict(decoded) == as_dict(index)
    for field in dataclasses.fields(Index):
        column = getattr(index, field.name)
        if isinstance(column, np.ndarray):
            assert getattr(decoded, field.name).dtype == column.dtype, field.name
    assert decoded.has_hashes


def test_scalars_alone_need_no_dimension(index):
    rows = np.zeros((1, 0), np.int64)
    one = dataclasses.replace(many_items(1), ndim=np.zeros(1, np.uint8), shape=rows, **_no_boxes(1))
    one = dataclasses.replace(one, data_bytes=np.array([4]))
    assert decode_index(encode_index(one), "here").shape.shape == (1, 0)


def test_safetensors_reads_the_file(index):
    columns = safetensors.numpy.load(encode_index(index))
    assert columns["item_hash"].tolist() == index.item_hash.tolist()
    assert columns["names"].tobytes().decode() == "".join(index.names)


def test_each_column_begins_at_a_multiple_of_its_width(index):
    data = encode_index(index)
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    assert begin % 8 == 0
    for name, column in safetensors.numpy.load(data).items():
        assert (begin + header[name]["data_offsets"][0]) % column.itemsize == 0


def test_an_index_without_hashes_says_so(index):
    index = dataclasses.replace(index, item_hash=np.zeros(0, np.uint64))
    assert not decode_index(encode_index(index), "here").has_hashes


def test_every_changed_byte_is_noticed(index):
    data = encode_index(index)
    for at in range(0, len(data), 3):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        with pytest.raises(BadIndex, match=r"^here: "):
            decode_index(bytes(changed), "here")


def test_every_cut_is_noticed(index):
    data = encode_index(index)
    for length in [*range(0, len(data), 7), len(data) - 1]:
        with pytest.raises(BadIndex):
            decode_index(data[:length], "here")


WRONG = {
    "a name occurs twice": lambda i: {"names": ["same"] * len(i.names)},
    "names and paths differ": lambda i: {"paths": i.paths[1:]},
    "a path is empty": lambda i: {"paths": [(), *i.paths[1:]]},
    "names and shapes differ": lambda i: {"shape": i.shape[1:]},
    "names and their columns": lambda i: {"dtype": i.dtype[1:]},
    "items and their boxes": lambda i: {"item_sizes": i.item_sizes[1:]},
    "items and their columns": lambda i: {"data_bytes": i.data_bytes[1:]},
    "items and hashes": lambda i: {"item_hash": i.item_hash[1:]},
    "too many dimensions": lambda i: {"shape": np.zeros((len(i.names), 65), np.int64)},
    "a file occurs twice": lambda i: {"files": ["a", "a"]},
    "'../x' is not the name": lambda i: {"files": ["a", "../x"]},
    "'..' is not the name": lambda i: {"files": ["a", ".."]},
    "'' is not the name": lambda i: {"files": ["a", ""]},
    r"'a\\x00' is not the name": lambda i: {"files": ["a\0", "b"]},
    "a dtype is unknown": lambda i: {"dtype": i.dtype - 100},
    "more dimensions than its shape": lambda i: {"ndim": i.ndim + np.uint8(5)},
    "an object has dimensions": lambda i: {"dtype": np.full_like(i.dtype, 255)},
    "requires_grad": lambda i: {"requires_grad": i.requires_grad + np.uint8(1)},
    "a shape is negative": lambda i: {"shape": -i.shape},
    "too large": lambda i: {"shape": i.shape + (1 << 62)},
    "a shape goes on": lambda i: {"shape": i.shape + 1},
    "belongs to no name": lambda i: {"item_name": i.item_name + 1},
    "lies in no file": lambda i: {"item_file": i.item_file - np.int32(1)},
    "begins before": lambda i: {"item_offsets": i.item_offsets - 1},
    "negative or too large size": lambda i: {"item_sizes": i.item_sizes - 100},
    "offsets go on": lambda i: {"item_offsets": i.item_offsets + 1},
    "sizes go on": lambda i: {"item_sizes": i.item_sizes + 1},
    "reaches beyond": lambda i: {"item_offsets": i.item_offsets + (i.item_sizes > 0) * 10_000},
    "negative or too large place": lambda i: {"record_offset": i.record_offset - 6},
    "a payload has a negative length": lambda i: {"data_bytes": i.data_bytes - 10_000},
    "hash but no length": lambda i: {"data_bytes": np.full_like(i.data_bytes, -1)},
    "lies nowhere": lambda i: {"data_offset": i.data_offset + (1 << 62)},
    "outside of its record": lambda i: {"data_offset": i.data_offset + 2000},
    "an object is not the whole": lambda i: {"record_bytes": i.record_bytes + 1},
    "not that of its sizes": lambda i: {"dtype": np.where(i.dtype == 255, 255, 1).astype(np.uint8)},
}


@pytest.mark.parametrize("reason", WRONG)
def test_a_contradiction_is_neither_written_nor_read(index, reason):
    wrong = dataclasses.replace(index, **WRONG[reason](index))
    with pytest.raises(BadIndex, match=f"^new index: .*{reason}"):
        encode_index(wrong)
    with pytest.raises(BadIndex, match=f"^here: .*{reason}"):
        decode_index(pack_index(wrong), "here")


@pytest.mark.parametrize("column", ["shape", "item_offsets", "item_sizes"])
@pytest.mark.parametrize("ndim", [0, 1])
def test_a_number_behind_the_last_dimension_is_refused(ndim, column):
    index, boxes = many_items(2), {name: np.array([[16, 8], [0, 0]]) for name in ("shape", "item_sizes")}
    boxes["shape"][1, :ndim] = boxes["item_sizes"][1, :ndim] = 1
    index = dataclasses.replace(index, ndim=np.array([2, ndim], np.uint8), data_bytes=np.array([512, 4]), **boxes)
    check_index(index, "here")
    behind = getattr(index, column).copy()
    behind[1, ndim] = 1
    with pytest.raises(BadIndex, match="on behind"):
        check_index(dataclasses.replace(index, **{column: behind}), "here")


def test_sizes_whose_product_overflows_are_refused():
    huge = np.full((1, 5), 1 << 60)
    index = dataclasses.replace(
        many_items(1),
        ndim=np.array([5], np.uint8),
        **{"shape": huge, "item_sizes": huge, "item_offsets": huge * 0},
        # 2**300 is 0 in 64 bits
        data_bytes=np.array([0]),
    )
    with pytest.raises(BadIndex, match="not that of its sizes"):
        check_index(index, "here")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h["__metadata__"].update(version="2"), "not an index of version 1 but 'ckptd-index 2'"),
        (lambda h: h["__metadata__"].update(format="other"), "not an index of version 1"),
        (lambda h: h.pop("__metadata__"), "not an index of version 1"),
        (lambda h: h["__metadata__"].update(header='{"a":1}'), "does not match its own hash"),
        (lambda h: h["__metadata__"].pop("xxh3_64"), "does not match its own hash"),
        (lambda h: h.pop("ndim"), "columns are missing or unknown"),
        (lambda h: h.update(more=h["ndim"]), "columns are missing or unknown"),
        (lambda h: h["shape"].update(dtype="U64"), "column shape has a wrong type"),
        (lambda h: h["shape"].update(shape=[-1, 5]), "shape cannot be decoded"),
        (lambda h: h["shape"].update(shape=[1 << 47, 1 << 47]), "column shape has"),
        (lambda h: h["shape"].update(shape=[35]), "column shape has a wrong type"),
        (lambda h: h["shape"].update(data_offsets=[0, 1 << 50]), "column shape has a wrong type or place"),
        (lambda h: h["shape"].update(data_offsets=[1 << 60, 0]), "column shape has a wrong type or place"),
        (lambda h: h["shape"].update(data_offsets=[0, 8]), "column shape has 8 bytes"),
    ],
)
def test_a_wrong_header_is_refused(index, change, reason):
    data = encode_index(index)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    with pytest.raises(BadIndex, match=reason):
        decode_index(len(text).to_bytes(8, "little") + text + data[end:], "here")


@pytest.mark.parametrize("name", ["\ud800", "a\udfff"])
def test_names_that_are_not_unicode_are_unsupported(name):
    with pytest.raises(Unsupported, match="valid Unicode"):
        encode_index(dataclasses.replace(many_items(1), names=[name]))


@pytest.mark.parametrize("element", ["\ud800", 1 << 70, object()])
def test_other_paths_are_unsupported(element):
    with pytest.raises(Unsupported, match="a path of the state dict"):
        encode_index(dataclasses.replace(many_items(1), paths=[(element,)]))


def test_string_tables_with_wrong_offsets_are_refused(index, monkeypatch):
    monkeypatch.setattr(np, "cumsum", lambda lengths: lengths[::-1])
    data = pack_index(index)
    with pytest.raises(BadIndex, match="table of strings"):
        decode_index(data, "here")
