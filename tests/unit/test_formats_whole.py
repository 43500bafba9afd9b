"""A tensor as one stream: runs are passed on, other boxes are put together, and hashes are held against the bytes."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from ckptd.checkpoint.formats import source as source_module
from ckptd.checkpoint.formats import whole as whole_module
from ckptd.checkpoint.formats.source import Box, Entry, Source, Subset
from ckptd.checkpoint.formats.whole import assemble, check_boxes, is_run, whole
from ckptd.protocol.errors import BadPlan, MissingKeys, WrongBits
from ckptd.staging.dtypes import by_name

INT32 = by_name("int32").code


class InMemory(Source):
    """A source of one tensor of int32 that counts up, in boxes; remembers what was read."""

    def __init__(self, shape, boxes, *, hashed=False, wrong=False):
        self.path = "memory"
        self.values = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
        self.reads = []
        made = []
        for offsets, sizes in boxes:
            data = self._part(offsets, sizes)
            digest = xxhash.xxh3_64_intdigest(data) ^ wrong if hashed else None
            made.append(Box(offsets, sizes, len(made), digest))
        self.entries = [Entry("w", ("w",), INT32, shape, False, tuple(made))]

    def _part(self, offsets, sizes):
        slices = tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))
        return self.values[slices].tobytes()

    def fill(self, entry, box, begin, target):
        self.reads.append((box.item, begin, len(target)))
        target[:] = self._part(box.offsets, box.sizes)[begin : begin + len(target)]

    def object_bytes(self, entry):
        raise NotImplementedError

    def object_value(self, entry, *, trust):
        raise NotImplementedError


ROWS = [((2, 0), (2, 3)), ((0, 0), (2, 3))]
COLUMNS = [((0, 0), (4, 1)), ((0, 1), (4, 2))]
MIXED = [((0, 0), (1, 2)), ((0, 2), (1, 1)), ((1, 0), (3, 3))]


@pytest.fixture(params=[8 << 20, 16, 4])
def piece_bytes(request, monkeypatch):
    for module in (source_module, whole_module):
        monkeypatch.setattr(module, "PIECE_BYTES", request.param)
    return request.param


def joined(source):
    return b"".join(bytes(piece) for piece in whole(source, source.entries[0]))


@pytest.mark.parametrize("boxes", [ROWS, COLUMNS, MIXED, [((0, 0), (4, 3))], [*ROWS, ((0, 0), (0, 3))]])
def test_any_boxes_make_the_tensor(piece_bytes, boxes):
    source = InMemory((4, 3), boxes, hashed=True)
    assert joined(source) == source.values.tobytes()


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (2, 1, 3, 2)])
def test_any_shape_in_one_box(piece_bytes, shape):
    source = InMemory(shape, [((0,) * len(shape), shape)])
    assert joined(source) == source.values.tobytes()
    assert assemble(source, source.entries[0]).tobytes() == source.values.tobytes()


def test_runs_are_not_held(monkeypatch):
    monkeypatch.setattr(whole_module, "assemble", None)
    source = InMemory((4, 3), ROWS)
    assert joined(source) == source.values.tobytes()
    assert source.reads == [(1, 0, 24), (0, 0, 24)]


def test_a_box_is_read_in_pieces(monkeypatch):
    monkeypatch.setattr(source_module, "PIECE_BYTES", 16)
    source = InMemory((4, 3), [((0, 0), (4, 3))])
    assert [len(piece) for piece in source.pieces(source.entries[0], source.entries[0].boxes[0])] == [16, 16, 16]


@pytest.mark.parametrize("boxes", [ROWS, COLUMNS])
def test_a_wrong_hash_is_told_with_its_place(boxes):
    source = InMemory((4, 3), boxes, hashed=True, wrong=True)
    with pytest.raises(WrongBits, match="memory: item 'w'"):
        joined(source)


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ([((0, 0), (3, 3))], "gap"),
        ([*ROWS, ((0, 0), (1, 1))], "overlap"),
        ([((1, 0), (4, 3))], "outside"),
        ([], "gap"),
    ],
)
def test_boxes_that_do_not_tile_are_refused_before_anything_is_read(boxes, reason):
    entry = Entry("w", ("w",), INT32, (4, 3), False, tuple(Box(*box) for box in boxes))
    source = InMemory((4, 3), ROWS)
    with pytest.raises(BadPlan, match=reason):
        list(whole(source, entry))
    with pytest.raises(BadPlan, match="w:"):
        check_boxes(entry)
    assert source.reads == []


@pytest.mark.parametrize(
    ("offsets", "sizes", "shape", "run"),
    [
        ((0, 0), (2, 3), (4, 3), True),
        ((0, 1), (4, 2), (4, 3), False),
        ((2, 1), (1, 2), (4, 3), True),
        ((0, 0, 0), (1, 2, 3), (4, 4, 3), True),
        ((0, 0, 0), (2, 2, 3), (4, 4, 3), False),
        ((), (), (), True),
    ],
)
def test_which_boxes_are_one_stretch(offsets, sizes, shape, run):
    assert is_run(Box(offsets, sizes), shape) is run


def test_a_subset_reads_from_its_source():
    source = InMemory((4, 3), ROWS)
    subset = Subset(source, source.entries)
    assert joined(subset) == source.values.tobytes()
    assert subset.place(source.entries[0], source.entries[0].boxes[0]) == "memory"
    with pytest.raises(MissingKeys, match="v"):
        subset.entry("v")
