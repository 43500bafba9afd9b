"""DCP's planners, each step held against torch's own in the same process; what ours refuse and torch's let pass."""

from __future__ import annotations

import dataclasses
import inspect
import io
import logging

import pytest
import torch
from support.meshes import as_rank, dtensor
from torch.distributed.checkpoint import default_planner as stock
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.tensor import Replicate, Shard

from ckptd.checkpoint import planners as ours
from ckptd.checkpoint.planners.coverage import check_coverage
from ckptd.protocol.errors import BadPlan, Mismatch, MissingKeys, Unsupported

FLOAT = TensorProperties(dtype=torch.float32)


def nested():
    return {
        "model": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)},
        "list": [torch.zeros(2), {"x": 1}],
        "step": 7,
        "names": ["a", "b"],
    }


def shard(name, offsets, sizes, *, of, dtype=torch.float32):
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(of))
    return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)


def whole(name, *sizes, dtype=torch.float32):
    return dataclasses.replace(shard(name, [0] * len(sizes), sizes, of=sizes, dtype=dtype), type=WriteItemType.TENSOR)


def thing(name):
    return WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)


def planned(planner, all_plans):
    """Return the global plan of a planner that has seen no state dict."""
    return planner.create_global_plan(all_plans)


def both(*args, **kwargs):
    return ours.DefaultSavePlanner(*args, **kwargs), stock.DefaultSavePlanner(*args, **kwargs)


def items(plans):
    return [[item.index.fqn for item in plan.items] for plan in plans]


