"""Recording and alert rules. Every alert has a section of its name in docs/monitoring.md: what it means, what to do.

Histograms of saves are sparse, for a job saves a few times an hour: so windows are long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True)
class Record:
    """A recording rule, named ``level:metric:operation`` as Prometheus advises."""

    name: str
    expr: str


@dataclass(frozen=True)
class Alert:
    """An alert rule.

    Attributes:
        name: What the page says; also a heading in docs/monitoring.md.
        value: What is looked at: has data whenever a daemon works and has saved.
        test: The condition; ``VALUE`` stands for the value.
        hold: For how long it must be so.
        severity: "critical" wakes somebody, "warning" can wait for the day.
        summary: One line, with Prometheus's templates.
    """

    name: str
    value: str
    test: str
    hold: str
    severity: Literal["critical", "warning"]
    summary: str

    @property
    def expr(self) -> str:
        """The whole expression."""
        return self.test.replace("VALUE", self.value)


def quantile(q: float, histogram: str, window: str) -> str:
    """Return an expression for a quantile per daemon over a window."""
    return f"histogram_quantile({q}, sum by (job, instance, le) (rate({histogram}_bucket[{window}])))"


RECORDS: Final = (
    Record(
        "instance:ckptd_trainer_stall_seconds:p99_30m",
        quantile(0.99, "ckptd_trainer_stall_seconds", "30m"),
    ),
    Record("instance:ckptd_save_seconds:p99_30m", quantile(0.99, "ckptd_save_seconds", "30m")),
    Record("instance:ckptd_slowest_rank_seconds:p95_30m", quantile(0.95, "ckptd_slowest_rank_seconds", "30m")),
    Record(
        "instance_phase:ckptd_phase_seconds:mean_30m",
        "sum by (job, instance, phase) (rate(ckptd_phase_seconds_sum[30m]))"
        " / sum by (job, instance, phase) (rate(ckptd_phase_seconds_count[30m]))",
    ),
    Record("instance:ckptd_written_bytes:rate5m", "rate(ckptd_written_bytes_total[5m])"),
    Record(
        "instance:ckptd_write:ratio",
        "ckptd_write_bytes_per_second / ckptd_write_peak_bytes_per_second",
    ),
    Record(
        "instance:ckptd_trainer_stall:ratio_rate30m",
        "rate(ckptd_trainer_stall_seconds_sum[30m]) / ckptd_sessions",
    ),
    Record("instance:ckptd_volume_free:ratio", "ckptd_volume_free_bytes / ckptd_volume_size_bytes"),
    Record(
        "instance:ckptd_slots:free_ratio",
        'sum by (job, instance) (ckptd_slots{state="free"}) / sum by (job, instance) (ckptd_slots)',
    ),
)

ALERTS: Final = (
    Alert(
        "CkptdDown",
        'up{job="ckptd"}',
        "VALUE == 0",
        "2m",
        "critical",
        "No answer from the checkpoint daemon of {{ $labels.instance }}.",
    ),
    Alert(
        "CkptdAbsent",
        'up{job="ckptd"}',
        "absent(VALUE)",
        "5m",
        "critical",
        "Prometheus knows no checkpoint daemon: the scrape job named ckptd has no targets.",
    ),
    Alert(
        "CkptdCommitLate",
        "ckptd_commit_lateness_ratio",
        "VALUE > 3",
        "1m",
        "critical",
        "A job on {{ $labels.instance }} has not committed for {{ printf `%.1f` $value }} of its intervals.",
    ),
    Alert(
        "CkptdNeverCommitted",
        "ckptd_sessions",
        "VALUE > 0 unless ckptd_last_commit_timestamp_seconds",
        "2h",
        "warning",
        "{{ $value }} ranks on {{ $labels.instance }} have been connected for long, and nothing was ever committed.",
    ),
    Alert(
        "CkptdSaveFailed",
        'increase(ckptd_saves_total{outcome="failed"}[15m])',
        "VALUE > 0",
        "0m",
        "warning",
        "A save failed on {{ $labels.instance }}.",
    ),
    Alert(
        "CkptdSavesFailing",
        'increase(ckptd_saves_total{outcome="failed"}[30m])',
        'VALUE > 1 unless ignoring (outcome) increase(ckptd_saves_total{outcome="committed"}[30m]) > 0',
        "0m",
        "critical",
        "Saves fail on {{ $labels.instance }}, and none has been committed for half an hour.",
    ),
    Alert(
        "CkptdSlotsExhausted",
        "ckptd_full_sessions",
        "VALUE > 0",
        "5m",
        "warning",
        "{{ $value }} ranks on {{ $labels.instance }} have had no free slot for minutes: their next save will wait.",
    ),
    Alert(
        "CkptdVolumeNearlyFull",
        'instance:ckptd_volume_free:ratio{volume="checkpoints"}',
        "VALUE < 0.1",
        "5m",
        "warning",
        "{{ $value | humanizePercentage }} of the checkpoints' volume of {{ $labels.instance }} is free.",
    ),
    Alert(
        "CkptdNoRoomForNextSave",
        'ckptd_volume_free_bytes{volume="checkpoints"} / ignoring (volume) ckptd_last_commit_bytes',
        "VALUE < 2",
        "1m",
        "critical",
        "The checkpoints' volume of {{ $labels.instance }} has room for {{ printf `%.1f` $value }} more checkpoints.",
    ),
    Alert(
        "CkptdSharedMemoryNearlyFull",
        'instance:ckptd_volume_free:ratio{volume="shm"}',
        "VALUE < 0.05",
        "5m",
        "warning",
        "{{ $value | humanizePercentage }} of the shared memory of {{ $labels.instance }} is free.",
    ),
    Alert(
        "CkptdVolumeSilent",
        "ckptd_volume_look_age_seconds",
        "VALUE > 60",
        "1m",
        "critical",
        "A volume of {{ $labels.instance }} ({{ $labels.volume }}) is silent since {{ $value | humanizeDuration }}.",
    ),
    Alert(
        "CkptdWorkerRestarting",
        "increase(ckptd_worker_restarts_total[15m])",
        "VALUE > 0",
        "0m",
        "warning",
        "Workers of the checkpoint daemon of {{ $labels.instance }} die and are replaced.",
    ),
    Alert(
        "CkptdStallHigh",
        "instance:ckptd_trainer_stall:ratio_rate30m",
        "VALUE > 0.02 and ckptd_sessions > 0",
        "5m",
        "warning",
        "Trainers on {{ $labels.instance }} stand still for {{ $value | humanizePercentage }} of their time in saves.",
    ),
    Alert(
        "CkptdSlowestRank",
        "instance:ckptd_slowest_rank_seconds:p95_30m",
        "VALUE > 60",
        "5m",
        "warning",
        "On {{ $labels.instance }} the last rank hands over its part {{ $value | humanizeDuration }} after the first.",
    ),
    Alert(
        "CkptdDiskSlow",
        "instance:ckptd_write:ratio",
        "VALUE < 0.2",
        "30m",
        "warning",
        "{{ $labels.instance }} writes at {{ $value | humanizePercentage }} of the rate it has been seen to reach.",
    ),
    Alert(
        "CkptdMemoryHigh",
        'ckptd_resident_bytes{role="daemon",kind="private"}',
        "VALUE > 268435456",
        "5m",
        "warning",
        "The checkpoint daemon of {{ $labels.instance }} holds {{ $value | humanize1024 }}B of memory of its own.",
    ),
    Alert(
        "CkptdNodeMemoryLow",
        "ckptd_node_memory_available_bytes / ckptd_node_memory_size_bytes",
        "VALUE < 0.05",
        "5m",
        "critical",
        "{{ $value | humanizePercentage }} of the memory of {{ $labels.instance }} is available.",
    ),
    Alert(
        "CkptdStrangers",
        "sum by (job, instance) (increase(ckptd_rejected_messages_total[15m]))",
        "VALUE > 10",
        "0m",
        "warning",
        "The checkpoint daemon of {{ $labels.instance }} turns messages away.",
    ),
)
