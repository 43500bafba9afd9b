"""A new configuration for a daemon that runs: what may change at once, and what waits for a restart.

The running configuration is one object that every part of the daemon holds. A reload writes into it the settings that
are looked up each time they are used; the others keep their value, so nobody ever sees half a change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from msgspec.structs import force_setattr

from ckptd.daemon.settings.config import Config

# Looked up when they are used: by the next write, pool of workers, job or stop. A setting that is not named here was
# given away when the daemon or a session began: the two ends of a session must agree about their heartbeat, and a
# socket or a tmpfs does not move.
LIVE: Final = frozenset(
    {
        "workers_per_job",
        "write_threads",
        "write_chunk_bytes",
        "worker_nice",
        "progress_timeout_s",
        "idle_exit_s",
        "stop_timeout_s",
        "node_cache_bytes",
        "node_cache_wait_s",
        "orphan_timeout_s",
        "retain_s",
        "work_attempts",
        "write_attempts",
        "write_retry_s",
    }
)


@dataclass(frozen=True)
class Reload:
    """What a reload did. ``changed``: in force now; ``waiting``: differ from the file until the daemon restarts."""

    changed: tuple[str, ...]
    waiting: tuple[str, ...]

    def __str__(self) -> str:
        changed = f"changed {', '.join(self.changed)}" if self.changed else "nothing changed"
        return f"{changed}; restart needed for {', '.join(self.waiting)}" if self.waiting else changed


def apply(running: Config, wanted: Config) -> Reload:
    """Bring the settings that may change from ``wanted`` into ``running``."""
    differ = [name for name in Config.__struct_fields__ if getattr(running, name) != getattr(wanted, name)]
    changed = tuple(name for name in differ if name in LIVE)
    for name in changed:
        force_setattr(running, name, getattr(wanted, name))
    return Reload(changed, tuple(name for name in differ if name not in LIVE))