class TestTheSameAsTorch:
    @pytest.mark.parametrize("flatten", [True, False])
    def test_a_local_plan_of_a_nested_state_dict(self, flatten):
        found = []
        for planner in both(flatten_state_dict=flatten):
            planner.set_up_planner(nested(), StorageMeta(), is_coordinator=True)
            found.append(planner.create_local_plan())
        assert found[0] == found[1]
        assert found[0].planner_data == (found[1].planner_data if flatten else None)
        assert len(found[0].items) == (6 if flatten else 4)

    @pytest.mark.parametrize("rank", range(4))
    def test_a_local_plan_of_sharded_tensors(self, rank):
        with as_rank(rank, 4):
            state = {
                "uneven": dtensor(torch.ones(2 if rank < 2 else 1 - (rank == 3), 3), (5, 3), [Shard(0)], (4,)),
                "replica": dtensor(torch.ones(2), (2,), [Replicate()], (4,)),
                "two": dtensor(torch.ones(1, 2), (2, 4), [Shard(0), Shard(1)], (2, 2)),
                "plain": torch.ones(3),
            }
            found = []
            for planner in both():
                planner.set_up_planner(state, is_coordinator=rank == 0)
                found.append(planner.create_local_plan())
        assert found[0] == found[1]
        assert len(found[0].items) == 4

    @pytest.mark.parametrize("lowest", [False, True])
    def test_replicas_are_left_to_the_same_ranks_with_the_same_metadata(self, lowest):
        sizes = {"a": (8, 8), "b": (4,), "c": (4,), "d": (16,), "e": (), "f": (0, 3)}
        local = [whole(name, *size) for name, size in sizes.items()] + [thing("x"), thing("y")]
        halves = [[shard("s", (4 * at,), (4,), of=(8,))] for at in (0, 1, 0)]
        data = [{"s": ("s",)}, {"x": ("x",)}, {"x": ("other",), "y": ("y",)}]
        plans = [SavePlan(local + half, planner_data=paths) for half, paths in zip(halves, data, strict=True)]
        mine, theirs = (planned(p, plans) for p in both(dedup_save_to_lowest_rank=lowest))
        assert mine == theirs
        assert mine[1].planner_data == {"s": ("s",), "x": ("x",), "y": ("y",)}
        owners = [len(plan.items) for plan in mine[0]]
        assert owners == ([9, 1, 0] if lowest else owners)
        assert lowest or all(owners)

    def test_plans_that_were_given_are_not_changed(self):
        plans = [SavePlan([whole("w", 2)], planner_data={}), SavePlan([whole("w", 2)], planner_data={})]
        planned(ours.DefaultSavePlanner(), plans)
        assert plans[0] == plans[1] == SavePlan([whole("w", 2)], planner_data={})

    def test_a_planner_hands_over_what_an_item_means(self):
        state = nested()
        mine, theirs = both()
        for planner in (mine, theirs):
            planner.set_up_planner(state, is_coordinator=True)
        for item in mine.finish_plan(planned(mine, [mine.create_local_plan()])[0][0]).items:
            one, other = mine.resolve_data(item), theirs.resolve_data(item)
            if isinstance(one, io.BytesIO):
                assert one.getvalue() == other.getvalue()
            else:
                assert one is other

    def test_a_load_plan_that_reshards(self):
        chunks = [ChunkStorageMetadata(torch.Size((2 * at, 0)), torch.Size((2, 3))) for at in range(2)]
        metadata = Metadata(
            {"w": TensorStorageMetadata(FLOAT, torch.Size((4, 3)), chunks), "n": BytesStorageMetadata()}
        )
        for rank in range(3):
            with as_rank(rank, 3):
                local = torch.ones(0 if rank == 2 else 2, 3)
                state = {"w": dtensor(local, (4, 3), [Shard(0)], (3,)), "n": 0}
                found = []
                for planner in (ours.DefaultLoadPlanner(), stock.DefaultLoadPlanner()):
                    planner.set_up_planner(dict(state), metadata, is_coordinator=rank == 0)
                    plans = planner.create_global_plan([planner.create_local_plan()])
                    found.append(planner.finish_plan(plans[0]))
            assert found[0] == found[1]
            assert len(found[0].items) == (1 if rank == 2 else 2)

    def test_a_checkpoint_from_before_torch_2_4_is_loaded_by_its_old_names(self):
        metadata = Metadata({"options": BytesStorageMetadata(), "other": BytesStorageMetadata()})
        found = []
        for planner in (ours.DefaultLoadPlanner(), stock.DefaultLoadPlanner()):
            state = {"options": {"lr": 1, "decay": 2}}
            planner.set_up_planner(state, metadata)
            found.append(planner.create_local_plan())
            assert planner.mappings == {"options": ("options",)}
        assert found[0] == found[1]
        assert [item.dest_index.fqn for item in found[0].items] == ["options"]

    @pytest.mark.parametrize("keys", [None, {"model"}, {"model.w", "step"}, {"list"}, {"nothing"}])
    def test_a_state_dict_is_made_from_a_checkpoint(self, keys):
        saver = stock.DefaultSavePlanner()
        saver.set_up_planner(nested(), is_coordinator=True)
        _, metadata = saver.create_global_plan([saver.create_local_plan()])
        made = []
        for planner in (ours.EmptyStateDictLoadPlanner(keys), stock._EmptyStateDictLoadPlanner(keys)):
            state = {}
            planner.set_up_planner(state, metadata)
            plan = planner.create_local_plan()
            made.append((plan, _shapes(state)))
        assert made[0] == made[1]

    def test_an_element_of_a_list_can_be_loaded_alone(self):
        """torch's planner then wants the others, too, as objects, and refuses them."""
        saver = ours.DefaultSavePlanner()
        saver.set_up_planner(nested(), is_coordinator=True)
        _, metadata = saver.create_global_plan([saver.create_local_plan()])
        planner, state = ours.EmptyStateDictLoadPlanner({"list.1"}), {}
        planner.set_up_planner(state, metadata)
        assert [item.dest_index.fqn for item in planner.create_local_plan().items] == ["list.1.x"]
        assert state["list"][0] is None

    @pytest.mark.parametrize(
        "name",
        [
            "create_default_local_save_plan",
            "create_default_global_save_plan",
            "create_default_local_load_plan",
            "create_default_global_load_plan",
            "DefaultSavePlanner",
            "DefaultLoadPlanner",
        ],
    )
    def test_signatures_annotations_included(self, name):
        assert inspect.signature(getattr(ours, name)) == inspect.signature(getattr(stock, name))

    @pytest.mark.parametrize("name", ["DefaultSavePlanner", "DefaultLoadPlanner"])
    def test_every_method_has_torchs_parameters(self, name):
        mine, theirs = getattr(ours, name), getattr(stock, name)
        hooks = [hook for hook in vars(theirs) if callable(getattr(theirs, hook)) and not hook.startswith("_")]
        assert len(hooks) >= 7
        for hook in hooks:
            one, other = inspect.signature(getattr(mine, hook)), inspect.signature(getattr(theirs, hook))
            assert list(one.parameters) == list(other.parameters), hook
            assert [p.default for p in one.parameters.values()] == [p.default for p in other.parameters.values()]


