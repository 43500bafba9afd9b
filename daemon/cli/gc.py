"""`ckptd gc`: removes what dead daemons and killed saves have left behind."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from ckptd.daemon.cli.output import counted, printable, progress_bar, say, say_json
from ckptd.daemon.cli.status import fetch_status
from ckptd.protocol.errors import BadConfig, CkptdError
from ckptd.protocol.paths import http_address_file, runtime_dir

if TYPE_CHECKING:
    from ckptd.daemon.cli.leftovers import ArenaDirectory


@dataclass(frozen=True)
class Left:
    """What may be a leftover.

    Attributes:
        path: Where it is.
        kind: arenas, a save, or a checkpoint: the last copy of one, which gets its name back.
        nbytes: What it takes.
        keep: Why it stays, or "".
        remove: Settles it, and returns why it is still there, or "".
    """

    path: str
    kind: str
    nbytes: int
    keep: str
    remove: Callable[[], str]


def gc(
    folders: Annotated[
        list[str] | None, typer.Argument(metavar="[FOLDER]...", help="Where checkpoints are kept; searched all below.")
    ] = None,
    *,
    shm_dir: Annotated[str, typer.Option(metavar="DIR", help="The tmpfs of arenas; default: as configured.")] = "",
    older_than: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Leave unfinished saves that changed later than that.")
    ] = 3600.0,
    sealed: Annotated[
        bool, typer.Option("--sealed", help="Also arenas with saves that a restarted daemon would finish.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON; needs --yes or --dry-run.")
    ] = False,
) -> None:
    """Remove what dead daemons and killed saves left.

    These are hidden directories of unfinished saves below FOLDERs, and arenas of daemons that have died. What a live
    daemon of this node works on is never touched. Exit status 1: something could not be removed.
    """
    if as_json and not (yes or dry_run):
        raise typer.BadParameter("there is nobody to ask; add --yes or --dry-run", param_hint="'--json'")
    found = _find(folders or [], shm_dir or _configured_shm_dir(), older_than_s=older_than, sealed=sealed)
    going = [left for left in found if not left.keep]
    if not as_json:
        for left in found:
            say(printable(_line(left)))
    if going and not dry_run and not yes:
        _ask(going)
    failed = [] if dry_run else _remove(going)
    removed = [] if dry_run else [left.path for left in going if left.path not in dict(failed)]
    if as_json:
        say_json(
            {
                "dry_run": dry_run,
                "removed": removed,
                "failed": [{"path": path, "message": message} for path, message in failed],
                "left": [{"path": x.path, "kind": x.kind, "bytes": x.nbytes, "keep": x.keep or None} for x in found],
            }
        )
    else:
        for path, message in failed:
            sys.stderr.write(printable(f"ckptd: {path}: {message}") + "\n")
        say(_summary(going, removed, dry_run=dry_run))
    raise typer.Exit(1 if failed else 0)


def _find(folders: list[str], shm_dir: str, *, older_than_s: float, sealed: bool) -> list[Left]:
    from ckptd.daemon.cli import leftovers

    directories = leftovers.arena_directories(shm_dir)
    found = []
    for arenas in directories:
        keep = _why_arenas_stay(arenas, sealed=sealed)
        found.append(Left(arenas.path, "arenas", arenas.nbytes, keep, partial(leftovers.remove_arenas, arenas.path)))
    busy, unsure = _busy([a for a in directories if a.live])
    if not sealed:
        pending = "a daemon that is started again may finish it; --sealed gives it up"
        unsure += [(a.uid, pending) for a in directories if not a.live and (a.sealed or a.waiting)]
    for folder in folders:
        now = _now_unix_s(folder)
        for save in leftovers.hidden_saves(folder):
            keep = leftovers.reason_to_keep(save, busy=busy, now_unix_s=now, older_than_s=older_than_s)
            # The system's daemon writes for all users, a user's own for that one.
            keep = keep or next((why for uid, why in unsure if uid in {0, save.uid}), "")
            kind = "save" if keep or not leftovers.names_back(save) else "checkpoint"
            found.append(Left(save.path, kind, save.nbytes, keep, partial(leftovers.settle, save)))
    return found


def _why_arenas_stay(arenas: ArenaDirectory, *, sealed: bool) -> str:
    if arenas.live:
        return "its daemon lives, or is not ours to judge"
    if arenas.waiting:
        return "trainers live that wait for its next daemon"
    if arenas.sealed and not sealed:
        return f"holds {arenas.sealed} sealed saves that its next daemon finishes; --sealed gives them up"
    return ""


def _busy(live: list[ArenaDirectory]) -> tuple[set[str], list[tuple[int, str]]]:
    """Ask all daemons that live here.

    Returns:
        The ids that they are saving, and of whose daemons we cannot be sure, and why.
    """
    busy: set[str] = set()
    unsure = [(one.uid, f"the daemon of {one.path} lives but cannot be found") for one in live if not one.runtime]
    uids = {one.runtime: one.uid for one in live if one.runtime}
    for runtime in dict.fromkeys([*uids, runtime_dir(), "/run/ckptd"]):
        if not os.path.lexists(http_address_file(runtime)) and runtime not in uids:
            continue  # nobody is there
        try:
            status: dict[str, Any] = msgspec.json.decode(fetch_status(runtime))
        except CkptdError:
            if runtime in uids:
                unsure.append((uids[runtime], f"the daemon at {runtime} lives but cannot be asked"))
            continue
        saves = [save for job in status["jobs"] for save in job["generations"]]
        busy |= {save["checkpoint_id"] for save in saves if save["state"] not in ("committed", "failed")}
    return busy, unsure


def _now_unix_s(folder: str) -> float:
    """Return the time by the clock of the file system, which on a network is not ours."""
    import time

    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()  # not ours to write, so nothing there will be removed


def _configured_shm_dir() -> str:
    from ckptd.daemon.settings.config import default_config_path, load_config

    return load_config(default_config_path("system" if os.geteuid() == 0 else "user")).shm_dir


def _ask(going: list[Left]) -> None:
    if not sys.stdin.isatty():
        raise BadConfig("gc", f"{len(going)} leftovers, and nobody to ask; add --yes to delete, or --dry-run")
    total = sum(left.nbytes for left in going)
    typer.confirm(f"Delete these {len(going)} leftovers, {total} bytes?", abort=True)


def _remove(going: list[Left]) -> list[tuple[str, str]]:
    failed = []
    with progress_bar("gc") as progress:
        done = counted(progress, sum(left.nbytes for left in going))
        for left in going:
            if why := left.remove():
                failed.append((left.path, why))
            done(left.nbytes)
    return failed


def _line(left: Left) -> str:
    what = f"kept: {left.keep}" if left.keep else "left over"
    if left.kind == "checkpoint":
        what = "the last copy of a checkpoint, gets its name back"
    return f"{left.path}: {left.nbytes} bytes, {what}"


def _summary(going: list[Left], removed: list[str], *, dry_run: bool) -> str:
    if not going:
        return "nothing is left over"
    nbytes = sum(left.nbytes for left in going if dry_run or left.path in removed)
    return f"{'would settle' if dry_run else 'settled'} {len(going if dry_run else removed)} leftovers, {nbytes} bytes"
