"""The service manager's protocols in a few lines of our own: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).

Invariant: a service manager that is not there, is slow or has gone is never an error: the daemon serves all the same.
The variables are taken out of the environment, so that no worker speaks in the daemon's name.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from typing import Final

logger = logging.getLogger(__name__)

# Descriptors that are handed over begin behind stderr. Source: sd_listen_fds(3), SD_LISTEN_FDS_START.
_FIRST_LISTENER: Final = 3
# __SO_ACCEPTCON of the kernel's include/linux/net.h.
_LISTENS: Final = 1 << 16
# Of a datagram's lines, the one that people read: longer text is cut by whoever shows it.
_STATUS_CHARACTERS: Final = 500


class Notifier:
    """Speaks to the service manager that started this process.

    Args:
        address: Path of its datagram socket; one that begins with ``@`` is abstract, an empty one is nobody's.
    """

    def __init__(self, address: str) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._complained = False
        self._status = ""

    @classmethod
    def from_environment(cls) -> Notifier:
        """Return the notifier of the manager that NOTIFY_SOCKET names, which is taken out of the environment."""
        return cls(os.environ.pop("NOTIFY_SOCKET", ""))

    @property
    def active(self) -> bool:
        """Whether anybody listens."""
        return bool(self._address)

    def ready(self, status: str) -> None:
        """Say that clients are served from now on, or again after a reload."""
        self._send(f"READY=1\n{self._take_status(status)}")

    def reloading(self) -> None:
        """Say that the configuration is being read; :meth:`ready` ends it."""
        # Without the time systemd would not know this from an older reload. Source: sd_notify(3), "RELOADING=1".
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str, *, most_s: float) -> None:
        """Say that the end has begun and may take ``most_s`` seconds, whatever the unit's TimeoutStopSec is."""
        self._send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(most_s * 1e6)}\n{self._take_status(status)}")

    def alive(self) -> None:
        """Give the sign of life for which the watchdog waits."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Tell people what is going on; said once, it is not said again."""
        if _one_line(text) != self._status:
            self._send(self._take_status(text))

    def _take_status(self, text: str) -> str:
        self._status = _one_line(text)
        return f"STATUS={self._status}"

    def _send(self, lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            ) as sender:
                sender.sendto(lines.encode("utf-8", "replace"), self._address)
        except OSError as error:
            # A full queue empties itself, and the next sign of life comes soon.
            if error.errno != errno.EAGAIN and not self._complained:
                self._complained = True
                logger.warning("the service manager cannot be told: %s", error)


def watchdog_s() -> float | None:
    """Return within how many seconds a sign of life must come each time, or None if nobody waits for one."""
    usec, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    if not usec.isdecimal() or not int(usec) or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 1e6


def take_listeners() -> list[socket.socket]:
    """Return the sockets that the service manager bound for this process; each call after the first returns none."""
    names = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
    count, pid, _ = (os.environ.pop(name, "") for name in names)
    if not count.isdecimal() or pid != str(os.getpid()):
        return []
    listeners = []
    for descriptor in range(_FIRST_LISTENER, _FIRST_LISTENER + int(count)):
        os.set_inheritable(descriptor, False)
        listeners.append(socket.socket(fileno=descriptor))
    return listeners


def choose_listener(listeners: list[socket.socket], path: str) -> socket.socket | None:
    """Return the listening stream socket that is bound to ``path``, not blocking; all others are closed."""
    chosen = None
    for listener in listeners:
        if chosen is None and _is_bound_to(listener, path):
            chosen = listener
            chosen.setblocking(False)
        else:
            logger.warning("a socket from the service manager is not %s; see ListenStream= of its unit", path)
            listener.close()
    return chosen


def is_listened_on(path: str) -> bool:
    """Say whether some process listens on a Unix socket of this name: a service manager, where no daemon runs."""
    wanted = os.path.realpath(path)
    try:
        with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as table:
            rows = [line.rstrip("\n").split(None, 7) for line in table][1:]
    except OSError:
        return False  # nothing to be known: as if nobody did
    # Number, references, protocol, flags, type, state, inode, path. Source: proc(5), /proc/net/unix.
    names = [row[7] for row in rows if len(row) == 8 and int(row[3], 16) & _LISTENS]
    return any(os.path.realpath(name) == wanted for name in names if name.startswith("/"))


def _is_bound_to(listener: socket.socket, path: str) -> bool:
    if (listener.family, listener.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        return False
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    name = listener.getsockname()
    # Two spellings of one file: /var/run is a link to /run.
    return bool(name) and isinstance(name, str) and os.path.realpath(name) == os.path.realpath(path)


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:_STATUS_CHARACTERS]
