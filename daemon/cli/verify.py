"""`ckptd verify`: reads a whole checkpoint and compares it with its hashes."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from ckptd.daemon.cli.output import complain, fault_facts, printable, progress_bar
from ckptd.protocol.errors import CkptdError


def verify(
    path: Annotated[str, typer.Argument(help="Directory of the checkpoint.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    threads: Annotated[int, typer.Option(min=1, max=256, help="Threads that read and hash.")] = 8,
) -> None:
    """Read a checkpoint and compare every byte with its hash. Exit status 0: good, 1: not good."""
    from ckptd.checkpoint.verify import verify_checkpoint

    counts = {"items": 0, "bytes": 0, "hashes_checked": 0, "crcs_checked": 0}
    faults: list[CkptdError]
    try:
        with progress_bar("verify") as progress:
            report = verify_checkpoint(path, threads=threads, progress=progress)
    except CkptdError as error:  # there is nothing to verify, or no way to know what should be there
        faults = [error]
    else:
        faults = list(report.faults)
        counts = {"items": report.items, "bytes": report.bytes, "hashes_checked": report.hashes_checked}
        counts["crcs_checked"] = report.crcs_checked
    if as_json:
        facts = {"good": not faults, "path": path, **counts, "faults": [fault_facts(fault) for fault in faults]}
        typer.echo(msgspec.json.encode(facts))
    else:
        for fault in faults:
            complain(fault)
        if not faults:
            typer.echo(
                f"{printable(path)}: good, {counts['items']} items, {counts['bytes']} bytes, "
                f"{counts['hashes_checked']} hashes checked"
            )
    raise typer.Exit(1 if faults else 0)
