from ckptd.daemon.monitoring.rhythm import Rhythm


def committed(*times_s):
    rhythm = Rhythm()
    return rhythm, [rhythm.committed(time_s) for time_s in times_s]


def test_one_commit_is_no_rhythm():
    rhythm, intervals = committed(10)
    assert intervals == [None]
    assert rhythm.interval_s is None
    assert rhythm.lateness(1000) is None
    assert Rhythm().lateness(5) is None


def test_lateness_is_the_age_of_the_last_commit_in_intervals():
    rhythm, intervals = committed(10, 14, 18)
    assert intervals == [None, 4, 4]
    assert rhythm.lateness(18) == 0
    assert rhythm.lateness(22) == 1
    assert rhythm.lateness(30) == 3
    assert rhythm.lateness(17) == 0


def test_one_long_pause_does_not_move_the_interval():
    rhythm, _ = committed(0, 10, 20, 5000, 5010)
    assert rhythm.interval_s == 10


def test_a_new_rhythm_takes_over():
    rhythm, _ = committed(0, *range(100, 1000, 100), *range(1000, 1100, 5))
    assert rhythm.interval_s == 5


def test_commits_in_the_same_moment_make_no_lateness():
    rhythm, _ = committed(7, 7)
    assert rhythm.lateness(8) is None
