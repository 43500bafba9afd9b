"""A worker process: plans, writes, hashes, fsyncs and commits for one job, under the trainer's uid.

Spawned, never forked from a trainer; a blocking loop over one socket. End-of-file is the order to leave. Foreseen
failures are answers; its death is one too, made by the supervisor. It loads no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
from typing import Final, assert_never

import numpy as np

from ckptd.checkpoint.folder.removal import retain
from ckptd.checkpoint.image.write import Pace, Payloads, write_image
from ckptd.checkpoint.image.write_wave import Place, finish_waves, frame_of_file, write_wave
from ckptd.checkpoint.planning.items import decode_plan
from ckptd.checkpoint.planning.plan import make_plan
from ckptd.checkpoint.planning.planfile import load_plan, store_plan, store_ranks
from ckptd.checkpoint.publishing.commit import commit, prepare_directory
from ckptd.checkpoint.publishing.leftovers import discard_save
from ckptd.checkpoint.system import closed_at_end, named
from ckptd.daemon.job.generation import RANKS_SUFFIX
from ckptd.protocol import messages
from ckptd.protocol.crash_points import CrashPoint, reach
from ckptd.protocol.errors import BadMessage, CkptdError, UnexpectedError
from ckptd.protocol.messages import (
    CommitDone,
    CommitTask,
    DiscardDone,
    DiscardTask,
    HandOverDone,
    HandOverTask,
    PlanDone,
    PlanRanks,
    PlanTask,
    Task,
    TaskFailed,
    TaskReply,
    WriteDone,
    WriteProgress,
    WriteTask,
)
from ckptd.protocol.retention_messages import RetainTask
from ckptd.protocol.wave_messages import FinishWavesTask, WaveWritten, WriteWaveTask

logger = logging.getLogger(__name__)

FRAME_LENGTH: Final = struct.Struct("<I")

# Progress is for people and deadlines: ten a second are enough for both.
_PROGRESS_INTERVAL_S: Final = 0.1

# The block layer's idle class is honoured by bfq and by mq-deadline's priorities. Source: ioprio_set(2).
_IOPRIO_SET: Final = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS: Final = 1
_IOPRIO_BEST_EFFORT_LOWEST: Final = (2 << 13) | 7

# In thousandths of all memory: as if a worker held a tenth more than it does. Source: proc(5), oom_score_adj.
_OOM_SCORE_MORE: Final = 100
_OOM_SCORE_MOST: Final = 1000
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


class _Arenas:
    """Mappings of the job's arenas, kept from save to save so that their pages are mapped once."""

    def __init__(self) -> None:
        self._views: dict[str, tuple[int, memoryview]] = {}

    def view(self, path: str) -> memoryview:
        """Return the arena's bytes, read-only. Raises SystemCallFailed."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = named("open", path, lambda: os.open(path, flags))
        with closed_at_end(descriptor, path):
            inode = os.fstat(descriptor).st_ino
            known = self._views.get(path)
            if known is None or known[0] != inode:
                self._forget_deleted()
                memory = named("mmap", path, lambda: mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
                self._views[path] = known = (inode, memoryview(memory))
        return known[1]

    def _forget_deleted(self) -> None:
        self._views = {path: view for path, view in self._views.items() if os.path.exists(path)}


class Worker:
    """Answers one task after the other."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._arenas = _Arenas()
        self._sending = threading.Lock()
        self._last_progress_s = 0.0

    def run(self) -> None:
        """Serve until the daemon closes the connection, or is gone before it has heard the answer."""
        with contextlib.suppress(ConnectionError):
            while (frame := self._receive()) is not None:
                self._send(self._answer(frame))

    def _receive(self) -> bytes | None:
        head = self._connection.recv(FRAME_LENGTH.size, socket.MSG_WAITALL)
        if len(head) < FRAME_LENGTH.size:
            return None
        (length,) = FRAME_LENGTH.unpack(head)
        parts: list[bytes] = []
        while length:
            part = self._connection.recv(min(length, 1 << 20))
            if not part:
                return None
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _send(self, reply: TaskReply) -> None:
        frame = messages.encode(reply)
        with self._sending:
            self._connection.sendall(FRAME_LENGTH.pack(len(frame)) + frame)

    def _answer(self, frame: bytes) -> TaskReply:
        try:
            return self._perform(messages.decode_task(frame))
        except CkptdError as error:
            return TaskFailed(error.report())
        except ConnectionError:
            raise  # no progress could be told: nobody is there to hear an answer either
        except Exception as bug:  # the bulkhead around one task: doing it again would meet the same bug
            logger.exception("bug in a worker")
            return TaskFailed(UnexpectedError(f"internal error: {bug!r}; see the daemon's log").report())

    def _perform(self, task: Task) -> TaskReply:
        match task:
            case PlanTask():
                return _plan(task)
            case WriteTask():
                return self._write(task)
            case WriteWaveTask():
                return self._write_wave(task)
            case FinishWavesTask():
                return _finish_waves(task)
            case CommitTask():
                return CommitDone(commit(load_plan(task.plan_path), task))
            case DiscardTask():
                discard_save(task.directory)
                return DiscardDone()
            case RetainTask():
                return retain(task)
            case HandOverTask():
                from ckptd.daemon.workers.handover import (
                    save_handed_over,  # torch, and whatever else the user's code needs
                )

                return HandOverDone(save_handed_over(task, on_item=self._progress))
        assert_never(task)

    def _write(self, task: WriteTask) -> WriteDone:
        rows = load_plan(task.plan_path).ranks[task.rank]
        lengths = rows.true_bytes(task.object_bytes)
        prepare_directory(task.directory)
        image = self._staged(task.arena_path, task.image_offset, task.image_bytes)
        written = write_image(
            os.path.join(task.directory, task.file),
            image,
            Payloads(rows.data_offset, lengths, rows.index_rows >= 0),
            pace=Pace(task.threads, task.chunk_bytes),
            on_progress=self._progress,
        )
        hashes = written.hashes.astype("<u8").tobytes()
        return WriteDone(
            written.bytes_written, hashes, written.frame_hash, written.write_s, written.fsync_s, written.direct
        )

    def _write_wave(self, task: WriteWaveTask) -> WaveWritten:
        if task.first:
            prepare_directory(task.directory)
        write_s, direct = write_wave(
            os.path.join(task.directory, task.file),
            self._staged(task.arena_path, task.wave_offset, task.nbytes),
            Place(task.begin, task.image_bytes, task.first),
            pace=Pace(task.threads, task.chunk_bytes),
            on_progress=self._progress,
        )
        return WaveWritten(write_s, direct)

    def _staged(self, arena_path: str, offset: int, nbytes: int) -> memoryview:
        staged = self._arenas.view(arena_path)[offset : offset + nbytes]
        if staged.nbytes != nbytes:
            raise BadMessage(f"an image of {nbytes} bytes that its arena does not hold")
        return staged

    def _progress(self, bytes_done: int) -> None:
        now = time.monotonic()
        if now - self._last_progress_s >= _PROGRESS_INTERVAL_S:
            self._last_progress_s = now
            self._send(WriteProgress(bytes_done))


