"""What quotas leave. The kernel's answers are made up: few machines that run tests have a file system with quotas."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import time

import pytest

from ckptd.checkpoint.space import quota
from ckptd.checkpoint.space.quota import QuotaRoom, quota_room

USER, GROUP, PROJECT = 0, 1, 2


def block(hard_kib=0, soft_kib=0, used_bytes=0, grace_ends_s=0):
    return struct.pack("=8QI4x", hard_kib, soft_kib, used_bytes, 0, 0, 0, int(grace_ends_s), 0, 63)


class Kernel:
    """Answers quotactl_fd(2), or quotactl(2) where that is all there is."""

    def __init__(self):
        self.quotas = {}
        self.old = False
        self.asked = []

    def syscall(self, number, descriptor, command, owner, buffer):
        assert number == 443
        os.fstat(descriptor)
        if self.old:
            ctypes.set_errno(errno.ENOSYS)
            return -1
        return self._answer(command, owner, buffer)

    def quotactl(self, command, device, owner, buffer):
        assert device.startswith(b"/dev/block/")
        return self._answer(command, owner, buffer)

    def _answer(self, command, owner, buffer):
        assert command >> 8 == 0x800007
        self.asked.append((command & 255, owner))
        found = self.quotas.get((command & 255, owner))
        if found is None:
            ctypes.set_errno(errno.ESRCH)
            return -1
        buffer[: len(found)] = found
        return 0


@pytest.fixture
def kernel(monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(quota, "_libc", kernel)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getegid", lambda: 100)
    return kernel


def test_without_a_quota_nothing_is_limited(kernel, tmp_path):
    assert quota_room(str(tmp_path)) is None
    assert kernel.asked == [(USER, 1000), (GROUP, 100)]


@pytest.mark.parametrize("old", [False, True])
def test_the_tightest_one_counts(kernel, tmp_path, old):
    kernel.old = old
    kernel.quotas[USER, 1000] = block(hard_kib=10, used_bytes=4096)
    assert quota_room(str(tmp_path)) == QuotaRoom("user 1000", 6 * 1024)
    kernel.quotas[GROUP, 100] = block(hard_kib=5, used_bytes=4096)
    assert quota_room(str(tmp_path)) == QuotaRoom("group 100", 1024)


def test_a_quota_that_is_exceeded_leaves_nothing(kernel, tmp_path):
    kernel.quotas[USER, 1000] = block(hard_kib=4, used_bytes=8192)
    assert quota_room(str(tmp_path)) == QuotaRoom("user 1000", 0)


def test_a_soft_limit_counts_once_its_grace_has_ended(kernel, tmp_path):
    now = time.time()
    for grace_ends_s, room in [(0, None), (now + 60, None), (now - 60, QuotaRoom("user 1000", 0))]:
        kernel.quotas[USER, 1000] = block(soft_kib=4, used_bytes=8192, grace_ends_s=grace_ends_s)
        assert quota_room(str(tmp_path)) == room


def test_a_block_without_limits_limits_nothing(kernel, tmp_path):
    kernel.quotas[USER, 1000] = block(used_bytes=1 << 40)
    assert quota_room(str(tmp_path)) is None


def test_a_folder_that_gives_its_group_to_new_files_is_asked_for_that_group(kernel, tmp_path):
    tmp_path.chmod(0o2755)
    kernel.quotas[GROUP, tmp_path.stat().st_gid] = block(hard_kib=1)
    assert quota_room(str(tmp_path)).free_bytes == 1024


def test_a_folder_that_gives_its_project_to_new_files_is_asked_for_that_project(kernel, tmp_path, monkeypatch):
    def ioctl(descriptor, request, attributes):
        assert request == 0x801C581F
        attributes[:20] = struct.pack("=5I", flags, 0, 0, 42, 0)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    kernel.quotas[PROJECT, 42] = block(hard_kib=3)
    flags = 0x200
    assert quota_room(str(tmp_path)) == QuotaRoom("project 42", 3 * 1024)
    flags = 0
    assert quota_room(str(tmp_path)) is None


def test_root_is_bound_by_none(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    kernel.quotas[USER, 0] = block(hard_kib=1)
    assert quota_room(str(tmp_path)) is None
    assert kernel.asked == []


def test_a_folder_that_cannot_be_opened_is_asked_nothing(kernel, tmp_path):
    assert quota_room(str(tmp_path / "none")) is None


def test_the_real_kernel_understands_the_question(tmp_path, monkeypatch):
    """Nothing is faked here but that we are not root: the call exists, and no descriptor stays open."""
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    before = os.listdir("/proc/self/fd")
    room = quota_room(str(tmp_path))
    assert room is None or room.free_bytes >= 0
    assert os.listdir("/proc/self/fd") == before
    ctypes.set_errno(0)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        if quota._get(descriptor, USER, 65534) is None:
            assert ctypes.get_errno() in {errno.ESRCH, errno.ENOSYS, errno.ENOTBLK, errno.EPERM, errno.ENOENT}
    finally:
        os.close(descriptor)
