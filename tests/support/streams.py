"""Devices and runtimes that exist only in tests. Meta tensors stand for tensors of a device."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

DEVICE = torch.device("meta")


class HeldStream:
    """A side stream whose copies are done only when they are released."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.waited_for = threading.Event()
        self.released = threading.Event()

    def mark(self) -> None:
        self.calls.append("mark")

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.calls.append("copy")
        self.pairs.extend(pairs)

    def wait(self) -> None:
        self.calls.append("wait")
        self.waited_for.set()
        assert self.released.wait(10)
        for target, _ in self.pairs:
            target.fill_(1)
        self.pairs.clear()


class FakeRegistrar:
    """A device runtime that locks pages until its limit is reached."""

    def __init__(self, *, limit: int = 1 << 30) -> None:
        self.limit = limit
        self.locked: dict[int, int] = {}
        self.log: list[tuple[str, int]] = []

    def register(self, address: int, nbytes: int) -> int:
        self.log.append(("register", address))
        if len(self.locked) >= self.limit:
            return 2  # cudaErrorMemoryAllocation
        self.locked[address] = nbytes
        return 0

    def unregister(self, address: int) -> int:
        self.log.append(("unregister", address))
        del self.locked[address]
        return 0
