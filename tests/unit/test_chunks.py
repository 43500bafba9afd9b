"""What part of a global tensor this process holds."""

from __future__ import annotations

import pytest
import torch
from support.meshes import as_rank, dtensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ckptd.checkpoint.chunks import chunks_of, data_of, structure_of
from ckptd.protocol.errors import Unsupported


def boxes(value):
    return [(chunk.offsets, chunk.sizes) for chunk in chunks_of("key", value)]


class Declared(torch.Tensor):
    """A tensor of a library that speaks DCP's chunk protocol: two boxes of a tensor of 6 rows."""

    def __create_chunk_list__(self):
        return [ChunkStorageMetadata(torch.Size(at), torch.Size((2, 3))) for at in [(0, 0), (4, 0)]]

    def __get_tensor_shard__(self, index):
        first = index.offset[0] // 2
        return torch.full((2, 3), float(first))


class TestPlainTensors:
    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
    def test_one_chunk_is_the_whole(self, shape):
        value = torch.zeros(shape)
        assert boxes(value) == [((0,) * len(shape), shape)]
        assert [data.shape for data in data_of("key", value)] == [shape]

    def test_a_parameter_gives_its_data_without_its_gradient(self):
        value = torch.nn.Parameter(torch.ones(2))
        for data in (chunks_of("key", value)[0].data, data_of("key", value)[0]):
            assert data.data_ptr() == value.data_ptr()
            assert not data.requires_grad

    @pytest.mark.filterwarnings("ignore:.*deprecated")
    @pytest.mark.parametrize(
        ("make", "told"),
        [
            (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
            (lambda: torch.empty(3, device="meta"), "a meta tensor"),
            (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a quantized tensor"),
        ],
    )
    def test_what_has_no_plain_bytes_is_refused_by_key(self, make, told):
        for look in (chunks_of, data_of):
            with pytest.raises(Unsupported, match=f"^model.w: .*{told}") as caught:
                look("model.w", make())
            assert "\n" not in str(caught.value)


class TestDTensors:
    @pytest.mark.parametrize(("rank", "box"), [(0, ((0, 0), (3, 4))), (1, ((3, 0), (3, 4))), (2, ((6, 0), (1, 4)))])
    def test_an_uneven_shard(self, rank, box):
        with as_rank(rank, 3):
            value = dtensor(torch.ones(box[1]), (7, 4), [Shard(0)], (3,))
            assert boxes(value) == [box]
            [data] = data_of("key", value)
            assert data.data_ptr() == value.to_local().data_ptr()

    def test_a_shard_without_rows_is_no_chunk(self):
        with as_rank(3, 4):
            value = dtensor(torch.ones(0, 4), (3, 4), [Shard(0)], (4,))
            assert boxes(value) == data_of("key", value) == []

    def test_an_empty_tensor_is_one_chunk(self):
        with as_rank(1, 2):
            value = dtensor(torch.ones(0, 4), (0, 4), [Shard(0)], (2,))
            assert len(boxes(value)) == len(data_of("key", value)) == 1

    def test_a_replica_is_the_whole_on_every_rank(self):
        with as_rank(1, 2):
            assert boxes(dtensor(torch.ones(3, 4), (3, 4), [Replicate()], (2,))) == [((0, 0), (3, 4))]

    def test_two_dimensions_of_a_mesh(self):
        with as_rank(3, 4):
            value = dtensor(torch.ones(2, 3), (4, 6), [Shard(0), Shard(1)], (2, 2))
            assert boxes(value) == [((2, 3), (2, 3))]

    def test_a_partial_value_is_refused(self):
        with as_rank(0, 2):
            value = dtensor(torch.ones(3), (3,), [Partial()], (2,))
            with pytest.raises(Unsupported, match="key: a DTensor with a partial placement"):
                chunks_of("key", value)

    def test_a_rank_outside_of_the_mesh_holds_nothing(self):
        with as_rank(1, 2):
            mesh = torch.distributed.device_mesh.DeviceMesh("cpu", [0])
            value = DTensor.from_local(torch.ones(3), mesh, [Replicate()], run_check=False)
            assert boxes(value) == data_of("key", value) == []


def test_boxes_that_a_tensor_declares_itself():
    value = Declared(torch.zeros(6, 3))
    assert boxes(value) == [((0, 0), (2, 3)), ((4, 0), (2, 3))]
    assert [data[0, 0].item() for data in data_of("key", value)] == [0.0, 2.0]


class TestStructure:
    def test_it_is_alike_for_other_values_of_the_same_kind(self):
        assert structure_of(torch.ones(2, 3)) == structure_of(torch.zeros(2, 3))
        with as_rank(0, 2):
            one, other = (dtensor(torch.full((2,), v), (4,), [Shard(0)], (2,)) for v in (1.0, 2.0))
            assert structure_of(one) == structure_of(other)

    def test_it_tells_what_changes_a_plan(self):
        base = torch.ones(2, 3)
        others = [torch.ones(3, 2), base.double(), torch.ones(2, 3, requires_grad=True), torch.ones(6)]
        assert len({structure_of(value) for value in [base, *others]}) == 5

    def test_it_tells_placements_and_boxes_apart(self):
        with as_rank(0, 2):
            shard = dtensor(torch.ones(2, 4), (4, 4), [Shard(0)], (2,))
            other = dtensor(torch.ones(4, 2), (4, 4), [Shard(1)], (2,))
            assert structure_of(shard) != structure_of(other) != structure_of(torch.ones(4, 4))
        moved = Declared(torch.zeros(6, 3))
        before = structure_of(moved)
        moved.__create_chunk_list__ = lambda: []
        assert structure_of(moved) != before
