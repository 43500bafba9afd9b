"""The daemon under a service manager: readiness, signs of life, what it is working on, reload and stop.

Invariant: a sign of life goes out only after a message went the whole way that a client's message goes, so a daemon
whose loop or message socket hangs is killed by the watchdog and started again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from typing import Any, Final, Protocol, cast

from ckptd.daemon.settings.config import Config, default_config_path, load_config
from ckptd.daemon.settings.reload import apply
from ckptd.daemon.systemd.notify import Notifier, choose_listener, take_listeners, watchdog_s
from ckptd.protocol.errors import BadConfig

logger = logging.getLogger(__name__)

# People look at the status; twice a second would be no news to them.
_TICK_S: Final = 1.0
# Signs of life for each that the watchdog wants: one may be late. Source: sd_watchdog_enabled(3) asks for two.
_SIGNS: Final = 3
# Seconds that the end takes beyond the saves themselves: closing workers and sockets.
_TEAR_DOWN_S: Final = 30.0
# States of a save that is over; see State in protocol/save.py.
_ENDED: Final = ("committed", "failed")


# Least level of logging, and its number in syslog(3).
_JOURNAL_LEVELS: Final = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.NOTSET, 7))


class Probed(Protocol):
    """What has to live."""

    async def answers(self, *, timeout_s: float) -> bool:
        """Say whether a message went from a socket of ours through the whole of it."""


class Managed:
    """One daemon's relation to its service manager; all of it is silent where there is none.

    Args:
        config: The running configuration, into which a reload writes.
        mode: How the daemon runs, which decides where its file is looked for.
        status: Returns what ``/status`` shows.
    """

    def __init__(self, config: Config, mode: str, status: Callable[[], dict[str, object]]) -> None:
        self._config, self._default_path, self._status = config, default_config_path(mode), status
        self._notifier = Notifier.from_environment()
        self._watchdog_s = watchdog_s()
        self._note = ""
        self._silent = False
        self.owns_listener = False

    def listener(self, path: str) -> socket.socket | None:
        """Return the attach socket that the manager bound ahead, or None where the daemon binds its own."""
        chosen = choose_listener(take_listeners(), path)
        self.owns_listener = chosen is not None
        return chosen

    def ready(self) -> None:
        """The sockets are bound."""
        self._notifier.ready(self._work())

    def stopping(self) -> None:
        """The daemon finishes what is sealed."""
        self._notifier.stopping(f"stopping; {self._work()}", most_s=self._config.stop_timeout_s + _TEAR_DOWN_S)

    async def watch(self, probed: Probed) -> None:
        """Tell of life and work until cancelled."""
        if not self._notifier.active:
            await asyncio.Event().wait()
        tick_s = _TICK_S if self._watchdog_s is None else min(_TICK_S, self._watchdog_s / _SIGNS)
        while True:
            if await probed.answers(timeout_s=tick_s):
                self._silent = False
                if self._watchdog_s is not None:
                    self._notifier.alive()
            elif not self._silent:
                self._silent = True
                logger.error("the message socket does not answer: no more signs of life for the service manager")
            self._notifier.status(self._work())
            await asyncio.sleep(tick_s)

    def reload(self) -> None:
        """Read the configuration again; a file that cannot be used changes nothing."""
        self._notifier.reloading()
        try:
            done = apply(self._config, load_config(self._default_path))
        except BadConfig as error:
            self._note = f"old configuration kept: {error}"
            logger.error("reload: %s", self._note)
        else:
            self._note = f"restart needed for {', '.join(done.waiting)}" if done.waiting else ""
            logger.info("reload: %s", done)
        self._notifier.ready(self._work())

    def _work(self) -> str:
        work = describe_work(cast("list[dict[str, Any]]", self._status()["jobs"]))
        return f"{work}; {self._note}" if self._note else work


class JournalFormatter(logging.Formatter):
    """Lines as a service manager's journal takes them: their level before them, without a time of their own."""

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, with the level in the form that sd-daemon(3) describes."""
        level = next(number for least, number in _JOURNAL_LEVELS if record.levelno >= least)
        return f"<{level}>{super().format(record)}"


def log_formatter() -> logging.Formatter:
    """Return how log lines look: to a journal, which keeps time and level, or to anybody else."""
    if os.environ.get("JOURNAL_STREAM"):
        return JournalFormatter()
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def on_hangup(reload: Callable[[], None], stop: Callable[[], None]) -> Callable[[], None]:
    """Return what SIGHUP means: the configuration is new, or, of a daemon in a terminal, the terminal is gone."""
    return stop if os.isatty(0) else reload


def describe_work(jobs: list[dict[str, Any]]) -> str:
    """Return in one line what jobs, as ``/status`` shows them, are at."""
    ranks = sum(len(job["sessions"]) for job in jobs)
    attached = sum(bool(job["sessions"]) for job in jobs)
    saves = [save for job in jobs for save in job["generations"]]
    running = [save for save in saves if save["state"] not in _ENDED]
    parts = [_counted(attached, "job") + " with " + _counted(ranks, "rank") if ranks else "no jobs"]
    if running:
        done, total = (sum(save[key] for save in running) for key in ("bytes_done", "bytes_total"))
        parts.append(f"saving {_counted(len(running), 'checkpoint')}" + (f", {100 * done // total} %" if total else ""))
    newest = max(saves, key=lambda save: float(save["started_unix_s"]), default=None)
    if newest is not None and newest["error"]:
        parts.append("the last save failed")
    return "; ".join(parts)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
