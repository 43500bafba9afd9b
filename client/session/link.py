"""The client's line to the daemon: attach socket, message socket, and the one thread that owns them.

Invariant: a waiting caller hears of the daemon's end soon after `silence_s`, and at once if the process died.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import zmq

from ckptd.client.session.embedded import open_attach_socket, reopen_attach_socket
from ckptd.protocol import messages
from ckptd.protocol.cache_messages import (
    CacheOpened,
    OpenCache,
)
from ckptd.protocol.errors import (
    BadMessage,
    CkptdError,
    DaemonLost,
    DaemonUnavailable,
    SessionUnknown,
    ShuttingDown,
    UnexpectedError,
    from_report,
)
from ckptd.protocol.messages import (
    ATTACH_FRAME_LIMIT_BYTES,
    PROTOCOL_VERSION,
    ArenaOpened,
    Attach,
    Attached,
    AttachReply,
    AttachRequest,
    ClientMessage,
    DaemonMessage,
    Detach,
    Echo,
    Heartbeat,
    OpenArena,
    Refused,
    Resume,
)
from ckptd.staging.arena import ArenaView

logger = logging.getLogger(__name__)

_FRAME_LENGTH: Final = struct.Struct("<I")
_LINGER_MS: Final = 2000  # a closing session may still have its last seal on the way
_RETRY_S: Final = 0.05
_LAST_WORDS_MS: Final = 1000  # how long a daemon's last messages may take after its end is seen


@dataclass(frozen=True)
class LinkTimeouts:
    """Seconds to wait for a daemon that is started, for an arena to be reserved, for a lost daemon's successor."""

    connect_s: float
    arena_s: float
    reconnect_s: float


