"""Tasks in threads, none of whose failures is lost.

Stock's writer threads swallow what they raise: the save succeeds and the load fails (pytorch/pytorch#191391).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ckptd.protocol.errors import SeveralFailed

T = TypeVar("T")


class Stopped(Exception):
    """Another task has failed: this one gives up. Never leaves :func:`run_all`."""


def run_all(tasks: Sequence[Callable[[Callable[[], None]], T]], *, threads: int) -> list[T]:
    """Run all tasks and return their results in order.

    Args:
        tasks: Each is given a function that it calls now and then; it raises once another task has failed.
        threads: How many run at a time; one runs in the calling thread.

    Raises:
        SeveralFailed: More than one failed; all are told. One failure is raised as it is.
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    def run(task: Callable[[Callable[[], None]], T]) -> T:
        try:
            check()
            return task(check)
        except BaseException:
            stop.set()
            raise

    if threads == 1 or len(tasks) <= 1:
        return [run(task) for task in tasks]
    with ThreadPoolExecutor(min(threads, len(tasks)), thread_name_prefix="ckptd-storage") as pool:
        futures = [pool.submit(run, task) for task in tasks]
    failures = [error for future in futures if (error := future.exception()) is not None]
    causes = [error for error in failures if not isinstance(error, Stopped)]
    if len(causes) == 1 or any(not isinstance(cause, Exception) for cause in causes):
        raise next((cause for cause in causes if not isinstance(cause, Exception)), causes[0])
    if causes:
        told = "; ".join(dict.fromkeys(str(cause) or type(cause).__name__ for cause in causes))
        raise SeveralFailed(len(causes), told) from causes[0]
    return [future.result() for future in futures]
