"""The benchmark's command line: ``python -m benchmarks``, from the root of the repository."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

import psutil
from rich.console import Console

from benchmarks.machine import Others, describe, file_system
from benchmarks.plot import write_plot
from benchmarks.report import plain_console, print_report, write_json, write_text
from benchmarks.run import ChildFailed, Extent, run_all
from benchmarks.summary import summarize
from benchmarks.targets import targets_of

_RESULTS: Final = Path(__file__).resolve().parent / "results"
# The state dict, two slots, and the interpreters; stock's writes also want page cache.
_MEMORY_FACTOR: Final = 3.5
_SHARED_FACTOR: Final = 2.1
_DISK_FACTOR: Final = 2.1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure ckptd beside stock torch and beside the machine's limits.",
    )
    parser.add_argument("--gigabytes", type=float, help="bytes of the state dict / 10^9 (2; quick: 0.1)")
    parser.add_argument("--tensors", type=int, default=1000, help="tensors of the state dict (%(default)s)")
    parser.add_argument("--saves", type=int, help="saves of each system after its first (5; quick: 2)")
    parser.add_argument("--rounds", type=int, help="how often the systems take turns (2; quick: 1)")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="on the disk to measure (here)")
    parser.add_argument("--output", type=Path, default=_RESULTS, help="where results go (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a look that takes a minute; numbers mean little")
    return parser


def _extent(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> Extent:
    quick: bool = arguments.quick
    gigabytes = arguments.gigabytes or (0.1 if quick else 2.0)
    saves, rounds = arguments.saves or (2 if quick else 5), arguments.rounds or (1 if quick else 2)
    if not (gigabytes >= 0.01 and saves >= 1 and rounds >= 1 and arguments.tensors >= 64):
        parser.error("give at least 0.01 gigabytes, 64 tensors, 1 save and 1 round")
    extent = Extent(nbytes=round(gigabytes * 1e9), tensors=arguments.tensors, saves=saves, rounds=rounds)
    if not quick:
        return extent
    return Extent(
        nbytes=extent.nbytes,
        tensors=extent.tensors,
        saves=saves,
        rounds=rounds,
        limit_repeats=2,
        slowdowns=1,
        loads=1,
        soak_saves=40,
        items=50_000,
        adoptions=2,
    )


def _lacking(nbytes: int, directory: Path) -> str | None:
    """Return what this machine has too little of, or None."""
    if file_system(directory).startswith(("tmpfs", "ramfs")):
        return f"{directory} is in memory; give --directory on a disk"
    rooms = [
        ("memory", psutil.virtual_memory().available, _MEMORY_FACTOR),
        ("/dev/shm", shutil.disk_usage("/dev/shm").free, _SHARED_FACTOR),
        (str(directory), shutil.disk_usage(directory).free, _DISK_FACTOR),
    ]
    for name, free, factor in rooms:
        if free < factor * nbytes:
            return f"{name}: {factor * nbytes:.0f} bytes are needed, {free} free; give fewer --gigabytes"
    return None


def main() -> None:
    """Measure and report. Exit status: 0 measured, whatever the numbers; 1 failed; 2 wrong usage."""
    parser = _parser()
    arguments = parser.parse_args()
    extent = _extent(arguments, parser)
    lacking = _lacking(extent.nbytes, arguments.directory)
    if lacking:
        parser.error(lacking)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    log = output / "children.log"
    log.write_bytes(b"")
    progress, others = Console(stderr=True, highlight=False), Others()
    machine = describe(arguments.directory.resolve())
    with (
        tempfile.TemporaryDirectory(prefix=".bench-", dir=arguments.directory) as checkpoints,
        tempfile.TemporaryDirectory(prefix="ckptd-bench-") as temporary,
    ):
        os.environ["TMPDIR"] = temporary  # children's sockets; removed even if they are killed
        try:
            results = run_all(extent, Path(checkpoints), log=log, console=progress)
        except ChildFailed as error:
            sys.exit(str(error))
    run = summarize(results, others_share=others.share())
    targets = targets_of(run)
    write_json(output / "results.json", machine=machine, run=run, targets=targets, results=results)
    write_text(output / "table.txt", machine=machine, run=run, targets=targets)
    write_plot(output / "plot.png", run=run, machine=machine)
    console = Console(highlight=False) if sys.stdout.isatty() else plain_console(sys.stdout)
    print_report(console, machine=machine, run=run, targets=targets)
    console.print(f"written: {output}/results.json, table.txt, plot.png; children.log")


if __name__ == "__main__":
    main()
