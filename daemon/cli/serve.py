"""`ckptd serve`: becomes the daemon."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from typing import Annotated

import typer

from ckptd.daemon.settings.config import parse_address
from ckptd.protocol.errors import BadConfig


class Mode(StrEnum):
    """How a daemon runs."""

    auto = "auto"
    user = "user"
    system = "system"
    embedded = "embedded"


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
