import os
import subprocess

import psutil
import pytest
from support.waiting import wait_until

from ckptd.daemon.monitoring import usage
from ckptd.daemon.monitoring.usage import UsageMeter


@pytest.fixture
def sleeper():
    """A process that has used some processor time and waits for its end."""
    process = subprocess.Popen(["sh", "-c", "i=0; while [ $i -lt 80000 ]; do i=$((i+1)); done; echo; read x"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    process.stdout.readline()
    yield process
    process.stdin.close()
    process.stdout.close()
    process.wait(5)


def test_the_daemon_is_this_process():
    daemon = UsageMeter().read([])["daemon"]
    process = psutil.Process(os.getpid())
    memory = process.memory_info()
    assert daemon.cpu_s > 0
    assert abs(daemon.private_bytes + daemon.shared_bytes - memory.rss) < memory.rss / 2
    assert daemon.descriptors >= 3


def test_an_open_descriptor_is_counted():
    meter = UsageMeter()
    before = meter.read([])["daemon"].descriptors
    with open(os.devnull):
        assert meter.read([])["daemon"].descriptors == before + 1


def test_workers_are_summed_and_without_any_all_is_nothing(sleeper):
    meter = UsageMeter()
    assert meter.read([])["worker"] == usage.Usage()
    worker = meter.read([sleeper.pid])["worker"]
    assert worker.private_bytes > 0
    assert worker.descriptors >= 3


def test_the_end_of_a_worker_does_not_lower_the_counter(sleeper):
    meter = UsageMeter()
    used = meter.read([sleeper.pid])["worker"].cpu_s
    assert used > 0
    sleeper.stdin.write(b"\n")
    sleeper.stdin.flush()
    sleeper.wait(5)
    assert meter.read([sleeper.pid])["worker"].cpu_s == used  # its pool has not noticed yet
    assert meter.read([])["worker"].cpu_s == used
    assert meter.read([])["worker"].private_bytes == 0


def test_what_may_not_be_seen_counts_as_nothing(monkeypatch):
    def deny(_):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "num_fds", deny)
    assert UsageMeter().read([])["daemon"].descriptors == 0


def test_a_pid_that_never_was_is_left_out():
    ended = subprocess.Popen(["true"])
    ended.wait(5)
    wait_until(lambda: not psutil.pid_exists(ended.pid), "its end")
    assert UsageMeter().read([ended.pid])["worker"] == usage.Usage()
