from typing import get_args

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from ckptd import __version__
from ckptd.daemon.monitoring.labels import (
    Kind,
    Memory,
    Outcome,
    Phase,
    Reason,
    Refusal,
    Role,
    SlotState,
    Volume,
    failure_kind,
)
from ckptd.daemon.monitoring.metrics import CONTENT_TYPE, Live, Metrics
from ckptd.daemon.monitoring.usage import Usage
from ckptd.daemon.monitoring.volumes import Room
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
    *("slots", "images", "sessions", "workers", "saves", "failures", "restarts", "messages", "retries", "checkpoints"),
    *("requests", "connections", "streams", "descriptors", "ratio", "loads"),
    *("progress", "second"),  # saves in progress; bytes per second
}
LABELS = {
    "phase": set(get_args(Phase)),
    "outcome": set(get_args(Outcome)),
    "kind": {*get_args(Kind), "private", "shared"},
    "reason": {*get_args(Reason), *get_args(Refusal)},
    "role": set(get_args(Role)),
    "volume": set(get_args(Volume)),
    "state": set(get_args(SlotState)),
    "memory": set(get_args(Memory)),
}


class Daemon:
    """A daemon's live state and a clock, both set by hand."""

    def __init__(self):
        self.live = Live({}, queue_depth=0, sessions=0, workers=0, arena_bytes=0)
        self.now = 1000.0
        self.metrics = Metrics(lambda: self.live, clock=lambda: self.now)

    def look(self, **rooms):
        """Let the volumes have been looked at."""
        self.live = Live({}, queue_depth=0, sessions=0, workers=0, arena_bytes=0, rooms=rooms)

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
    assert len(families) == 44
    for name, family in families.items():
        assert name.startswith("ckptd_")
        assert family.documentation.endswith(".")
        assert name.removesuffix("_total").rsplit("_", 1)[1] in UNITS, name
        assert name.rsplit("_", 1)[1] not in {"created", "count"}
        assert family.type in {"counter", "gauge", "histogram"}


def test_label_sets_are_closed_and_complete_before_anything_happens(daemon):
    daemon.look(shm=Room(2, 1), checkpoints=Room(2, 1))
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
    metrics.work_retried()
    metrics.refused("host")
    metrics.observe_interval(60.0)
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
    assert samples["ckptd_work_retries_total",] == 1
    assert samples["ckptd_refused_http_requests_total", "host"] == 1
    assert samples["ckptd_save_interval_seconds_sum",] == 60
    assert samples["ckptd_rejected_messages_total", "stale"] == 0
    assert samples["ckptd_memory_served_bytes_total",] == 19
    assert [samples["ckptd_memory_loads_total", memory] for memory in get_args(Memory)] == [1, 2, 1, 0]


def test_what_was_never_measured_has_no_series(daemon):
    for name in ("commit_lateness_ratio", "last_commit_bytes", "write_bytes_per_second", "write_peak_bytes_per_second"):
        assert (f"ckptd_{name}",) not in daemon.samples()
    assert not [name for name, *_ in daemon.samples() if name.startswith(("ckptd_volume", "ckptd_node_memory"))]


def test_the_rest_of_what_is_live_is_shown(daemon):
    daemon.live = Live(
        {},
        queue_depth=0,
        sessions=3,
        workers=2,
        arena_bytes=0,
        saves=4,
        full_sessions=1,
        lateness=2.5,
        connections=7,
        streams=6,
        usage={"daemon": Usage(1.5, 10, 20, 30), "worker": Usage(2.5, 11, 21, 31)},
        rooms={"shm": Room(100, 40, 3.0)},
        memory=(1000, 600),
    )
    samples = daemon.samples()
    assert samples["ckptd_saves_in_progress",] == 4
    assert samples["ckptd_full_sessions",] == 1
    assert samples["ckptd_commit_lateness_ratio",] == 2.5
    assert samples["ckptd_http_connections",] == 7
    assert samples["ckptd_http_streams",] == 6
    assert samples["ckptd_cpu_seconds_total", "daemon"] == 1.5
    assert samples["ckptd_resident_bytes", "private", "worker"] == 11
    assert samples["ckptd_resident_bytes", "shared", "worker"] == 21
    assert samples["ckptd_open_descriptors", "daemon"] == 30
    assert samples["ckptd_volume_size_bytes", "shm"] == 100
    assert samples["ckptd_volume_free_bytes", "shm"] == 40
    assert samples["ckptd_volume_look_age_seconds", "shm"] == 3
    assert ("ckptd_volume_size_bytes", "checkpoints") not in samples
    assert samples["ckptd_node_memory_size_bytes",] == 1000
    assert samples["ckptd_node_memory_available_bytes",] == 600


def test_the_measured_limit_is_the_highest_rate_of_an_image_or_a_save(daemon):
    daemon.metrics.written(100, 2.0)
    daemon.metrics.written(100)  # nobody measured
    assert daemon.samples()["ckptd_write_peak_bytes_per_second",] == 50
    assert ("ckptd_write_bytes_per_second",) not in daemon.samples()
    daemon.metrics.save_written(80.0)
    daemon.metrics.save_written(60.0)
    samples = daemon.samples()
    assert samples["ckptd_write_peak_bytes_per_second",] == 80
    assert samples["ckptd_write_bytes_per_second",] == 60
    assert samples["ckptd_written_bytes_total",] == 200


def test_a_slow_observation_names_its_save_where_the_format_can(daemon):
    daemon.metrics.committed(10, 2.5, now=1005.0, save_id="job-1-7-ab12")
    daemon.metrics.observe_slowest_rank(3.0, save_id="job-1-7-ab12")
    daemon.metrics.observe_phase("write", 0.3, save_id="jöb-1-7-ab12")  # not every parser takes it
    daemon.metrics.observe_phase("fsync", 0.3, save_id="x" * 200)  # too long for an exemplar
    daemon.metrics.observe_phase("plan", 0.3)
    found = {
        (sample.name, sample.labels["le"]): sample.exemplar.labels
        for family in openmetrics(daemon.metrics.render_open().decode())
        for sample in family.samples
        if sample.exemplar
    }
    assert found == {
        ("ckptd_save_seconds_bucket", "5.0"): {"save_id": "job-1-7-ab12"},
        ("ckptd_slowest_rank_seconds_bucket", "5.0"): {"save_id": "job-1-7-ab12"},
    }
    assert "job-1-7" not in daemon.metrics.render().decode()


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
