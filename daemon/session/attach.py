"""The attach socket: the kernel says who the peer is, and descriptors of arenas go over it.

The connection lives as long as the session; its end, or the end of the process behind it, ends the session.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Final, Protocol

from ckptd.daemon.session.frames import FRAME_LENGTH
from ckptd.daemon.session.sessions import ArenaFile, Peer, Session, started_ticks
from ckptd.protocol import messages
from ckptd.protocol.cache_messages import (
    CacheOpened,
    OpenCache,
)
from ckptd.protocol.errors import BadMessage, CkptdError, ProtocolMismatch, UnexpectedError
from ckptd.protocol.messages import (
    ATTACH_FRAME_LIMIT_BYTES,
    PROTOCOL_VERSION,
    ArenaOpened,
    Attach,
    Attached,
    AttachReply,
    Drain,
    Drained,
    OpenArena,
    Refused,
    Resume,
)
from ckptd.protocol.retained import OpenRetained, RetainedClosed, RetainedOpened

logger = logging.getLogger(__name__)

_PEER_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid. Source: unix(7), SO_PEERCRED


class Host(Protocol):
    """What the daemon does for an attached peer."""

    def admit(self, peer: Peer) -> None:
        """Raise Forbidden if the peer may not use this daemon."""

    def attach(self, peer: Peer, request: Attach) -> tuple[Session, Attached]:
        """Open a session. Raises CkptdError."""

    def resume(self, peer: Peer, request: Resume) -> tuple[Session, Attached]:
        """Go on with a session. Raises CkptdError."""

    async def open_arena(self, session: Session, request: OpenArena) -> ArenaFile:
        """Make an arena for the session. Raises CkptdError."""

    async def open_cache(self, session: Session, request: OpenCache) -> tuple[CacheOpened, int]:
        """Let the session use the node's cache; return its segment's descriptor, too. Raises CkptdError."""

    def open_retained(self, peer: Peer, request: OpenRetained) -> tuple[RetainedOpened, list[int]]:
        """Find a save in memory; return its images' descriptors, too, which are the caller's to close."""

    def retained_closed(self, message: RetainedClosed) -> None:
        """A load from memory is over, for the metrics."""

    async def drain(self, peer: Peer, timeout_s: float) -> Drained:
        """Take nothing new and wait for what is sealed. Raises Forbidden."""

    def lose(self, session: Session, reason: str) -> None:
        """The peer is gone."""

    def reject(self, error: CkptdError) -> None:
        """A peer was turned away, for the metrics."""


async def serve_attach(listener: socket.socket, host: Host) -> None:
    """Accept peers until cancelled; each is served by a task of its own."""
    loop = asyncio.get_running_loop()
    peers: set[asyncio.Task[None]] = set()
    try:
        while True:
            connection, _ = await loop.sock_accept(listener)
            connection.setblocking(False)
            task = asyncio.create_task(_AttachedPeer(connection, host).run())
            peers.add(task)
            task.add_done_callback(peers.discard)
    finally:
        for task in peers:
            task.cancel()
        await asyncio.gather(*peers, return_exceptions=True)


class _AttachedPeer:
    """One connection, from the first frame to its end."""

    def __init__(self, connection: socket.socket, host: Host) -> None:
        self._connection, self._host = connection, host
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        pid, uid, gid = _PEER_CREDENTIALS.unpack(raw)
        self._peer = Peer(pid, uid, gid, started_ticks(pid))
        self._session: Session | None = None
        self._attachment = 0
        self._retained_opened = False

    async def run(self) -> None:
        """Serve the peer until it goes."""
        watch: Callable[[], None] | None = None
        reason = "ended"
        try:
            watch = self._watch_process(asyncio.current_task())
            while (frame := await self._receive()) is not None:
                await self._answer(frame)
            if watch is not None:
                await self._outlive_connection()
        except asyncio.CancelledError:
            # Either the process behind the connection ended, or the daemon is stopping; both end the session.
            pass
        except CkptdError as error:
            self._refuse(error)
            reason = "broke the protocol"
        except OSError as error:
            reason = f"lost its connection ({error.strerror})"
        finally:
            if watch is not None:
                watch()
            self._connection.close()
            session = self._session
            if session is not None and session.attachment == self._attachment:  # else the client is back by another one
                self._host.lose(session, reason)

    async def _outlive_connection(self) -> None:
        """Wait for the end of a process that closed its connection and did not say good-bye.

        It may be on its way back by another connection, because it took us for dead; its silence ends the session, too.
        """
        self._connection.close()
        session = self._session
        if session is not None and session.live and session.address:  # one that never spoke has nothing to come back to
            session.attached = False
            await asyncio.Event().wait()  # the watch on the process cancels this task

    def _watch_process(self, task: asyncio.Task[None] | None) -> Callable[[], None] | None:
        """End the session with the process, even if a child of it still holds the connection open.

        Returns:
            What ends the watch; None where the process cannot be watched, so that the connection must do.
        """
        try:
            descriptor = os.pidfd_open(self._peer.pid)
        except OSError:
            return None  # gone already, or in a pid namespace that is not ours
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(descriptor)
            if task is not None:
                task.cancel()

        loop.add_reader(descriptor, ended)

        def stop() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)

        return stop

    async def _receive(self) -> bytes | None:
        head = await self._read(FRAME_LENGTH.size)
        if head is None:
            return None
        (length,) = FRAME_LENGTH.unpack(head)
        if length > ATTACH_FRAME_LIMIT_BYTES:
            raise BadMessage(f"an attach frame of {length} bytes")
        return await self._read(length)

    async def _read(self, nbytes: int) -> bytes | None:
        loop = asyncio.get_running_loop()
        data = b""
        while len(data) < nbytes:
            part = await loop.sock_recv(self._connection, nbytes - len(data))
            if not part:
                return None
            data += part
        return data

    async def _answer(self, frame: bytes) -> None:
        try:
            await self._perform(frame)
        except CkptdError as error:
            self._refuse(error)
        except Exception as bug:
            logger.exception("bug while answering pid %d", self._peer.pid)
            self._refuse(UnexpectedError(f"internal error: {bug!r}; see the daemon's log"))

    def _refuse(self, error: CkptdError) -> None:
        self._host.reject(error)
        self._send(Refused(error.report()))

    async def _perform(self, frame: bytes) -> None:
        self._host.admit(self._peer)
        if self._session is None:
            version = messages.decode_attach_version(frame)
            if version != PROTOCOL_VERSION:
                raise ProtocolMismatch(version, PROTOCOL_VERSION)
        request = messages.decode_attach_request(frame)
        match request:
            case Attach() if self._session is None:
                self._session, reply = self._host.attach(self._peer, request)
                self._send(reply)
            case Resume() if self._session is None:
                self._session, reply = self._host.resume(self._peer, request)
                self._attachment = self._session.attachment
                self._send(reply)
            case OpenArena() if self._session is not None:
                arena = await self._host.open_arena(self._session, request)
                opened = ArenaOpened(arena.number, arena.slots, arena.slot_bytes)
                self._send(opened, [arena.descriptor])
            case OpenCache() if self._session is not None:
                cache, descriptor = await self._host.open_cache(self._session, request)
                self._send(cache, [descriptor])
            case OpenRetained():
                self._send_retained(*self._host.open_retained(self._peer, request))
            case RetainedClosed() if self._retained_opened:
                self._retained_opened = False
                self._host.retained_closed(request)
            case Drain() if self._session is None:
                self._send(await self._host.drain(self._peer, request.timeout_s))
            case _:
                raise BadMessage("an attach message out of turn")

    def _send_retained(self, opened: RetainedOpened, descriptors: list[int]) -> None:
        self._retained_opened = bool(opened.images)
        try:
            self._send(opened, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _send(self, reply: AttachReply, descriptors: list[int] | None = None) -> None:
        """Send a frame of some kilobytes at most, which a fresh socket buffer always takes."""
        frame = messages.encode(reply)
        try:
            socket.send_fds(self._connection, [FRAME_LENGTH.pack(len(frame)) + frame], descriptors or [])
        except OSError as error:
            logger.info("pid %d went away: %s", self._peer.pid, error)
