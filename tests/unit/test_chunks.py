"""What part of a global tensor this process holds."""

from __future__ import annotations

import pytest
import torch
from support.meshes import as_rank, dtensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.distributed.tensor.placement_types import _StridedShard

from ckptd.checkpoint.planning.chunks import (
    chunks_of,
    data_of,
    is_meta,
    is_plain,
    shape_of,
    structure_of,
    written_chunks_of,
)
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


class Spoken(Declared):
    """Saves only one of its two boxes: the other is left to another rank."""

    shape_told = (6, 3)

    def __create_write_items__(self, fqn, _value):
        chunk = self.__create_chunk_list__()[1]
        told = TensorWriteData(chunk, TensorProperties(self.dtype), torch.Size(self.shape_told))
        return [WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=told)]


class TestWriteItems:
    def test_they_say_what_is_saved_and_the_chunk_list_what_is_loaded(self):
        value = Spoken(torch.zeros(6, 3))
        assert [chunk.offsets for chunk in written_chunks_of("key", value)] == [(4, 0)]
        assert [data[0, 0].item() for data in data_of("key", value)] == [2.0]
        assert boxes(value) == [((0, 0), (2, 3)), ((4, 0), (2, 3))]
        assert structure_of(value) != structure_of(Declared(torch.zeros(6, 3)))

    def test_they_must_speak_of_the_same_shape(self):
        value = Spoken(torch.zeros(6, 3))
        value.shape_told = (8, 3)
        with pytest.raises(Unsupported, match=r"key: write items of a tensor of shape \(8, 3\) in one of \(6, 3\)"):
            written_chunks_of("key", value)

    def test_they_must_be_shards_of_their_key(self):
        value = Spoken(torch.zeros(6, 3))
        value.__create_write_items__ = lambda fqn, _: [WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO)]
        with pytest.raises(Unsupported, match=r"^key: a Spoken whose write items are not shards of itself"):
            data_of("key", value)

    def test_a_shard_of_another_dtype_is_refused(self):
        with pytest.raises(Unsupported, match=r"key: a shard of torch.float32 in a tensor of torch.float64"):
            data_of("key", Spoken(torch.zeros(6, 3, dtype=torch.float64)))

    def test_a_shard_of_another_shape_than_its_box_is_refused(self):
        value = Declared(torch.zeros(6, 3))
        value.__get_tensor_shard__ = lambda _index: torch.zeros(2, 4)
        with pytest.raises(Unsupported, match=r"key: a shard of shape \(2, 4\) that says it has shape \(2, 3\)"):
            chunks_of("key", value)


def slices(**changed):
    """Return a buffer of five rows that holds rows 4-5 and 0-1 of a tensor of six, padding between them."""
    value = torch.arange(15.0).reshape(5, 3)
    fields = {"global_shape": (6, 3), "global_offsets": ((4, 0), (0, 0)), "local_offsets": ((0, 0), (3, 0))}
    for name, told in {**fields, "local_sizes": ((2, 3), (2, 3)), **changed}.items():
        setattr(value, name, told)
    return value


class TestSlicesOfABuffer:
    def test_the_fields_say_where_they_lie(self):
        value = slices()
        assert shape_of(value) == (6, 3)
        assert boxes(value) == [((4, 0), (2, 3)), ((0, 0), (2, 3))]
        assert [data[:, 0].tolist() for data in data_of("key", value)] == [[0.0, 3.0], [9.0, 12.0]]
        assert not is_plain(value)
        assert structure_of(value) != structure_of(slices(global_offsets=((4, 0), (2, 0))))

    def test_one_field_alone_makes_no_shard_of_a_tensor(self):
        value = torch.ones(2)
        value.global_shape = (4,)
        assert is_plain(value)
        assert boxes(value) == [((0,), (2,))]

    @pytest.mark.parametrize(
        ("changed", "told"),
        [
            ({"local_sizes": ((2, 3),)}, "global_offsets, local_offsets and local_sizes of different length"),
            ({"local_offsets": ((0, 0), (4, 0))}, r"a shard of shape \(1, 3\) that says it has shape \(2, 3\)"),
        ],
    )
    def test_fields_that_do_not_fit_are_refused(self, changed, told):
        with pytest.raises(Unsupported, match=f"^key: {told}"):
            data_of("key", slices(**changed))


class TestStridedShards:
    @pytest.mark.parametrize(("rank", "rows"), [(0, [(0, 2)]), (1, [(4, 2)]), (2, [(2, 2)]), (3, [(6, 1)])])
    def test_fsdp_over_tp_holds_one_run(self, rank, rows):
        with as_rank(rank, 4):
            local = torch.ones(rows[0][1], 3)
            value = dtensor(local, (7, 3), [_StridedShard(0, split_factor=2), Shard(0)], (2, 2))
            assert boxes(value) == [((at, 0), (count, 3)) for at, count in rows]

    def test_a_scattered_one_holds_several(self):
        with as_rank(1, 2):
            value = dtensor(torch.arange(8.0).reshape(4, 2), (8, 2), [_StridedShard(0, split_factor=2)], (2,))
            assert boxes(value) == [((2, 0), (2, 2)), ((6, 0), (2, 2))]
            assert [data[:, 0].tolist() for data in data_of("key", value)] == [[0.0, 2.0], [4.0, 6.0]]

    def test_placements_that_do_not_give_the_local_shape_are_refused(self):
        """As when FSDP shards unevenly what TP has sharded unevenly before."""
        with as_rank(0, 2):
            value = dtensor(torch.ones(3, 2), (8, 2), [_StridedShard(0, split_factor=2)], (2,))
            with pytest.raises(Unsupported, match=r"^key: placements .* do not give the local shape \(3, 2\)"):
                data_of("key", value)


def test_a_padded_shard_is_refused():
    with as_rank(2, 3):
        value = dtensor(torch.ones(3, 4), (7, 4), [Shard(0)], (3,))
        with pytest.raises(Unsupported, match=r"key: a shard of shape \(3, 4\) that says it has shape \(1, 4\)"):
            chunks_of("key", value)


class TestAListOfShardsInADTensor:
    """TorchRec's."""

    def test_each_is_a_chunk(self):
        with as_rank(0, 2):
            local = LocalShardsWrapper([torch.ones(2, 3), torch.zeros(1, 3)], [(0, 0), (4, 0)])
            value = dtensor(local, (6, 3), [Shard(0)], (2,))
            assert boxes(value) == [((0, 0), (2, 3)), ((4, 0), (1, 3))]
            assert [chunk.offsets for chunk in written_chunks_of("key", value)] == [(0, 0), (4, 0)]
            assert len(data_of("key", value)) == 2

    def test_a_rank_may_hold_none(self):
        with as_rank(1, 2):
            value = dtensor(LocalShardsWrapper([], []), (6, 3), [Shard(0)], (2,))
            assert boxes(value) == data_of("key", value) == []


def test_what_has_memory_is_not_meta():
    assert is_meta(torch.empty(2, device="meta"))
    assert not is_meta(torch.empty(2))
