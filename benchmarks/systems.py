"""The ways to save that are compared: ckptd, and stock torch's three, each behind the same few calls.

Every one is used as its own documentation says is fastest: stock's process executor keeps its staging memory, ckptd its
arena, from save to save.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import psutil
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.workload import StateDict

if TYPE_CHECKING:
    from ckptd.client import Session

WAVE_SLOTS: Final = 2
WAVE_SLOT_BYTES: Final = 64 << 20
_DAEMON_ENDS_WITHIN_S: Final = 60.0


@dataclass(frozen=True)
class Pending:
    """A save under way.

    Attributes:
        durable: Done when the checkpoint is there.
        staged: Done when the tensors may change; None if they may since the call returned.
    """

    durable: Future[Any]
    staged: Future[None] | None = None


class System(Protocol):
    """One way to save and load."""

    def open(self, state: StateDict) -> None:
        """Do what is done once, ahead of the first save."""

    def begin(self, state: StateDict, path: Path) -> Pending:
        """Begin a save, as the trainer would."""

    def daemons(self) -> list[int]:
        """Return the pids of processes that work for this system and need not be descendants of the trainer."""

    def close(self) -> None:
        """End every process that was started."""

    def load(self, state: StateDict, path: Path) -> None:
        """Load a checkpoint of this system into tensors that are there; called after :meth:`close`."""


class _Stock:
    """What stock's three ways have in common."""

    def open(self, state: StateDict) -> None:
        """Nothing to do."""

    def daemons(self) -> list[int]:
        """Return none: all are descendants of the trainer."""
        return []

    def close(self) -> None:
        """Nothing to do."""

    def load(self, state: StateDict, path: Path) -> None:
        """Load with stock's `load`."""
        stock.load(state, checkpoint_id=path)


class Sync(_Stock):
    """Stock's `save`: the trainer writes."""

    def begin(self, state: StateDict, path: Path) -> Pending:
        """Save; the future is done."""
        durable: Future[Any] = Future()
        durable.set_result(stock.save(state, checkpoint_id=path))
        return Pending(durable)


class Thread(_Stock):
    """Stock's `async_save` as it is by default: a thread of the trainer writes."""

    def begin(self, state: StateDict, path: Path) -> Pending:
        """Stage, and leave the rest to the thread."""
        durable = stock.async_save(state, checkpoint_id=path)
        assert isinstance(durable, Future)  # AsyncSaveResponse comes only from stagers that are asynchronous
        return Pending(durable)


class Process(_Stock):
    """Stock's `async_save` with the process executor and staging memory that is shared and kept."""

    def __init__(self) -> None:
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=True,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )
        self._rendezvous = tempfile.mkdtemp(prefix="ckptd-bench-")

    def open(self, state: StateDict) -> None:
        """Make the process group that the executor insists on."""
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # or the executor looks the host's name up
        dist.init_process_group("gloo", init_method=f"file://{self._rendezvous}/store", rank=0, world_size=1)

    def begin(self, state: StateDict, path: Path) -> Pending:
        """Stage into shared memory, and leave the rest to the process."""
        durable = stock.async_save(
            state,
            checkpoint_id=path,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=self._stager,
        )
        assert isinstance(durable, Future)
        return Pending(durable)

    def close(self) -> None:
        """End the process group; torch ends its child with this process."""
        self._stager.close()
        dist.destroy_process_group()
        shutil.rmtree(self._rendezvous, ignore_errors=True)


class Ckptd:
    """ckptd with a daemon of its own, embedded, as it is by default.

    Attributes:
        is_plain: Whether it is used as it is by default; then it is held against the machine's limits, too.
        in_background: Stage saves in the background; what `connect(staging="background")` does for all saves.
    """

    def __init__(self) -> None:
        self.is_plain = type(self) is Ckptd
        self.in_background = False
        self._runtime = tempfile.mkdtemp(prefix="ckptd-bench-")
        os.environ.update(CKPTD_RUNTIME_DIR=self._runtime, CKPTD_STATE_DIR=self._runtime)
        os.environ.pop("CKPTD_CONFIG", None)
        os.environ.pop("CKPTD_EMBEDDED", None)
        import ckptd.client as dcp

        self._dcp = dcp
        self._session: Session | None = None
        self._daemon_left: list[int] = []  # its pid, once the session has ended before it
        # Asking for the asynchronous stager turns background staging on for one save, so that no second arena is
        # needed to measure it.
        self._background_stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=False,
                use_async_staging=True,
                use_non_blocking_copy=False,
            )
        )

    def open(self, state: StateDict) -> None:
        """Start the daemon, plan, make and touch the arena."""
        self._session = self._dcp.connect(state_dict=state)

    def begin(self, state: StateDict, path: Path) -> Pending:
        """Stage into the arena, and leave the rest to the daemon."""
        stager = self._background_stager if self.in_background else None
        future = self._dcp.async_save(state, checkpoint_id=path, async_stager=stager)
        return Pending(future, future.staging_completion)

    def daemons(self) -> list[int]:
        """Return the daemon's pid."""
        return self._daemon_left if self._session is None else [self._session.daemon_pid]

    def close(self) -> None:
        """End the session, then the daemon and its workers."""
        daemons, self._daemon_left = self.daemons(), []
        if self._session is not None:
            self._session.close()
            self._session = None
        for pid in daemons:
            with suppress(psutil.NoSuchProcess):
                daemon = psutil.Process(pid)
                daemon.send_signal(signal.SIGTERM)
                daemon.wait(_DAEMON_ENDS_WITHIN_S)
        self._background_stager.close()
        shutil.rmtree(self._runtime, ignore_errors=True)

    def load(self, state: StateDict, path: Path) -> None:
        """Load with ckptd's `load`, which needs no daemon."""
        self._dcp.load(state, checkpoint_id=path)

    def end_session(self) -> None:
        """End the session, as a trainer's end does; the daemon stays, and keeps the last save for a while."""
        assert self._session is not None
        self._daemon_left = self.daemons()
        self._session.close()
        self._session = None

    def load_verified(self, state: StateDict, path: Path, *, verify: bool) -> str:
        """Load with or without holding items against their hashes; return where the bytes came from."""
        report = self._dcp.load(state, checkpoint_id=path, verify=verify)
        assert report is not None  # there is one wherever no planner or reader of the caller's own decides
        return report.source


class CkptdWaves(Ckptd):
    """ckptd with memory for two waves only: the trainer is held while the disk takes the state, wave by wave."""

    def open(self, state: StateDict) -> None:
        """Start the daemon, plan, make and touch the ring."""
        self._session = self._dcp.connect(
            state_dict=state, staging="waves", slots=WAVE_SLOTS, slot_bytes=WAVE_SLOT_BYTES
        )


SYSTEMS: Final[dict[str, Callable[[], System]]] = {
    "ckptd": Ckptd,
    "waves": CkptdWaves,
    "sync": Sync,
    "thread": Thread,
    "process": Process,
}
