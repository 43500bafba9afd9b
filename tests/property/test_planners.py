"""Any state dict, any spread of tensors over ranks: our plans are torch's, or refused where a part is lacking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import strategies
from support.meshes import as_rank, dtensor
from torch.distributed.checkpoint import default_planner as stock
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ckptd.checkpoint import planners as ours
from ckptd.checkpoint.planners.cache import PlanCache
from ckptd.checkpoint.planners.coverage import check_coverage
from ckptd.protocol.errors import BadPlan, Mismatch

often = settings(max_examples=60, deadline=None)


def chunk(box):
    return ChunkStorageMetadata(torch.Size(box[0]), torch.Size(box[1]))


def item(name, box, spread):
    data = TensorWriteData(chunk(box), TensorProperties(dtype=spread.dtype), torch.Size(spread.shape))
    return WriteItem(MetadataIndex(name, box[0]), WriteItemType.SHARD, tensor_data=data)


def local_plans(world_size, tensors):
    """Return each rank's plan for tensors that are spread over them."""
    plans = []
    for rank in range(world_size):
        items = [item(name, box, spread) for name, spread in tensors.items() for box in spread.held_by(rank)]
        plans.append(SavePlan(items, planner_data={i.index.fqn: (i.index.fqn,) for i in items}))
    return plans


def stored(spread):
    chunks = [chunk(box) for box in spread.boxes]
    return TensorStorageMetadata(TensorProperties(dtype=spread.dtype), torch.Size(spread.shape), chunks)


@often
@given(strategies.state_dicts(), st.booleans())
def test_a_local_plan_is_torchs_for_any_state_dict(state_dict, flatten):
    planners = [kind(flatten_state_dict=flatten) for kind in (ours.DefaultSavePlanner, stock.DefaultSavePlanner)]
    found = []
    for planner in planners:
        try:
            planner.set_up_planner(state_dict, is_coordinator=True)
            plan = planner.create_local_plan()
            found.append((plan, planner.create_global_plan([plan])))
        except ValueError as error:
            found.append((type(error), str(error)))
    assert found[0] == found[1]


@often
@given(strategies.jobs(), st.booleans())
def test_a_global_plan_is_torchs_for_any_spread_over_ranks(job, lowest):
    plans = local_plans(*job)
    mine, theirs = (
        kind(dedup_save_to_lowest_rank=lowest).create_global_plan(plans)
        for kind in (ours.DefaultSavePlanner, stock.DefaultSavePlanner)
    )
    assert mine == theirs


@often
@given(strategies.jobs())
def test_everything_is_written_once(job):
    world_size, tensors = job
    plans, metadata = ours.DefaultSavePlanner().create_global_plan(local_plans(world_size, tensors))
    written = [(i.index.fqn, tuple(i.index.offset)) for plan in plans for i in plan.items]
    assert len(written) == len(set(written))
    assert set(written) == {(name, box[0]) for name, spread in tensors.items() for box in spread.boxes}
    for plan in plans:
        for i in plan.items:
            assert metadata.state_dict_metadata[i.index.fqn].chunks[i.index.index] == i.tensor_data.chunk


@often
@given(st.data())
def test_replicas_of_equal_size_are_spread_evenly(data):
    world_size = data.draw(st.integers(1, 5))
    count = data.draw(st.integers(0, 12))
    whole = strategies.Spread((3,), torch.float32, (((0,), (3,)),), (frozenset(range(world_size)),))
    plans, _ = ours.DefaultSavePlanner().create_global_plan(
        local_plans(world_size, {f"w{number}": whole for number in range(count)})
    )
    counts = [len(plan.items) for plan in plans]
    assert max(counts) - min(counts) <= 1


@settings(often, max_examples=150)
@given(st.data())
def test_a_plan_is_refused_if_and_only_if_its_chunks_do_not_tile(data):
    shape = data.draw(strategies.shapes(min_dims=1, min_size=1))
    boxes = data.draw(strategies.flawed_tilings(shape) | strategies.tilings(shape))
    metadata = Metadata(
        {"w": TensorStorageMetadata(TensorProperties(), torch.Size(shape), [chunk(box) for box in boxes])}
    )
    grid = np.zeros(tuple(size + 8 for size in shape), int)
    for offsets, sizes in boxes:
        grid[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))] += 1
    inside = grid[tuple(slice(0, size) for size in shape)]
    held = grid.sum() == inside.sum() and all(
        at + size <= end for box in boxes for at, size, end in zip(*box, shape, strict=True)
    )
    for complete in (True, False):
        good = bool(held and (inside <= 1).all() and (not complete or (inside == 1).all()))
        if good:
            check_coverage(metadata, complete=complete)
        else:
            with pytest.raises(BadPlan):
                check_coverage(metadata, complete=complete)


