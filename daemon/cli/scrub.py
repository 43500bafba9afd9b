"""`ckptd scrub`: verifies every checkpoint below a folder."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptd.daemon.cli.output import complain, fault_facts, printable, progress_bar, say, say_json

if TYPE_CHECKING:
    from ckptd.checkpoint.folder.scrub import Scrubbed


def scrub(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of checkpoints.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Threads that read and hash.")] = 8,
) -> None:
    """Verify every checkpoint below a folder, ours and stock's. Exit status 0: all good, 1: something is not good.

    Unfinished saves are reported and not judged. Of stock's checkpoints, which have no hashes, CRCs are checked.
    """
    from ckptd.checkpoint.folder.scrub import scrub

    found: list[Scrubbed] = []
    with progress_bar("scrub") as progress:
        for one in scrub(folder, threads=threads, progress=progress):
            found.append(one)
            if not as_json:
                _print(one)
    counts = Counter(one.state for one in found)
    good = counts["damaged"] == 0
    if as_json:
        say_json({"good": good, "path": folder, "checkpoints": [_facts(one) for one in found]})
    else:
        told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "no checkpoints"
        say(printable(f"{folder}: {told}"))
    raise typer.Exit(0 if good else 1)


def _print(one: Scrubbed) -> None:
    details = ""
    if one.report is not None and one.state == "good":
        checked = "hashes checked" if one.report.hashes_checked else f"{one.report.crcs_checked} CRCs checked"
        details = f", {one.report.items} items, {one.report.bytes} bytes, {checked}"
    say(printable(f"{one.path}: {one.state}{details}"))
    if one.state == "damaged":
        for fault in one.faults:
            complain(fault)


def _facts(one: Scrubbed) -> dict[str, Any]:
    facts: dict[str, Any] = {"path": one.path, "state": one.state}
    if one.report is not None:
        facts |= {"items": one.report.items, "bytes": one.report.bytes}
        facts |= {"hashes_checked": one.report.hashes_checked, "crcs_checked": one.report.crcs_checked}
    return {**facts, "faults": [fault_facts(fault) for fault in one.faults]}
