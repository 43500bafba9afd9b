"""Ranks of one node that load the same checkpoint read each byte once, whoever dies meanwhile."""

import os
from pathlib import Path

import pytest
from support.trees import below
from support.waiting import wait_until

MIB = 1 << 20
SIZE_MIB = 48

PREPARE = """
from ckptd.checkpoint.reading import files as read_files
wanted = {f'w{n}': torch.arange(1 << 20, dtype=torch.int32) * (n + 1) for n in range(mib // 4)}
target = {name: torch.zeros_like(value) for name, value in wanted.items()}
def bit_equal():
    return all(torch.equal(target[name], value) for name, value in wanted.items())
"""
SERVED = "ckptd_node_cache_served_bytes_total"
LOAD = "report = dcp.load(target, checkpoint_id=path)"


@pytest.fixture
def saved(start_daemon, trainers, tmp_path):
    """Return what starts a job and lets it save something that is not in the page cache then."""

    def save(count, mib=SIZE_MIB, **settings):
        # However late a rank begins on a busy machine, the others still count with it.
        daemon = start_daemon(**{"node_cache_wait_s": 10.0, **settings})
        ranks = trainers.job(count)
        path = tmp_path / "a"
        ranks.do(PREPARE, mib=mib)
        ranks.do("dcp.save(wanted, checkpoint_id=path)", path=str(path))
        forget_pages(path)
        return daemon, ranks

    return save


def forget_pages(folder):
    """Have the kernel forget what it has cached of a checkpoint's images."""
    for image in Path(folder).glob("*.distcp"):
        descriptor = os.open(image, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def segments(daemon):
    """Return the shared segments that the daemon has."""
    return below(daemon.runtime.arenas, "cache-*")


def test_four_ranks_read_a_replicated_checkpoint_once(saved):
    daemon, ranks = saved(4)
    ranks.do(LOAD)
    assert ranks.get("bit_equal()") == [True] * 4
    read_bytes = ranks.get("report.read_bytes")
    assert SIZE_MIB * MIB <= sum(read_bytes) < 1.1 * SIZE_MIB * MIB
    assert ranks.get("report.source") == ["node cache"] * 4
    assert daemon.metric(SERVED) == pytest.approx(3 * SIZE_MIB * MIB, rel=0.1)
    wait_until(lambda: not segments(daemon), "the end of the segment")


def test_memory_stays_bounded_and_the_ranks_still_share(saved):
    """Two frames for twelve cells: whoever is ahead waits a little for the others."""
    _, ranks = saved(3, node_cache_bytes=8 * MIB)
    ranks.do(LOAD)
    assert ranks.get("bit_equal()") == [True] * 3
    assert sum(ranks.get("report.read_bytes")) < 2 * SIZE_MIB * MIB


def test_ranks_that_want_overlapping_parts_read_each_byte_once(saved):
    _, ranks = saved(3)
    ranks.do("target = {name: target[name] for number, name in enumerate(target) if number % 3 != rank}")
    ranks.do("wanted = {name: wanted[name] for name in target}")
    ranks.do(LOAD)
    assert ranks.get("bit_equal()") == [True] * 3
    assert SIZE_MIB * MIB <= sum(ranks.get("report.read_bytes")) < 1.1 * SIZE_MIB * MIB


STUCK = """
turns, stuck, go_on, real = iter([True]), threading.Event(), threading.Event(), read_files.DiskFile.view
others = threading.Semaphore(0)
def wait(self, *arguments):
    if next(turns, False):  # the first one only
        stuck.set()
        assert go_on.wait(120)
        return real(self, *arguments)
    data = real(self, *arguments)
    others.release()
    return data
read_files.DiskFile.view = wait
failures = []
def load():
    try:
        dcp.load(target, checkpoint_id=path)
    except BaseException as error:
        failures.append(repr(error))
loading = threading.Thread(target=load)
loading.start()
"""


def test_the_others_finish_when_the_reading_rank_dies(saved):
    daemon, ranks = saved(4)
    ranks[0].do(STUCK)
    ranks[0].do("assert stuck.wait(60)")
    ranks[0].do("assert all(others.acquire(timeout=60) for _ in range(6))")  # half of it will be its work
    for trainer in ranks[1:]:
        trainer.start(LOAD)
    wait_until(lambda: daemon.metric(SERVED) > 0, "the first bytes that are served")
    ranks[0].kill()
    for trainer in ranks[1:]:
        trainer.finish()
        assert trainer.get("bit_equal()")
    assert sum(trainer.get("report.read_bytes") for trainer in ranks[1:]) < SIZE_MIB * MIB
    wait_until(lambda: not segments(daemon), "the end of the segment")


def test_the_others_finish_when_the_reading_rank_is_stuck(saved):
    _, ranks = saved(2, mib=8)
    ranks[0].do(STUCK)
    ranks[0].do("assert stuck.wait(60)")
    ranks[1].do(LOAD)
    assert ranks[1].get("bit_equal()")
    ranks[0].do("go_on.set()\nloading.join()")
    assert ranks[0].get("failures") == []
    assert ranks[0].get("bit_equal()")


def test_loads_finish_when_the_daemon_dies_in_the_middle(saved):
    daemon, ranks = saved(2)
    ranks.do(STUCK)
    ranks[0].do("assert stuck.wait(60)")
    daemon.kill()
    ranks.do("go_on.set()\nloading.join()")
    assert ranks.get("failures") == [[], []]
    assert ranks.get("bit_equal()") == [True] * 2


def test_a_second_load_of_the_same_ranks_shares_again(saved, tmp_path):
    _, ranks = saved(2, mib=16)
    for _ in range(2):
        forget_pages(tmp_path / "a")
        ranks.do("for value in target.values(): value.zero_()")
        ranks.do(LOAD)
        assert ranks.get("bit_equal()") == [True] * 2
        assert sum(ranks.get("report.read_bytes")) < 1.2 * 16 * MIB


def test_without_a_session_or_other_ranks_nothing_is_shared_and_no_daemon_started(saved, trainers, tmp_path):
    _, ranks = saved(1, mib=8)
    ranks.do(LOAD)
    assert ranks.get("report.source") == ["disk"]
    stranger = trainers.start(CKPTD_EMBEDDED="1", CKPTD_RUNTIME_DIR=str(tmp_path / "nothing"))
    stranger.do(PREPARE, mib=8)
    stranger.do(LOAD, path=str(tmp_path / "a"))
    assert stranger.get("bit_equal()")
    assert stranger.get("report.source") == "disk"
    assert not (tmp_path / "nothing").exists()


def test_a_daemon_without_room_for_a_cache_lets_ranks_read_for_themselves(saved):
    _, ranks = saved(2, mib=8, node_cache_bytes=0)
    ranks.do(LOAD)
    assert ranks.get("bit_equal()") == [True] * 2
    assert sum(ranks.get("report.read_bytes")) >= 2 * 8 * MIB