class Link:
    """An open session with the daemon.

    Args:
        request: Who we are.
        timeouts: How long to wait.
        on_message: Called in the link's thread for each message.
        on_resumed: Called in the link's thread when a successor of a lost daemon has taken the session up.
        on_lost: Called once in the link's thread when the daemon is gone for good.

    Raises:
        DaemonUnavailable: There is no daemon.
        CkptdError: It refused the session.
    """

    def __init__(
        self,
        request: Attach,
        *,
        timeouts: LinkTimeouts,
        on_message: Callable[[DaemonMessage], None],
        on_resumed: Callable[[], None],
        on_lost: Callable[[CkptdError], None],
    ) -> None:
        self._timeouts, self._on_message, self._on_resumed, self._on_lost = timeouts, on_message, on_resumed, on_lost
        self._job = request.job
        self._attach_socket, self.runtime = open_attach_socket(timeout_s=timeouts.connect_s)
        self._asking = threading.Lock()
        try:
            reply, _ = self._ask(request, timeout_s=timeouts.connect_s)
        except BaseException:
            self._attach_socket.close()
            raise
        assert isinstance(reply, Attached)
        self.attached = reply
        self._outbox: deque[bytes] = deque()
        self._wake_receive, self._wake_send = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._closing = False
        self._lost = False
        self._resumed = threading.Condition()
        self._times_resumed = 0
        self.resuming = False  # the daemon is gone, and its successor is waited for
        self._stop_waiting = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ckptd-link", daemon=True)
        self._thread.start()

    # --- attach socket -------------------------------------------------------------------------------------------

    def open_arena(self, *, slots: int, slot_bytes: int) -> ArenaView:
        """Have an arena made and map it. Raises ShmTooSmall if it does not fit."""
        request = OpenArena(slots, slot_bytes)
        reply, descriptors = self._ask_whoever_is_there(request, timeout_s=self._timeouts.arena_s)
        if not isinstance(reply, ArenaOpened) or len(descriptors) != 1:
            raise BadMessage("an arena without a descriptor")
        return ArenaView(descriptors[0], arena=reply.arena, slots=reply.slots, slot_bytes=reply.slot_bytes)

    def open_cache(self, wanted_bytes: int) -> tuple[CacheOpened, ArenaView]:
        """Have the node's cache opened for a load of so many bytes, and map its segment. Raises CkptdError."""
        request = OpenCache(wanted_bytes)
        reply, descriptors = self._ask_whoever_is_there(request, timeout_s=self._timeouts.connect_s)
        if not isinstance(reply, CacheOpened) or len(descriptors) != 1:
            raise BadMessage("a cache without a descriptor")
        return reply, ArenaView(descriptors[0], arena=0, slots=1, slot_bytes=reply.frames * reply.frame_bytes)

    def _ask_whoever_is_there(self, request: AttachRequest, *, timeout_s: float) -> tuple[AttachReply, list[int]]:
        """Ask the daemon, or its successor if it goes away meanwhile."""
        before = self._times_resumed
        with self._asking:
            try:
                return self._ask(request, timeout_s=timeout_s)
            except DaemonUnavailable as error:
                lost = error
        with self._resumed:
            self._resumed.wait_for(
                lambda: self._times_resumed > before or not self.live, self._timeouts.reconnect_s + timeout_s
            )
            if self._times_resumed == before:
                raise lost
        with self._asking:
            return self._ask(request, timeout_s=timeout_s)

    def _ask(self, request: AttachRequest, *, timeout_s: float) -> tuple[AttachReply, list[int]]:
        connection = self._attach_socket
        connection.settimeout(timeout_s)
        frame = messages.encode(request)
        try:
            connection.sendall(_FRAME_LENGTH.pack(len(frame)) + frame)
            data, descriptors, _, _ = socket.recv_fds(connection, _FRAME_LENGTH.size, 1)
            data += self._receive(_FRAME_LENGTH.size - len(data))
            (length,) = _FRAME_LENGTH.unpack(data)
            if length > ATTACH_FRAME_LIMIT_BYTES:
                raise BadMessage(f"an attach frame of {length} bytes")
            reply = messages.decode_attach_reply(self._receive(length))
        except TimeoutError:
            raise DaemonUnavailable(self.runtime, f"it did not answer within {timeout_s:.0f} s") from None
        except (OSError, EOFError) as error:
            raise DaemonUnavailable(self.runtime, f"it closed the connection ({error})") from None
        if isinstance(reply, Refused):
            raise from_report(reply.error)
        return reply, descriptors

    def _receive(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            part = self._attach_socket.recv(nbytes - len(data))
            if not part:
                raise EOFError("end of file")
            data += part
        return data

    # --- message socket ------------------------------------------------------------------------------------------

    @property
    def live(self) -> bool:
        """Whether messages still reach the daemon."""
        return not self._lost and not self._closing

    def send(self, message: ClientMessage) -> None:
        """Queue a message; from any thread."""
        self.send_encoded(messages.encode(message))

    def send_encoded(self, body: bytes) -> None:
        """Queue a message that is already encoded."""
        self._outbox.append(body)
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes the thread just as well
            os.write(self._wake_send, b"!")

    def _run(self) -> None:
        error: CkptdError | None = None
        try:
            error = self._serve_and_resume()
        except CkptdError as failure:
            error = failure
        except Exception as bug:
            logger.exception(
                "bug in the line to the daemon"
            )  # whoever waits for a save must hear of its end all the same
            error = UnexpectedError(f"internal error: {bug!r}; see this process's log")
        finally:
            self._lost = True
            with self._resumed:
                self._resumed.notify_all()
        if error is not None and not self._closing:
            self._on_lost(error)

    def _serve_and_resume(self) -> CkptdError | None:
        """Serve one daemon after the other; return what ended that, or None if we are closing."""
        while True:
            error = self._serve_one()
            if error is None or self._closing:
                return error
            logger.warning("%s; waiting %.0f s for its successor", error, self._timeouts.reconnect_s)
            if not self._resume():
                return None if self._closing else error
            self._on_resumed()

    def _serve_one(self) -> CkptdError | None:
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, _LINGER_MS)
        dealer.setsockopt(zmq.SNDHWM, 0)
        ended = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        dealer.connect(self.attached.endpoint)
        error: CkptdError | None = DaemonLost(self.runtime)
        try:
            error = self._serve(dealer)
            if error is not None:
                # The two sockets end in no order: what the daemon said last, a commit perhaps, is still to be heard.
                ended.poll(_LAST_WORDS_MS)
                self._listen(dealer)
            return error
        finally:
            dealer.disable_monitor()
            ended.close(0)
            dealer.close(linger=_LINGER_MS if error is None else 0)  # to a daemon that is gone nothing can be sent
            context.term()

    def _resume(self) -> bool:
        """Find the daemon's successor and go on with the session there; return whether that worked in time."""
        deadline = time.monotonic() + self._timeouts.reconnect_s
        self.resuming = True
        while not self._closing and (left_s := deadline - time.monotonic()) > 0:
            try:
                connection = reopen_attach_socket(
                    self.runtime, embedded=self.attached.embedded, timeout_s=min(left_s, self._timeouts.connect_s)
                )
                if connection is not None and self._resume_on(connection, timeout_s=left_s):
                    return True
            except (ShuttingDown, DaemonUnavailable) as error:
                logger.debug("not yet: %s", error)
            self._stop_waiting.wait(_RETRY_S)
        return False

    def _resume_on(self, connection: socket.socket, *, timeout_s: float) -> bool:
        with contextlib.suppress(OSError):
            self._attach_socket.shutdown(socket.SHUT_RDWR)  # whoever still waits there for an answer must not wait on
        with self._asking:
            self._attach_socket.close()
            self._attach_socket = connection
            request = Resume(PROTOCOL_VERSION, self.attached.token, self._job, self.attached.incarnation)
            try:
                reply, _ = self._ask(request, timeout_s=timeout_s)
            except SessionUnknown as error:
                logger.warning("%s", error)
                raise DaemonLost(self.runtime) from None
        if not isinstance(reply, Attached):
            raise BadMessage("no session in answer to a resumption")
        self.attached = reply
        self.resuming = False
        with self._resumed:
            self._times_resumed += 1
            self._resumed.notify_all()
        return True

    def _serve(self, dealer: zmq.Socket[bytes]) -> CkptdError | None:
        poller = zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(self._wake_receive, zmq.POLLIN)
        poller.register(self._attach_socket, zmq.POLLERR)  # end-of-file: the daemon is gone
        beat_at_s = time.monotonic()  # the first beat goes at once: it tells the daemon our address
        unanswered = 0  # beats, not seconds: while we were stopped ourselves, nobody was silent
        while not self._closing:
            now = time.monotonic()
            if now >= beat_at_s:
                if unanswered * self.attached.heartbeat_s > self.attached.silence_s:
                    return DaemonLost(self.runtime)
                unanswered += 1
                self._put(dealer, messages.encode(Heartbeat()))
                beat_at_s = now + self.attached.heartbeat_s
            ready = dict(poller.poll(int(max(0.0, beat_at_s - now) * 1000) + 1))
            if self._listen(dealer):
                unanswered = 0
            if self._wake_receive in ready:
                self._drain_wakes()
            self._flush(dealer)
            if self._attach_socket.fileno() in ready:
                return DaemonLost(self.runtime)
        self._flush(dealer)
        self._put(dealer, messages.encode(Detach()))
        return None

    def _listen(self, dealer: zmq.Socket[bytes]) -> bool:
        """Take all messages that are there; return whether there were any."""
        heard = False
        while int(dealer.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            heard = True
            self._take(dealer.recv())
        return heard

    def _flush(self, dealer: zmq.Socket[bytes]) -> None:
        while self._outbox:
            self._put(dealer, self._outbox.popleft())

    def _put(self, dealer: zmq.Socket[bytes], body: bytes) -> None:
        dealer.send_multipart([self.attached.token, body])

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_receive, 4096):
                pass

    def _take(self, body: bytes) -> None:
        message = messages.decode_daemon_message(body)
        if not isinstance(message, Echo):
            self._on_message(message)

    def close(self) -> None:
        """Say good-bye and end the thread; what was sealed is finished by the daemon."""
        if self._closing:
            return
        self._closing = True
        self._stop_waiting.set()
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_send, b"!")
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=_LINGER_MS / 1000 + 1)
        self._attach_socket.close()
        os.close(self._wake_receive)
        os.close(self._wake_send)
