"""Which bytes of which files a state dict needs, and what is put where."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint, write_checkpoint
from support.meshes import as_rank, dtensor
from torch.distributed.tensor import Shard

from ckptd.client.flatten import flatten
from ckptd.client.load import load_into
from ckptd.client.load_plan import LoadPlanner, Overlap, byte_span, overlap_of, row_major
from ckptd.protocol.errors import BadIndex, Mismatch, MissingKeys, UnknownCheckpoint, Unsupported, WrongBits

INDEX, IMAGES = make_checkpoint()
KEYS = {"model.w": "w", "model.b": "b", "model.step": "step", "model.deep": "deep", "model.empty": "empty"}


def saved(name: str) -> torch.Tensor:
    """Put a tensor of the small checkpoint together by hand."""
    row = INDEX.names.index(name)
    shape = tuple(INDEX.shape[row, : INDEX.ndim[row]].tolist())
    dtype = {"model.w": torch.float32, "model.b": torch.bfloat16, "model.step": torch.int64}.get(name)
    dtype = dtype or {"model.deep": torch.float8_e4m3fn, "model.empty": torch.uint16}[name]
    whole = torch.zeros(shape, dtype=dtype)
    for item in np.flatnonzero(INDEX.item_name == row):
        begin, nbytes = int(INDEX.data_offset[item]), int(INDEX.data_bytes[item])
        if not nbytes:
            continue
        data = bytearray(IMAGES[INDEX.files[INDEX.item_file[item]]][begin : begin + nbytes])
        sizes = tuple(INDEX.item_sizes[item, : len(shape)].tolist())
        part = torch.frombuffer(data, dtype=dtype).view(sizes)
        at = INDEX.item_offsets[item, : len(shape)].tolist()
        whole[tuple(slice(a, a + s) for a, s in zip(at, sizes, strict=True))] = part
    return whole


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def empty_state() -> dict:
    tensors = {key: torch.zeros_like(saved(name)) for name, key in KEYS.items()}
    return {"model": tensors, "epoch": 0, "list": [{"nämé": None}]}


@pytest.fixture
def checkpoint(tmp_path) -> str:
    write_checkpoint(tmp_path)
    return str(tmp_path)


def load(state, path, *, partial=False, flat=False):
    load_into(state, path, partial=partial, flat=flat)
    return state


def planned(state, *, partial=False, index=INDEX, verify=True):
    return LoadPlanner("/ckpt", index, verify=verify).plan(flatten(state), partial=partial)


class TestOverlap:
    @pytest.mark.parametrize(
        ("stored", "wanted", "shared"),
        [
            (((0,), (4,)), ((0,), (4,)), Overlap((0,), (0,), (4,))),
            (((2,), (4,)), ((0,), (3,)), Overlap((0,), (2,), (1,))),
            (((0, 0), (4, 4)), ((1, 2), (9, 9)), Overlap((1, 2), (0, 0), (3, 2))),
            (((0,), (4,)), ((4,), (4,)), None),
            (((0,), (0,)), ((0,), (4,)), None),
            (((), ()), ((), ()), Overlap((), (), ())),
        ],
    )
    def test_two_boxes(self, stored, wanted, shared):
        assert overlap_of(stored, wanted) == shared


class TestByteSpan:
    def test_whole_rows_are_one_range(self):
        assert byte_span((4, 6), Overlap((1, 0), (0, 0), (2, 6)), 4) == (24, 48, True)

    def test_a_column_is_a_range_with_holes(self):
        assert byte_span((4, 6), Overlap((0, 2), (0, 0), (4, 1)), 2) == (4, 38, False)

    def test_a_part_of_one_row_has_none(self):
        assert byte_span((4, 6), Overlap((3, 1), (0, 0), (1, 5)), 1) == (19, 5, True)

    def test_a_scalar_is_its_own_span(self):
        assert byte_span((), Overlap((), (), ()), 8) == (0, 8, True)

    @pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
    def test_strides_are_those_of_torch(self, shape):
        assert row_major(shape) == torch.empty(shape).stride()


class TestThePlan:
    def test_items_that_are_read_whole_are_held_against_their_hash(self):
        plan = planned(empty_state())
        held = sorted(read.item for read in plan.reads if read.expected_hash is not None)
        assert held == ["epoch", "list.0.nämé", "model.b", "model.deep", "model.step", "model.w", "model.w"]

    def test_without_verifying_none_is(self):
        assert {read.expected_hash for read in planned(empty_state(), verify=False).reads} == {None}

    def test_contiguous_targets_are_read_into_directly(self):
        state = {"model": {"b": torch.zeros(300, dtype=torch.bfloat16)}}
        [read] = planned(state).reads
        assert read.address == state["model"]["b"].data_ptr()
        assert read.then is None

    def test_a_part_of_an_item_is_read_without_a_hash(self):
        with as_rank(1, 2):
            state = {"model.b": dtensor(torch.zeros(150, dtype=torch.bfloat16), (300,), [Shard(0)], (2,))}
            [read] = planned(state).reads
        assert (read.nbytes, read.expected_hash) == (300, None)

    def test_missing_names_are_counted_and_the_first_is_told(self):
        with pytest.raises(MissingKeys) as caught:
            planned({"epoch": 0, "no": 1, "nor": 2})
        assert (caught.value.count, caught.value.first, caught.value.path) == (2, "no", "/ckpt")
        assert str(caught.value).startswith("Missing key in checkpoint state_dict: no")

    def test_or_left_alone_where_a_part_will_do(self):
        assert list(planned({"epoch": 0, "no": 1}, partial=True).objects) == ["epoch"]

    @pytest.mark.parametrize(
        ("state", "told"),
        [
            (
                {"model": {"w": torch.zeros(4, 7)}},
                "model.w: the state dict wants shape (4, 7), the checkpoint holds shape (4, 6)",
            ),
            (
                {"model": {"w": torch.zeros(24)}},
                "model.w: the state dict wants shape (24,), the checkpoint holds shape (4, 6)",
            ),
            (
                {"model": {"w": 5}},
                "model.w: the state dict wants an object of type int, the checkpoint holds a tensor of shape (4, 6)",
            ),
            ({"epoch": torch.zeros(())}, "epoch: the state dict wants shape (), the checkpoint holds an object"),
        ],
    )
    def test_what_does_not_fit_is_told_by_key(self, state, told):
        with pytest.raises(Mismatch) as caught:
            planned(state)
        assert str(caught.value) == told

    def test_an_index_with_a_hole_is_not_believed(self):
        keep = np.ones(len(INDEX.item_name), bool)
        keep[np.flatnonzero(INDEX.item_name == 0)[1]] = False
        columns = {
            name: getattr(INDEX, name)[keep] for name in vars(INDEX) if name.startswith(("item_", "record_", "data_"))
        }
        with pytest.raises(BadIndex, match=r"model.w: it holds 12 of 24 wanted elements"):
            planned({"model": {"w": torch.zeros(4, 6)}}, index=dataclasses.replace(INDEX, **columns))


class TestALoad:
    def test_every_tensor_and_object_comes_back(self, checkpoint):
        state = load(empty_state(), checkpoint)
        for name, key in KEYS.items():
            assert bits(state["model"][key]) == bits(saved(name))
        assert (state["epoch"], state["list"]) == (7, [{"nämé": "a string"}])

    def test_tensors_are_filled_in_place(self, checkpoint):
        state = empty_state()
        before = state["model"]["w"]
        assert load(state, checkpoint)["model"]["w"] is before

    def test_targets_that_are_not_contiguous_are_filled_by_value(self, checkpoint):
        base = torch.zeros(6, 8)
        load({"model": {"w": base[:, ::2].t()}}, checkpoint)
        assert torch.equal(base[:, ::2].t(), saved("model.w"))
        assert not base[:, 1::2].any()

    def test_another_dtype_is_converted(self, checkpoint):
        state = load({"model": {"w": torch.zeros(4, 6, dtype=torch.float64), "step": torch.zeros(())}}, checkpoint)
        assert torch.allclose(state["model"]["w"], saved("model.w").double(), rtol=0, atol=0, equal_nan=True)
        assert state["model"]["step"] == saved("model.step").float()

    def test_a_parameter_keeps_its_gradient_flag(self, checkpoint):
        parameter = torch.nn.Parameter(torch.zeros(4, 6))
        load({"model": {"w": parameter}}, checkpoint)
        assert bits(parameter.detach()) == bits(saved("model.w"))
        assert parameter.requires_grad

    @pytest.mark.parametrize("rank", range(3))
    def test_any_sharding_reads_its_part(self, checkpoint, rank):
        rows = [slice(0, 2), slice(2, 4), slice(4, 4)][rank]
        columns = [slice(0, 2), slice(2, 4), slice(4, 6)][rank]
        with as_rank(rank, 3):
            whole = saved("model.w")
            by_column = dtensor(torch.zeros(4, 2), (4, 6), [Shard(1)], (3,))
            by_row = dtensor(torch.zeros(whole[rows].shape), (4, 6), [Shard(0)], (3,))
            load({"model": {"w": by_column}}, checkpoint)
            load({"model": {"w": by_row}}, checkpoint)
            assert bits(by_column.to_local()) == bits(whole[:, columns])
            assert bits(by_row.to_local()) == bits(whole[rows])

    def test_meta_tensors_are_made(self, checkpoint):
        state = load({"model": {"w": torch.empty(4, 6, device="meta")}}, checkpoint)
        assert bits(state["model"]["w"]) == bits(saved("model.w"))

    def test_the_top_level_may_be_flat(self, checkpoint):
        state = load({"model.w": torch.zeros(4, 6), "epoch": 0}, checkpoint, flat=True)
        assert bits(state["model.w"]) == bits(saved("model.w"))
        assert state["epoch"] == 7

    def test_stateful_values_are_given_their_state(self, checkpoint):
        module = torch.nn.Module()
        module.register_parameter("w", torch.nn.Parameter(torch.zeros(4, 6)))
        load({"model": module}, checkpoint)
        assert bits(module.w.detach()) == bits(saved("model.w"))

    def test_a_wrong_bit_is_told_and_objects_stay_as_they_were(self, checkpoint, tmp_path):
        item = int(np.flatnonzero(INDEX.item_name == INDEX.names.index("model.b"))[0])
        file = tmp_path / INDEX.files[INDEX.item_file[item]]
        data = bytearray(file.read_bytes())
        data[int(INDEX.data_offset[item]) + 17] ^= 4
        file.write_bytes(data)
        state = empty_state()
        with pytest.raises(WrongBits) as caught:
            load(state, checkpoint)
        assert caught.value.report().facts == {
            "path": str(file),
            "item": "model.b",
            "offset": int(INDEX.data_offset[item]),
        }
        assert state["epoch"] == 0

    def test_nothing_is_changed_where_something_does_not_fit(self, checkpoint):
        state = {"model": {"w": torch.zeros(4, 6), "b": torch.zeros(3)}}
        with pytest.raises(Mismatch):
            load(state, checkpoint)
        assert not state["model"]["w"].any()

    def test_no_checkpoint_is_told(self, tmp_path):
        with pytest.raises(UnknownCheckpoint):
            load({"w": torch.zeros(1)}, str(tmp_path))

    def test_two_names_alike_are_refused(self, checkpoint):
        with pytest.raises(Unsupported, match="twice"):
            load({"a.b": 1, "a": {"b": 2}}, checkpoint)
