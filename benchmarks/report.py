"""Writes down one run: everything as JSON, the targets and all figures as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Final

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.machine import Machine
from benchmarks.samples import Result
from benchmarks.summary import Summary, SystemSummary
from benchmarks.systems import WAVE_SLOT_BYTES, WAVE_SLOTS
from benchmarks.targets import Target

_WIDTH: Final = 150
# The kernel's writeback threads alone take 1 to 3 %; at a tenth figures were seen to double.
_QUIET_SHARE: Final = 0.06
_NOTES: Final = (
    "Medians of the saves after each process's first. CPU and memory: of trainer, daemon, workers and helpers.",
    "Extra memory: anonymous and shared, above that of a trainer that does not save; page cache is not in it.",
    "Lost: the stall, and what the save slows a matmul loop with torch's default threads.",
    "Stock loads alike in all its modes.",
    "Waves go through 2 slots of 64 MiB: the limit of their time is a raw write, of their memory those slots.",
)


def write_json(path: Path, *, machine: Machine, run: Summary, targets: list[Target], results: list[Result]) -> None:
    """Write everything: the machine, the medians, the targets, and every sample."""
    content = {
        "machine": machine,
        "summary": run,
        "targets": [msgspec.to_builtins(target) | {"met": target.met} for target in targets],
        "results": results,
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")


def print_report(console: Console, *, machine: Machine, run: Summary, targets: list[Target]) -> None:
    """Print the machine, the targets and all figures."""
    size = f"{run.gigabytes:.2f} GB in {run.tensors} tensors"
    console.print("\n".join(machine.lines()))
    noisy = " - TOO NOISY: run it again on a quiet machine" if run.others_share > _QUIET_SHARE else ""
    console.print(f"{run.others_share:.0%} of the machine's CPU time went to others during the run{noisy}")
    console.print(_targets_table(targets, f"ckptd's targets: {size}"))
    console.print(_figures_table(run, f"All figures: {size}, {run.systems['ckptd'].saves} saves each"))
    console.print("\n".join(_NOTES))


def write_text(path: Path, *, machine: Machine, run: Summary, targets: list[Target]) -> None:
    """Write what :func:`print_report` prints."""
    with path.open("w", encoding="utf-8") as file:
        print_report(plain_console(file), machine=machine, run=run, targets=targets)


def plain_console(file: object) -> Console:
    """Return a console that writes tables of full width, without colours, to a file."""
    return Console(file=file, width=_WIDTH, highlight=False, color_system=None)  # type: ignore[arg-type]


def _targets_table(targets: Sequence[Target], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("#")
    table.add_column("what")
    for heading in ("ours", "torch", "limit"):
        table.add_column(heading, justify="right")
    table.add_column("ratio of")
    table.add_column("ratio", justify="right")
    table.add_column("target", justify="right")
    table.add_column("met")
    for target in targets:
        table.add_row(
            str(target.number),
            f"{target.what}, {target.unit}",
            _number(target.ours),
            " / ".join(_number(figure) for figure in target.stock) or "-",
            _number(target.limit),
            target.ratio_of,
            f"{target.ratio:.2f}",
            f"{target.relation} {target.bound:.2f}",
            "yes" if target.met else "NO",
            style=None if target.met else "bold",
        )
    return table


def _figures_table(run: Summary, title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for heading in ("ckptd", "torch sync", "torch thread", "torch process", "limit"):
        table.add_column(heading, justify="right")
    systems = [run.systems[name] for name in ("ckptd", "sync", "thread", "process")]
    for what, limit, figures in _figures(run, systems):
        table.add_row(what, *(_number(figure) for figure in figures), _number(limit))
    return table


Figures = list[float | None]


def _figures(run: Summary, systems: list[SystemSummary]) -> list[tuple[str, float | None, Figures]]:
    """Return name, limit, and the figure of each system."""
    limits, gigabytes = run.limits, run.gigabytes
    background = [s.background_return_s for s in systems]
    finished_s = median(run.adoption.finished_s)
    rows: list[tuple[str, float | None, Figures]] = [
        ("opening, ahead of the first save, s", None, [s.open_s for s in systems]),
        ("stall, first save, s", None, [s.first_stall_s for s in systems]),
        ("stall, s", limits.memcpy_s(gigabytes), [s.stall_s for s in systems]),
        ("stall, staged in the background, s", None, background),
        ("to durable, first save, s", None, [s.first_durable_s for s in systems]),
        ("to durable, s", limits.durable_s(gigabytes), [s.durable_s for s in systems]),
        *_waves(run),
        ("persist rate, GB/s", limits.write_gb_per_s, [s.persist_gb_per_s for s in systems]),
        ("CPU, s/GB", limits.cpu_s_per_gb, [s.cpu_s_per_gb for s in systems]),
        ("peak extra memory, GB", None, [s.peak_extra_gb for s in systems]),
        ("peak page cache to be written, GB", None, [s.peak_dirty_gb for s in systems]),
    ]
    for threads in systems[0].slowed:
        slowed: Figures = [_percent(s.slowed.get(threads)) for s in systems]
        rows.append(
            (
                f"matmul loop slowed, {threads} thread{'s' * (threads > 1)}, %",
                _percent(limits.slowed.get(threads)),
                slowed,
            )
        )
    return [
        *rows,
        ("lost by the trainer in a save, s", limits.memcpy_s(gigabytes), [s.lost_s for s in systems]),
        ("load, cold, GB/s", limits.read_gb_per_s, [s.cold_load_gb_per_s for s in systems]),
        ("load, warm, GB/s", None, [s.warm_load_gb_per_s for s in systems]),
        ("load from memory, GB/s", None, [_from_memory(run), None, None, None]),
        (
            f"{run.adoption.generations} saves finished by a killed daemon's successor, s",
            None,
            [finished_s, None, None, None],
        ),
    ]


def _from_memory(run: Summary) -> float | None:
    if run.restore is None:
        return None
    return run.gigabytes / (run.restore.against_disk.limit_s * run.restore.against_disk.slower)


def _waves(run: Summary) -> list[tuple[str, float | None, Figures]]:
    """Return what ckptd needs with memory for two small slots only."""
    waves = run.systems.get("waves")
    if waves is None:
        return []
    nobody_else: Figures = [None] * 3
    write_s = run.gigabytes / run.limits.write_gb_per_s
    return [
        ("staged in waves: stall, s", write_s, [waves.stall_s, *nobody_else]),
        ("staged in waves: to durable, s", write_s, [waves.durable_s, *nobody_else]),
        ("staged in waves: CPU, s/GB", run.limits.cpu_s_per_gb, [waves.cpu_s_per_gb, *nobody_else]),
        (
            "staged in waves: peak extra memory, GB",
            WAVE_SLOTS * WAVE_SLOT_BYTES / 1e9,
            [waves.peak_extra_gb, *nobody_else],
        ),
    ]


def _percent(share: float | None) -> float | None:
    return None if share is None else share * 100


def _number(value: float | None) -> str:
    """Return a figure with three digits that count; large ones are bytes and told whole."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"
