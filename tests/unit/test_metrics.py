from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ckptd import __version__
from ckptd.daemon.metrics import (
    CONTENT_TYPE,
    Kind,
    Live,
    Memory,
    Metrics,
    Outcome,
    Phase,
    Reason,
    SlotState,
    failure_kind,
)
from ckptd.protocol.errors import (
    BadMessage,
    BadPlan,
    CkptdError,
    DiskFull,
    RankFailed,
    RankLost,
    SystemCallFailed,
    UnexpectedError,
    for_rank,
)

# Base units, and for counts the noun that is counted.
UNITS = {"seconds", "bytes", "info"} | {
    *("slots", "images", "sessions", "workers", "saves", "failures", "restarts", "messages", "loads"),
}
LABELS = {
    "phase": set(get_args(Phase)),
    "outcome": set(get_args(Outcome)),
    "kind": set(get_args(Kind)),
    "reason": set(get_args(Reason)),
    "state": set(get_args(SlotState)),
    "memory": set(get_args(Memory)),
}


class Daemon:
    """A daemon's live state and a clock, both set by hand."""

    def __init__(self):
        self.live = Live({}, queue_depth=0, sessions=0, workers=0, arena_bytes=0)
        self.now = 1000.0
        self.metrics = Metrics(lambda: self.live, clock=lambda: self.now)

    def families(self):
        text = self.metrics.render().decode()
        return {family.name: family for family in text_string_to_metric_families(text)}

    def samples(self):
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in self.families().values()
            for sample in family.samples
        }


@pytest.fixture
def daemon():
    return Daemon()


def test_every_metric_has_a_help_text_and_a_name_that_ends_in_a_unit(daemon):
    families = daemon.families()
    assert len(families) == 22
    for name, family in families.items():
        assert name.startswith("ckptd_")
        assert family.documentation.endswith(".")
        assert name.removesuffix("_total").rsplit("_", 1)[1] in UNITS, name
        assert name.rsplit("_", 1)[1] not in {"created", "count"}
        assert family.type in {"counter", "gauge", "histogram"}


def test_label_sets_are_closed_and_complete_before_anything_happens(daemon):
    found = {}
    for family in daemon.families().values():
        for sample in family.samples:
            for label, value in sample.labels.items():
                found.setdefault(label, set()).add(value)
    assert found.pop("version") == {__version__}
    assert float(max(found.pop("le") - {"+Inf"}, key=float)) == 3600
    assert found == LABELS


def test_nothing_outside_the_closed_sets_gets_in(daemon):
    with pytest.raises(KeyError):
        daemon.metrics.observe_phase("nap", 1)
    with pytest.raises(KeyError):
        daemon.metrics.rejected("boredom")
    with pytest.raises(ValueError, match="burning"):
        Live({"burning": 1}, queue_depth=0, sessions=0, workers=0, arena_bytes=0)


def test_gauges_show_what_is_live_at_the_scrape(daemon):
    assert daemon.samples()["ckptd_sessions",] == 0
    daemon.live = Live({"free": 1, "sealed": 2}, queue_depth=3, sessions=4, workers=5, arena_bytes=6)
    samples = daemon.samples()
    assert samples["ckptd_slots", "free"] == 1
    assert samples["ckptd_slots", "sealed"] == 2
    assert samples["ckptd_slots", "persisting"] == 0
    assert samples["ckptd_queued_images",] == 3
    assert samples["ckptd_sessions",] == 4
    assert samples["ckptd_workers",] == 5
    assert samples["ckptd_arena_bytes",] == 6


def test_a_snapshot_is_taken_once_per_scrape_and_not_before():
    taken = []

    def snapshot():
        taken.append(1)
        return Live({}, queue_depth=0, sessions=0, workers=0, arena_bytes=0)

    metrics = Metrics(snapshot)
    assert taken == []
    metrics.render()
    assert taken == [1]


def test_the_age_of_the_last_commit_is_told_at_the_scrape(daemon):
    assert ("ckptd_last_commit_age_seconds",) not in daemon.samples()
    assert ("ckptd_last_commit_timestamp_seconds",) not in daemon.samples()
    daemon.metrics.committed(10, 2.0, now=1005.0)
    daemon.now = 1012.0
    samples = daemon.samples()
    assert samples["ckptd_last_commit_age_seconds",] == 7
    assert samples["ckptd_last_commit_timestamp_seconds",] == 1005
    assert samples["ckptd_start_time_seconds",] == 1000
    daemon.now = 900.0  # the clock was set back
    assert daemon.samples()["ckptd_last_commit_age_seconds",] == 0


def test_a_commit_counts_bytes_time_and_outcome(daemon):
    daemon.metrics.committed(10, 2.0, now=1005.0)
    samples = daemon.samples()
    assert samples["ckptd_committed_bytes_total",] == 10
    assert samples["ckptd_saves_total", "committed"] == 1
    assert samples["ckptd_saves_total", "failed"] == 0
    assert samples["ckptd_save_seconds_sum",] == 2
    assert samples["ckptd_save_seconds_count",] == 1


def test_the_other_counters_count_what_they_are_told(daemon):
    metrics = daemon.metrics
    metrics.observe_phase("fsync", 0.5)
    metrics.observe_stall(0.25)
    metrics.staged(7)
    metrics.written(8)
    metrics.skipped()
    metrics.worker_restarted()
    metrics.rejected("uid")
    for memory, nbytes in (("served", 9), ("served", 10), ("overwritten", 5), ("absent", 0)):
        metrics.loaded_from_memory(memory, nbytes)
    samples = daemon.samples()
    assert samples["ckptd_phase_seconds_sum", "fsync"] == 0.5
    assert samples["ckptd_phase_seconds_count", "write"] == 0
    assert samples["ckptd_trainer_stall_seconds_sum",] == 0.25
    assert samples["ckptd_staged_bytes_total",] == 7
    assert samples["ckptd_written_bytes_total",] == 8
    assert samples["ckptd_saves_total", "skipped"] == 1
    assert samples["ckptd_worker_restarts_total",] == 1
    assert samples["ckptd_rejected_messages_total", "uid"] == 1
    assert samples["ckptd_rejected_messages_total", "stale"] == 0
    assert samples["ckptd_memory_served_bytes_total",] == 19
    assert [samples["ckptd_memory_loads_total", memory] for memory in get_args(Memory)] == [1, 2, 1, 0]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BadMessage("empty"), "request"),
        (DiskFull("/d", 2, 1), "capacity"),
        (SystemCallFailed("fsync", "/d", 5), "storage"),
        (BadPlan("w", "a gap"), "plan"),
        (RankLost(1, 2, "died"), "lifecycle"),
        (UnexpectedError("oops"), "internal"),
        (CkptdError(), "internal"),
        (for_rank(3, DiskFull("/d", 2, 1)), "capacity"),
        (RankFailed(3, "error_of_a_newer_daemon", "?"), "internal"),
    ],
)
def test_a_failure_counts_under_the_kind_of_its_root_cause(daemon, error, kind):
    assert failure_kind(error) == kind
    daemon.metrics.failed(error)
    samples = daemon.samples()
    assert samples["ckptd_saves_total", "failed"] == 1
    assert {k: samples["ckptd_failures_total", k] for k in get_args(Kind)} == {
        k: float(k == kind) for k in get_args(Kind)
    }


def test_two_daemons_in_one_process_share_nothing(daemon):
    daemon.metrics.staged(7)
    assert Daemon().samples()["ckptd_staged_bytes_total",] == 0


def test_the_format_is_named():
    assert CONTENT_TYPE.startswith("text/plain; version=")
