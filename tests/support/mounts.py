"""File systems of a test's own: small ones, full ones, overlays. Root mounts; who may use sudo mounts, too."""

from __future__ import annotations

import os
import subprocess

import pytest


def unavailable(reason):
    """Skip where a person runs the tests; fail in CI, which must not skip in silence."""
    if os.environ.get("CI", "").lower() in {"1", "true"}:
        pytest.fail(f"{reason}, and CI must run this test")
    pytest.skip(reason)


def need_root(what):
    """Skip a test that needs root, or fail it in CI."""
    if os.geteuid() != 0:
        unavailable(f"{what}: needs root")


class Mounts:
    """Mounts that end with the test."""

    def __init__(self, directory):
        self._directory = directory
        self._mounted = []
        self._sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]

    def tmpfs(self, *, mib, name="small"):
        """Return the path of a tmpfs of ``mib`` MiB."""
        target = self._directory / name
        owner = f"uid={os.geteuid()},gid={os.getegid()},mode=700"
        self._mount(target, "tmpfs", f"size={mib}m,{owner}")
        return target

    def ramfs(self):
        """Return the path of a ramfs: it takes no O_DIRECT, and does not say how much room it has."""
        target = self._directory / "ramfs"
        self._mount(target, "ramfs", f"mode={0o777:o}")
        return target

    def loop(self, kind):
        """Return the path of a file system of a kind on a loop device: xfs, btrfs or ext4."""
        image = self._image(kind)
        target = self._directory / kind
        self._mount(target, kind, "loop", device=image)
        return target

    def fuse(self):
        """Return the path of a file system in user space, whose renames know no flags."""
        image = self._image("ext4", name="fuse")
        target = self._directory / "fuse"
        target.mkdir()
        self._run("fuse2fs", str(image), str(target), "-o", "fakeroot")
        self._mounted.append(target)
        return target

    def overlay(self):
        """Return the path of an overlay whose upper layer is on tmpfs."""
        layers = self.tmpfs(mib=64, name="layers")
        for name in ("lower", "upper", "work"):
            (layers / name).mkdir()
        target = self._directory / "overlay"
        self._mount(target, "overlay", f"lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work")
        return target

    def read_only(self, target):
        """Make a mounted path read-only, or writable again with :meth:`writable`."""
        self._run("mount", "-o", "remount,ro", str(target))

    def writable(self, target):
        """Make a mounted path writable again."""
        self._run("mount", "-o", "remount,rw", str(target))

    def quota(self, volume, *, mib):
        """Make a folder on a btrfs that may hold only so much, and return its path."""
        folder = volume / "limited"
        self._run("btrfs", "quota", "enable", str(volume))
        self._run("btrfs", "subvolume", "create", str(folder))
        self._run("btrfs", "qgroup", "limit", f"{mib}M", str(folder))
        return folder

    def _image(self, kind, *, name=None):
        """Make a file system in a sparse file. XFS takes no less than 300 MiB."""
        image = self._directory / f"{name or kind}.img"
        with image.open("wb") as file:
            file.truncate(320 << 20)
        self._run(f"mkfs.{kind}", "-q", str(image))
        return image

    def _mount(self, target, kind, options, *, device="ckptd-test"):
        target.mkdir()
        self._run("mount", "-t", kind, "-o", options, str(device), str(target))
        self._mounted.append(target)

    def _run(self, *command):
        # Nothing else of ours goes along: a file system's own process outlives the command.
        environment = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        try:
            subprocess.run(
                [*self._sudo, *command], check=True, capture_output=True, text=True, timeout=20, env=environment
            )
        except (OSError, subprocess.CalledProcessError) as error:
            unavailable(f"cannot {' '.join(command)}: {getattr(error, 'stderr', error)} (make system-packages)")

    def close(self):
        """Unmount all, the newest first."""
        for target in reversed(self._mounted):
            subprocess.run([*self._sudo, "umount", str(target)], check=True, timeout=20)


@pytest.fixture
def mounts(tmp_path):
    """Mount file systems below the test's directory. Named first in a test's arguments, it is unmounted last."""
    mounts = Mounts(tmp_path)
    yield mounts
    mounts.close()
