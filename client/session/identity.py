"""Who this process is in its job: told by arguments, by a process group, or alone.

A process group is asked for its rank and its key-value store and for nothing else: no collective runs, so NCCL-only
groups and full GPUs are no obstacle.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _get_default_store

from ckptd.protocol.errors import DeadlineExceeded, MultiNode


class KeyValueStore(Protocol):
    """The part of torch's Store that is used."""

    def set(self, key: str, value: str) -> None:
        """Set a key."""

    def get(self, key: str) -> bytes:
        """Return a key's value, waiting for it."""

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Wait until the keys are set."""


@dataclass(frozen=True)
class Identity:
    """A rank of a job. ``store`` and ``prefix`` are there where ranks can compare notes."""

    job: str
    rank: int
    world_size: int
    launch: str = ""
    store: KeyValueStore | None = None
    prefix: str = ""


# How many sessions this process has opened per group: all ranks open them in the same order.
_opened: dict[str, int] = {}


def alone(job: str | None = None) -> Identity:
    """Return the identity of a job of one. Its default name is this process's own."""
    return Identity(job or f"{_program()}-{os.getpid()}-{secrets.token_hex(3)}", 0, 1)


def of_group(group: ProcessGroup | None, *, job: str | None, timeout_s: float) -> Identity:
    """Return the identity of this process in a process group.

    Args:
        group: The group; None is the default one.
        job: Name of the job; None lets rank 0 choose one, unique to this start.
        timeout_s: How long to wait for rank 0, in seconds.

    Raises:
        DeadlineExceeded: Rank 0 did not say the job's name in time.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if world_size == 1:
        return alone(job)
    store: KeyValueStore = _get_default_store()
    ranks = "-".join(str(r) for r in dist.get_process_group_ranks(group or dist.group.WORLD))
    _opened[ranks] = _opened.get(ranks, 0) + 1
    prefix = f"ckptd/{_opened[ranks]}/{ranks}"
    if rank == 0:
        launch = secrets.token_hex(8)
        name = job or f"{_program()}-{os.getpid()}-{launch[:6]}"
        store.set(f"{prefix}/job", json.dumps([name, launch]))
    _wait(store, [f"{prefix}/job"], timeout_s)
    name, launch = json.loads(store.get(f"{prefix}/job"))
    return Identity(name, rank, world_size, launch, store, prefix)


def check_same_daemon(identity: Identity, daemon: str, *, timeout_s: float) -> None:
    """Compare notes with the other ranks: all must have reached the same daemon.

    Raises:
        MultiNode: Some have reached another one.
        DeadlineExceeded: Some have not reached any in time.
    """
    store = identity.store
    if store is None:
        return
    store.set(f"{identity.prefix}/daemon/{identity.rank}", daemon)
    keys = [f"{identity.prefix}/daemon/{rank}" for rank in range(identity.world_size)]
    _wait(store, keys, timeout_s)
    same = sum(store.get(key).decode() == daemon for key in keys)
    if same != identity.world_size:
        raise MultiNode(identity.world_size, same)


def check_local_world(identity: Identity) -> None:
    """Refuse a job whose launcher says that only some of its ranks are on this node. Raises MultiNode."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    world = os.environ.get("WORLD_SIZE", "")
    if local.isdigit() and world.isdigit() and int(local) < int(world) == identity.world_size:
        raise MultiNode(identity.world_size, int(local))


def _wait(store: KeyValueStore, keys: list[str], timeout_s: float) -> None:
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError:  # DistStoreError and DistNetworkError
        raise DeadlineExceeded("opening the job's session waits for the other ranks", timeout_s) from None


def _program() -> str:
    return os.path.basename(sys.argv[0] or "python") or "python"
