"""Every panel of both dashboards: what it asks, and how it is drawn. One list; nothing is drawn by hand in Grafana."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

Unit = Literal["s", "bytes", "Bps", "short", "percentunit"]
Kind = Literal["stat", "timeseries"]

# Selectors with Grafana's variables. `window` is long: a job saves a few times an hour.
_FLEET: Final = '{job=~"$job"}'
_FLEET_FAILED: Final = '{job=~"$job", outcome="failed"}'
_FLEET_DISKS: Final = '{job=~"$job", volume="checkpoints"}'
_ONE: Final = '{job=~"$job", instance=~"$instance"}'


@dataclass(frozen=True)
class Query:
    """One expression and the name of its series, with Grafana's templates."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: What it answers.
        text: How to read it.
        queries: What it asks.
        unit: Unit of all its values.
        kind: A figure, or lines over time.
        width: Of 24 columns.
        steps: Value and colour from which on it is drawn in that colour; the first begins at the lowest.
        stacked: Whether the series add up to something.
    """

    title: str
    text: str
    queries: tuple[Query, ...]
    unit: Unit
    kind: Kind = "timeseries"
    width: int = 12
    steps: tuple[tuple[float, str], ...] = ()
    stacked: bool = False


@dataclass(frozen=True)
class Dashboard:
    """One dashboard: ``variables`` maps a variable to the query of its values."""

    uid: str
    title: str
    text: str
    panels: tuple[Panel, ...]
    variables: dict[str, str] = field(default_factory=dict)


def _quantile(q: float, histogram: str, selector: str, by: str = "le") -> str:
    return f"histogram_quantile({q}, sum by ({by}) (rate({histogram}_bucket{selector}[$window])))"


def _stat(title: str, text: str, expr: str, unit: Unit = "short", *steps: tuple[float, str]) -> Panel:
    return Panel(title, text, (Query(expr),), unit, kind="stat", width=4, steps=steps)


_FLEET_PANELS: Final = (
    _stat("Daemons that answer", "Of all that Prometheus knows.", f"sum(up{_FLEET})"),
    _stat("Saves in progress", "Begun and not ended.", f"sum(ckptd_saves_in_progress{_FLEET})"),
    _stat(
        "Longest without a commit",
        "In intervals of the job that is latest: 1 is on time.",
        f"max(ckptd_commit_lateness_ratio{_FLEET})",
        "short",
        (2, "yellow"),
        (3, "red"),
    ),
    _stat(
        "Failed saves",
        "Within the window.",
        f"sum(increase(ckptd_saves_total{_FLEET_FAILED}[$window]))",
        "short",
        (1, "red"),
    ),
    _stat(
        "Least room on a volume",
        "Of all volumes that checkpoints go to.",
        f"min(ckptd_volume_free_bytes{_FLEET_DISKS} / ckptd_volume_size_bytes{_FLEET_DISKS})",
        "percentunit",
        (0.0, "red"),
        (0.1, "yellow"),
        (0.2, "green"),
    ),
    _stat("Ranks connected", "Open sessions.", f"sum(ckptd_sessions{_FLEET})"),
    Panel(
        "Stall of trainers",
        "How long a save call kept a trainer. The 99th percentile over the window, of the worst ten nodes.",
        (Query(f"topk(10, {_quantile(0.99, 'ckptd_trainer_stall_seconds', _FLEET, 'instance, le')})", "{{instance}}"),),
        "s",
    ),
    Panel(
        "Age of the last commit",
        "Of the ten nodes that have waited longest. A saw's teeth are good; a line that climbs is not.",
        (Query(f"topk(10, ckptd_last_commit_age_seconds{_FLEET})", "{{instance}}"),),
        "s",
    ),
    Panel(
        "Throughput against the disks' limit",
        "What all nodes write together, and what their disks have been seen to take.",
        (
            Query(f"sum(rate(ckptd_written_bytes_total{_FLEET}[$__rate_interval]))", "written"),
            Query(f"sum(ckptd_write_peak_bytes_per_second{_FLEET})", "measured limit"),
        ),
        "Bps",
    ),
    Panel(
        "Where saves spend their time",
        "Mean seconds of each phase on one rank, over all nodes.",
        (
            Query(
                f"sum by (phase) (rate(ckptd_phase_seconds_sum{_FLEET}[$window]))"
                f" / sum by (phase) (rate(ckptd_phase_seconds_count{_FLEET}[$window]))",
                "{{phase}}",
            ),
        ),
        "s",
        stacked=True,
    ),
    Panel(
        "Saves by outcome",
        "Per second.",
        (
            Query(
                f"sum by (outcome) (rate(ckptd_saves_total{_FLEET}[$__rate_interval]))",
                "{{outcome}}",
            ),
        ),
        "short",
    ),
    Panel(
        "Failures by kind",
        "Class of the root cause, within the window.",
        (Query(f"sum by (kind) (increase(ckptd_failures_total{_FLEET}[$window]))", "{{kind}}"),),
        "short",
        stacked=True,
    ),
    Panel(
        "Slowest rank",
        "By how much the last rank of a save sealed after the first: the 95th percentile of the worst ten nodes.",
        (Query(f"topk(10, {_quantile(0.95, 'ckptd_slowest_rank_seconds', _FLEET, 'instance, le')})", "{{instance}}"),),
        "s",
    ),
    Panel(
        "Slots by state",
        "Over all arenas. Where no slot is free, the next save waits.",
        (Query(f"sum by (state) (ckptd_slots{_FLEET})", "{{state}}"),),
        "short",
        stacked=True,
    ),
)

_DAEMON_PANELS: Final = (
    Panel(
        "Stall of trainers",
        "How long a save call kept a trainer.",
        (
            Query(_quantile(0.5, "ckptd_trainer_stall_seconds", _ONE), "median"),
            Query(_quantile(0.99, "ckptd_trainer_stall_seconds", _ONE), "99th percentile"),
        ),
        "s",
    ),
    Panel(
        "Age of the last commit",
        "And the median interval between two commits of a job.",
        (
            Query(f"ckptd_last_commit_age_seconds{_ONE}", "age"),
            Query(_quantile(0.5, "ckptd_save_interval_seconds", _ONE), "interval"),
        ),
        "s",
    ),
    Panel(
        "Throughput against the disk's measured limit",
        "How fast the last save was written, beside the fastest image or save so far.",
        (
            Query(f"ckptd_write_bytes_per_second{_ONE}", "last save"),
            Query(f"rate(ckptd_written_bytes_total{_ONE}[$__rate_interval])", "written, over time"),
            Query(f"ckptd_write_peak_bytes_per_second{_ONE}", "measured limit"),
        ),
        "Bps",
    ),
    Panel(
        "Where saves spend their time",
        "Mean seconds of each phase on one rank.",
        (
            Query(
                f"sum by (phase) (rate(ckptd_phase_seconds_sum{_ONE}[$window]))"
                f" / sum by (phase) (rate(ckptd_phase_seconds_count{_ONE}[$window]))",
                "{{phase}}",
            ),
        ),
        "s",
        stacked=True,
    ),
    Panel(
        "Duration of saves",
        "From scheduling to commit. The dots are exemplars: their save_id names the save on the daemon's page.",
        (
            Query(_quantile(0.5, "ckptd_save_seconds", _ONE), "median"),
            Query(_quantile(0.99, "ckptd_save_seconds", _ONE), "99th percentile"),
        ),
        "s",
    ),
    Panel(
        "Slowest rank",
        "By how many seconds the last rank of a save sealed after the first.",
        (
            Query(_quantile(0.5, "ckptd_slowest_rank_seconds", _ONE), "median"),
            Query(_quantile(0.95, "ckptd_slowest_rank_seconds", _ONE), "95th percentile"),
        ),
        "s",
    ),
    Panel(
        "Slots by state",
        "Of all ranks. Ranks without a free slot are those whose next save will wait.",
        (
            Query(f"sum by (state) (ckptd_slots{_ONE})", "{{state}}"),
            Query(f"ckptd_full_sessions{_ONE}", "ranks without a free slot"),
        ),
        "short",
    ),
    Panel(
        "Saves and failures",
        "Within the window: how saves ended, and the class of the root cause.",
        (
            Query(f"sum by (outcome) (increase(ckptd_saves_total{_ONE}[$window]))", "{{outcome}}"),
            Query(f"sum by (kind) (increase(ckptd_failures_total{_ONE}[$window]))", "failed: {{kind}}"),
        ),
        "short",
    ),
    Panel(
        "Work in flight",
        "Saves, images that wait for a worker, workers.",
        (
            Query(f"ckptd_saves_in_progress{_ONE}", "saves"),
            Query(f"ckptd_queued_images{_ONE}", "queued images"),
            Query(f"ckptd_workers{_ONE}", "workers"),
            Query(f"ckptd_sessions{_ONE}", "ranks"),
        ),
        "short",
    ),
    Panel(
        "What went wrong and was mended or refused",
        "Within the window.",
        (
            Query(f"increase(ckptd_worker_restarts_total{_ONE}[$window])", "workers replaced"),
            Query(f"increase(ckptd_work_retries_total{_ONE}[$window])", "work begun anew"),
            Query(f"increase(ckptd_write_retries_total{_ONE}[$window])", "images written again"),
            Query(f"increase(ckptd_removed_checkpoints_total{_ONE}[$window])", "checkpoints removed by retention"),
            Query(
                f"sum by (reason) (increase(ckptd_rejected_messages_total{_ONE}[$window]))",
                "message: {{reason}}",
            ),
            Query(f"sum by (reason) (increase(ckptd_refused_http_requests_total{_ONE}[$window]))", "HTTP: {{reason}}"),
        ),
        "short",
    ),
    Panel(
        "Loads of a save still in memory",
        "Within the window: what they found there. The overwritten and the damaged were read again from the disk.",
        (Query(f"sum by (memory) (increase(ckptd_memory_loads_total{_ONE}[$window]))", "{{memory}}"),),
        "short",
        stacked=True,
    ),
    Panel(
        "Bytes loaded from memory",
        "That no disk was asked for.",
        (Query(f"rate(ckptd_memory_served_bytes_total{_ONE}[$__rate_interval])", "from a save in memory"),),
        "Bps",
    ),
    Panel(
        "Room",
        "Free bytes of the fullest volume in use, and of the node's memory.",
        (
            Query(f"ckptd_volume_free_bytes{_ONE}", "{{volume}}"),
            Query(f"ckptd_node_memory_available_bytes{_ONE}", "memory"),
            Query(f"ckptd_arena_bytes{_ONE}", "arenas"),
        ),
        "bytes",
    ),
    Panel(
        "Memory of the processes",
        "Private and shared pages; the shared pages of workers are the arenas, once for each worker.",
        (Query(f"ckptd_resident_bytes{_ONE}", "{{role}}, {{kind}}"),),
        "bytes",
    ),
    Panel(
        "Processor time",
        "Processors in use.",
        (Query(f"rate(ckptd_cpu_seconds_total{_ONE}[$__rate_interval])", "{{role}}"),),
        "short",
    ),
    Panel(
        "Descriptors and connections",
        "Open file descriptors, HTTP connections and event streams.",
        (
            Query(f"ckptd_open_descriptors{_ONE}", "descriptors of {{role}}"),
            Query(f"ckptd_http_connections{_ONE}", "HTTP connections"),
            Query(f"ckptd_http_streams{_ONE}", "event streams"),
        ),
        "short",
    ),
)

DASHBOARDS: Final = (
    Dashboard(
        "ckptd-fleet",
        "ckptd: fleet",
        "All checkpoint daemons: is every job's work safe, and where is it not?",
        _FLEET_PANELS,
        {"job": "label_values(ckptd_build_info, job)"},
    ),
    Dashboard(
        "ckptd-daemon",
        "ckptd: one daemon",
        "One node's checkpoint daemon and its jobs.",
        _DAEMON_PANELS,
        {
            "job": "label_values(ckptd_build_info, job)",
            "instance": 'label_values(ckptd_build_info{job=~"$job"}, instance)',
        },
    ),
)
