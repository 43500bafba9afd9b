"""A training script as torchrun starts it: one collective more after the session is open would end it."""

import os
import sys

import torch
import torch.distributed as dist
from support.nursery import forbid_collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import ckptd.client as dcp


def main(path):
    """Save twice, the second time over the first, and load the result back."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    full, weights = torch.arange(24.0).reshape(8, 3), torch.ones(1 << 18)
    state = {
        "shard": distribute_tensor(full, mesh, [Shard(0)]),
        "replicated": distribute_tensor(weights, mesh, [Replicate()]),
        "step": 1,
    }
    blank = distribute_tensor(torch.zeros(8, 3), mesh, [Shard(0)])
    dcp.connect(state)
    forbid_collectives()
    for step in (1, 2):
        future = dcp.async_save({**state, "step": step}, checkpoint_id=path)
        future.result(60)
    found = {"shard": blank, "step": 0}
    dcp.load(found, checkpoint_id=path)
    assert torch.equal(found["shard"].to_local(), state["shard"].to_local())
    assert found["step"] == 2
    print(f"rank {rank} of {world_size} pid {os.getpid()} {future.state}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
