from ckptd.daemon.cadence import Cadence


def committed(*times_s):
    cadence = Cadence()
    return cadence, [cadence.committed(time_s) for time_s in times_s]


def test_one_commit_is_no_rhythm():
    cadence, intervals = committed(10)
    assert intervals == [None]
    assert cadence.interval_s is None
    assert cadence.lateness(1000) is None
    assert Cadence().lateness(5) is None


def test_lateness_is_the_age_of_the_last_commit_in_intervals():
    cadence, intervals = committed(10, 14, 18)
    assert intervals == [None, 4, 4]
    assert cadence.lateness(18) == 0
    assert cadence.lateness(22) == 1
    assert cadence.lateness(30) == 3
    assert cadence.lateness(17) == 0


def test_one_long_pause_does_not_move_the_interval():
    cadence, _ = committed(0, 10, 20, 5000, 5010)
    assert cadence.interval_s == 10


def test_a_new_rhythm_takes_over():
    cadence, _ = committed(0, *range(100, 1000, 100), *range(1000, 1100, 5))
    assert cadence.interval_s == 5


def test_commits_in_the_same_moment_make_no_lateness():
    cadence, _ = committed(7, 7)
    assert cadence.lateness(8) is None
