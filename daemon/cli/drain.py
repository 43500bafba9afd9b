"""`ckptd drain`: the daemon takes nothing new and finishes what is sealed."""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer

from ckptd.daemon.cli.output import progress_bar, say, say_json
from ckptd.daemon.cli.status import daemons_runtime_dir, fetch_status
from ckptd.protocol.errors import BadMessage, DaemonUnavailable, from_report
from ckptd.protocol.paths import attach_socket

if TYPE_CHECKING:
    from ckptd.protocol.messages import Drained

# Seconds between two looks at how far the saves are.
_LOOK_S: Final = 0.2
# Seconds that the answer may take beyond the time that the daemon was given.
_ANSWER_S: Final = 10.0
_ENDED: Final = ("committed", "failed")


def drain(
    *,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, max=86_400, help="How long saves may take to finish.")
    ] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Take nothing new, finish what is sealed.

    As before an upgrade. The daemon stays so until it is restarted; only its own user and root may ask.
    Exit status 1: saves were unfinished when time was up.
    """
    runtime = daemons_runtime_dir()
    fetch_status(runtime)  # where none runs, the socket of a service manager would start one
    with progress_bar("drain") as progress:
        drained = _ask(runtime, timeout, lambda: progress(*_bytes_left(runtime)) if progress else None)
    facts = {"drained": not drained.unfinished, "unfinished": drained.unfinished, "pid": drained.pid}
    if as_json:
        say_json(facts)
    elif drained.unfinished:
        sys.stderr.write(
            f"ckptd: {drained.unfinished} saves are unfinished after {timeout:.0f} s; see `ckptd status`\n"
        )
    else:
        say(f"daemon pid {drained.pid} is drained: nothing is in flight, nothing new is taken until it is restarted")
    raise typer.Exit(1 if drained.unfinished else 0)


def _ask(runtime: str, timeout_s: float, look: Callable[[], None]) -> Drained:
    """Send the order over the attach socket, on which the kernel says who we are, and wait for the answer."""
    from ckptd.daemon.session.frames import FRAME_LENGTH
    from ckptd.protocol import messages

    frame = messages.encode(messages.Drain(messages.PROTOCOL_VERSION, timeout_s))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_ANSWER_S)
            connection.connect(attach_socket(runtime))
            connection.sendall(FRAME_LENGTH.pack(len(frame)) + frame)
            _wait(connection, timeout_s + _ANSWER_S, look)
            (length,) = FRAME_LENGTH.unpack(_receive(connection, FRAME_LENGTH.size))
            reply = messages.decode_attach_reply(_receive(connection, min(length, messages.ATTACH_FRAME_LIMIT_BYTES)))
    except TimeoutError:
        raise DaemonUnavailable(runtime, "it did not answer; see its log") from None
    except (OSError, EOFError) as error:
        raise DaemonUnavailable(runtime, f"it closed the connection ({error}); see its log") from None
    if isinstance(reply, messages.Refused):
        raise from_report(reply.error)
    if not isinstance(reply, messages.Drained):
        raise BadMessage(f"{type(reply).__name__} in answer to Drain")
    return reply


def _wait(connection: socket.socket, timeout_s: float, look: Callable[[], None]) -> None:
    waited_s = 0.0
    while not select.select([connection], [], [], _LOOK_S)[0]:
        waited_s += _LOOK_S
        if waited_s > timeout_s:
            raise TimeoutError
        look()


def _receive(connection: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        part = connection.recv(nbytes - len(data))
        if not part:
            raise EOFError("end of file")
        data += part
    return data


def _bytes_left(runtime: str) -> tuple[int, int]:
    """Return bytes done and bytes in all of the saves in flight."""
    status: dict[str, Any] = msgspec.json.decode(fetch_status(runtime))
    running = [save for job in status["jobs"] for save in job["generations"] if save["state"] not in _ENDED]
    return sum(save["bytes_done"] for save in running), sum(save["bytes_total"] for save in running)
