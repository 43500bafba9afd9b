"""`ckptd install` and `ckptd uninstall`: the daemon as a service of systemd."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ckptd.daemon.cli.manager import run, systemd_version
from ckptd.daemon.cli.output import printable, say, say_json
from ckptd.protocol.errors import BadConfig, SystemCallFailed

if TYPE_CHECKING:
    from ckptd.daemon.systemd.units import Layout, Planned

_UNITS: Final = ("ckptd.socket", "ckptd.service")
# Seconds; stopping waits for saves, up to the unit's TimeoutStopSec and what the daemon asks for beyond it.
_STOP_S: Final = 3600.0

User = Annotated[bool, typer.Option("--user", help="A service of your own, not of the system.")]
Root = Annotated[str, typer.Option(metavar="DIR", help="Take DIR for /, as for an image; runs no systemctl.")]
Prefix = Annotated[str, typer.Option(metavar="DIR", help="Where a package keeps its files, as /usr; not /etc.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")]


def install(
    *, user: User = False, root: Root = "", prefix: Prefix = "", dry_run: DryRun = False, as_json: Json = False
) -> None:
    """Put the service's files in place.

    Units, configuration, and what they need; then it says what to do next. An existing configuration stays. Nothing is
    started. Exit status 1: a command failed.
    """
    layout = _layout(user=user, root=root, prefix=prefix)
    files = _planned(layout)
    written = [file for file in files if not (file.keep and os.path.lexists(file.path))]
    commands = [] if root else _commands_after(layout)
    warnings: list[str] = []
    if not dry_run:
        _need_rights(layout)
        for file in written:
            _place(file.path, file.text)
        warnings = _run_all(commands)
    failed = bool(warnings)
    facts = {
        "dry_run": dry_run,
        "written": [file.path for file in written],
        "kept": [file.path for file in files if file not in written],
        "commands": [" ".join(command) for command in commands],
        "warnings": [*warnings, *_unreadable(layout)],
        "next": _next_steps(user=user),
    }
    _report(facts, as_json=as_json)
    raise typer.Exit(1 if failed else 0)


def uninstall(
    *, user: User = False, root: Root = "", prefix: Prefix = "", dry_run: DryRun = False, as_json: Json = False
) -> None:
    """Stop the service and remove its files.

    Its saves are finished first. A configuration that was changed stays, and so do checkpoints. Exit status 1: a
    command failed.
    """
    layout = _layout(user=user, root=root, prefix=prefix)
    files = _planned(layout)
    there = [file for file in files if os.path.lexists(file.path)]
    kept = [file for file in there if file.keep and _read(file.path) != file.text]
    removed = [file.path for file in there if file not in kept]
    live = not root and any(path.endswith(_UNITS) for path in removed)
    stop, reload = (_systemctl(layout, "disable", "--now", *_UNITS), _systemctl(layout, "daemon-reload"))
    warnings: list[str] = []
    if not dry_run:
        _need_rights(layout)
        if live:
            warnings = _stop(files, stop=stop, reload=reload)
        for path in {*removed, *(file.path for file in files if live and not file.keep)}:
            _remove(path)
        warnings += _run_all([reload] if live else [])
    facts = {
        "dry_run": dry_run,
        "removed": removed,
        "kept": [file.path for file in kept],
        "commands": [" ".join(command) for command in (stop, reload)] if live else [],
        "warnings": warnings,
    }
    _report(facts, as_json=as_json)
    raise typer.Exit(1 if warnings else 0)


def _stop(files: list[Planned], *, stop: tuple[str, ...], reload: tuple[str, ...]) -> list[str]:
    """Stop and disable the units. One that is missing or broken is put right first: systemd refuses it otherwise."""
    broken = [f for f in files if f.path.endswith(_UNITS) and not (os.path.exists(f.path) and _read(f.path) == f.text)]
    for file in broken:
        _place(file.path, file.text)
    return _run_all([reload, stop] if broken else [stop])


def _layout(*, user: bool, root: str, prefix: str) -> Layout:
    from ckptd.daemon.systemd.units import Layout

    for option, value in (("--root", root), ("--prefix", prefix)):
        if value and not os.path.isabs(value):
            raise typer.BadParameter(f"{value} is no absolute path", param_hint=f"'{option}'")
    base = os.environ.get("XDG_CONFIG_HOME", "")
    home = base if os.path.isabs(base) else os.path.expanduser("~/.config")
    return Layout(user, root, prefix, home)


def _planned(layout: Layout) -> list[Planned]:
    from ckptd.daemon.systemd.units import planned

    return planned(layout, python=sys.executable, systemd=systemd_version())


def _need_rights(layout: Layout) -> None:
    if os.geteuid() != 0 and not layout.user and not layout.root:
        raise BadConfig("install", "a service of the system needs root; use sudo, or say --user for one of your own")


def _systemctl(layout: Layout, *words: str) -> tuple[str, ...]:
    return ("systemctl", "--user", *words) if layout.user else ("systemctl", *words)


def _commands_after(layout: Layout) -> list[tuple[str, ...]]:
    reload = _systemctl(layout, "daemon-reload")
    if layout.user:
        return [reload]
    made = [("systemd-sysusers", layout.entries("sysusers.d"))]
    return [*made, ("systemd-tmpfiles", "--create", layout.entries("tmpfiles.d")), reload]


def _run_all(commands: Sequence[tuple[str, ...]]) -> list[str]:
    """Run commands, and return a line for each that failed."""
    ran = [run(*command, timeout_s=_STOP_S) for command in commands]
    return [f"`{' '.join(one.command)}` failed: {one.error}; run it once that is put right" for one in ran if one.error]


def _unreadable(layout: Layout) -> list[str]:
    from ckptd.daemon.systemd.units import closed_directories

    if layout.user:
        return []
    closed = closed_directories([sys.executable, sys.prefix, sys.base_prefix, os.path.dirname(__file__)])
    where = ", ".join(closed)
    remedy = "install ckptd where every user can read it"
    return (
        [f"workers of other users cannot run {sys.executable}: {where} is closed to them; {remedy}"] if closed else []
    )


def _next_steps(*, user: bool) -> list[str]:
    manager = "systemctl --user" if user else "systemctl"
    linger = ["loginctl enable-linger"] if user else []  # it then runs on when its user logs out
    return [*linger, f"{manager} enable --now {' '.join(_UNITS)}", "ckptd doctor"]


def _place(path: str, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise SystemCallFailed("write", path, error.errno or 0) from None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError as error:
        raise SystemCallFailed("read", path, error.errno or 0) from None


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SystemCallFailed("unlink", path, error.errno or 0) from None


def _report(facts: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        say_json(facts)
        return
    would = "would be " if facts["dry_run"] else ""
    titles = {"written": f"{would}written", "removed": f"{would}removed", "kept": "kept as it is"}
    titles |= {"commands": f"{would}run", "next": "next"}
    for key, title in titles.items():
        for value in facts.get(key, []):  # type: ignore[attr-defined]
            say(printable(f"{title}: {value}"))
    for warning in facts["warnings"]:  # type: ignore[attr-defined]
        sys.stderr.write(printable(f"ckptd: {warning}") + "\n")
