"""`ckptd doctor`: is this machine fit for checkpoints, and the service in order?"""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from ckptd.daemon.cli.output import print_columns, say, say_json

if TYPE_CHECKING:
    from ckptd.daemon.cli.checks import Check
    from ckptd.daemon.settings.config import Config


def doctor(
    folder: Annotated[str, typer.Argument(metavar="[FOLDER]", help="Where checkpoints are kept.")] = ".",
    *,
    shm_dir: Annotated[str, typer.Option(metavar="DIR", help="The tmpfs of arenas; default: as configured.")] = "",
    user: Annotated[bool, typer.Option("--user", help="Look at your own service, not the system's.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check machine, folder and service.

    Each check is ok, warn or fail, with what to do. Exit status 1: a check failed.
    """
    checks = _checks(os.path.abspath(folder), shm_dir, user=user or os.geteuid() != 0)
    counts = Counter(str(check.verdict) for check in checks)
    if as_json:
        facts = [
            {"name": c.name, "verdict": str(c.verdict), "found": c.found, "remedy": c.remedy or None} for c in checks
        ]
        say_json({"good": not counts["fail"], "checks": facts})
    else:
        rows = [(c.verdict, c.name, c.found + (f" -> {c.remedy}" if c.remedy else "")) for c in checks]
        print_columns(("Verdict", "Check", "Found"), rows)
        say(f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failed")
    raise typer.Exit(1 if counts["fail"] else 0)


def _checks(folder: str, shm_dir: str, *, user: bool) -> list[Check]:
    from ckptd.daemon.cli import checks
    from ckptd.daemon.settings.config import Config
    from ckptd.protocol.errors import CkptdError

    try:
        shm_dir = shm_dir or _configured(user=user).shm_dir
    except CkptdError:
        shm_dir = Config().shm_dir  # what is wrong with the file is a check of its own
    return [
        *checks.check_versions(),
        checks.check_shm(shm_dir),
        checks.check_memlock(),
        checks.check_logout(user=user),
        checks.check_leftovers(shm_dir),
        *checks.check_folder(folder),
        checks.check_config(lambda: _configured(user=user)),
        *checks.check_units(user=user),
        *([] if user else checks.check_network(lambda: _configured(user=user))),
        checks.check_daemon(),
    ]


def _configured(*, user: bool) -> Config:
    from ckptd.daemon.settings.config import default_config_path, load_config

    return load_config(default_config_path("user" if user else "system"))
