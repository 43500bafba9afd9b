"""The ``ckptd`` command: start the daemon, ask it for its status, verify a checkpoint.

Exit status: 0 done, 1 failed or not good, 2 wrong usage. What goes wrong is one line on stderr.
Typer and rich stay on this side: the daemon itself is another program image; nothing here imports torch.
"""

from __future__ import annotations

import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer

from ckptd import __version__
from ckptd.daemon.config import parse_address
from ckptd.protocol.errors import BadConfig, BadMessage, CkptdError, DaemonUnavailable
from ckptd.protocol.paths import http_address_file, runtime_dir

if TYPE_CHECKING:
    from rich.table import Table

# Seconds. The daemon answers from memory within milliseconds; longer means that it hangs.
_STATUS_TIMEOUT_S: Final = 5.0
_REMEDY: Final = "start one with `ckptd serve`"

app: Final = typer.Typer(
    name="ckptd",
    help="A checkpoint daemon for PyTorch.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Mode(StrEnum):
    """How a daemon runs."""

    auto = "auto"
    user = "user"
    system = "system"
    embedded = "embedded"


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


def main() -> None:
    """Run the command line; the entry point of ``ckptd``."""
    try:
        app(prog_name="ckptd")
    except CkptdError as error:
        _complain(error)
        sys.exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ckptd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """A checkpoint daemon for PyTorch."""


@app.command()
def serve(
    *,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Address of the HTTP endpoint; port 0 is any.")
    ] = None,
    mode: Annotated[Mode, typer.Option(help="How to run; auto is system for root, else user.")] = Mode.auto,
) -> None:
    """Run the daemon in the foreground."""
    # -P: without it -m puts the working directory before the standard library, so that whoever owns the
    # directory decides what a daemon started there imports. Source: python(1), "-P".
    command = [sys.executable, "-P", "-m", "ckptd.daemon"]
    if http is not None:
        try:
            parse_address(http)
        except BadConfig as error:
            raise typer.BadParameter(str(error), param_hint="'--http'") from None
        command += ["--http", http]
    if mode is not Mode.auto:
        command += ["--mode", mode.value]
    os.execv(sys.executable, command)


@app.command()
def status(*, as_json: Annotated[bool, typer.Option("--json", help="Print what the daemon answers.")] = False) -> None:
    """Show the jobs of the running daemon, their ranks and their saves."""
    body = fetch_status(runtime_dir())
    if as_json:
        typer.echo(body)
        return
    try:
        answer = msgspec.json.decode(body, type=Status)
    except msgspec.DecodeError as error:
        raise BadMessage(f"status: {error}") from None
    _print_status(answer)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="Directory of the checkpoint.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Threads that read and hash.")] = 4,
) -> None:
    """Read a checkpoint and compare every byte with its hash. Exit status 0: good, 1: not good."""
    from ckptd.checkpoint.verify import verify_checkpoint

    counts = {"items": 0, "bytes": 0, "hashes_checked": 0}
    faults: list[CkptdError]
    try:
        with _progress() as progress:
            report = verify_checkpoint(path, threads=threads, progress=progress)
    except CkptdError as error:  # there is nothing to verify, or no way to know what should be there
        faults = [error]
    else:
        faults = list(report.faults)
        counts = {"items": report.items, "bytes": report.bytes, "hashes_checked": report.hashes_checked}
    if as_json:
        facts = {"good": not faults, "path": path, **counts, "faults": [_fault(fault) for fault in faults]}
        typer.echo(msgspec.json.encode(facts))
    else:
        for fault in faults:
            _complain(fault)
        if not faults:
            typer.echo(
                f"{_printable(path)}: good, {counts['items']} items, {counts['bytes']} bytes, "
                f"{counts['hashes_checked']} hashes checked"
            )
    raise typer.Exit(1 if faults else 0)


def fetch_status(runtime: str) -> bytes:
    """Return the body of ``/status`` of the daemon whose runtime directory this is.

    Raises:
        DaemonUnavailable: No daemon runs there, or it does not answer within 5 seconds.
        BadConfig: The file with its address holds none.
    """
    try:
        address = Path(http_address_file(runtime)).read_text("utf-8", errors="replace").strip()
    except OSError as error:
        raise DaemonUnavailable(runtime, f"{error.filename}: {error.strerror}; {_REMEDY}") from None
    parse_address(address)
    # No proxy: a variable meant for the internet must not catch a request to this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/status", timeout=_STATUS_TIMEOUT_S) as answer:
            body: bytes = answer.read()
    except urllib.error.HTTPError as error:
        error.close()
        raise DaemonUnavailable(runtime, f"{address} answered {error.code}; {_REMEDY}") from None
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        raise DaemonUnavailable(runtime, f"{address}: {cause or type(cause).__name__}; {_REMEDY}") from None
    return body


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callback of bytes done and bytes in all that draws a bar, or None where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("verify", total=None)
        yield lambda done_bytes, total_bytes: bar.update(task, completed=done_bytes, total=total_bytes)


def _print_status(answer: Status) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(
        _printable(
            f"ckptd {answer.version}, pid {answer.pid}, {answer.mode}, http://{answer.http}, "
            f"up {answer.uptime_s:.0f} s, {len(answer.workers)} workers"
        )
    )
    if not answer.jobs:
        console.print("no jobs")
    for job in answer.jobs:
        title = f"job {job.job}, incarnation {job.incarnation}, uid {job.uid}, {job.world_size} ranks"
        console.print(_printable(f"\n{title}").strip(), style="bold")
        console.print(_ranks(job.sessions))
        console.print(_generations(job.generations))


def _ranks(sessions: list[SessionStatus]) -> Table:
    table = _table("Rank", "PID", "Slots", "Slot bytes", "Silent s")
    for session in sessions:
        slots = ", ".join(_slot(slot) for slot in session.slots)
        cells = (session.rank, session.pid, slots, session.slot_bytes, f"{session.silent_s:.1f}")
        table.add_row(*(_printable(str(cell)) for cell in cells))
    return table


def _generations(generations: list[GenerationStatus]) -> Table:
    table = _table("Save", "Checkpoint", "State", "Sealed", "Progress", "Seconds", "Error")
    for save in generations:
        seconds = "" if save.seconds is None else f"{save.seconds:.1f}"
        progress = f"{save.bytes_done}/{save.bytes_total}"
        if save.bytes_total:
            progress = f"{100 * save.bytes_done // save.bytes_total} % of {save.bytes_total} bytes"
        cells = (save.sequence, save.checkpoint_id, save.state, save.ranks_sealed, progress, seconds)
        table.add_row(*(_printable(str(cell)) for cell in (*cells, save.error or "")))
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


def _fault(error: CkptdError) -> dict[str, object]:
    return {"code": error.code, "message": str(error), **error.report().facts}


def _complain(error: CkptdError) -> None:
    typer.echo(_printable(f"ckptd: {error}"), err=True)


def _printable(text: str) -> str:
    """Return ``text`` on one line and without control characters: names in it may be another user's."""
    return "".join(character if character.isprintable() else "?" for character in text)
