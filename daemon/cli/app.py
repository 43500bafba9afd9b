"""All commands, as typer knows them."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from ckptd import __version__
from ckptd.daemon.cli.bench import bench
from ckptd.daemon.cli.convert import convert
from ckptd.daemon.cli.diff import diff
from ckptd.daemon.cli.doctor import doctor
from ckptd.daemon.cli.drain import drain
from ckptd.daemon.cli.extract import extract
from ckptd.daemon.cli.gc import gc
from ckptd.daemon.cli.inspect import inspect
from ckptd.daemon.cli.install import install, uninstall
from ckptd.daemon.cli.ls import ls
from ckptd.daemon.cli.scrub import scrub
from ckptd.daemon.cli.serve import serve
from ckptd.daemon.cli.status import status
from ckptd.daemon.cli.top import top
from ckptd.daemon.cli.verify import verify

app: Final = typer.Typer(
    name="ckptd",
    help="A checkpoint daemon for PyTorch.\n\n"
    "Exit status: 0 done, 1 failed or not good, 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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


_DAEMON: Final = (serve, status, top, drain, gc, doctor, bench, install, uninstall)
_CHECKPOINTS: Final = (ls, inspect, verify, scrub, diff, extract, convert)
for _command in (*_DAEMON, *_CHECKPOINTS):
    app.command()(_command)
