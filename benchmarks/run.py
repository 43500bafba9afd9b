"""Runs the child processes, one at a time and in rounds, so that a drift of the machine meets all systems alike."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import psutil
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from benchmarks.samples import Message, Result, Step

_ROOT: Final = Path(__file__).resolve().parent.parent
_CHILD_TIMEOUT_S: Final = 1800.0
_ENDS_WITHIN_S: Final = 90.0  # the daemon may take a minute to write what is sealed
_LOG_LINES_SHOWN: Final = 20
_SOAK_BYTES: Final = 8_000_000
_SOAK_TENSORS: Final = 100
_RESHARD_BYTES: Final = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is measured.

    Attributes:
        nbytes: Wanted bytes of the state dict.
        tensors: Wanted number of tensors.
        saves: Saves of each system in steady state, over all rounds.
        rounds: How often the systems take turns.
        limit_repeats: Repetitions of each limit, in each of its turns.
        slowdowns: Saves of ckptd beside a matmul loop, for each number of threads and round; of stock it is one.
        loads: Loads of each system and round, cold and warm each.
        soak_saves: Saves of a small model in a row.
        items: Chunks of tensors in the metadata that are written and read.
        adopted: Sealed saves of a daemon that is killed.
        adoptions: How often that is done.
    """

    nbytes: int
    tensors: int
    saves: int
    rounds: int
    limit_repeats: int = 3
    slowdowns: int = 2
    loads: int = 2
    soak_saves: int = 200
    items: int = 1_000_000
    adopted: int = 100
    adoptions: int = 5


@dataclass(frozen=True)
class Turn:
    """One child process: its name for people, and its arguments."""

    name: str
    arguments: list[str]


def turns_of(extent: Extent) -> list[Turn]:
    """Return the child processes in order: limits around the rounds, the systems' order reversed in every other one."""
    turns = []
    size = ["--bytes", str(extent.nbytes), "--tensors", str(extent.tensors)]
    limits = ["--system", "limits", *size, "--saves", str(extent.limit_repeats)]
    for number in range(extent.rounds):
        name = f"round {number + 1} of {extent.rounds}"
        turns.append(Turn(f"{name}: limits", limits))
        saves = extent.saves // extent.rounds + (number < extent.saves % extent.rounds)
        order = ["sync", "thread", "process", "ckptd", "waves"]
        for system in reversed(order) if number % 2 else order:
            arguments = ["--system", system, *size, "--saves", str(max(1, saves)), *_extras(system, extent)]
            turns.append(Turn(f"{name}: {system}", arguments + ["--memory"] * (number == 0)))
    turns.append(Turn("limits once more", limits))
    small = ["--bytes", str(_SOAK_BYTES), "--tensors", str(_SOAK_TENSORS), "--saves", str(extent.soak_saves)]
    turns.append(Turn(f"{extent.soak_saves} small saves", ["--system", "soak", *small]))
    adoption = [
        "--system",
        "adoption",
        "--bytes",
        "0",
        "--saves",
        str(extent.adopted),
        "--loads",
        str(extent.adoptions),
    ]
    turns.append(Turn(f"the successor of a daemon killed with {extent.adopted} saves", adoption))
    many = ["--bytes", str(min(extent.nbytes, _RESHARD_BYTES)), "--tensors", str(extent.items)]
    turns.append(Turn(f"planning, and metadata of {extent.items:,} items", ["--system", "planning", *many]))
    return turns


def _extras(system: str, extent: Extent) -> list[str]:
    # The trainer does nothing beside stock's `save`, and stock loads alike whatever has saved. Stock's other saves take
    # seconds, not fractions: one of them says as much as several of ours.
    slowdowns = {"sync": 0, "waves": 0, "ckptd": extent.slowdowns}.get(system, 1)
    loads = extent.loads if system in {"sync", "ckptd"} else 0
    return ["--slowdowns", str(slowdowns), "--loads", str(loads)]


class ChildFailed(Exception):
    """A child process measured nothing."""


def run_turn(turn: Turn, directory: Path, *, log: Path, tell: Callable[[str], None]) -> Result:
    """Run one child process to its end and return what it measured.

    Args:
        turn: What to run.
        directory: Where checkpoints and temporary files go.
        log: File that its standard error is appended to.
        tell: Called with what it is about to do.

    Raises:
        ChildFailed: It ended without a result, or not in time; all its processes are ended.
    """
    command = [sys.executable, "-m", "benchmarks.child", *turn.arguments, "--directory", str(directory)]
    with log.open("ab") as errors:
        child = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=errors)
    watchdog = threading.Timer(_CHILD_TIMEOUT_S, lambda: _end(child))
    watchdog.daemon = True
    watchdog.start()
    result: Result | None = None
    try:
        assert child.stdout is not None
        for line in child.stdout:
            message = msgspec.json.decode(line, type=Message)
            if isinstance(message, Step):
                tell(message.what)
            else:
                result = message
        child.wait()
    finally:
        watchdog.cancel()
        _end(child)
    if result is None or child.returncode != 0:
        raise ChildFailed(f"{turn.name} ended with status {child.returncode}; the end of {log}:\n{_tail(log)}")
    return result


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child that is still there; one that does not end its own processes in time is killed with them."""
    child.terminate()  # does nothing to one that has been waited for
    try:
        child.wait(_ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        process = psutil.Process(child.pid)
        for member in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        child.wait()


def _tail(log: Path) -> str:
    with log.open(encoding="utf-8", errors="replace") as lines:
        return "".join(deque(lines, maxlen=_LOG_LINES_SHOWN))


def run_all(extent: Extent, directory: Path, *, log: Path, console: Console) -> list[Result]:
    """Run everything and return all results.

    Args:
        extent: How much is measured.
        directory: Where the checkpoints go.
        log: File that the children's standard error is appended to.
        console: Where progress is shown: a line for each child, and on a terminal what it is about.
    """
    results, turns = [], turns_of(extent)
    for number, turn in enumerate(turns, start=1):
        label = f"[{number}/{len(turns)}] {turn.name}"
        begun = time.perf_counter()
        with console.status(label) as status:
            show = partial(_show, status, label)
            results.append(run_turn(turn, directory, log=log, tell=show))
        console.print(f"{label}: {time.perf_counter() - begun:.0f} s", markup=False)
    return results


def _show(status: Status, label: str, what: str) -> None:
    status.update(f"{escape(label)}: {escape(what)}")
