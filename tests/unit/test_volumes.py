import errno
import os
import threading
import time

import pytest
from support.waiting import wait_until

from ckptd.daemon.monitoring.volumes import Room, VolumeWatch, look_at


class Disk:
    """Volumes by path; one may be away, another may hang."""

    def __init__(self, **rooms):
        self.rooms = {f"/{name}": room for name, room in rooms.items()}
        self.looks = []
        self.hang = threading.Event()
        self.hang.set()

    def look(self, path):
        self.looks.append(path)
        assert self.hang.wait(10)
        room = self.rooms.get(path, FileNotFoundError(path))
        if isinstance(room, Exception):
            raise room
        return room


def test_nothing_is_known_before_the_first_look():
    assert VolumeWatch("/shm", look=Disk(shm=Room(10, 5)).look).rooms() == {}


def test_of_the_checkpoints_volumes_the_fullest_is_told():
    watch = VolumeWatch("/shm", look=Disk(shm=Room(10, 5), a=Room(1000, 90), b=Room(10, 1), c=Room(10, 9)).look)
    for path in ("/a", "/b", "/c", "/gone"):
        watch.used(path)
    watch.look_once()
    rooms = watch.rooms()
    assert (rooms["shm"].size_bytes, rooms["shm"].free_bytes) == (10, 5)
    assert (rooms["checkpoints"].size_bytes, rooms["checkpoints"].free_bytes) == (1000, 90)
    assert 0 <= rooms["shm"].age_s < 5


def test_a_volume_with_an_error_keeps_its_last_look_which_grows_old():
    disk = Disk(shm=Room(10, 5), a=Room(10, 4), b=Room(10, 9))
    watch = VolumeWatch("/shm", look=disk.look)
    watch.used("/a")
    watch.used("/b")
    watch.look_once()
    before = watch.rooms()["checkpoints"].age_s
    disk.rooms["/a"] = OSError(errno.ESTALE, "Stale file handle")
    watch.look_once()
    assert watch.rooms()["checkpoints"].free_bytes == 4
    assert watch.rooms()["checkpoints"].age_s > before


@pytest.mark.parametrize("error", [FileNotFoundError, NotADirectoryError, PermissionError])
def test_a_path_that_is_no_place_for_checkpoints_says_nothing(error):
    disk = Disk(shm=Room(10, 5), a=Room(10, 4), b=Room(10, 9))
    watch = VolumeWatch("/shm", look=disk.look)
    watch.used("/a")
    watch.used("/b")
    watch.look_once()
    disk.rooms["/a"] = error("/a")
    watch.look_once()
    assert watch.rooms()["checkpoints"].free_bytes == 9
    disk.rooms["/b"] = error("/b")
    watch.look_once()
    assert "checkpoints" not in watch.rooms()


def test_only_the_directories_of_the_last_saves_are_looked_at():
    disk = Disk()
    watch = VolumeWatch("/shm", look=disk.look)
    for number in range(30):
        watch.used(f"/{number}")
        watch.used("/0")
    watch.look_once()
    assert len(disk.looks) == 17
    assert {"/shm", "/0", "/29", "/15"} <= set(disk.looks)
    assert "/14" not in disk.looks


def test_a_volume_that_hangs_hangs_only_the_look():
    disk = Disk(shm=Room(10, 5), a=Room(10, 4))
    watch = VolumeWatch("/shm", look=disk.look)
    watch.start()
    try:
        wait_until(watch.rooms, "the first look")
        disk.hang.clear()
        watch.used("/a")  # a new directory is looked at soon, not after the interval
        wait_until(lambda: len(disk.looks) == 2, "a look that hangs")
        begun = time.monotonic()
        rooms = watch.rooms()
        watch.used("/a")
        assert time.monotonic() - begun < 1
        assert "checkpoints" not in rooms
        disk.hang.set()
        wait_until(lambda: "checkpoints" in watch.rooms(), "a look that came back")
    finally:
        disk.hang.set()
        watch.close()


@pytest.mark.parametrize("inner", ["", "not/there/yet"])
def test_a_directory_that_is_still_to_be_made_is_on_its_ancestors_volume(tmp_path, inner):
    volume = os.statvfs(tmp_path)
    room = look_at(str(tmp_path / inner))
    assert room.size_bytes == volume.f_blocks * volume.f_frsize
    assert 0 < room.free_ratio <= 1


def test_what_is_no_directory_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        look_at(str(tmp_path / "file" / "inner"))


def test_a_volume_without_a_size_is_never_full():
    assert Room(0, 0).free_ratio == 1
