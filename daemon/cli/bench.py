"""`ckptd bench`: what this machine can do, and what a save and a load through the daemon make of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Annotated, Final

import typer

from ckptd.daemon.cli.output import print_columns, progress_bar, say_json
from ckptd.protocol.errors import SystemCallFailed, UnexpectedError

_GB: Final = 1e9
_MIB: Final = 1 << 20
_TRIAL_S: Final = 900.0


def bench(
    folder: Annotated[
        str, typer.Argument(metavar="[FOLDER]", help="Where checkpoints are kept; what is made is removed.")
    ] = ".",
    *,
    mib: Annotated[int, typer.Option(metavar="N", min=1, max=1 << 20, help="MiB to copy, write, save and load.")] = 512,
    shm_dir: Annotated[str, typer.Option(metavar="DIR", help="The tmpfs of arenas.")] = "/dev/shm",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure copy, disk, save and load.

    One turn of each: figures to look at, not to compare versions with. The save goes through the running daemon, or a
    private one where none runs.
    """
    nbytes = mib * _MIB
    try:
        made = tempfile.mkdtemp(prefix=".ckptd-bench-", dir=folder)
    except OSError as error:
        raise SystemCallFailed("mkdir", folder, error.errno or 0) from None
    try:
        with progress_bar("bench") as progress:
            figures = _measure(os.path.abspath(made), shm_dir, nbytes, progress)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    if as_json:
        say_json({"folder": os.path.abspath(folder), "bytes": nbytes, **figures})
        return
    rows = [(name, f"{figures[key]:.3f}", f"{nbytes / figures[key] / _GB:.2f}") for key, name in _NAMES.items()]
    print_columns(("What", "Seconds", "GB/s"), rows, right=("Seconds", "GB/s"))


_NAMES: Final = {
    "memcpy_s": "copy into shared memory",
    "write_s": "raw write, durable",
    "stall_s": "save: trainer stalled",
    "durable_s": "save: durable",
    "load_s": "load, verified",
}


def _measure(made: str, shm_dir: str, nbytes: int, progress: Callable[[int, int], None] | None) -> dict[str, float]:
    from ckptd.daemon.cli import rates

    def done(parts: int) -> None:
        if progress is not None:
            progress(parts * nbytes, 4 * nbytes)

    private = rates.anonymous_memory(nbytes)
    shared = rates.shared_memory(shm_dir, nbytes)
    figures: dict[str, float] = {"memcpy_s": rates.copy_s(private, shared)}
    done(1)
    raw = os.path.join(made, "raw")
    figures["write_s"], figures["direct"] = rates.write_s(raw, shared)
    os.unlink(raw)
    shared.close()
    private.close()
    done(2)
    figures |= _trial(os.path.join(made, "checkpoint"), nbytes)
    done(4)
    return figures


def _trial(path: str, nbytes: int) -> dict[str, float]:
    """Be a trainer, in a process of its own. Raises UnexpectedError with what that process said."""
    command = [sys.executable, "-P", "-m", "ckptd.client.trial", path, str(nbytes)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TRIAL_S)
    except subprocess.TimeoutExpired:
        raise UnexpectedError(f"save and load were not done after {_TRIAL_S:.0f} s; see `ckptd status`") from None
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
        raise UnexpectedError(lines[-1].removeprefix("ckptd: "))
    figures: dict[str, float] = json.loads(ran.stdout)
    return {key: figures[key] for key in ("connect_s", "stall_s", "durable_s", "load_s")}
