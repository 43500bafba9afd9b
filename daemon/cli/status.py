"""`ckptd status`: what the running daemon says of itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer

from ckptd.daemon.cli.output import printable
from ckptd.daemon.settings.config import parse_address
from ckptd.protocol.errors import BadMessage, DaemonUnavailable
from ckptd.protocol.paths import http_address_file, http_token_file, runtime_dir

if TYPE_CHECKING:
    from rich.table import Table

# Seconds. The daemon answers from memory within milliseconds; longer means that it hangs.
_STATUS_TIMEOUT_S: Final = 5.0
_UNAUTHORIZED: Final = 401
_SYSTEM_RUNTIME: Final = "/run/ckptd"
_REMEDY: Final = "start one with `ckptd serve`"


class SlotStatus(msgspec.Struct, frozen=True):
    """One slot of an arena."""

    state: str
    sequence: int | None = None


class SessionStatus(msgspec.Struct, frozen=True):
    """One rank's session."""

    rank: int
    pid: int
    slots: list[SlotStatus]
    slot_bytes: int
    silent_s: float


class GenerationStatus(msgspec.Struct, frozen=True):
    """One save of a job."""

    sequence: int
    checkpoint_id: str
    state: str
    bytes_done: int
    bytes_total: int
    seconds: float | None = None
    error: str | None = None
    ranks_sealed: int = 0


class JobStatus(msgspec.Struct, frozen=True):
    """One training run."""

    job: str
    incarnation: int
    uid: int
    world_size: int
    sessions: list[SessionStatus]
    generations: list[GenerationStatus]


class Status(msgspec.Struct, frozen=True):
    """What this command reads of ``/status``; a newer daemon may say more."""

    pid: int
    version: str
    http: str
    mode: str
    uptime_s: float
    workers: list[int]
    jobs: list[JobStatus]


def status(*, as_json: Annotated[bool, typer.Option("--json", help="Print what the daemon answers.")] = False) -> None:
    """Show the jobs of the running daemon, their ranks and their saves."""
    body = fetch_status(daemons_runtime_dir())
    if as_json:
        typer.echo(body)
        return
    try:
        answer = msgspec.json.decode(body, type=Status)
    except msgspec.DecodeError as error:
        raise BadMessage(f"status: {error}") from None
    _print_status(answer)


def daemons_runtime_dir() -> str:
    """Return the runtime directory of the daemon that clients of this user would find: their own, else the system's."""
    own = runtime_dir()
    if os.environ.get("CKPTD_RUNTIME_DIR") or os.path.lexists(http_address_file(own)):
        return own
    return _SYSTEM_RUNTIME if os.path.lexists(http_address_file(_SYSTEM_RUNTIME)) else own


def fetch_status(runtime: str) -> bytes:
    """Return the body of ``/status`` of the daemon whose runtime directory this is.

    Raises:
        DaemonUnavailable: No daemon runs there, or it does not answer within 5 seconds.
        BadConfig: The file with its address holds none.
    """
    import http.client  # 30 ms that no other command needs
    import urllib.error
    import urllib.request

    try:
        address = Path(http_address_file(runtime)).read_text("utf-8", errors="replace").strip()
    except OSError as error:
        raise DaemonUnavailable(runtime, f"{error.filename}: {error.strerror}; {_REMEDY}") from None
    parse_address(address)
    # No proxy: a variable meant for the internet must not catch a request to this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"http://{address}/status", headers=_credentials(runtime))
    try:
        with opener.open(request, timeout=_STATUS_TIMEOUT_S) as answer:
            body: bytes = answer.read()
    except urllib.error.HTTPError as error:
        error.close()
        remedy = "only its own user may read its token" if error.code == _UNAUTHORIZED else _REMEDY
        raise DaemonUnavailable(runtime, f"{address} answered {error.code}; {remedy}") from None
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        raise DaemonUnavailable(runtime, f"{address}: {cause or type(cause).__name__}; {_REMEDY}") from None
    return body


def _credentials(runtime: str) -> dict[str, str]:
    """Return the header that shows the daemon's token; none where it has none, or none that we may read."""
    try:
        token = Path(http_token_file(runtime)).read_text("ascii").strip()
    except OSError:
        return {}
    return {"Authorization": f"Bearer {token}"}


def _print_status(answer: Status) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(
        printable(
            f"ckptd {answer.version}, pid {answer.pid}, {answer.mode}, http://{answer.http}, "
            f"up {answer.uptime_s:.0f} s, {len(answer.workers)} workers"
        )
    )
    if not answer.jobs:
        console.print("no jobs")
    for job in answer.jobs:
        title = f"job {job.job}, incarnation {job.incarnation}, uid {job.uid}, {job.world_size} ranks"
        console.print(printable(f"\n{title}").strip(), style="bold")
        console.print(_ranks(job.sessions))
        console.print(_generations(job.generations))


def _ranks(sessions: list[SessionStatus]) -> Table:
    table = _table("Rank", "PID", "Slots", "Slot bytes", "Silent s")
    for session in sessions:
        slots = ", ".join(_slot(slot) for slot in session.slots)
        cells = (session.rank, session.pid, slots, session.slot_bytes, f"{session.silent_s:.1f}")
        table.add_row(*(printable(str(cell)) for cell in cells))
    return table


def _generations(generations: list[GenerationStatus]) -> Table:
    table = _table("Save", "Checkpoint", "State", "Sealed", "Progress", "Seconds", "Error")
    for save in generations:
        seconds = "" if save.seconds is None else f"{save.seconds:.1f}"
        progress = f"{save.bytes_done}/{save.bytes_total}"
        if save.bytes_total:
            progress = f"{100 * save.bytes_done // save.bytes_total} % of {save.bytes_total} bytes"
        cells = (save.sequence, save.checkpoint_id, save.state, save.ranks_sealed, progress, seconds)
        table.add_row(*(printable(str(cell)) for cell in (*cells, save.error or "")))
    return table


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _slot(slot: SlotStatus) -> str:
    return slot.state if slot.sequence is None else f"{slot.state} #{slot.sequence}"
