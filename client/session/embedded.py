"""Finds the daemon's attach socket, or starts a private daemon where none runs.

The private daemon gets a session of its own, so that the launcher which kills the trainer's process group does not kill
the saver with it. The trainer itself is never forked: a new interpreter is executed.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from typing import Final

from ckptd.protocol.errors import DaemonUnavailable
from ckptd.protocol.paths import attach_socket, runtime_dir

_SYSTEM_RUNTIME: Final = "/run/ckptd"
_POLL_S: Final = 0.005
_LOG_NAME: Final = "embedded.log"
_PEER_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid. Source: unix(7), SO_PEERCRED


def open_attach_socket(*, timeout_s: float) -> tuple[socket.socket, str]:
    """Return a connection to a daemon's attach socket, and the daemon's runtime directory.

    Looked for in CKPTD_RUNTIME_DIR or this user's default, then as a system service; last, one is started, unless
    CKPTD_EMBEDDED is 0.

    Raises:
        DaemonUnavailable: None runs, and none may be started or came up in time.
    """
    own = runtime_dir()
    for place in _places():
        connection = _try(place)
        if connection is not None:
            if not os.environ.get("CKPTD_RUNTIME_DIR"):
                _check_owner(connection, place)
            return connection, place
    if os.environ.get("CKPTD_EMBEDDED", "1") == "0":
        raise DaemonUnavailable(own, "CKPTD_EMBEDDED=0 forbids to start one; run `ckptd serve` or unset it")
    return _start(own, timeout_s=timeout_s), own


def find_attach_socket(runtime: str | None, *, timeout_s: float) -> socket.socket | None:
    """Return a connection to a daemon that runs already, or None if there is none.

    Args:
        runtime: Its runtime directory; None looks where :func:`open_attach_socket` does.
        timeout_s: How long each call on the connection may take, the first one included, in seconds.

    Raises:
        CkptdError: There is something, but it cannot be reached.
    """
    for place in _places() if runtime is None else [runtime]:
        connection = _try(place, timeout_s=timeout_s)
        if connection is not None:
            return connection
    return None


def _places() -> list[str]:
    own = runtime_dir()
    return [own] if os.environ.get("CKPTD_RUNTIME_DIR") else list(dict.fromkeys([own, _SYSTEM_RUNTIME]))


def reopen_attach_socket(runtime: str, *, embedded: bool, timeout_s: float) -> socket.socket | None:
    """Return a connection to the successor of a daemon that went away, or None if there is none yet.

    Args:
        runtime: Where the daemon was.
        embedded: It was a private one: whoever needs it starts it again.
        timeout_s: How long to wait for one that is started, in seconds.

    Raises:
        DaemonUnavailable: The one started did not come up.
    """
    connection = _try(runtime)
    if connection is None and embedded and os.environ.get("CKPTD_EMBEDDED", "1") != "0":
        return _start(runtime, timeout_s=timeout_s)
    return connection


def _try(runtime: str, *, timeout_s: float | None = None) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        connection.connect(attach_socket(runtime))
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise DaemonUnavailable(runtime, f"{error.strerror}; check the owner of this directory") from None
    return connection


def _check_owner(connection: socket.socket, runtime: str) -> None:
    """Refuse a stranger's socket: anybody may make /tmp/ckptd-UID before its user does.

    Raises:
        DaemonUnavailable: Whoever listens is neither this user nor root.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    uid = _PEER_CREDENTIALS.unpack(raw)[1]
    if uid not in (0, os.geteuid()):
        connection.close()
        raise DaemonUnavailable(runtime, f"uid {uid} listens there, who is a stranger; set CKPTD_RUNTIME_DIR")


def _start(runtime: str, *, timeout_s: float) -> socket.socket:
    try:
        os.makedirs(runtime, mode=0o700, exist_ok=True)
        log = open(os.path.join(runtime, _LOG_NAME), "ab")  # noqa: SIM115  # handed to the daemon
    except OSError as error:
        raise DaemonUnavailable(runtime, f"cannot write there ({error.strerror}); set CKPTD_RUNTIME_DIR") from None
    with log:
        begin = log.tell()
        daemon = subprocess.Popen(
            [sys.executable, "-P", "-m", "ckptd.daemon", "--mode", "embedded", "--http", "127.0.0.1:0"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "CKPTD_RUNTIME_DIR": runtime},
        )
    deadline = time.monotonic() + timeout_s
    ended_at: float | None = None
    while time.monotonic() < deadline:
        connection = _try(runtime)
        if connection is not None:
            _reap_later(daemon)
            return connection
        # Ours may have lost a race for the lock: then another rank's comes up in a moment.
        if ended_at is None and daemon.poll() is not None:
            ended_at = time.monotonic()
        if ended_at is not None and daemon.returncode != 0 and time.monotonic() > ended_at + 2.0:
            break
        time.sleep(_POLL_S)
    _reap_later(daemon)
    raise DaemonUnavailable(runtime, f"the one started did not come up: {_last_line(runtime, begin)}")


# Daemons that this process started: kept so that a dead one is reaped at the next start, and no warning is printed.
_started: list[subprocess.Popen[bytes]] = []


def _reap_later(daemon: subprocess.Popen[bytes]) -> None:
    _started[:] = [other for other in _started if other.poll() is None]
    if daemon.poll() is None:
        _started.append(daemon)


def _last_line(runtime: str, begin: int) -> str:
    with open(os.path.join(runtime, _LOG_NAME), "rb") as log:
        log.seek(begin)
        lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "it wrote nothing to its log"