def _shapes(value):
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return {key: _shapes(inner) for key, inner in value.items()}
    return [_shapes(inner) for inner in value] if isinstance(value, list) else value


def test_planners_are_torchs_to_those_who_ask():
    assert isinstance(ours.DefaultSavePlanner(), SavePlanner)
    assert isinstance(ours.DefaultLoadPlanner(), LoadPlanner)


class TestRefusedPlans:
    """torch raises ValueError or AssertionError for these; ours is a ValueError that names the key."""

    @pytest.mark.parametrize(
        ("items", "reason"),
        [
            ([[shard("w", (0, 0), (2, 2), of=(2, 4))], [shard("w", (0, 1), (2, 3), of=(2, 4))]], "overlap"),
            ([[shard("w", (0, 0), (2, 2), of=(3, 2))], [shard("w", (1, 0), (2, 2), of=(3, 2))]], "overlap"),
            ([[shard("w", (0,), (2,), of=(6,))], [shard("w", (3,), (3,), of=(6,))]], "a gap: the ranks hold 5 of 6"),
            ([[shard("w", (0,), (2,), of=(2,))], [shard("w", (2,), (1,), of=(2,))]], "reaches outside"),
            ([[shard("w", (-1,), (2,), of=(2,))], []], "reaches outside"),
            ([[shard("w", (0,), (2,), of=(1, 2))], []], "reaches outside"),
            ([[thing("w")], [whole("w", 2)]], "two ranks would write it"),
            ([[thing("w")], [shard("w", (0,), (2,), of=(2,))]], "object and"),
            ([[shard("w", (0,), (2,), of=(4,))], [whole("w", 4)]], "different size"),
            ([[shard("w", (0,), (2,), of=(4,))], [shard("w", (2,), (2,), of=(4,), dtype=torch.int64)]], "disagree"),
            ([[shard("w", (0,), (2,), of=(4,))], [shard("w", (2,), (2,), of=(5,))]], "disagree"),
        ],
    )
    def test_are_named(self, items, reason):
        plans = [SavePlan(mine, planner_data={}) for mine in items]
        with pytest.raises(BadPlan, match=reason) as caught:
            planned(ours.DefaultSavePlanner(), plans)
        assert caught.value.key == "w"
        assert isinstance(caught.value, ValueError)

    def test_a_name_in_two_plans_that_is_not_sharded(self):
        plans = [SavePlan([whole("w", 2)]), SavePlan([whole("w", 2)])]
        with pytest.raises(BadPlan, match="two ranks would write it"):
            ours.create_default_global_save_plan(plans)
        with pytest.raises(AssertionError):
            stock.create_default_global_save_plan(plans)

    def test_a_tensor_without_a_place(self):
        with pytest.raises(BadPlan, match="no chunk"):
            ours.create_default_global_save_plan([SavePlan([dataclasses.replace(whole("w", 2), tensor_data=None)])])

    def test_a_rank_that_saves_for_itself_may_hold_a_part(self):
        plans = [SavePlan([shard("w", (0,), (2,), of=(6,))], planner_data={})]
        for planner in both():
            assert len(planned(planner, plans)[0][0].items) == 1

    def test_all_wrong_tensors_are_counted(self):
        part = {f"w{n}": TensorStorageMetadata(FLOAT, torch.Size((2,)), []) for n in range(3)}
        with pytest.raises(BadPlan, match=r"w0: a gap: .* so are 2 other tensors"):
            check_coverage(Metadata(part), complete=True)

    def test_an_empty_chunk_gives_way_to_a_full_one_at_its_place(self):
        for order in (0, 1):
            pair = [[shard("w", (0,), (0,), of=(2,))], [shard("w", (0,), (2,), of=(2,))]]
            plans = [SavePlan(mine, planner_data={}) for mine in (pair if order else pair[::-1])]
            found, metadata = planned(ours.DefaultSavePlanner(), plans)
            assert metadata.state_dict_metadata["w"].chunks[0].sizes == (2,)
            assert sum(len(plan.items) for plan in found) == 1


