"""`ckptd gc`: removes what dead daemons and killed saves have left behind."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import msgspec
import typer

from ckptd.daemon.cli.output import counted, printable, progress_bar, say, say_json
from ckptd.daemon.cli.status import fetch_status
from ckptd.protocol.errors import BadConfig, CkptdError
from ckptd.protocol.paths import runtime_dir


@dataclass(frozen=True)
class Left:
    """What may be a leftover. ``keep``: why it stays, or ""; ``remove``: removes it; False if it is gone."""

    path: str
    kind: str
    nbytes: int
    keep: str
    remove: Callable[[], bool]


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
    from ckptd.daemon import leftovers

    arenas = leftovers.arena_directories(shm_dir)
    busy, silent = _busy([a.runtime for a in arenas if a.live and a.runtime])
    found = []
    for arena in arenas:
        keep = "its daemon lives, or is not ours to judge" if arena.live else ""
        if arena.waiting and not keep:
            keep = "trainers live that wait for its next daemon"
        if arena.sealed and not sealed and not keep:
            keep = (
                f"holds {arena.sealed} sealed saves that its daemon may finish when it is started; --sealed drops them"
            )
        found.append(Left(arena.path, "arenas", arena.nbytes, keep, partial(leftovers.remove_arenas, arena.path)))
    for folder in folders:
        now = _now_unix_s(folder)
        for save in leftovers.hidden_saves(folder):
            keep = leftovers.reason_to_keep(save, busy=busy, now_unix_s=now, older_than_s=older_than_s)
            if silent and not keep:
                keep = f"the daemon at {silent[0]} lives but cannot be asked"
            found.append(Left(save.path, "save", save.nbytes, keep, partial(leftovers.remove_hidden, save.path)))
    return found


def _busy(runtimes: list[str]) -> tuple[set[str], list[str]]:
    """Ask all daemons that live here; return the ids that they are saving, and which of them did not answer."""
    busy: set[str] = set()
    silent = []
    for runtime in dict.fromkeys([*runtimes, runtime_dir(), "/run/ckptd"]):
        if not os.path.lexists(os.path.join(runtime, "http")) and runtime not in runtimes:
            continue  # nobody is there
        try:
            status: dict[str, Any] = msgspec.json.decode(fetch_status(runtime))
        except CkptdError:
            silent += [runtime] if runtime in runtimes else []
            continue
        saves = [save for job in status["jobs"] for save in job["generations"]]
        busy |= {save["checkpoint_id"] for save in saves if save["state"] not in ("committed", "failed")}
    return busy, silent


def _now_unix_s(folder: str) -> float:
    """Return the time by the clock of the file system, which on a network is not ours."""
    import time

    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()  # not ours to write, so nothing there will be removed


def _configured_shm_dir() -> str:
    from ckptd.daemon.config import default_config_path, load_config

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
            try:
                if not left.remove():
                    failed.append((left.path, "somebody has taken it in the meantime"))
            except CkptdError as error:
                failed.append((left.path, str(error)))
            done(left.nbytes)
    return failed


def _line(left: Left) -> str:
    return f"{left.path}: {left.nbytes} bytes" + (f", kept: {left.keep}" if left.keep else ", left over")


def _summary(going: list[Left], removed: list[str], *, dry_run: bool) -> str:
    if not going:
        return "nothing is left over"
    nbytes = sum(left.nbytes for left in going if dry_run or left.path in removed)
    return f"{'would remove' if dry_run else 'removed'} {len(going if dry_run else removed)} leftovers, {nbytes} bytes"
