"""Storage back-ends under stock's functions, and under one process that plays all ranks in turn."""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from ckptd.checkpoint.user_code.stand_in import Piece, StagedShards, Stand


def small_state(number=1.0):
    """A few tensors of different sizes, and objects."""
    return {
        "model": {"w": torch.arange(6000.0).reshape(60, 100) + number, "b": torch.full((7,), number)},
        "step": int(number),
        "names": ["a", ("b", number)],
    }


def blank_state():
    """What :func:`small_state` is loaded into."""
    return {"model": {"w": torch.zeros(60, 100), "b": torch.zeros(7)}, "step": -1, "names": None}


def same(found, wanted):
    """Whether two small states are equal."""
    tensors = all(torch.equal(found["model"][key], wanted["model"][key]) for key in ("w", "b"))
    return tensors and (found["step"], found["names"]) == (wanted["step"], wanted["names"])


def save(state, writer, **options):
    """Save with stock's function, in a single process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group, and stock's that it overwrites
        return stock.save(state, storage_writer=writer, no_dist=True, **options)


def load(state, reader, **options):
    """Load with stock's function, and return what was loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock.load(state, storage_reader=reader, no_dist=True, **options)
    return state


def loaded(reader):
    """Return what a small state's checkpoint holds."""
    return load(blank_state(), reader)


def play_ranks(states, writers, *, before_writing=lambda rank: None):
    """Save the states of all ranks in this process: the protocol in its order, with no process group.

    Args:
        states: One per rank.
        writers: One per rank, or one for all of them.
        before_writing: Called with each rank before it writes.
    """
    writers = writers if isinstance(writers, list) else [writers] * len(states)
    for writer in dict.fromkeys(writers):
        writer.reset()
    planners = [DefaultSavePlanner() for _ in states]
    plans = []
    for rank, (state, writer, planner) in enumerate(zip(states, writers, planners, strict=True)):
        planner.set_up_planner(state, storage_meta=writer.storage_meta(), is_coordinator=rank == 0)
        writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    results = []
    for rank, (plan, writer, planner) in enumerate(zip(plans, writers, planners, strict=True)):
        before_writing(rank)
        results.append(writer.write_data(planner.finish_plan(plan), planner).value())
    writers[0].finish(metadata, results)
    return metadata


def read_parts(state, reader):
    """Load into a flat state dict of plain or sharded tensors, in this process."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(state, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    [plan] = reader.prepare_global_plan(planner.create_global_plan([plan]))
    reader.read_data(planner.finish_plan(plan), planner).wait()
    return state


def sharded(whole, boxes):
    """Return a sharded tensor that holds some boxes of ``whole``, each given by offsets and sizes."""
    pieces = tuple(Piece(whole.dtype, tuple(offsets), tuple(sizes)) for offsets, sizes in boxes)
    stand = Stand(tuple(whole.shape), whole.dtype, False, False, pieces)
    shards = [whole[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].clone() for box in boxes]
    return StagedShards(stand, shards)


def files_in(folder):
    """Return all files below a folder, by name, and their bytes."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = file.read()
    return found
