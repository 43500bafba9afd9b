"""An arena is admitted only where every limit has room for it, beside what is being made and what is kept back."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.daemon.session.admission import Admission
from ckptd.daemon.settings.config import Config
from ckptd.protocol.admission import Limit, Reserve, admit
from ckptd.protocol.errors import ShmTooSmall

SHM = Limit("", 1000, 1000, shared=False)
MACHINE = Limit("machine", 900, 2000)
GROUP = Limit("group", 800, 1000)
NONE = Reserve(0, 0.0)


def refusal(wanted_bytes, limits, reserve=NONE, making_bytes=0):
    with pytest.raises(ShmTooSmall) as caught:
        admit(wanted_bytes, limits, reserve, making_bytes=making_bytes, path="/shm")
    return caught.value


def largest(limits, reserve=NONE, making_bytes=0):
    """Return the largest arena that is admitted, which is one byte less than the smallest that is not."""
    free_bytes = refusal(1 << 60, limits, reserve, making_bytes).free_bytes
    admit(free_bytes, limits, reserve, making_bytes=making_bytes, path="/shm")
    assert refusal(free_bytes + 1, limits, reserve, making_bytes).free_bytes == free_bytes
    return free_bytes


class TestTheRule:
    @pytest.mark.parametrize(
        ("limits", "nbytes", "rule"),
        [([SHM], 1000, ""), ([SHM, MACHINE], 900, "machine"), ([SHM, MACHINE, GROUP], 800, "group")],
    )
    def test_the_tightest_limit_counts_and_is_named(self, limits, nbytes, rule):
        assert largest(limits) == nbytes
        assert refusal(nbytes + 1, limits).rule == rule

    @pytest.mark.parametrize(
        ("reserve", "nbytes"), [(Reserve(100, 0.0), 700), (Reserve(0, 0.1), 700), (Reserve(300, 0.1), 500)]
    )
    def test_the_larger_reserve_is_kept_back(self, reserve, nbytes):
        assert largest([SHM, MACHINE, GROUP], reserve) == nbytes

    def test_the_reserve_is_of_each_limit_its_own_share(self):
        assert largest([MACHINE], Reserve(0, 0.1)) == 900 - 200

    def test_a_tmpfs_which_holds_arenas_only_needs_no_reserve(self):
        assert largest([SHM], Reserve(500, 0.5)) == 1000

    def test_what_is_being_made_is_taken_from_every_limit(self):
        assert largest([SHM], making_bytes=400) == 600
        assert largest([SHM, GROUP], Reserve(100, 0), making_bytes=400) == 300

    def test_a_limit_that_is_exceeded_already_leaves_nothing(self):
        error = refusal(1, [Limit("group", -50, 1000)], Reserve(100, 0))
        assert (error.free_bytes, error.reserve_bytes) == (0, 100)

    def test_the_refusal_tells_all_figures_and_what_to_do(self):
        text = str(refusal(950, [SHM, MACHINE], Reserve(10, 0), 5))
        assert "needs 950 bytes" in text
        assert "machine leaves 885 free" in text
        assert 'connect(staging="waves")' in text
        assert "/shm: 1000 of 1000 free, machine: 900 of 2000 free" in text
        assert "10 bytes kept in reserve, 5 for arenas being made" in text

    @given(
        st.lists(st.tuples(st.integers(-100, 1000), st.booleans()), min_size=1, max_size=4),
        st.integers(0, 300),
        st.lists(st.integers(1, 400), max_size=12),
    )
    def test_never_is_more_admitted_than_there_is(self, frees, reserve_bytes, wishes):
        limits = [Limit(str(n), free, 1000, shared=shared) for n, (free, shared) in enumerate(frees)]
        making = 0
        for wish in wishes:
            try:
                admit(wish, limits, Reserve(reserve_bytes, 0.0), making_bytes=making, path="/shm")
            except ShmTooSmall:
                continue
            making += wish
        room = min(limit.free_bytes - (reserve_bytes if limit.shared else 0) for limit in limits)
        assert making <= max(0, room)


class TestTheDaemonsAccount:
    @pytest.fixture
    def account(self, tmp_path):
        config = Config(memory_reserve_bytes=0, memory_reserve_fraction=0.0)
        measured = []

        def measure(directory, pids):
            measured.append((directory, tuple(pids)))
            return [SHM]

        admission = Admission(config, measure=measure)
        admission.measured = measured
        return admission

    def test_of_two_that_fit_only_once_the_second_is_refused_until_the_first_is_made(self, account, tmp_path):
        first, second = str(tmp_path / "first"), str(tmp_path / "second")
        with (
            account.reserve(first, 600, pid=1),
            pytest.raises(ShmTooSmall) as caught,
            account.reserve(second, 600, pid=2),
        ):
            pytest.fail("both were admitted")
        assert (caught.value.free_bytes, caught.value.making_bytes) == (400, 600)
        with account.reserve(second, 600, pid=2):  # the first is done: from now on the kernel counts it
            pass

    def test_two_that_fit_together_are_both_admitted(self, account, tmp_path):
        with account.reserve(str(tmp_path / "a"), 600, pid=1), account.reserve(str(tmp_path / "b"), 400, pid=2):
            pass

    def test_a_refused_or_failed_one_promises_nothing(self, account, tmp_path):
        with pytest.raises(ShmTooSmall), account.reserve(str(tmp_path / "a"), 1001, pid=1):
            pass
        with pytest.raises(OSError, match="broken"), account.reserve(str(tmp_path / "a"), 1000, pid=1):
            raise OSError("broken")
        with account.reserve(str(tmp_path / "b"), 1000, pid=1):
            pass

    def test_pages_that_an_arena_has_already_are_not_counted_twice(self, account, tmp_path):
        path = tmp_path / "a"
        nbytes = 16 * 4096
        limits = [Limit("", 20 * 4096, 20 * 4096, shared=False)]
        account._measure = lambda directory, pids: limits
        with account.reserve(str(path), nbytes, pid=1), path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, nbytes // 2)
            limits[:] = [Limit("", 12 * 4096, 20 * 4096, shared=False)]  # as the kernel says after these 8 pages
            with account.reserve(str(tmp_path / "b"), 4 * 4096, pid=2):
                pass
            with pytest.raises(ShmTooSmall), account.reserve(str(tmp_path / "b"), 4 * 4096 + 1, pid=2):
                pass

    def test_the_daemons_and_the_trainers_limits_are_asked_for(self, account, tmp_path):
        with account.reserve(str(tmp_path / "a"), 1, pid=4711):
            pass
        assert account.measured == [(str(tmp_path), (os.getpid(), 4711))]
