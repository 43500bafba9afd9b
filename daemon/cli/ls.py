"""`ckptd ls` as typer knows it; see :mod:`ckptd.daemon.cli.listing`."""

from __future__ import annotations

from typing import Annotated

import typer

from ckptd.daemon.cli.listing import list_paths


def ls(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Folders, checkpoints, or files.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List the checkpoints under folders, and the entries of checkpoints.

    Exit status 1: something is damaged or not there.
    """
    raise typer.Exit(list_paths(paths, as_json=as_json))
