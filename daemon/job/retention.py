"""Retention of one job: after commits, old checkpoints are removed by a worker of its own, under the user's uid.

Invariant: a save never waits for a removal; of each folder at most one removal runs at a time, and what is asked for
meanwhile is done once after it, by the newest policy.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from typing import Final, Protocol, cast

from ckptd.daemon.monitoring.metrics import Metrics
from ckptd.protocol.errors import CkptdError
from ckptd.protocol.messages import Task, TaskReply
from ckptd.protocol.retention_messages import Keep, RetainDone, RetainTask

logger = logging.getLogger(__name__)

# What a stopping daemon waits for a removal; what it then cuts short has a hidden name and is swept by the next one.
_CLOSE_TIMEOUT_S: Final = 10.0


class Pool(Protocol):
    """What does the removing; a WorkerPool."""

    async def run(self, task: Task) -> TaskReply:
        """Do a task. Raises CkptdError."""

    async def close(self) -> None:
        """End the workers."""


class Retention:
    """Removes what is not to be kept.

    Args:
        job: Name of the job, for the log.
        open_pool: Starts the worker, when one is needed for the first time.
        saving: Returns the ids of the checkpoints that the job is saving.
        metrics: Where removals are counted.
    """

    def __init__(
        self, job: str, *, open_pool: Callable[[], Pool], saving: Callable[[], Iterable[str]], metrics: Metrics
    ) -> None:
        self._job, self._open_pool, self._saving, self._metrics = job, open_pool, saving, metrics
        self._pool: Pool | None = None
        self._wanted: dict[str, Keep] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._last: dict[str, object] = {}

    @property
    def busy(self) -> bool:
        """Whether something is being removed."""
        return bool(self._running)

    def request(self, root: str, keep: Keep) -> None:
        """Remove soon what ``keep`` does not keep of a folder."""
        self._wanted[root] = keep
        if root not in self._running:
            self._running[root] = asyncio.create_task(self._run(root))

    async def _run(self, root: str) -> None:
        try:
            while (keep := self._wanted.pop(root, None)) is not None:
                await self._retain(root, keep)
        finally:
            del self._running[root]

    async def _retain(self, root: str, keep: Keep) -> None:
        if self._pool is None:
            self._pool = self._open_pool()
        saving = [os.path.basename(path) for path in self._saving() if os.path.dirname(path) == root]
        try:
            done = cast(RetainDone, await self._pool.run(RetainTask(root, keep, saving)))
        except CkptdError as error:
            done = RetainDone([], [], [str(error)])
        self._note(root, done)

    def _note(self, root: str, done: RetainDone) -> None:
        self._last = {"root": root, "removed": done.removed, "held": done.held, "errors": done.errors}
        self._metrics.removed(len(done.removed))
        if done.removed or done.errors:
            level = logging.WARNING if done.errors else logging.INFO
            removed, errors = ", ".join(done.removed) or "nothing", "; ".join(done.errors)
            logger.log(level, "job %s: removed %s from %s%s", self._job, removed, root, errors and f": {errors}")

    async def close(self) -> None:
        """Finish what is being removed, within bounds, and end the worker."""
        self._wanted.clear()
        if self._running:
            await asyncio.wait(list(self._running.values()), timeout=_CLOSE_TIMEOUT_S)
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()

    def status(self) -> dict[str, object]:
        """Return what `/status` tells: the last removal, and where one is under way."""
        return {"running": sorted(self._running), "last": self._last}
