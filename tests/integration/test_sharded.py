"""Every layout is saved, by ckptd and by stock, and loaded into every other: all bits, and in both directions."""

import pytest
from support.layouts import LAYOUTS, SHAPES
from support.sharded import WAYS, path_of
from support.sharded_worlds import worlds

from ckptd.checkpoint.indexing.open import read_index

WORLD_SIZES = sorted({layout.world_size for layout in LAYOUTS.values()})


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The worlds, in which every layout is saved."""
    with worlds(tmp_path_factory.mktemp("sharded")) as shared:
        for name, layout in LAYOUTS.items():
            shared.of_size(layout.world_size).do("metadata = sharded.save_layout(name, root)", name=name)
        yield shared


@pytest.fixture(scope="module")
def matrix(shared):
    """What was wrong, on which rank, by writer, reader and way."""
    found = {}
    for reader, layout in LAYOUTS.items():
        by_rank = shared.of_size(layout.world_size).get("sharded.load_layout(name, root)", name=reader)
        for writer, way in by_rank[0]:
            wrong = {rank: told[writer, way] for rank, told in enumerate(by_rank) if told[writer, way]}
            found[writer, reader, way] = wrong
    return found


@pytest.mark.parametrize("reader", LAYOUTS)
@pytest.mark.parametrize("writer", LAYOUTS)
def test_bits(matrix, writer, reader):
    loads = {way: matrix[writer, reader, way] for way in WAYS if (writer, reader, way) in matrix}
    assert loads["ours to ours"] == {}
    assert loads == {way: {} for way in loads}


def boxes_of(path):
    """Return the boxes of each tensor of a checkpoint, without the empty ones."""
    index = read_index(path)
    found = {key: set() for key in SHAPES}
    for row, offsets, sizes in zip(index.item_name.tolist(), index.item_offsets, index.item_sizes, strict=True):
        name, ndim = index.names[row], int(index.ndim[row])
        if name in found and 0 not in sizes[:ndim]:
            found[name].add((tuple(offsets[:ndim].tolist()), tuple(sizes[:ndim].tolist())))
    return found


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.stock])
def test_the_boxes_are_those_of_stock(shared, name):
    assert boxes_of(path_of(shared.root, name, "ours")) == boxes_of(path_of(shared.root, name, "stock"))


def test_the_matrix_is_large_enough():
    assert WORLD_SIZES == [1, 2, 3, 4, 8]
    assert len(LAYOUTS) * (len(LAYOUTS) - 1) >= 30
