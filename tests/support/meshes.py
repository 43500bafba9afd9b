"""Sharded tensors of any rank of any world, without a second process: torch's fake process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Placement, Replicate, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def as_rank(rank: int, world_size: int) -> Iterator[None]:
    """Be a rank; collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def dtensor(local: torch.Tensor, shape: tuple[int, ...], placements: list[Placement], mesh: tuple[int, ...]) -> DTensor:
    """Return a DTensor of which this rank holds ``local``."""
    stride = torch.empty(shape, device="meta").stride()
    device_mesh = init_device_mesh("cpu", mesh)
    return DTensor.from_local(local, device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


with as_rank(0, 1):  # torch's first DTensor takes half a second, which no single test is to blame for
    dtensor(torch.ones(1), (1,), [Replicate()], (1,)).__create_chunk_list__()
