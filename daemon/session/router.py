"""The message socket: decodes what clients send, finds the session that the token opens, hands it on.

No byte that a peer sends is unpickled; a frame that is not ours costs one counter and, where it can be, one answer.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Final, Protocol

import zmq
import zmq.asyncio

from ckptd.daemon.session.sessions import Session
from ckptd.protocol import messages
from ckptd.protocol.errors import BadMessage, CkptdError, WrongToken
from ckptd.protocol.messages import ClientMessage, DaemonMessage, Fenced

logger = logging.getLogger(__name__)

# A plan of 1,000,000 items is some 200 MB; more than that is not a plan.
_FRAME_LIMIT_BYTES: Final = 1 << 30


class Handler(Protocol):
    """Who takes the messages."""

    def session(self, token: bytes) -> Session | None:
        """Return the session that a token opens."""

    def on_message(self, session: Session, message: ClientMessage) -> None:
        """Take a message. Raises CkptdError."""

    def reject(self, error: CkptdError) -> None:
        """A message was turned away, for the metrics."""


class Router:
    """A ZeroMQ ROUTER socket on ``endpoint``."""

    def __init__(self, endpoint: str, handler: Handler) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # bounded by the generations in flight, not by a drop
        self._socket.setsockopt(zmq.MAXMSGSIZE, _FRAME_LIMIT_BYTES)
        self._handler = handler
        self._socket.bind(endpoint)
        self._endpoint = endpoint
        self._probe: zmq.asyncio.Socket | None = None
        self._probe_token = secrets.token_bytes(32)
        self._probed = asyncio.Event()

    async def run(self) -> None:
        """Take messages until cancelled."""
        while True:
            frames = await self._socket.recv_multipart()
            address = frames[0]
            try:
                self._take(address, frames[1:])
            except CkptdError as error:
                self._handler.reject(error)
                self._put(address, Fenced(error.report()))
            except Exception:
                logger.exception("bug while handling a message of %d frames", len(frames))

    def _take(self, address: bytes, frames: list[bytes]) -> None:
        if len(frames) != 2:
            raise BadMessage(f"{len(frames)} frames, 2 are expected")
        token, body = frames
        if token == self._probe_token:
            self._probed.set()
            return
        session = self._handler.session(token)
        if session is None:
            raise WrongToken
        message = messages.decode_client_message(body)
        session.address = address
        self._handler.on_message(session, message)

    def send(self, session: Session, message: DaemonMessage) -> None:
        """Send to a session; one that has never spoken, or is gone, is no error."""
        if session.address:
            self._put(session.address, message)

    def _put(self, address: bytes, message: DaemonMessage) -> None:
        # A future is returned only for a socket that would block, which a ROUTER without a limit never does.
        self._socket.send_multipart([address, messages.encode(message)], flags=zmq.NOBLOCK)

    async def answers(self, *, timeout_s: float) -> bool:
        """Send a message to ourselves, the way that clients do, and say whether it came in time."""
        if self._probe is None:
            self._probe = self._context.socket(zmq.DEALER)
            self._probe.setsockopt(zmq.SNDHWM, 1)  # probes do not pile up behind a router that hangs
            self._probe.connect(self._endpoint)
        self._probed.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._probe.send_multipart([self._probe_token, b""])
                await self._probed.wait()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Close the socket and its file."""
        self._context.destroy(linger=200)
