"""A matmul loop in the trainer: what it loses while something else is written beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

import torch

from benchmarks.samples import SlowdownSample

# 0.7 to 2.6 ms an iteration on one core of the last ten years: short beside the shortest save.
_MATMUL_WIDTH: Final = 512
_IDLE_WINDOW_S: Final = 0.75
_WARM_UP_S: Final = 0.3


def thread_counts() -> list[int]:
    """Return torch's default number of threads, and one."""
    return sorted({torch.get_num_threads(), 1}, reverse=True)


def slowdown_beside(begin: Callable[[], Future[Any]], *, threads: int, settle: Callable[[], None]) -> SlowdownSample:
    """Run the loop without and with something beside it.

    Args:
        begin: Begins it and returns the future of its end; its own time is not measured.
        threads: torch's threads meanwhile.
        settle: Cleans up behind it, before the loop runs alone again.
    """
    default = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        loop = MatmulLoop()
        loop.run_for(_WARM_UP_S)
        before = loop.run_for(_IDLE_WINDOW_S)
        end = begin()
        iterations, window_s = loop.run_until(end.done)
        end.result()
        settle()
        loop.run_for(_WARM_UP_S)
        after = loop.run_for(_IDLE_WINDOW_S)
    finally:
        torch.set_num_threads(default)
    idle_per_s = (before + after) / 2
    return SlowdownSample(threads=threads, idle_per_s=idle_per_s, during_per_s=iterations / window_s, window_s=window_s)


class MatmulLoop:
    """Multiplies matrices as fast as torch's threads can, as a trainer on the CPU does."""

    def __init__(self) -> None:
        self._factor = torch.rand(_MATMUL_WIDTH, _MATMUL_WIDTH)
        self._product = torch.empty_like(self._factor)

    def run_until(self, over: Callable[[], bool]) -> tuple[int, float]:
        """Return the number of iterations until ``over()`` and the seconds they took."""
        iterations, begun = 0, time.perf_counter()
        while not over():
            torch.mm(self._factor, self._factor, out=self._product)
            iterations += 1
        return iterations, time.perf_counter() - begun

    def run_for(self, seconds: float) -> float:
        """Return the iterations per second over so many seconds."""
        end = time.perf_counter() + seconds
        iterations, took_s = self.run_until(lambda: time.perf_counter() >= end)
        return iterations / took_s
