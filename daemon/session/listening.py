"""Where a daemon can be found: the attach socket that it listens on, and files that tell of it beside the sockets."""

from __future__ import annotations

import errno
import os
import socket

from ckptd.daemon.systemd.notify import is_listened_on
from ckptd.protocol.errors import SystemCallFailed


def listen(path: str, *, everyone: bool) -> socket.socket:
    """Return a socket of our own that listens at a path, in place of a dead daemon's.

    Args:
        path: Where; the lock on its directory is ours.
        everyone: Whether other users may connect.

    Returns:
        One that does not block.

    Raises:
        SystemCallFailed: It cannot be had; a service manager may listen there.
    """
    if is_listened_on(path):  # the lock is ours, so it is no daemon but a service manager: stop its socket first
        raise SystemCallFailed("bind", path, errno.EADDRINUSE)
    if os.path.lexists(path):
        os.unlink(path)  # a dead daemon's
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o666 if everyone else 0o600)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise SystemCallFailed("bind", path, error.errno or 0) from None
    listener.setblocking(False)
    return listener


def write_text(path: str, text: str, *, mode: int = 0o666) -> None:
    """Put a file in place whole: whoever reads it sees all of it or nothing.

    Args:
        path: The file.
        text: What is to stand in it.
        mode: Who may read it, before the umask.
    """
    temporary = f"{path}.{os.getpid()}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)
