import pytest

from ckptd.daemon.monitoring.timeline import Timeline


class Clock:
    """A clock set by hand."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def timeline(clock):
    return Timeline(clock)


def spans(timeline):
    return {span["phase"]: (span["begin_s"], span["seconds"]) for span in timeline.status()}


def test_a_phase_is_told_at_its_end_and_counts_back(timeline, clock):
    clock.now = 110.0
    timeline.took("stage", 3.0)
    timeline.took("plan", 2.0, ended_ago_s=3.0)
    assert spans(timeline) == {"plan": (5.0, 2.0), "stage": (7.0, 3.0)}


def test_a_save_that_staged_before_it_was_heard_of_begins_with_its_staging(timeline, clock):
    clock.now = 101.0
    timeline.took("stage", 4.0)
    assert spans(timeline) == {"stage": (0.0, 4.0)}


def test_ranks_overlap_from_the_first_beginning_to_the_last_end(timeline, clock):
    clock.now = 110.0
    timeline.took("write", 4.0)
    clock.now = 112.0
    timeline.took("write", 1.0)
    clock.now = 115.0
    timeline.took("write", 9.0)
    assert spans(timeline) == {"write": (6.0, 9.0)}


def test_phases_are_told_in_the_order_in_which_they_began(timeline, clock):
    clock.now = 120.0
    timeline.took("commit", 1.0)
    timeline.took("stage", 19.0)
    assert [span["phase"] for span in timeline.status()] == ["stage", "commit"]


def test_the_slowest_rank_is_the_last_to_seal(timeline, clock):
    assert timeline.slowest() is None
    timeline.sealed(1)
    assert timeline.slowest() is None  # alone there is no slowest
    clock.now += 2.5
    timeline.sealed(0)
    clock.now += 10
    timeline.sealed(1)  # heard twice
    assert timeline.slowest() == (0, 2.5)


def test_a_rate_counts_from_the_first_write_to_the_last_fsync(timeline, clock):
    assert timeline.rate(10, running=True) is None
    timeline.writing_began()
    clock.now += 2
    timeline.writing_began()  # another rank's
    assert timeline.rate(0, running=True) is None
    assert timeline.rate(10, running=True) == 5
    clock.now += 3
    timeline.took("fsync", 1.0)
    clock.now += 5
    assert timeline.writing_s == 5
    assert timeline.rate(10, running=False) == 2
    assert timeline.rate(10, running=True) == 1  # another rank still writes


def test_an_image_told_of_at_its_end_counts_from_where_it_began(timeline, clock):
    clock.now = 120.0
    timeline.writing_began()  # by the worker that ends the image
    timeline.took("write", 8.0, ended_ago_s=2.0)
    timeline.took("fsync", 2.0)
    assert timeline.rate(100, running=False) == 10


def test_before_it_writes_a_save_has_written_for_no_time(timeline):
    assert timeline.writing_s == 0
    timeline.writing_began()
    assert timeline.rate(10, running=False) is None
