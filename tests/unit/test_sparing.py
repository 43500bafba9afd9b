import pytest

from ckptd.daemon.sparing import Sparing


class Maker:
    """Makes answers that take a while, by a clock set by hand."""

    def __init__(self, seconds):
        self.seconds, self.now, self.made = seconds, 100.0, 0
        self.sparing = Sparing(lambda: self.now)

    def make(self):
        self.made += 1
        self.now += self.seconds
        return b"%d" % self.made

    def ask(self, kind="a"):
        return self.sparing.answer(kind, self.make)


@pytest.fixture
def maker():
    return Maker(1.0)


def test_who_asks_now_and_then_gets_a_fresh_answer(maker):
    assert maker.ask() == b"1"
    maker.now += 4.0
    assert maker.ask() == b"2"


def test_who_asks_at_once_again_gets_the_last_one(maker):
    maker.ask()
    maker.now += 3.9
    assert maker.ask() == b"1"


def test_a_flood_takes_a_fifth_of_the_time_at_most(maker):
    for _ in range(1000):
        maker.ask()
        maker.now += 0.1
    assert 10 < maker.made <= (maker.now - 100.0) / 5 + 1


def test_each_kind_is_answered_at_least_once_and_all_share_the_time(maker):
    assert maker.ask("a") == b"1"
    assert maker.ask("b") == b"2"
    assert (maker.ask("a"), maker.ask("b")) == (b"1", b"2")
    maker.now += 10
    assert maker.ask("b") == b"3"
    assert maker.ask("a") == b"1"


def test_what_costs_nothing_is_always_fresh():
    maker = Maker(0.0)
    assert [maker.ask() for _ in range(3)] == [b"1", b"2", b"3"]


def test_an_answer_that_fails_is_none(maker):
    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        maker.sparing.answer("a", fail)
    assert maker.ask() == b"1"
