"""The one tree of errors, and how they cross processes.

The class is the kind, the fields are the facts, ``__str__`` is one line (what, where, what to do), ``code`` is the
name on the wire. Errors travel as :class:`ErrorReport`, never as pickles.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final

import msgspec

Fact = str | int | float | None


class ErrorReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An error as it crosses a process border."""

    code: str
    facts: dict[str, Fact]


class CkptdError(RuntimeError):
    """Base of every error that ckptd raises. Derives from RuntimeError, as most of torch's do."""

    code: ClassVar[str] = "error"

    def report(self) -> ErrorReport:
        """Return this error in the form that crosses processes."""
        facts = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return ErrorReport(self.code, facts)


class RequestError(CkptdError):
    """The caller asked for something that cannot be had as asked."""


class CapacityError(CkptdError):
    """Memory, a slot or disk space is lacking."""


class StorageError(CkptdError):
    """Bytes could not be written, read or trusted."""


class PlanError(CkptdError):
    """The ranks' items do not make up one checkpoint."""


class LifecycleError(CkptdError):
    """A process, a session or a deadline came to its end."""


@dataclass(eq=False)
class UnexpectedError(CkptdError):
    """A bug, or an error that a newer peer knows and we do not."""

    code: ClassVar[str] = "unexpected"
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(eq=False)
class BadMessage(RequestError):
    """A frame that is not one of our messages."""

    code: ClassVar[str] = "bad_message"
    reason: str

    def __str__(self) -> str:
        return f"not a ckptd message: {self.reason}; is the other side a ckptd of the same version?"


@dataclass(eq=False)
class ProtocolMismatch(RequestError):
    """Client and daemon speak different versions of the protocol."""

    code: ClassVar[str] = "protocol_mismatch"
    client: int
    daemon: int

    def __str__(self) -> str:
        older = "client" if self.client < self.daemon else "daemon"
        versions = f"client speaks protocol {self.client}, daemon speaks {self.daemon}"
        return f"{versions}: upgrade the {older} (pip install --upgrade ckptd) and restart it"


@dataclass(eq=False)
class WrongToken(RequestError):
    """A message carried a token that opens no session."""

    code: ClassVar[str] = "wrong_token"

    def __str__(self) -> str:
        return "the token opens no session of this daemon; call ckptd.client.connect() again"


@dataclass(eq=False)
class Forbidden(RequestError):
    """The peer's uid, which the kernel told us, may not use this daemon."""

    code: ClassVar[str] = "forbidden"
    uid: int
    owner_uid: int

    def __str__(self) -> str:
        return (
            f"uid {self.uid} may not use the daemon of uid {self.owner_uid}; start your own or use the system service"
        )


@dataclass(eq=False)
class RankTaken(RequestError):
    """A live session already holds this rank of the job."""

    code: ClassVar[str] = "rank_taken"
    job: str
    rank: int
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} of job {self.job!r} is held by pid {self.pid}; give this job another name"


@dataclass(eq=False)
class RankMismatch(RequestError):
    """Ranks of one job disagree about what they are doing."""

    code: ClassVar[str] = "rank_mismatch"
    rank: int
    theirs: str
    ours: str

    def __str__(self) -> str:
        return f"rank {self.rank} sent {self.theirs}, but the others {self.ours}; all ranks must make the same calls"


@dataclass(eq=False)
class MultiNode(RequestError):
    """The job's ranks are on several nodes."""

    code: ClassVar[str] = "multi_node"
    world_size: int
    local_ranks: int

    def __str__(self) -> str:
        return (
            f"the job has {self.world_size} ranks, {self.local_ranks} of them on this node: "
            "jobs across nodes are not supported yet; save with one node's ranks or with torch"
        )


@dataclass(eq=False)
class Unsupported(RequestError):
    """An argument or a value that ckptd cannot save or load."""

    code: ClassVar[str] = "unsupported"
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what} is not supported; {self.remedy}"


@dataclass(eq=False)
class BadConfig(RequestError):
    """A configuration file, a variable of the environment or an option that cannot be used as it is."""

    code: ClassVar[str] = "bad_config"
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(eq=False)
class UnknownCheckpoint(RequestError):
    """There is no checkpoint under this id."""

    code: ClassVar[str] = "unknown_checkpoint"
    path: str

    def __str__(self) -> str:
        return f"no checkpoint at {self.path}: neither .ckptd nor .metadata is there; check the checkpoint id"


