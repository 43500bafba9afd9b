"""What a job's saves need of the job and of the daemon, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ckptd.daemon.job.jobfiles import JobFiles
from ckptd.daemon.job.retention import Retention
from ckptd.daemon.monitoring.metrics import Metrics
from ckptd.daemon.recovery.job_log import JobLog
from ckptd.daemon.recovery.journal import Journal
from ckptd.daemon.session.sessions import Session
from ckptd.daemon.settings.config import Config
from ckptd.daemon.workers.supervisor import WorkerPool
from ckptd.protocol.messages import DaemonMessage
from ckptd.protocol.session import Roster


class Send(Protocol):
    """How a job speaks to its ranks."""

    def __call__(self, session: Session, message: DaemonMessage) -> None:
        """Send ``message``; a session that is gone is no error."""


@dataclass(frozen=True)
class JobContext:
    """What all jobs of a daemon share. ``root``: its directory on tmpfs; ``user_code``: whether users' code may run."""

    config: Config
    metrics: Metrics
    send: Send
    root: str
    journal: Journal
    user_code: bool = True


class Crew(Protocol):
    """Who takes part in a job's saves, and what they share."""

    name: str
    log: JobLog
    roster: Roster
    sessions: dict[int, Session]
    files: JobFiles
    pool: WorkerPool | None
    progress_timeout_s: float

    @property
    def retention(self) -> Retention:
        """Removes old checkpoints after commits."""

    def open_user_pool(self) -> WorkerPool:
        """Return the worker for users' own code. Raises Unsupported where none may run."""

    def release_retired(self) -> None:
        """A generation ended: arenas of ended sessions may no longer be needed."""
