"""What a disk quota leaves to whoever writes into a directory. Reads limits; sets none.

`statvfs` tells the room of the volume, and on ext4 and XFS that of a project quota, but of a user's or a group's quota
it knows nothing: a save that it lets pass ends in EDQUOT. Sources: quotactl(2), linux/quota.h, linux/dqblk_xfs.h (XFS
answers Q_GETQUOTA, too). NFS and Lustre keep quotas at the server, where this call does not reach.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import time
from typing import Final, NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)

_QUOTACTL_FD: Final = 443  # Linux 5.14, the same number on every architecture; libc has no name for it
_GET_QUOTA: Final = 0x800007
_USER, _GROUP, _PROJECT = 0, 1, 2
# struct if_dqblk: hard and soft limit in KiB, bytes used, three counts of inodes, two ends of grace, valid fields.
_BLOCK: Final = struct.Struct("=8QI4x")
_LIMIT_UNIT_BYTES: Final = 1024
# struct fsxattr (linux/fs.h) and the ioctl that fills it; the flag says that new files belong to the project.
_ATTRIBUTES: Final = struct.Struct("=5I8x")
_GET_ATTRIBUTES: Final = 0x801C581F
_INHERITS_PROJECT: Final = 0x200


class QuotaRoom(NamedTuple):
    """What the tightest quota leaves. ``owner``: whose it is, for people."""

    owner: str
    free_bytes: int


def quota_room(directory: str) -> QuotaRoom | None:
    """Return what quotas leave to this process's new files in a directory; None where none limits them.

    Root is bound by none: CAP_SYS_RESOURCE passes hard limits by.
    """
    if os.geteuid() == 0:
        return None
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None  # a directory that may be written into but not read: its quota shows at the write
    try:
        found = [
            QuotaRoom(f"{kind} {number}", free_bytes)
            for kind, code, number in _owners(descriptor)
            if (free_bytes := _left(_get(descriptor, code, number))) is not None
        ]
    finally:
        os.close(descriptor)
    return min(found, key=lambda room: room.free_bytes, default=None)


def _owners(descriptor: int) -> list[tuple[str, int, int]]:
    """Return to whom a new file in the directory is charged."""
    folder = os.fstat(descriptor)
    gid = folder.st_gid if folder.st_mode & stat.S_ISGID else os.getegid()
    owners = [("user", _USER, os.geteuid()), ("group", _GROUP, gid)]
    attributes = bytearray(_ATTRIBUTES.size)
    try:
        fcntl.ioctl(descriptor, _GET_ATTRIBUTES, attributes)
    except OSError:
        return owners  # a file system without projects
    flags, _, _, project, _ = _ATTRIBUTES.unpack(attributes)
    return [*owners, ("project", _PROJECT, project)] if flags & _INHERITS_PROJECT and project else owners


def _get(descriptor: int, kind: int, number: int) -> bytes | None:
    """Return the kernel's struct if_dqblk; None where there is no such quota, or we may not see it."""
    block = ctypes.create_string_buffer(_BLOCK.size)
    command = _GET_QUOTA << 8 | kind
    # Project quotas show to CAP_SYS_ADMIN only; ext4 and XFS tell what they leave by statvfs.
    if _libc.syscall(_QUOTACTL_FD, descriptor, command, number, block) == 0:
        return block.raw
    if ctypes.get_errno() != errno.ENOSYS:
        return None
    device = os.fstat(descriptor).st_dev  # Linux before 5.14 wants the block device's name
    name = f"/dev/block/{os.major(device)}:{os.minor(device)}".encode()
    return block.raw if _libc.quotactl(command, name, number, block) == 0 else None


def _left(block: bytes | None) -> int | None:
    """Return what a quota leaves in bytes; None if it limits nothing."""
    if block is None:
        return None
    hard, soft, used_bytes, _, _, _, grace_ends_s, _, _ = _BLOCK.unpack(block)
    if soft and used_bytes > soft * _LIMIT_UNIT_BYTES and 0 < grace_ends_s < time.time():
        return 0
    return max(0, hard * _LIMIT_UNIT_BYTES - used_bytes) if hard else None
