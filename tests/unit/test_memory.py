"""Every limit on memory is found where the kernel tells it: on trees of files as it writes them."""

from __future__ import annotations

import os

import pytest

from ckptd.staging.memory import memory_limits

MEMINFO = "MemTotal:       2000 kB\nMemFree:         100 kB\nMemAvailable:   1500 kB\nHugePages_Total:       0\n"
V2 = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "36 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
OTHER_V1 = "37 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
TMPFS = "29 1 0:25 / /dev/shm rw - tmpfs tmpfs rw\n"


@pytest.fixture
def machine(tmp_path):
    """Write files of a machine: ``machine({"proc/meminfo": text})``; return the limits of some processes."""
    root = tmp_path / "root"

    def write(files, *pids):
        for name, text in {"proc/meminfo": MEMINFO, **files}.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return memory_limits(str(tmp_path), pids, root=str(root))

    return write


def named(limits):
    return {limit.rule.removeprefix("control group "): limit.free_bytes for limit in limits[2:]}


def test_the_volume_and_the_machine_come_first(machine, tmp_path):
    volume = os.statvfs(tmp_path)
    shm, memory = machine({})
    assert (shm.rule, shm.total_bytes, shm.shared) == ("", volume.f_blocks * volume.f_frsize, False)
    assert 0 < shm.free_bytes <= shm.total_bytes
    assert (memory.free_bytes, memory.total_bytes, memory.shared) == (1500 * 1024, 2000 * 1024, True)
    assert "MemAvailable" in memory.rule


def test_a_group_of_version_2_and_all_above_it_count(machine):
    group = "sys/fs/cgroup/jobs/mine"
    limits = machine(
        {
            "proc/self/mountinfo": TMPFS + V2,
            "proc/7/cgroup": "0::/jobs/mine\n",
            f"{group}/memory.max": "max\n",
            f"{group}/memory.high": "900\n",
            f"{group}/memory.current": "500\n",
            f"{group}/memory.stat": "anon 300\nactive_file 50\ninactive_file 100\nfile 190\n",
            "sys/fs/cgroup/jobs/memory.max": "1000\n",
            "sys/fs/cgroup/jobs/memory.current": "700\n",
        },
        7,
    )
    assert named(limits) == {
        "/sys/fs/cgroup/jobs/mine/memory.high": 900 - 500 + 150,
        "/sys/fs/cgroup/jobs/memory.max": 300,
    }
    assert [limit.total_bytes for limit in limits[2:]] == [900, 1000]


def test_a_group_of_version_1_counts(machine):
    group = "sys/fs/cgroup/memory/job"
    limits = machine(
        {
            "proc/self/mountinfo": OTHER_V1 + V1 + V2,
            "proc/7/cgroup": "4:memory:/job\n3:cpu,cpuacct:/elsewhere\n0::/\n",
            f"{group}/memory.limit_in_bytes": "5000\n",
            f"{group}/memory.usage_in_bytes": "1000\n",
            f"{group}/memory.stat": "cache 900\ntotal_active_file 200\ntotal_inactive_file 100\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000\n",
        },
        7,
    )
    assert named(limits) == {"/sys/fs/cgroup/memory/job/memory.limit_in_bytes": 5000 - 1000 + 300}


def test_two_processes_of_one_group_are_asked_once_and_of_two_groups_each(machine):
    files = {"proc/self/mountinfo": V2}
    for pid, group in ((7, "a"), (8, "b"), (9, "a")):
        files[f"proc/{pid}/cgroup"] = f"0::/{group}\n"
        files[f"sys/fs/cgroup/{group}/memory.max"] = "100\n"
        files[f"sys/fs/cgroup/{group}/memory.current"] = f"{pid}\n"
    assert named(machine(files, 7, 8, 9)) == {
        "/sys/fs/cgroup/a/memory.max": 91,
        "/sys/fs/cgroup/b/memory.max": 92,
    }


def test_a_container_sees_its_own_part_of_the_tree(machine):
    files = {
        "proc/self/mountinfo": "35 24 0:30 /pods/mine /sys/fs/cgroup ro - cgroup2 cgroup2 ro\n",
        "proc/7/cgroup": "0::/pods/mine/inner\n",
        "proc/8/cgroup": "0::/pods/other\n",  # of which nothing is mounted here
        "sys/fs/cgroup/memory.max": "1000\n",
        "sys/fs/cgroup/memory.current": "400\n",
    }
    assert named(machine(files, 7, 8)) == {"/sys/fs/cgroup/memory.max": 600}


@pytest.mark.parametrize("files", [{}, {"proc/self/mountinfo": V2}, {"proc/7/cgroup": "0::/a\n"}])
def test_what_cannot_be_seen_bounds_nothing(machine, files):
    assert named(machine(files, 7)) == {}


def test_without_meminfo_the_volume_is_all(machine):
    [shm] = machine({"proc/meminfo": ""})
    assert shm.rule == ""


def test_this_machine_can_be_measured(tmp_path):
    limits = memory_limits(str(tmp_path), (os.getpid(), os.getppid()))
    assert len(limits) >= 2
    assert all(limit.free_bytes > 0 for limit in limits)