def _finish_waves(task: FinishWavesTask) -> WriteDone:
    rows = load_plan(task.plan_path).ranks[task.rank]
    items = Payloads(rows.data_offset, rows.true_bytes(task.object_bytes), rows.index_rows >= 0)
    if len(task.hashes) != 8 * len(items.offsets):
        raise BadMessage(f"{len(task.hashes)} bytes of hashes for {len(items.offsets)} items")
    path = os.path.join(task.directory, task.file)
    fsync_s = finish_waves(path, task.image_bytes)
    # The client takes all that it stages for indexed, as a plan has it that was made before anybody had staged.
    frame_hash = task.frame_hash if items.indexed.all() else frame_of_file(path, items, task.image_bytes)
    return WriteDone(task.image_bytes, task.hashes, frame_hash, task.write_s, fsync_s, task.direct)


def _plan(task: PlanTask) -> PlanDone:
    plans = [decode_plan(data) for data in task.plans]
    fixed = [None if done is None else np.frombuffer(done, dtype="<i8") for done in task.fixed]
    plan = make_plan(plans, fixed)
    done = PlanDone(
        [mine.astype("<i8").tobytes() for mine in plan.assigned],
        [layout.image_bytes for layout in plan.layouts],
    )
    store_ranks(
        task.path + RANKS_SUFFIX, PlanRanks(task.plans, done.assigned)
    )  # first: with the plan's own file all is there
    store_plan(task.path, plan)
    reach(CrashPoint.WORKER_PLANNED)
    return done


def _step_back(nice: int) -> None:
    """Let the trainer go first, on the processor and at the disk."""
    os.nice(nice)
    number = _IOPRIO_SET.get(os.uname().machine)
    if number is not None:
        ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_BEST_EFFORT_LOWEST)


def _go_first() -> None:
    """Where memory runs out, be killed before the daemon and before trainers: a worker's work is done again."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:
        ours = int(file.read())
        file.seek(0)
        file.write(str(min(max(0, ours) + _OOM_SCORE_MORE, _OOM_SCORE_MOST)))


def _die_with(daemon: int) -> None:
    """Let the kernel end us when the daemon ends, however it does: its successor does our work again.

    Not earlier than here: a change of uid or an exec would forget it.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != daemon:
        os.kill(os.getpid(), signal.SIGKILL)  # it was dead already


def main() -> None:
    """Serve tasks from the socket whose descriptor is the first argument; then the nice value and the daemon's pid.

    With ``--users-code`` torch is loaded before the worker steps back: among cores that are all taken it would take
    minutes after that.
    """
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s worker %(process)d: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the daemon decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # and so does a service manager's stop
    if "--users-code" in sys.argv[4:]:
        importlib.import_module("ckptd.daemon.workers.handover")
    _step_back(int(sys.argv[2]))
    _go_first()
    _die_with(int(sys.argv[3]))
    Worker(socket.socket(fileno=int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