@often
@given(st.data())
def test_a_flaw_that_torch_finds_is_found(data):
    shape = data.draw(strategies.shapes(min_dims=1, min_size=1))
    world_size = data.draw(st.integers(2, 3))
    boxes = data.draw(strategies.flawed_tilings(shape))
    owners = [frozenset([data.draw(st.integers(0, world_size - 1))]) for _ in boxes]
    plans = local_plans(world_size, {"w": strategies.Spread(shape, torch.float32, tuple(boxes), tuple(owners))})
    try:
        stock.DefaultSavePlanner().create_global_plan(plans)
    except (ValueError, AssertionError):
        with pytest.raises(BadPlan):
            ours.DefaultSavePlanner().create_global_plan(plans)


@often
@given(st.data())
def test_a_load_plan_is_torchs_for_any_mesh_and_any_stored_tiling(data):
    shape = data.draw(strategies.shapes(min_dims=1))
    boxes = data.draw(strategies.tilings(shape))
    mesh = data.draw(strategies.meshes())
    placements = data.draw(strategies.placements(len(shape), mesh))
    world_size = int(np.prod(mesh))
    rank = data.draw(st.integers(0, world_size - 1))
    metadata = Metadata({"w": stored(strategies.Spread(shape, torch.float32, tuple(boxes), ()))})
    with as_rank(rank, world_size):
        state = {"w": of_mesh(shape, placements, mesh)}
        found = []
        for planner in (ours.DefaultLoadPlanner(), stock.DefaultLoadPlanner()):
            planner.set_up_planner(state, metadata)
            found.append(planner.create_local_plan())
    assert found[0] == found[1]


@often
@given(st.data())
def test_save_plans_of_a_mesh_are_torchs_and_make_up_the_tensor(data):
    shape = data.draw(strategies.shapes(min_dims=1, min_size=1))
    mesh = data.draw(strategies.meshes(max_ranks=4))
    placements = data.draw(strategies.placements(len(shape), mesh))
    world_size = int(np.prod(mesh))
    plans = {ours: [], stock: []}
    for rank in range(world_size):
        with as_rank(rank, world_size):
            state = {"w": of_mesh(shape, placements, mesh), "r": torch.ones(3), "n": 1}
            for module, made in plans.items():
                planner = module.DefaultSavePlanner()
                planner.set_up_planner(state, is_coordinator=rank == 0)
                made.append(planner.create_local_plan())
    assert plans[ours] == plans[stock]
    mine, theirs = (module.DefaultSavePlanner().create_global_plan(made) for module, made in plans.items())
    assert mine == theirs


def of_mesh(shape, placements, mesh) -> DTensor:
    """Return a DTensor of ones of which this rank holds its part."""
    sizes, _ = compute_local_shape_and_global_offset(shape, init_device_mesh("cpu", mesh), placements)
    return dtensor(torch.ones(sizes), shape, placements, mesh)


@often
@given(st.data())
def test_a_checkpoint_with_a_hole_is_refused_where_the_hole_is_wanted(data):
    shape = data.draw(strategies.shapes(min_dims=1, min_size=1))
    boxes = data.draw(strategies.tilings(shape))
    lost = data.draw(st.integers(0, len(boxes) - 1))
    kept = tuple(box for at, box in enumerate(boxes) if at != lost)
    metadata = Metadata({"w": stored(strategies.Spread(shape, torch.float32, kept, ()))})
    planner = ours.DefaultLoadPlanner()
    planner.set_up_planner({"w": torch.ones(shape)}, metadata)
    with pytest.raises(Mismatch, match="only"):
        planner.create_local_plan()


@often
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_cached_plans_are_what_plans_without_a_cache_are(turns, data):
    """Models take turns, writers and networks lose plans: what is written is always this model's plan."""
    world_size = data.draw(st.integers(1, 3))
    models = [{"w": torch.ones(2)}, {"w": torch.ones(3)}, {"w": torch.ones(2), "x": 1}, {"v": torch.ones(2)}]
    caches = [PlanCache() for _ in range(world_size)]
    for turn in turns:
        states = [{**models[turn], **({"own": rank} if data.draw(st.booleans()) else {})} for rank in range(world_size)]
        planners, plain = [], []
        for rank, (state, cache) in enumerate(zip(states, caches, strict=True)):
            planner, reference = ours.DefaultSavePlanner(enable_plan_caching=True), stock.DefaultSavePlanner()
            planner._cache = cache
            for each in (planner, reference):
                each.set_up_planner(state, is_coordinator=rank == 0)
            planners.append(planner)
            plain.append(reference)
        sent = [planner.create_local_plan() for planner in planners]
        if data.draw(st.integers(0, 3)) == 0:
            continue  # the save fails here
        sent = [SavePlan(plan.items, None, plan.planner_data) if lossy(plan, data) else plan for plan in sent]
        answers, metadata = planners[0].create_global_plan(sent)
        wanted, wanted_metadata = plain[0].create_global_plan([reference.create_local_plan() for reference in plain])
        written = [planner.finish_plan(answer) for planner, answer in zip(planners, answers, strict=True)]
        assert [plan.items for plan in written] == [plan.items for plan in wanted]
        assert [plan.planner_data for plan in written] == [plan.planner_data for plan in wanted]
        assert metadata == wanted_metadata


def lossy(plan, data):
    return plan.usable and data.draw(st.integers(0, 4)) == 0
