"""Where daemon and clients of one user meet. Reads the environment and nothing else: makes and opens no file.

Invariant: two processes of one user with the same absolute paths in the environment get the same answers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ckptd.protocol.errors import BadConfig

_ATTACH: Final = "/attach.sock"
_MESSAGES: Final = "/messages.sock"
_HTTP: Final = "/http"
_HTTP_TOKEN: Final = "/http-token"

# A socket's name must fit into sockaddr_un.sun_path: 108 bytes with the final NUL.
# Source: unix(7), "Address format".
SOCKET_PATH_BYTES: Final = 107


def runtime_dir() -> str:
    """Return the absolute directory of the sockets of this user's daemon; whoever makes it checks its owner.

    Raises:
        BadConfig: The path is too long for the name of a socket. Set CKPTD_RUNTIME_DIR to a shorter one.
    """
    path = _named_by("CKPTD_RUNTIME_DIR") or _default_runtime_dir()
    longest = max(len(_ATTACH), len(_MESSAGES))
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES - longest:
        limit_bytes = SOCKET_PATH_BYTES - longest
        raise BadConfig(path, f"longer than {limit_bytes} bytes; set CKPTD_RUNTIME_DIR to a shorter directory")
    return path


def state_dir() -> str:
    """Return the absolute directory of the daemon's journal, which outlives a restart of the machine."""
    if named := _named_by("CKPTD_STATE_DIR"):
        return named
    if os.geteuid() == 0:
        return "/var/lib/ckptd"
    home = _xdg("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return f"{home}/ckptd"


def attach_socket(runtime: str) -> str:
    """Return the path of the Unix socket on which clients attach and get their arena."""
    return runtime + _ATTACH


def message_endpoint(runtime: str) -> str:
    """Return the ZeroMQ endpoint of the messages between clients and daemon."""
    return "ipc://" + runtime + _MESSAGES


def http_address_file(runtime: str) -> str:
    """Return the path of the file into which the daemon writes the HOST:PORT of its HTTP endpoint."""
    return runtime + _HTTP


def http_token_file(runtime: str) -> str:
    """Return the path of the file into which the daemon writes its HTTP token, if it has one, for its own user."""
    return runtime + _HTTP_TOKEN


def _named_by(variable: str) -> str:
    value = os.environ.get(variable, "")
    return str(Path(value).absolute()) if value else ""


def _default_runtime_dir() -> str:
    if os.geteuid() == 0:
        return "/run/ckptd"
    if base := _xdg("XDG_RUNTIME_DIR"):
        return f"{base}/ckptd"
    return f"/tmp/ckptd-{os.geteuid()}"


def _xdg(variable: str) -> str:
    # "If an implementation encounters a relative path ... it should consider the path invalid and ignore it."
    # Source: XDG Base Directory Specification 0.8, "Basics".
    value = os.environ.get(variable, "")
    return value.rstrip("/") if value.startswith("/") else ""
