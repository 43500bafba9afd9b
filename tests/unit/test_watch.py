"""What a save's observer tells the metrics, and the save itself."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ckptd.daemon.job.generation import Generation
from ckptd.daemon.monitoring.metrics import Live, Metrics
from ckptd.daemon.monitoring.watch import SaveWatch
from ckptd.protocol.errors import DiskFull, SaveSkipped
from ckptd.protocol.messages import Sealed, WriteDone
from ckptd.protocol.save import SaveRules

SEAL = Sealed(
    sequence=1,
    checkpoint_id="/c/a",
    digest="d",
    arena=1,
    slot=0,
    control_bytes=4096,
    image_bytes=8192,
    object_bytes=b"",
    plan_s=0.5,
    stage_s=2.0,
    stall_s=2.25,
)
DONE = WriteDone(bytes_written=8192, hashes=b"", frame_hash=0, write_s=3.0, fsync_s=1.0, direct=True)


class Watched:
    """A watch over one save of two ranks."""

    def __init__(self):
        live = Live({}, queue_depth=0, sessions=0, workers=0, arena_bytes=0)
        self.metrics = Metrics(lambda: live)
        self.watch = SaveWatch(self.metrics)
        self.save = self.next_save()

    def next_save(self):
        return Generation(1, 1, "job-1-1-abcd", SaveRules(2), plan=None)

    def samples(self):
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(self.metrics.render().decode())
            for sample in family.samples
        }

    def phases(self):
        return {span["phase"]: span for span in self.save.timeline.status()}


@pytest.fixture
def watched():
    return Watched()


def test_a_seal_tells_of_planning_staging_and_the_stall(watched):
    watched.watch.sealed(watched.save, 0, SEAL)
    samples = watched.samples()
    assert samples["ckptd_phase_seconds_sum", "plan"] == 0.5
    assert samples["ckptd_phase_seconds_sum", "stage"] == 2.0
    assert samples["ckptd_trainer_stall_seconds_sum",] == 2.25
    assert samples["ckptd_staged_bytes_total",] == 8192
    phases = watched.phases()
    assert phases["plan"]["begin_s"] == 0
    assert phases["plan"]["seconds"] == pytest.approx(0.5)
    assert phases["stage"]["begin_s"] == pytest.approx(0.5, abs=0.05)


def test_an_image_tells_of_its_wait_its_writing_and_the_disks_rate(watched):
    watched.watch.writing_began(watched.save, 0.25)
    watched.watch.written(watched.save, DONE)
    samples = watched.samples()
    assert samples["ckptd_phase_seconds_sum", "queue"] == 0.25
    assert samples["ckptd_phase_seconds_sum", "write"] == 3.0
    assert samples["ckptd_phase_seconds_sum", "fsync"] == 1.0
    assert samples["ckptd_written_bytes_total",] == 8192
    assert samples["ckptd_write_peak_bytes_per_second",] == 2048
    write, fsync = watched.phases()["write"], watched.phases()["fsync"]
    assert fsync["begin_s"] == pytest.approx(write["begin_s"] + write["seconds"], abs=0.05)


def test_a_commit_tells_of_the_save_as_a_whole(watched):
    for rank in (0, 1):
        watched.watch.sealed(watched.save, rank, SEAL)
        watched.watch.writing_began(watched.save, 0.0)
        watched.save.bytes_done[rank] = 8192
        watched.watch.written(watched.save, DONE)
    watched.watch.committed(watched.save, 20_000)
    samples = watched.samples()
    assert samples["ckptd_saves_total", "committed"] == 1
    assert samples["ckptd_committed_bytes_total",] == 20_000
    assert samples["ckptd_slowest_rank_seconds_count",] == 1
    assert samples["ckptd_save_interval_seconds_count",] == 0
    assert samples["ckptd_write_bytes_per_second",] > 0
    watched.watch.committed(watched.next_save(), 20_000)
    assert watched.samples()["ckptd_save_interval_seconds_count",] == 1
    assert watched.watch.rhythm.interval_s >= 0


def test_a_hand_over_is_written_by_others_and_counted(watched):
    watched.watch.handed_over(watched.save, 1.5)
    assert watched.samples()["ckptd_phase_seconds_sum", "write"] == 1.5


def test_a_failure_and_a_skip_are_told_apart(watched):
    watched.watch.failed(DiskFull("/c", 2, 1))
    watched.watch.failed(SaveSkipped("/c/a", 0))
    samples = watched.samples()
    assert samples["ckptd_saves_total", "failed"] == 1
    assert samples["ckptd_failures_total", "capacity"] == 1
    assert samples["ckptd_saves_total", "skipped"] == 1


def test_the_status_of_a_save_tells_its_phases_its_rate_and_who_is_missing(watched):
    watched.watch.sealed(watched.save, 1, SEAL)
    status = watched.save.status()
    assert [phase["phase"] for phase in status["phases"]] == ["plan", "stage"]
    assert (status["world_size"], status["incarnation"]) == (2, 1)
    assert status["bytes_per_s"] is None
    assert status["slowest_rank"] is None
    assert "waits for rank 0" in status["waiting_for"]
    watched.watch.sealed(watched.save, 0, SEAL)
    assert watched.save.status()["slowest_rank"]["rank"] == 0
