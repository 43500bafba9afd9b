"""What `async_save` returns: a future of the checkpoint's metadata that also tells how far the save is."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ckptd.client.failures import as_checkpoint_failure, as_failure
from ckptd.client.logging_handlers import note
from ckptd.protocol.errors import CkptdError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

# The saves of this process that have not ended, in the order in which they were begun. Who runs them holds them.
_open: weakref.WeakValueDictionary[int, SaveFuture] = weakref.WeakValueDictionary()

SaveState = Literal["scheduled", "staged", "committed", "failed"]


@dataclass(frozen=True)
class SaveProgress:
    """Bytes that are durable, and bytes in all, over all ranks."""

    bytes_done: int
    bytes_total: int


class SaveFuture(Future):  # type: ignore[type-arg]  # Future is generic only for type checkers
    """A save under way. Its result is the checkpoint's `Metadata`, built when it is asked for.

    Attributes:
        checkpoint_id: Where the checkpoint will be.
        staging_completion: Done when the last byte is staged: from then on the tensors may change, and the
            trainer may die without harm to the save.
        stall_s: Seconds for which the caller of `async_save` was held, once it has returned.
        rank: This process's rank in the job.
    """

    def __init__(self, checkpoint_id: str, read_metadata: Callable[[], Metadata]) -> None:
        super().__init__()
        self.checkpoint_id = checkpoint_id
        self.staging_completion: Future[None] = Future()
        self.stall_s = 0.0
        self.rank: int | None = None
        self._begun_s = time.monotonic()
        self._read_metadata = read_metadata
        self._metadata: Metadata | None = None
        self._building = threading.Lock()
        self._progress = SaveProgress(0, 0)
        self.set_running_or_notify_cancel()
        self.staging_completion.set_running_or_notify_cancel()
        _open[id(self)] = self
        self.add_done_callback(_close)

    @property
    def upload_completion(self) -> SaveFuture:
        """This future: done when the checkpoint is durable and visible, or has failed."""
        return self

    @property
    def state(self) -> SaveState:
        """How far the save is."""
        if self.done():
            return "failed" if super().exception() else "committed"
        staged = self.staging_completion.done() and self.staging_completion.exception() is None
        return "staged" if staged else "scheduled"

    @property
    def progress(self) -> SaveProgress:
        """Bytes done and in all."""
        return self._progress

    def result(self, timeout: float | None = None) -> Metadata:
        """Wait for the commit and return the metadata.

        Args:
            timeout: Seconds to wait; None waits until the save has ended, which the daemon's deadlines bound.

        Raises:
            CkptdError: The save failed; the cause is the same on all ranks. It is a CheckpointException, too.
            TimeoutError: It had not ended in time.
        """
        super().result(timeout)
        with self._building:
            if self._metadata is None:
                with as_checkpoint_failure():
                    self._metadata = self._read_metadata()
            return self._metadata

    # What the session calls.

    def note_progress(self, bytes_done: int, bytes_total: int) -> None:
        """The daemon has written so much."""
        self._progress = SaveProgress(bytes_done, bytes_total)

    def note_staged(self, bytes_total: int) -> None:
        """The last byte is staged."""
        if not self.done() and not self._progress.bytes_done:  # of a save in waves, much is written by now
            self._progress = SaveProgress(0, bytes_total)
        with contextlib.suppress(InvalidStateError):
            self.staging_completion.set_result(None)

    def note_committed(self) -> None:
        """The checkpoint is there."""
        if not self.done():
            self._progress = SaveProgress(self._progress.bytes_total, self._progress.bytes_total)
        with contextlib.suppress(InvalidStateError):
            self.set_result(None)
            self._tell("commit", nbytes=self._progress.bytes_total)

    def note_staging_failed(self, error: CkptdError) -> None:
        """The tensors were not staged; whether the save fails is for the daemon to say, to all ranks alike."""
        with contextlib.suppress(InvalidStateError):
            self.staging_completion.set_exception(_kept(error))

    def note_failed(self, error: CkptdError) -> None:
        """The save failed, before or after it was staged. Two threads may find so at once: the first one counts."""
        failure = _kept(error)
        with contextlib.suppress(InvalidStateError):
            self.staging_completion.set_exception(failure)
        with contextlib.suppress(InvalidStateError):
            self.set_exception(failure)
            self._tell("fail", error=failure)

    def _tell(self, phase: Literal["commit", "fail"], *, nbytes: int = 0, error: CkptdError | None = None) -> None:
        seconds = time.monotonic() - self._begun_s
        note("save", phase, self.checkpoint_id, self.rank, seconds, nbytes=nbytes, error=error)


def failed_save(checkpoint_id: str, error: CkptdError) -> SaveFuture:
    """Return the future of a save that could not even be begun."""

    def no_metadata() -> Metadata:
        raise error

    save = SaveFuture(checkpoint_id, no_metadata)
    save.note_failed(error)
    return save


def open_saves() -> list[SaveFuture]:
    """Return the saves of this process that have not ended, the oldest first."""
    return list(_open.values())


def _close(save: Future[Metadata]) -> None:
    _open.pop(id(save), None)


# A forked child has none of its parent's saves.
os.register_at_fork(after_in_child=_open.clear)


def _kept(error: CkptdError) -> CkptdError:
    """Return an error as a future may keep it: without frames, which hold the tensors that were being saved."""
    return as_failure(error).with_traceback(None)


def wait_quietly(future: Future[None], *, timeout_s: float) -> None:
    """Wait until a future is done, whatever its outcome. Raises TimeoutError."""
    begun = time.monotonic()
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    if not done.wait(timeout_s):
        raise TimeoutError(f"not done after {time.monotonic() - begun:.1f} s")
