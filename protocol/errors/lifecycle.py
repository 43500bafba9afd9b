"""Plans that do not fit together; processes, sessions and deadlines that came to their end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ckptd.protocol.errors.base import LifecycleError, PlanError


@dataclass(eq=False)
class BadPlan(PlanError, ValueError):
    """The items of the ranks leave a gap, overlap or contradict each other. A ValueError, as torch's own."""

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
class SessionUnknown(LifecycleError):
    """A client came back to a daemon that does not know its session: its journal is gone, or the session was lost."""

    code: ClassVar[str] = "session_unknown"
    job: str

    def __str__(self) -> str:
        return f"the daemon does not know this session of job {self.job!r} any more; connect again"


@dataclass(eq=False)
class SessionClosed(LifecycleError):
    """The session was closed, or a newer incarnation of the job took over."""

    code: ClassVar[str] = "session_closed"
    reason: str

    def __str__(self) -> str:
        return f"the session is closed: {self.reason}"
