"""Copies tensors into a slot: large CPU tensors by memmove, small ones in batches, device tensors on a side stream.

All of it releases the GIL. Invariant: when :meth:`Copier.copy` returns, every byte is in the slot.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

import torch

Pair = tuple[torch.Tensor, torch.Tensor]  # target in the slot, source

# One memmove call costs 0.3 us of Python; below this size one batched call for many tensors is no dearer. Above it
# torch's copy may wake its other threads (at::internal::GRAIN_SIZE, 32768 elements): the same rate for twice the CPU
# time, and on a machine whose cores are taken, by data loaders say, it waits for them: copies of 20 ms took 400 ms.
_LARGE_BYTES: Final = 32 * 1024
# One core copies at 7 to 20 GB/s, two at almost twice that for the same CPU time: 2 GB took 295 and 159 ms on a machine
# with two, whose trainer waits for it anyway. More than four bring little on one socket.
_MAX_THREADS: Final = 4
# Blocks that threads share out; copying a shorter one takes no longer than a thread may wait for the interpreter.
_SHARED_BYTES: Final = 256 * 1024
# Longer ones are cut, so that no thread is left alone with the last.
_PART_BYTES: Final = 16 << 20


_Block = tuple[int, int, int]  # address in the slot, address of the source, bytes


class SideStream(Protocol):
    """A device's stream beside those that compute."""

    def mark(self) -> None:
        """Remember this point of the current stream: copies that follow start after it."""

    def copy(self, pairs: Sequence[Pair]) -> None:
        """Queue copies."""

    def wait(self) -> None:
        """Return when the queued copies are done."""


class CudaSideStream:
    """A CUDA stream with one event per save. Not run in CI, which has no GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device=device)
        self._ready = torch.cuda.Event()
        self._done = torch.cuda.Event()

    def mark(self) -> None:
        """Note what the trainer's stream has queued so far."""
        self._ready.record(torch.cuda.current_stream(self._device))

    def copy(self, pairs: Sequence[Pair]) -> None:
        """Queue copies behind the mark; the allocator is told that the sources are in use."""
        self._stream.wait_event(self._ready)
        try:
            with torch.cuda.stream(self._stream):
                for target, source in pairs:
                    target.copy_(source, non_blocking=True)
                    source.record_stream(self._stream)
        finally:
            self._done.record(self._stream)  # after a failure, too: what was queued is still being copied

    def wait(self) -> None:
        """Wait for the event, not for the device."""
        self._done.synchronize()


class _PlainDevice:
    """Any other accelerator: torch's own blocking copy, which always works."""

    def mark(self) -> None:
        """Copies are queued on the current stream anyway."""

    def copy(self, pairs: Sequence[Pair]) -> None:
        """Copy, one after the other."""
        for target, source in pairs:
            target.copy_(source)

    def wait(self) -> None:
        """Nothing is queued."""


def make_side_stream(device: torch.device) -> SideStream:
    """Return the side stream of a device."""
    return CudaSideStream(device) if device.type == "cuda" else _PlainDevice()


class Copier:
    """Copies sets of tensors; one per session, so that streams and threads are made once."""

    def __init__(self, *, threads: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0))
        self._threads = threads or min(_MAX_THREADS, cores, max(2, cores // 4))
        self._helpers = self._threads - 1  # the caller copies, too
        self._pool = ThreadPoolExecutor(self._helpers, thread_name_prefix="ckptd-copy") if self._helpers else None
        self._streams: dict[torch.device, SideStream] = {}

    def mark(self, devices: set[torch.device]) -> None:
        """Note the point in the trainer's streams up to which its work is part of the save.

        Args:
            devices: The devices that hold tensors of the save.
        """
        for device in devices:
            self._stream(device).mark()

    def _stream(self, device: torch.device) -> SideStream:
        if device not in self._streams:
            self._streams[device] = make_side_stream(device)
        return self._streams[device]

    def copy(self, pairs: Sequence[Pair]) -> None:
        """Copy each source into its target; same shape and dtype, targets contiguous and in host memory."""
        on_device: dict[torch.device, list[Pair]] = {}
        large: list[_Block] = []
        batch: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        rest: list[Pair] = []
        for pair in pairs:
            target, source = pair
            if not source.is_cpu:
                on_device.setdefault(source.device, []).append(pair)
            elif not source.is_contiguous() or source.is_conj() or source.is_neg():
                rest.append(pair)
            elif source.nbytes >= _LARGE_BYTES:
                large.append((target.data_ptr(), source.data_ptr(), source.nbytes))
            elif source.nbytes:
                batch[0].append(target)
                batch[1].append(source)
        try:
            with torch.no_grad():
                for device, mine in on_device.items():
                    self._stream(device).copy(mine)
                self._copy_large(large)
                if batch[0]:
                    torch._foreach_copy_(*batch)
                for target, source in rest:
                    target.copy_(source)
        finally:  # after a failure, too: the slot may be given to another save
            for device in on_device:
                self._stream(device).wait()

    def _copy_large(self, blocks: list[_Block]) -> None:
        shared = [part for block in blocks if block[2] >= _SHARED_BYTES for part in _parts(block)]
        if self._pool is None or len(shared) < 2:
            _copy_all(iter(blocks))
            return
        left = iter(shared)  # taken from by all: each takes the next
        helpers = [self._pool.submit(_copy_all, left) for _ in range(self._helpers)]
        try:
            _copy_all(block for block in blocks if block[2] < _SHARED_BYTES)
            _copy_all(left)
        finally:  # after an interrupt, too: nobody may still copy into a slot that is given back
            for helper in helpers:
                if not helper.cancel():  # one that has not begun on a busy machine is not waited for
                    helper.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _copy_all(blocks: Iterator[_Block]) -> None:
    for block in blocks:
        ctypes.memmove(*block)


def _parts(block: _Block) -> Iterator[_Block]:
    target, source, nbytes = block
    for at in range(0, nbytes, _PART_BYTES):
        yield target + at, source + at, min(_PART_BYTES, nbytes - at)
