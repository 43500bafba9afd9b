"""Which bytes of which files a state dict needs, and what is put where."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.checkpoints import make_checkpoint, write_checkpoint
from support.meshes import as_rank, dtensor
from torch.distributed.tensor import Shard

from ckptd.client.loading.load import load_into
from ckptd.client.loading.match import LoadRules, match
from ckptd.client.loading.plan import LoadPlanner
from ckptd.client.saving.flatten import flatten
from ckptd.protocol.errors import BadIndex, Mismatch, UnknownCheckpoint, Unsupported, WrongBits
from ckptd.staging.dtypes import OBJECT

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


def load(state, path, *, flat=False, **rules):
    load_into(state, path, rules=LoadRules(**rules), flat=flat)
    return state


def planned(state, *, index=INDEX, verify=True):
    leaves = flatten(state)
    found = match("/ckpt", index, leaves, rules=LoadRules())
    return LoadPlanner("/ckpt", index, verify=verify).plan(leaves, found)


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

    @pytest.mark.parametrize(
        ("lost", "state", "told"),
        [
            ("model.w", {"model": {"w": torch.zeros(4, 6)}}, "model.w: it holds 12 of 24 wanted elements"),
            ("model.b", {"model": {"b": torch.zeros(300, dtype=torch.bfloat16)}}, "it holds 0 of 300 wanted elements"),
            ("epoch", {"epoch": 0}, "epoch: it holds no record of this object"),
        ],
    )
    def test_an_index_with_a_hole_is_not_believed(self, lost, state, told):
        keep = np.ones(len(INDEX.item_name), bool)
        keep[np.flatnonzero(INDEX.item_name == INDEX.names.index(lost))[-1]] = False
        columns = {
            name: getattr(INDEX, name)[keep] for name in vars(INDEX) if name.startswith(("item_", "record_", "data_"))
        }
        with pytest.raises(BadIndex, match=told):
            planned(state, index=dataclasses.replace(INDEX, **columns))


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

    def test_tensors_that_do_not_fit_stay_as_they_were_where_nobody_insists(self, checkpoint):
        state = {"model": {"w": torch.full((4, 7), 3.0), "b": torch.zeros(300, dtype=torch.bfloat16), "new": "kept"}}
        report = load_into(state, checkpoint, rules=LoadRules(strict=False))
        assert (report.loaded, report.missing) == (1, ("model.new",))
        assert [other.name for other in report.mismatched] == ["model.w"]
        assert torch.equal(state["model"]["w"], torch.full((4, 7), 3.0))
        assert state["model"]["new"] == "kept"
        assert bits(state["model"]["b"]) == bits(saved("model.b"))

    def test_meta_tensors_that_the_checkpoint_lacks_stay_meta(self, checkpoint):
        state = {"model": {"new": torch.zeros(3, device="meta")}}
        load(state, checkpoint, strict=False)
        assert state["model"]["new"].is_meta

    def test_meta_shards_are_made(self, checkpoint):
        with as_rank(1, 2):
            shard = dtensor(torch.zeros(2, 6, device="meta"), (4, 6), [Shard(0)], (2,))
            state = load({"model": {"w": shard}}, checkpoint)
            assert bits(state["model"]["w"].to_local()) == bits(saved("model.w")[2:])
            assert state["model"]["w"].placements == (Shard(0),)

    def test_the_report_counts_keys_and_bytes(self, checkpoint):
        report = load_into(empty_state(), checkpoint, rules=LoadRules())
        payload = INDEX.data_bytes[INDEX.dtype[INDEX.item_name] != OBJECT].sum()
        objects = INDEX.record_bytes[INDEX.dtype[INDEX.item_name] == OBJECT].sum()
        assert (report.path, report.loaded, report.source) == (checkpoint, 7, "disk")
        assert report.needed_bytes == payload + objects
        assert report.needed_bytes <= report.read_bytes <= 1.05 * report.needed_bytes
        assert report.seconds > 0
        assert report.complete
        assert report.unexpected == ()

    def test_without_verifying_wrong_bits_are_loaded(self, checkpoint, tmp_path):
        item = int(np.flatnonzero(INDEX.item_name == INDEX.names.index("model.b"))[0])
        file = tmp_path / INDEX.files[INDEX.item_file[item]]
        data = bytearray(file.read_bytes())
        data[int(INDEX.data_offset[item])] ^= 4
        file.write_bytes(data)
        state = {"model": {"b": torch.zeros(300, dtype=torch.bfloat16)}}
        with pytest.raises(WrongBits):
            load(state, checkpoint)
        load_into(state, checkpoint, rules=LoadRules(), verify=False)
        assert bits(state["model"]["b"])[1:] == bits(saved("model.b"))[1:]

    def test_no_checkpoint_is_told(self, tmp_path):
        with pytest.raises(UnknownCheckpoint):
            load({"w": torch.zeros(1)}, str(tmp_path))

    def test_two_names_alike_are_refused(self, checkpoint):
        with pytest.raises(Unsupported, match="twice"):
            load({"a.b": 1, "a": {"b": 2}}, checkpoint)
