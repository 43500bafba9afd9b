"""Does a worker's task again after errors that may pass, with growing waits in between."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from ckptd.protocol.errors import CkptdError
from ckptd.protocol.messages import Task, TaskReply
from ckptd.protocol.transient import Backoff, is_transient

logger = logging.getLogger(__name__)


class Pool(Protocol):
    """What does tasks; a WorkerPool."""

    async def run(
        self, task: Task, *, on_progress: Callable[[int], None], on_start: Callable[[float], None]
    ) -> TaskReply:
        """Do a task. Raises CkptdError."""


class Retrying:
    """A pool whose tasks are begun anew after transient errors.

    Args:
        pool: Returns the pool of the moment.
        backoff: How often, and how long to wait.
        on_retry: Called before each new attempt.
    """

    def __init__(self, pool: Callable[[], Pool], *, backoff: Backoff, on_retry: Callable[[], None]) -> None:
        self._pool, self._backoff, self._on_retry = pool, backoff, on_retry

    async def run(
        self, task: Task, *, on_progress: Callable[[int], None], on_start: Callable[[float], None]
    ) -> TaskReply:
        """Do a task, which must be such that it can be done again.

        Args:
            task: What to do.
            on_progress: Called with the bytes written so far; with 0 when it begins anew.
            on_start: Called with the seconds that the task waited for a worker.

        Raises:
            CkptdError: It failed for good: an error that will not pass, or one attempt too many.
        """
        attempt = 1
        while True:
            try:
                return await self._pool().run(task, on_progress=on_progress, on_start=on_start)
            except CkptdError as error:
                wait_s = self._backoff.wait_s(attempt) if is_transient(error) else None
                if wait_s is None:
                    raise
                logger.warning("attempt %d failed, another one follows in %.1f s: %s", attempt, wait_s, error)
            await asyncio.sleep(wait_s)
            on_progress(0)
            self._on_retry()
            attempt += 1
