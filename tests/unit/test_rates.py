"""Short measurements: of what they claim, and leaving nothing behind."""

from __future__ import annotations

import errno
import os

import pytest

from ckptd.daemon.cli import rates
from ckptd.protocol.errors import SystemCallFailed

MIB = 1 << 20


def test_a_copy_copies():
    source, target = rates.anonymous_memory(9 * MIB), rates.anonymous_memory(9 * MIB)  # more than one chunk
    source[:4], source[-4:] = b"ckpt", b"save"
    assert rates.copy_s(source, target) > 0
    assert target[:] == source[:]


def test_shared_memory_has_no_name(tmp_path):
    memory = rates.shared_memory("/dev/shm", MIB)
    memory[-1:] = b"x"
    memory.close()
    with pytest.raises(SystemCallFailed, match="gone"):
        rates.shared_memory(str(tmp_path / "gone"), MIB)


def test_a_write_writes_it_all(tmp_path):
    data = rates.anonymous_memory(9 * MIB)  # more than one chunk
    data[9 * MIB - 1 :] = b"x"
    seconds, _ = rates.write_s(str(tmp_path / "a"), data)
    assert seconds > 0
    assert (tmp_path / "a").read_bytes() == data[:]
    with pytest.raises(SystemCallFailed, match="File exists"):
        rates.write_s(str(tmp_path / "a"), data)


def test_without_o_direct_the_page_cache_does(tmp_path, monkeypatch):
    true_open = os.open

    def no_direct(path, flags, *mode, **options):
        descriptor = true_open(path, flags & ~os.O_DIRECT, *mode, **options)
        if flags & os.O_DIRECT:
            os.close(descriptor)
            raise OSError(errno.EINVAL, "no O_DIRECT here")  # the file was made all the same: as on old tmpfs
        return descriptor

    monkeypatch.setattr(os, "open", no_direct)
    data = rates.anonymous_memory(MIB)
    data[:1] = b"x"
    _, direct = rates.write_s(str(tmp_path / "a"), data)
    assert not direct
    assert (tmp_path / "a").read_bytes() == data[:]
