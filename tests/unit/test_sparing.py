import pytest

from ckptd.daemon.http.sparing import Sparing


class Maker:
    """Makes answers that take a while, by a clock set by hand."""

    def __init__(self, seconds):
        self.seconds, self.now, self.made = seconds, 100.0, 0
        self.sparing = Sparing(lambda: self.now)

    def make(self):
        self.made += 1
        self.now += self.seconds
        return b"%d" % self.made

    def ask(self, kind="a", *, after_s=0.0):
        self.now += after_s
        return self.sparing.answer(kind, self.make)


@pytest.fixture
def maker():
    return Maker(0.003)


def test_who_asks_at_a_usual_pace_always_gets_a_fresh_answer(maker):
    assert [int(maker.ask(after_s=0.1)) for _ in range(1000)] == list(range(1, 1001))


def test_so_does_who_asks_often_for_a_short_while(maker):
    assert [int(maker.ask(after_s=0.001)) for _ in range(200)] == list(range(1, 201))


def test_a_flood_takes_a_fifth_of_the_time_at_most(maker):
    for _ in range(100_000):
        maker.ask(after_s=0.0005)
    passed_s = maker.now - 100.0
    assert 0.15 * passed_s < 0.003 * maker.made <= 0.2 * passed_s + 1.01


def test_in_a_flood_an_answer_is_not_old(maker):
    for _ in range(10_000):
        maker.ask(after_s=0.0005)
    before = maker.made
    maker.ask(after_s=0.016)  # five times what one takes
    maker.ask()
    assert maker.made > before


def test_each_kind_is_answered_at_least_once_and_all_share_the_time():
    maker = Maker(2.0)
    assert (maker.ask("a"), maker.ask("b")) == (b"1", b"2")
    assert (maker.ask("a"), maker.ask("b")) == (b"1", b"2")
    assert maker.ask("b", after_s=100) == b"3"
    assert maker.ask("a") == b"1"


def test_an_answer_that_fails_is_none(maker):
    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        maker.sparing.answer("a", fail)
    assert maker.ask() == b"1"