class TestRefusedLoads:
    def plan(self, state, stored, **settings):
        planner = ours.DefaultLoadPlanner(**settings)
        planner.set_up_planner(state, Metadata(stored))
        return planner.create_local_plan()

    @staticmethod
    def stored(*size, chunks=None):
        boxes = [((0,) * len(size), size)] if chunks is None else chunks
        return TensorStorageMetadata(
            FLOAT, torch.Size(size), [ChunkStorageMetadata(torch.Size(at), torch.Size(n)) for at, n in boxes]
        )

    def test_missing_keys_are_all_counted_before_anything_is_read(self):
        state = {"w": torch.ones(2), "x": torch.ones(2), "y": 1}
        with pytest.raises(MissingKeys, match="Missing key in checkpoint state_dict: x") as caught:
            self.plan(state, {"w": self.stored(2)})
        assert caught.value.count == 2
        with pytest.raises(RuntimeError, match="Missing key in checkpoint state_dict: x"):
            stock.create_default_local_load_plan(state, Metadata({"w": self.stored(2)}))

    def test_a_partial_load_leaves_them_alone(self):
        plan = self.plan({"w": torch.ones(2), "x": 1}, {"w": self.stored(2)}, allow_partial_load=True)
        assert [item.dest_index.fqn for item in plan.items] == ["w"]

    def test_another_shape(self):
        with pytest.raises(Mismatch, match=r"wants float32\[3\], the checkpoint holds float32\[2\]") as caught:
            self.plan({"w": torch.ones(3)}, {"w": self.stored(2)})
        assert isinstance(caught.value, ValueError)

    def test_an_object_where_a_tensor_is_stored(self):
        with pytest.raises(Mismatch, match=r"wants an object \(int\)"):
            self.plan({"w": 1}, {"w": self.stored(2)})
        with pytest.raises(ValueError, match="Invalid checkpoint metadata"):
            stock.create_default_local_load_plan({"w": 1}, Metadata({"w": self.stored(2)}))

    def test_a_checkpoint_with_a_hole_where_something_is_wanted(self):
        hole = self.stored(4, chunks=[((0,), (1,)), ((2,), (2,))])
        with pytest.raises(Mismatch, match="wants 4 elements, the checkpoint holds only 3"):
            self.plan({"w": torch.ones(4)}, {"w": hole})

    def test_planning_before_being_set_up(self):
        planner = ours.DefaultLoadPlanner()
        planner.set_up_planner({"w": torch.ones(2)})
        with pytest.raises(Unsupported, match="without metadata"):
            planner.create_local_plan()

    def test_a_full_state_dict_for_the_planner_that_makes_it(self):
        with pytest.raises(Unsupported, match="give an empty one"):
            ours.EmptyStateDictLoadPlanner().set_up_planner({"a": 1}, Metadata({}))


