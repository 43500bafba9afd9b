"""A hand-over is taken apart in the trainer and put together again in a worker, tensors apart."""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict

import pytest
import torch
from support.meshes import as_rank, dtensor
from support.writers import Doubling, PickleWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import Shard

from ckptd.checkpoint.user_code.handover import UserSave, offsets_of, pack, unpack
from ckptd.checkpoint.user_code.stand_in import Piece, StagedShards, Stand
from ckptd.protocol.errors import BadMessage, Unsupported


def save_of(state_dict) -> UserSave:
    return UserSave("here", Doubling(), PickleWriter("here"), state_dict)


def stage(packed):
    """Do what the session does: copy each piece to its place."""
    offsets, end = offsets_of(packed.pieces)
    image = bytearray(end)
    for offset, piece, source in zip(offsets, packed.pieces, packed.sources, strict=True):
        if piece.nbytes:
            target = torch.frombuffer(image, dtype=torch.uint8, offset=offset, count=piece.nbytes)
            target.copy_(source.contiguous().reshape(-1).view(torch.uint8))
    return memoryview(image)


def there_and_back(state_dict):
    packed = pack(save_of(state_dict))
    return unpack(stage(packed), memoryview(packed.code)).state_dict


def test_nested_values_come_back_as_they_were():
    tied = torch.arange(6.0).reshape(2, 3)
    state = OrderedDict(
        w=tied,
        again=tied,
        turned=tied.t(),
        nested={"scalar": torch.tensor(3, dtype=torch.int8), "list": [torch.ones(2, dtype=torch.bfloat16), "text"]},
        tuple=(torch.zeros(0, 4), 7),
        parameter=torch.nn.Parameter(torch.ones(3)),
        number=1.5,
    )
    found = there_and_back(state)
    assert list(found) == list(state)
    assert type(found) is OrderedDict
    assert torch.equal(found["w"], tied)
    assert found["again"] is found["w"]
    assert torch.equal(found["turned"], tied.t())
    assert found["nested"]["list"][0].dtype == torch.bfloat16
    assert found["nested"]["scalar"].item() == 3
    assert found["tuple"][0].shape == (0, 4)
    assert found["parameter"].requires_grad
    assert found["number"] == 1.5


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64, torch.float16])
def test_every_kind_of_number_keeps_its_bits(dtype):
    value = torch.arange(5, dtype=torch.float32).to(dtype)
    assert torch.equal(there_and_back({"v": value})["v"].view(torch.uint8), value.view(torch.uint8))


def test_tensors_lie_in_the_image_and_not_in_the_pickle():
    packed = pack(save_of({"w": torch.zeros(1 << 18)}))
    assert len(packed.code) < 1 << 16
    assert [piece.nbytes for piece in packed.pieces] == [1 << 20]


def test_the_image_is_seen_and_not_copied():
    packed = pack(save_of({"w": torch.zeros(4)}))
    image = stage(packed)
    found = unpack(image, memoryview(packed.code)).state_dict["w"]
    image[:4] = torch.tensor([7.0]).numpy().tobytes()
    assert found[0] == 7


def test_a_planner_of_the_main_script_needs_no_second_run_of_it():
    main = type("Local", (Doubling,), {"__module__": "__main__", "answer": lambda self: 42})
    packed = pack(UserSave(None, main(), PickleWriter("x"), {}))
    assert unpack(memoryview(bytearray()), memoryview(packed.code)).planner.answer() == 42


def test_what_cannot_be_pickled_is_named_before_anything_is_staged():
    with pytest.raises(Unsupported, match=r"Doubling with PickleWriter.*cannot be pickled"):
        pack(save_of({"lock": threading.Lock()}))


def test_a_pickle_that_does_not_fit_its_image_is_refused():
    packed = pack(save_of({"w": torch.zeros(4)}))
    with pytest.raises(BadMessage, match="16 bytes in an image of 8"):
        unpack(memoryview(bytearray(8)), memoryview(packed.code))


def test_modules_are_looked_for_where_the_trainer_found_them(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    packed = pack(save_of({}))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    unpack(memoryview(bytearray()), memoryview(packed.code))
    assert str(tmp_path) in sys.path


def test_keys_of_object_stores_come_along_and_a_ranks_own_number_does_not(monkeypatch):
    monkeypatch.setenv("AWS_TEST_KEY", "secret")
    monkeypatch.setenv("RANK", "3")
    packed = pack(save_of({}))
    monkeypatch.delenv("AWS_TEST_KEY")
    monkeypatch.setenv("RANK", "0")
    unpack(memoryview(bytearray()), memoryview(packed.code))
    assert (os.environ["AWS_TEST_KEY"], os.environ["RANK"]) == ("secret", "0")


class TestStandIns:
    @pytest.fixture
    def shards(self):
        local = torch.arange(6.0).reshape(2, 3)
        with as_rank(0, 2):
            return there_and_back({"s": dtensor(local, (4, 3), [Shard(0)], (2,))})["s"], local

    def test_a_sharded_tensor_is_seen_as_its_shape_and_its_shards(self, shards):
        found, local = shards
        assert isinstance(found, StagedShards)
        assert (tuple(found.size()), found.dtype) == ((4, 3), torch.float32)
        [chunk] = found.__create_chunk_list__()
        assert (tuple(chunk.offsets), tuple(chunk.sizes)) == ((0, 0), (2, 3))
        assert torch.equal(found.__get_tensor_shard__(MetadataIndex("s", chunk.offsets)), local)

    def test_its_write_items_are_those_of_the_tensor(self, shards):
        found, _ = shards
        [item] = found.__create_write_items__("s", found)
        assert (tuple(item.tensor_data.size), tuple(item.tensor_data.chunk.sizes)) == ((4, 3), (2, 3))
        assert item.tensor_data.properties.dtype == torch.float32

    def test_nothing_can_be_computed_with_it(self, shards):
        with pytest.raises(NotImplementedError, match="__get_tensor_shard__"):
            shards[0] + 1

    def test_a_shard_that_is_elsewhere_is_not_found(self, shards):
        with pytest.raises(ValueError, match="no shard at"):
            shards[0].__get_tensor_shard__(MetadataIndex("s", torch.Size([2, 0])))

    def test_it_says_what_it_is(self):
        stand = Stand((4,), torch.float32, False, False, (Piece(torch.float32, (0,), (2,)),))
        assert repr(StagedShards(stand, [torch.zeros(2)])) == "StagedShards(shape=(4,), dtype=torch.float32, shards=1)"
