"""Draws one run: a panel for each figure, a bar for each system, a line for the machine's limit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: no display is needed

import matplotlib.pyplot as plt

from benchmarks.machine import Machine
from benchmarks.summary import Summary

# Ours stands out; stock's three are shades of one colour. Told apart by position and name, too.
_SYSTEMS: Final = {
    "ckptd": ("ckptd", "#1f6fb4"),
    "sync": ("torch\nsync", "#e3c4a0"),
    "thread": ("torch\nthread", "#d89b55"),
    "process": ("torch\nprocess", "#b8691a"),
}
_LIMIT_COLOUR: Final = "#b02020"
_COLUMNS: Final = 4


@dataclass(frozen=True)
class _Panel:
    title: str
    higher_is_better: bool
    values: dict[str, float | None]
    limit: tuple[str, float] | None = None


def write_plot(path: Path, *, run: Summary, machine: Machine) -> None:
    """Write the plot as PNG."""
    panels = _panels(run)
    rows = -(-len(panels) // _COLUMNS)
    figure, axes = plt.subplots(rows, _COLUMNS, figsize=(4.1 * _COLUMNS, 3.6 * rows + 0.9))
    for axis, panel in zip(axes.flat, panels, strict=True):
        _draw(axis, panel)
    figure.suptitle(
        f"One checkpoint of {run.gigabytes:.2f} GB in {run.tensors} tensors: ckptd beside torch {machine.torch}"
        f" and the machine's limits\n{machine.cpu}, {machine.cores} cores, Linux {machine.kernel},"
        f" {machine.file_system}; medians of {run.systems['ckptd'].saves} saves",
        fontsize=12,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.98), h_pad=2.0)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panels(run: Summary) -> list[_Panel]:
    systems, limits, gigabytes = run.systems, run.limits, run.gigabytes

    def each(name: str) -> dict[str, float | None]:
        return {system: getattr(summary, name) for system, summary in systems.items()}

    threads = max(systems["ckptd"].slowed, default=1)
    slowed = {name: summary.slowed.get(threads) for name, summary in systems.items()}
    percent = {name: None if share is None else share * 100 for name, share in slowed.items()}
    write_alone = limits.slowed.get(threads)
    beside_write = None if write_alone is None else ("beside a raw write", write_alone * 100)
    loads = ("ckptd", "sync")  # stock's three modes load alike
    cold = {name: systems[name].cold_load_gb_per_s for name in loads}
    warm = {name: systems[name].warm_load_gb_per_s for name in loads}
    return [
        _Panel("Stall of the trainer, s", False, each("stall_s"), ("memcpy", limits.memcpy_s(gigabytes))),
        _Panel("Seconds to durable", False, each("durable_s"), ("memcpy + write", limits.durable_s(gigabytes))),
        _Panel("Persist rate, GB/s", True, each("persist_gb_per_s"), ("raw O_DIRECT write", limits.write_gb_per_s)),
        _Panel("CPU-seconds per GB", False, each("cpu_s_per_gb"), ("memcpy + write", limits.cpu_s_per_gb)),
        _Panel("Peak extra memory, GB", False, each("peak_extra_gb")),
        _Panel(f"Matmul loop slowed, {threads} threads, %", False, percent, beside_write),
        _Panel("Load, cold, GB/s", True, cold, ("raw read", limits.read_gb_per_s)),
        _Panel("Load, warm, GB/s", True, warm),
    ]


def _draw(axis: Any, panel: _Panel) -> None:
    names = [name for name in _SYSTEMS if panel.values.get(name) is not None]
    heights = [panel.values[name] or 0.0 for name in names]
    labels = ["torch" if len(panel.values) == 2 and n != "ckptd" else _SYSTEMS[n][0] for n in names]
    bars = axis.bar(labels, heights, color=[_SYSTEMS[name][1] for name in names], width=0.62)
    backing = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    labels_above = axis.bar_label(bars, [_text(height) for height in heights], padding=3, fontsize=10, zorder=5)
    for label in labels_above:
        label.set_bbox(backing)  # the limit's line may pass behind it
    tops = [*heights, 0.0]
    if panel.limit is not None:
        name, value = panel.limit
        axis.axhline(value, color=_LIMIT_COLOUR, linestyle="--", linewidth=1.4, label=f"{name}: {_text(value)}")
        axis.legend(fontsize=9, frameon=False, loc="upper right")
        tops.append(value)
    # Room above the bars, so that the legend hides none of their labels.
    axis.set_ylim(min(0.0, *heights), max(tops) * 1.35 or 1.0)
    axis.set_xlim(-0.6, 3.6 if len(names) > 2 else 2.0)
    axis.set_title(f"{panel.title}\n({'higher' if panel.higher_is_better else 'lower'} is better)", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def _text(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"
