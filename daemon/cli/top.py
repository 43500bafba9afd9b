"""`ckptd top`: the daemon's jobs and saves as they go, until somebody has seen enough."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import typer

from ckptd.daemon.cli.output import printable, say_json
from ckptd.daemon.cli.status import GenerationStatus, JobStatus, Status, daemons_runtime_dir, fetch_status
from ckptd.protocol.errors import BadMessage, CkptdError

if TYPE_CHECKING:
    from rich.console import RenderableType

# Ended saves of a job that are shown beside those in flight.
_ENDED_SHOWN: Final = 3
_BAR_CELLS: Final = 8
_ENDED: Final = ("committed", "failed")
_MB: Final = 1e6


class Rates:
    """How fast bytes are written, from one look to the next."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, str, int, int], tuple[float, int]] = {}

    def update(self, status: Status, now_s: float) -> dict[tuple[int, str, int, int], float]:
        """Take a look, and return bytes per second of each save that was seen before."""
        rates, seen = {}, {}
        for job in status.jobs:
            for save in job.generations:
                key = (job.uid, job.job, job.incarnation, save.sequence)
                seen[key] = (now_s, save.bytes_done)
                if key in self._last and now_s > self._last[key][0] and save.state not in _ENDED:
                    before_s, before_bytes = self._last[key]
                    rates[key] = max(0, save.bytes_done - before_bytes) / (now_s - before_s)
        self._last = seen
        return rates


def top(
    *,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=3600, help="Seconds from one look to the next.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one look as JSON, as `ckptd status --json`.")] = False,
) -> None:
    """Watch jobs and saves as they go.

    q or Ctrl-C ends it. Where there is no terminal they are shown once.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if as_json:
        say_json(msgspec.json.decode(fetch_status(daemons_runtime_dir())))
        return
    if not console.is_terminal:
        console.print(render(_look(), {}))
        return
    from rich.live import Live

    rates = Rates()
    screen = Live(console=console, screen=True, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), _single_keys() as pressed, screen:
        while True:
            screen.update(_shown(rates), refresh=True)
            if pressed(interval) == "q":
                return


def _look() -> Status:
    try:
        return msgspec.json.decode(fetch_status(daemons_runtime_dir()), type=Status)
    except msgspec.DecodeError as error:
        raise BadMessage(f"status: {error}") from None


def _shown(rates: Rates) -> RenderableType:
    """Return what is to be seen now: a daemon that is gone may come back."""
    try:
        status = _look()
    except CkptdError as error:
        return printable(f"{time.strftime('%H:%M:%S')}  {error}")
    return render(status, rates.update(status, time.monotonic()))


def render(status: Status, rates: dict[tuple[int, str, int, int], float]) -> RenderableType:
    """Return the whole picture."""
    from rich.console import Group
    from rich.text import Text

    slots = [slot.state for job in status.jobs for session in job.sessions for slot in session.slots]
    states = ", ".join(f"{slots.count(state)} {state}" for state in dict.fromkeys(sorted(slots)))
    ranks = sum(len(job.sessions) for job in status.jobs)
    who = f"ckptd {status.version}, pid {status.pid}, {status.mode}, up {status.uptime_s:.0f} s"
    what = f"{len(status.jobs)} jobs, {ranks} ranks, {len(status.workers)} workers; slots: {states or 'none'}"
    head = Text(printable(f"{time.strftime('%H:%M:%S')}  {who}"))
    return Group(head, Text(printable(what)), _saves(status.jobs, rates))


def _saves(jobs: list[JobStatus], rates: dict[tuple[int, str, int, int], float]) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    table.add_column("Job", max_width=14, no_wrap=True)
    table.add_column("Save", justify="right", no_wrap=True)
    table.add_column("State", no_wrap=True)
    table.add_column("Progress", no_wrap=True)
    for column in ("MB/s", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("Checkpoint, or why it failed", overflow="fold", ratio=1, min_width=12)
    for job in jobs:
        for save in _chosen(job.generations):
            rate = rates.get((job.uid, job.job, job.incarnation, save.sequence))
            table.add_row(*map(printable, _row(job, save, rate)))
    return table


def _chosen(saves: list[GenerationStatus]) -> list[GenerationStatus]:
    ended = [save for save in saves if save.state in _ENDED]
    return [*ended[-_ENDED_SHOWN:], *(save for save in saves if save.state not in _ENDED)]


def _row(job: JobStatus, save: GenerationStatus, rate: float | None) -> tuple[str, ...]:
    done = save.bytes_done / save.bytes_total if save.bytes_total else float(save.state == "committed")
    cells = round(min(done, 1.0) * _BAR_CELLS)
    average = save.bytes_total / save.seconds if save.state == "committed" and save.seconds else None
    speed = rate if rate is not None else average
    return (
        job.job,
        str(save.sequence),
        save.state,
        "#" * cells + "." * (_BAR_CELLS - cells) + f" {100 * min(done, 1.0):3.0f} %",
        "" if speed is None else f"{speed / _MB:.0f}",
        "" if save.seconds is None else f"{save.seconds:.1f}",
        save.error or save.checkpoint_id,
    )


class _Keys:
    """Waits for a key for a while."""

    def __call__(self, wait_s: float) -> str:
        """Return the key, or "" if none came."""
        if select.select([sys.stdin], [], [], wait_s)[0]:
            return os.read(sys.stdin.fileno(), 1).decode("utf-8", "replace").lower() or "q"  # end of file
        return ""


class _NoKeys:
    def __call__(self, wait_s: float) -> str:
        time.sleep(wait_s)
        return ""


@contextlib.contextmanager
def _single_keys() -> Iterator[_Keys | _NoKeys]:
    """Have keys come one by one, not line by line; the terminal is as it was afterwards."""
    if not sys.stdin.isatty():
        yield _NoKeys()
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield _Keys()
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
