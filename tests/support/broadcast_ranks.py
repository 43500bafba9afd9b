"""One rank of a group that loads a torch.save file by broadcasts; tells what it saw as a line of JSON."""

from __future__ import annotations

import importlib
import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ckptd.checkpoint.formats.broadcast import BroadcastingTorchSaveReader, DynamicMetaLoadPlanner


def main(library, store, rank, world_size, path):
    """Load what fits, then what does not."""
    rank, world_size = int(rank), int(world_size)
    dcp = importlib.import_module(library)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (world_size,))

    def load(state, coordinator=0):
        dcp.load(
            state,
            checkpoint_id=path,
            storage_reader=BroadcastingTorchSaveReader(coordinator_rank=coordinator),
            planner=DynamicMetaLoadPlanner(),
        )

    def failure(state):
        try:
            load(state)
        except (RuntimeError, CheckpointException) as error:  # stock wraps errors in one that is no Exception
            return str(error)
        return None

    state = {
        "model": {
            "rows": distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)]),
            "columns": distribute_tensor(torch.zeros(4, 7), mesh, [Shard(1)]),
            "one_row": distribute_tensor(torch.zeros(1, 3), mesh, [Shard(0)]),
            "whole": distribute_tensor(torch.zeros(6), mesh, [Replicate()]),
        },
        "plain": torch.zeros(4, dtype=torch.float64),
    }
    load(state)
    found = {name: value.to_local().tolist() for name, value in state["model"].items()}
    again = {"plain": torch.zeros(4)}
    load(again, coordinator=1)
    told = {
        "rank": rank,
        **found,
        "plain": state["plain"].tolist(),
        "again": again["plain"].tolist(),
        "missing": failure({"nothing": torch.zeros(1)}),
        "mismatch": failure({"plain": torch.zeros(5)}),
        "no_tensor": failure({"plain": 1}),
    }
    print(json.dumps(told), flush=True)
    dist.destroy_process_group()
    os._exit(0)  # all is said; torch's own threads sometimes abort the interpreter's end


if __name__ == "__main__":
    main(*sys.argv[1:])