class TestOverriddenSteps:
    def test_a_value_may_be_changed_on_its_way(self):
        class Half(ours.DefaultSavePlanner):
            def transform_object(self, write_item, object):
                value = super().transform_object(write_item, object)
                return value.half() if isinstance(value, torch.Tensor) else value

        planner = Half()
        planner.set_up_planner({"w": torch.ones(2), "n": 1}, is_coordinator=True)
        tensor, number = (planner.resolve_data(item) for item in planner.create_local_plan().items)
        assert tensor.dtype is torch.float16
        assert torch.load(io.BytesIO(number.getvalue())) == 1

    def test_a_value_may_be_found_elsewhere(self):
        class Elsewhere(ours.DefaultLoadPlanner):
            def lookup_tensor(self, index):
                return self.elsewhere[index.fqn]

        planner = Elsewhere()
        planner.elsewhere = {"w": torch.zeros(2)}
        stored = TestRefusedLoads.stored(2)
        planner.set_up_planner({"w": torch.ones(2)}, Metadata({"w": stored}))
        [item] = planner.create_local_plan().items
        assert planner.resolve_tensor(item).data_ptr() == planner.elsewhere["w"].data_ptr()

    def test_data_of_the_users_own_in_the_plan_is_merged_by_the_user(self):
        """As torch's documentation of SavePlanner shows it; torch's own merging fails there."""

        class Extra(ours.DefaultSavePlanner):
            def create_local_plan(self):
                return dataclasses.replace(super().create_local_plan(), planner_data="of this rank")

            def create_global_plan(self, all_plans):
                plans, metadata = super().create_global_plan(all_plans)
                return plans, dataclasses.replace(metadata, planner_data=[plan.planner_data for plan in plans])

        planner = Extra()
        planner.set_up_planner({"w": torch.ones(2)}, is_coordinator=True)
        assert planned(planner, [planner.create_local_plan()])[1].planner_data == ["of this rank"]


def test_the_deprecated_argument_is_told_of(caplog):
    with caplog.at_level(logging.WARNING, logger="ckptd"):
        ours.DefaultSavePlanner(dedup_replicated_tensors=True)
    assert "dedup_replicated_tensors has no effect" in caplog.text


class TestSettings:
    @pytest.mark.parametrize("kind", [ours.DefaultSavePlanner, stock.DefaultSavePlanner])
    def test_of_default_save_planners_of_either_library(self, kind):
        planner = kind(flatten_state_dict=False, dedup_save_to_lowest_rank=True)
        planner.set_up_planner({"w": torch.ones(1)})
        wanted = ours.SaveSettings(flatten_state_dict=False, dedup_save_to_lowest_rank=True)
        assert ours.save_settings(planner) == wanted

    @pytest.mark.parametrize("kind", [ours.DefaultLoadPlanner, stock.DefaultLoadPlanner])
    def test_of_default_load_planners_of_either_library(self, kind):
        wanted = ours.LoadSettings(flatten_sharded_tensors=False, allow_partial_load=True)
        assert ours.load_settings(kind(flatten_sharded_tensors=False, allow_partial_load=True)) == wanted

    def test_no_planner_means_the_defaults(self):
        assert ours.save_settings(None) == ours.SaveSettings()
        assert ours.load_settings(None) == ours.LoadSettings()

    @pytest.mark.parametrize("base", [ours.DefaultSavePlanner, stock.DefaultSavePlanner])
    def test_a_subclass_is_the_users_own(self, base):
        assert ours.save_settings(type("Mine", (base,), {})()) is None

    @pytest.mark.parametrize("base", [ours.DefaultLoadPlanner, stock.DefaultLoadPlanner])
    def test_a_load_subclass_is_the_users_own(self, base):
        assert ours.load_settings(type("Mine", (base,), {})()) is None

    def test_so_is_a_planner_with_a_method_replaced(self):
        planner = ours.DefaultSavePlanner()
        planner.lookup_object = lambda index: None
        assert ours.save_settings(planner) is None

    def test_a_planner_of_the_other_kind_is_nobodys_default(self):
        assert ours.save_settings(ours.DefaultLoadPlanner()) is None
        assert ours.load_settings(ours.DefaultSavePlanner()) is None
