"""Named points at which a process can be made to die, so that tests can kill it at every state change of a save.

Nothing happens unless the variable :data:`VARIABLE` names the point: then the process gets SIGKILL, from itself. Points
are listed in one place, so that one test can go through all of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
from enum import StrEnum
from typing import Final

# POINT, or POINT@FILE: with a file, only the process that can make it dies, so a successor lives.
VARIABLE: Final = "CKPTD_CRASH_AT"


class CrashPoint(StrEnum):
    """Every state change of a generation, by the process that makes it, in the order of a save."""

    CLIENT_SCHEDULED = "client.scheduled"
    CLIENT_PROPOSED = "client.proposed"
    CLIENT_ASSIGNED = "client.assigned"
    CLIENT_STAGING = "client.staging"
    CLIENT_STAGED = "client.staged"
    CLIENT_SEAL_WRITTEN = "client.seal_written"
    CLIENT_SEAL_SENT = "client.seal_sent"
    CLIENT_COMMITTED = "client.committed"

    DAEMON_PROPOSED = "daemon.proposed"
    DAEMON_PLANNED = "daemon.planned"
    DAEMON_PLAN_JOURNALED = "daemon.plan_journaled"
    DAEMON_ASSIGNED = "daemon.assigned"
    DAEMON_SEAL_HEARD = "daemon.seal_heard"
    DAEMON_SEAL_JOURNALED = "daemon.seal_journaled"
    DAEMON_WRITE_BEGUN = "daemon.write_begun"
    DAEMON_WRITTEN = "daemon.written"
    DAEMON_WRITTEN_JOURNALED = "daemon.written_journaled"
    DAEMON_COMMITTING = "daemon.committing"
    DAEMON_PUBLISHED = "daemon.published"
    DAEMON_COMMIT_JOURNALED = "daemon.commit_journaled"
    DAEMON_SLOTS_FREED = "daemon.slots_freed"
    DAEMON_COMMIT_TOLD = "daemon.commit_told"
    DAEMON_FAILURE_JOURNALED = "daemon.failure_journaled"
    DAEMON_FAILURE_TOLD = "daemon.failure_told"
    DAEMON_DISCARDED = "daemon.discarded"

    WORKER_PLANNED = "worker.planned"
    WORKER_FILE_OPENED = "worker.file_opened"
    WORKER_CHUNK_WRITTEN = "worker.chunk_written"
    WORKER_WRITTEN = "worker.written"
    WORKER_FSYNCED = "worker.fsynced"
    WORKER_INDEX_WRITTEN = "worker.index_written"
    WORKER_METADATA_WRITTEN = "worker.metadata_written"
    WORKER_DIRECTORY_SYNCED = "worker.directory_synced"
    WORKER_NAMED = "worker.named"
    WORKER_PARENT_SYNCED = "worker.parent_synced"
    WORKER_CLEARED = "worker.cleared"
    WORKER_DISCARDED = "worker.discarded"


def reach(point: CrashPoint) -> None:
    """Die here if the environment says so. Costs a look at a variable of this module."""
    if _wanted == point.value:
        _die()


def _read() -> tuple[str, str]:
    point, _, mark = os.environ.get(VARIABLE, "").partition("@")
    return point, mark


def _die() -> None:
    if _mark:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(_mark, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            os.kill(os.getpid(), signal.SIGKILL)
        return
    os.kill(os.getpid(), signal.SIGKILL)


def arm() -> None:
    """Read the environment again: for a process that was forked and given another one."""
    global _wanted, _mark
    _wanted, _mark = _read()


_wanted, _mark = _read()