@dataclass(eq=False)
class MissingKeys(RequestError):
    """The state dict asks for keys that the checkpoint does not hold."""

    code: ClassVar[str] = "missing_keys"
    path: str
    count: int
    first: str

    def __str__(self) -> str:
        return (
            f"Missing key in checkpoint state_dict: {self.first} ({self.count} in all, {self.path}); "
            "load with DefaultLoadPlanner(allow_partial_load=True) to skip them"
        )


@dataclass(eq=False)
class Mismatch(RequestError):
    """A key's shape or kind in the checkpoint is not what the state dict wants."""

    code: ClassVar[str] = "mismatch"
    key: str
    wanted: str
    stored: str

    def __str__(self) -> str:
        return f"{self.key}: the state dict wants {self.wanted}, the checkpoint holds {self.stored}"


@dataclass(eq=False)
class ShmTooSmall(CapacityError):
    """The staging arena does not fit into shared memory."""

    code: ClassVar[str] = "shm_too_small"
    path: str
    wanted_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        return (
            f"staging needs {self.wanted_bytes} bytes of shared memory, {self.path} has {self.free_bytes} free; "
            "enlarge it, or use fewer or smaller slots (connect(slots=..., slot_bytes=...))"
        )


@dataclass(eq=False)
class SlotTooSmall(CapacityError):
    """The state of this rank does not fit into a slot of the size that was asked for."""

    code: ClassVar[str] = "slot_too_small"
    wanted_bytes: int
    slot_bytes: int

    def __str__(self) -> str:
        sizes = f"this rank's part needs {self.wanted_bytes} bytes, a slot has {self.slot_bytes}"
        return f"{sizes}; raise connect(slot_bytes=...) or leave it out"


@dataclass(eq=False)
class SlotsBusy(CapacityError):
    """All slots still hold saves that are being made durable."""

    code: ClassVar[str] = "slots_busy"
    slots: int
    waited_s: float

    def __str__(self) -> str:
        waited = f"all {self.slots} slots are still being written after {self.waited_s:.1f} s"
        return f"{waited}; save less often, or connect(slots=...) with more"


@dataclass(eq=False)
class SaveSkipped(CapacityError):
    """The save was left out because all slots were busy and the policy is skip."""

    code: ClassVar[str] = "save_skipped"
    checkpoint_id: str
    rank: int

    def __str__(self) -> str:
        return f"save of {self.checkpoint_id} skipped: rank {self.rank} had no free slot and on_busy is 'skip'"


@dataclass(eq=False)
class DiskFull(CapacityError):
    """The volume of the checkpoint has too little room."""

    code: ClassVar[str] = "disk_full"
    path: str
    wanted_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        return f"{self.path}: {self.wanted_bytes} bytes wanted, {self.free_bytes} free; free space and save again"


@dataclass(eq=False)
class SystemCallFailed(StorageError):
    """A system call on a file of the checkpoint failed."""

    code: ClassVar[str] = "system_call_failed"
    call: str
    path: str
    errno: int

    def __str__(self) -> str:
        return f"{self.call} {self.path}: {os.strerror(self.errno)} (errno {self.errno})"


@dataclass(eq=False)
class RankFailed(StorageError):
    """One rank's part failed; the cause of every rank's failure."""

    code: ClassVar[str] = "rank_failed"
    rank: int
    cause_code: str
    cause: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.cause}"


@dataclass(eq=False)
class MissingFile(StorageError):
    """A file that the index names is not there."""

    code: ClassVar[str] = "missing_file"
    path: str

    def __str__(self) -> str:
        return f"{self.path} is missing though the index names it; restore it or load another checkpoint"


@dataclass(eq=False)
class TruncatedFile(StorageError):
    """A file is shorter than its index says."""

    code: ClassVar[str] = "truncated_file"
    path: str
    wanted_bytes: int
    found_bytes: int

    def __str__(self) -> str:
        sizes = f"{self.path} has {self.found_bytes} bytes, the index needs {self.wanted_bytes}"
        return f"{sizes}: it was cut short; load another checkpoint"


