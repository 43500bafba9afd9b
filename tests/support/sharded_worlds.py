"""Worlds of 1, 2, 3, 4 and 8 ranks on one daemon, alive for a whole test file."""

from __future__ import annotations

from contextlib import contextmanager

from support.daemons import Daemon, Runtime
from support.trainers import Nursery, Ranks, Trainers


class Worlds:
    """Process groups by their size, each made when it is first asked for.

    Attributes:
        root: Directory for checkpoints.
    """

    def __init__(self, trainers, root):
        self._trainers, self.root = trainers, root
        self._ranks = {}

    def of_size(self, world_size):
        """Return the ranks of a world; `support.sharded` is imported as ``sharded`` there, ``root`` is set."""
        if world_size not in self._ranks:
            ranks = Ranks(self._trainers.start() for _ in range(world_size))
            ranks.do(
                "import support.sharded as sharded\nsharded.join(store, rank, world_size)",
                store=str(self.root / f"store-{world_size}"),
                root=str(self.root),
            )
            self._ranks[world_size] = ranks
        return self._ranks[world_size]


@contextmanager
def worlds(root):
    """Have a daemon, and ranks which save with it, until the block is left; then look for what was left behind."""
    runtime = Runtime()
    runtime.watched.append(root)
    try:
        nursery = Nursery(script="sharded.py")
        try:
            daemon = Daemon(runtime)
            try:
                trainers = Trainers(nursery, runtime)
                try:
                    yield Worlds(trainers, root)
                finally:
                    trainers.close()
            finally:
                daemon.stop()
        finally:
            nursery.close()
    finally:
        runtime.close()
