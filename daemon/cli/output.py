"""What commands print: lines that names of others cannot steer, columns, complaints, progress bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ckptd.protocol.errors import CkptdError


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a callback of bytes done and bytes in all that draws a bar, or None where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done_bytes, total_bytes: bar.update(task, completed=done_bytes, total=total_bytes)


def counted(progress: Callable[[int, int], None] | None, total_bytes: int) -> Callable[[int], None]:
    """Return a callback of bytes done just now, which adds them up for a progress bar."""
    done_bytes = 0

    def done(nbytes: int) -> None:
        nonlocal done_bytes
        done_bytes += nbytes
        if progress is not None:
            progress(done_bytes, total_bytes)

    return done


def fault_facts(error: CkptdError) -> dict[str, object]:
    """Return an error as `--json` tells it."""
    return {"code": error.code, "message": str(error), **error.report().facts}


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{text}\n")


def say_json(facts: object) -> None:
    """Print facts as one line of JSON, in ASCII: names may hold what is no valid Unicode."""
    say(json.dumps(facts, separators=(",", ":")))


def complain(error: CkptdError) -> None:
    """Print what went wrong, as one line on stderr."""
    sys.stderr.write(printable(f"ckptd: {error}") + "\n")


def printable(text: str) -> str:
    """Return ``text`` on one line and without control characters: names in it may be another user's."""
    return "".join(character if character.isprintable() else "?" for character in text)


def print_columns(heads: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """Print a table as aligned columns; ``right`` names the heads whose columns are numbers.

    Plain text rather than a table of rich, whose import alone would take a third of the time that `ls` has.
    """
    cells = [list(heads), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        parts = [
            cell.rjust(width) if head in right else cell.ljust(width)
            for head, cell, width in zip(heads, row, widths, strict=True)
        ]
        say("  ".join(parts).rstrip())