@dataclass(eq=False)
class WrongBits(StorageError):
    """The bytes of an item are not those that were saved."""

    code: ClassVar[str] = "wrong_bits"
    path: str
    item: str
    offset: int

    def __str__(self) -> str:
        where = f"{self.path}: item {self.item!r} at offset {self.offset} does not match its hash"
        return f"{where}: the file was damaged after it was saved; load another checkpoint"


@dataclass(eq=False)
class BadIndex(StorageError):
    """An index or metadata file that cannot be read or trusted."""

    code: ClassVar[str] = "bad_index"
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; load another checkpoint"


@dataclass(eq=False)
class WriteIncomplete(StorageError):
    """A rank's report does not cover its plan."""

    code: ClassVar[str] = "write_incomplete"
    rank: int
    planned_bytes: int
    written_bytes: int

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.written_bytes} of {self.planned_bytes} bytes reported durable"


@dataclass(eq=False)
class BadPlan(PlanError):
    """The items of the ranks leave a gap, overlap or contradict each other."""

    code: ClassVar[str] = "bad_plan"
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@dataclass(eq=False)
class RankLost(LifecycleError):
    """A rank's process ended, or fell silent, before its part was staged."""

    code: ClassVar[str] = "rank_lost"
    rank: int
    pid: int
    reason: str

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid}) {self.reason} before its part was staged; restart the job"


@dataclass(eq=False)
class DeadlineExceeded(LifecycleError):
    """Nothing happened for longer than the caller allows."""

    code: ClassVar[str] = "deadline_exceeded"
    what: str
    after_s: float

    def __str__(self) -> str:
        return f"{self.what}: nothing happened for {self.after_s:.1f} s"


@dataclass(eq=False)
class WorkerDied(LifecycleError):
    """A worker process ended without an answer, more often than work is done again."""

    code: ClassVar[str] = "worker_died"
    pid: int
    exit_status: int
    attempts: int

    def __str__(self) -> str:
        return f"worker pid {self.pid} died (status {self.exit_status}), attempt {self.attempts}; see the daemon's log"


@dataclass(eq=False)
class DaemonUnavailable(LifecycleError):
    """No daemon runs, and none may or could be started."""

    code: ClassVar[str] = "daemon_unavailable"
    path: str
    reason: str

    def __str__(self) -> str:
        return f"no ckptd daemon at {self.path}: {self.reason}"


@dataclass(eq=False)
class DaemonLost(LifecycleError):
    """The daemon went away while a save was under way."""

    code: ClassVar[str] = "daemon_lost"
    path: str

    def __str__(self) -> str:
        return f"the daemon at {self.path} went away before the save was committed; start it and save again"


@dataclass(eq=False)
class ShuttingDown(LifecycleError):
    """The daemon is stopping: it finishes what is sealed and takes nothing new."""

    code: ClassVar[str] = "shutting_down"

    def __str__(self) -> str:
        return "the daemon is shutting down; it finishes sealed saves and takes no new ones"


@dataclass(eq=False)
class SessionClosed(LifecycleError):
    """The session was closed, or a newer incarnation of the job took over."""

    code: ClassVar[str] = "session_closed"
    reason: str

    def __str__(self) -> str:
        return f"the session is closed: {self.reason}"


def _leaves(kind: type[CkptdError]) -> dict[str, type[CkptdError]]:
    found = {kind.code: kind} if "code" in vars(kind) else {}
    for sub in kind.__subclasses__():
        found |= _leaves(sub)
    return found


BY_CODE: Final[dict[str, type[CkptdError]]] = _leaves(CkptdError)


def from_report(report: ErrorReport) -> CkptdError:
    """Return the error that a report describes; one that is unknown or does not fit becomes UnexpectedError."""
    kind = BY_CODE.get(report.code)
    facts: dict[str, Any] = dict(report.facts)
    if kind is not None and kind is not CkptdError and {f.name for f in fields(kind)} == set(facts):  # type: ignore[arg-type]
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            error = kind(**facts)
            str(error)  # facts of a wrong type show when they are told
            return error
    return UnexpectedError(f"{report.code}: " + ", ".join(f"{k}={v}" for k, v in facts.items()))


def for_rank(rank: int, error: CkptdError) -> CkptdError:
    """Return ``error`` as the failure of ``rank``, unless it already names a rank."""
    return error if hasattr(error, "rank") else RankFailed(rank, error.code, str(error))
