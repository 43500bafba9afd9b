"""A service manager's end of sd_notify: a datagram socket that remembers what it was told."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from contextlib import contextmanager

from support.waiting import PATIENCE_S, wait_readable


class Manager:
    """Listens on an address of the kind NOTIFY_SOCKET holds."""

    def __init__(self, address):
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def hear(self):
        """Wait for the next message and return its fields."""
        wait_readable(self._socket, "a message to the service manager")
        return dict(line.split("=", 1) for line in self._socket.recv(4096).decode().splitlines())

    def poll(self):
        """Return the next message as it came, or None if none waits."""
        try:
            return self._socket.recv(4096, socket.MSG_DONTWAIT).decode()
        except BlockingIOError:
            return None

    def heard_nothing(self):
        """Say whether no message waits."""
        return self.poll() is None

    async def hear_until(self, *wanted):
        """Return the messages up to the one with which all ``wanted`` have come; a wanted one may be named twice."""
        seen = []
        async with asyncio.timeout(PATIENCE_S):
            while Counter(wanted) - Counter(seen):
                if (message := self.poll()) is not None:
                    seen.append(message)
                else:
                    await asyncio.sleep(0.001)
        return seen

    def close(self):
        """Go away."""
        self._socket.close()


@contextmanager
def manager_at(address):
    """Listen until the end of the block."""
    manager = Manager(str(address))
    try:
        yield manager
    finally:
        manager.close()
