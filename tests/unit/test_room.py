"""Room for a save: on the right volume, beside the saves under way, and before anything is staged."""

from __future__ import annotations

import os
import time

import pytest

from ckptd.checkpoint.names import hidden_directory
from ckptd.checkpoint.space import room as room_module
from ckptd.checkpoint.space.quota import QuotaRoom
from ckptd.checkpoint.space.room import Claim, Room, check_room, find_room
from ckptd.client.saving.room import claim_room
from ckptd.protocol.errors import DiskFull

PAGE = 4096


def claim(tmp_path, name="new", nbytes=1000, *, number=1, begun_unix_s=0.0):
    return Claim(str(tmp_path / name), f"-1-{number}-", nbytes, begun_unix_s)


def write_file(folder, name, nbytes):
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, nbytes)
    return path


class TestWhatASaveHasAlready:
    def test_is_what_lies_in_its_hidden_directory(self, tmp_path):
        mine = claim(tmp_path)
        assert mine.has_bytes() == 0
        hidden = hidden_directory(mine.checkpoint_id, "job-1-1-abcd")
        write_file(hidden, "__0_0.distcp", 2 * PAGE)
        write_file(hidden, "__1_0.distcp", 3 * PAGE)
        assert mine.has_bytes() == 5 * PAGE

    def test_is_not_what_other_saves_have(self, tmp_path):
        mine = claim(tmp_path)
        for other in ("job-1-11-abcd", "job-2-1-abcd", "job-1-2-abcd"):
            write_file(hidden_directory(mine.checkpoint_id, other), "__0_0.distcp", PAGE)
        write_file(hidden_directory(str(tmp_path / "news"), "job-1-1-abcd"), "__0_0.distcp", PAGE)
        write_file(hidden_directory(mine.checkpoint_id, "job-1-1-abcd"), "notes.txt", PAGE)
        assert mine.has_bytes() == 0

    def test_is_not_taken_from_a_name_that_has_its_marks(self, tmp_path):
        mine = claim(tmp_path, "x-1-1-y")
        write_file(hidden_directory(mine.checkpoint_id, "job-2-7-abcd"), "__0_0.distcp", PAGE)
        assert mine.has_bytes() == 0

    def test_is_what_was_published_since_it_began(self, tmp_path):
        mine = claim(tmp_path, begun_unix_s=time.time())
        path = write_file(mine.checkpoint_id, "__0_0.distcp", PAGE)
        assert mine.has_bytes() == PAGE
        os.utime(path, (0, time.time() - 60))  # an older checkpoint, which this save will replace
        assert mine.has_bytes() == 0


class TestTheVolume:
    def test_is_that_of_the_nearest_folder_that_is_there(self, tmp_path):
        found = find_room(str(tmp_path / "not" / "yet" / "there"))
        assert (found.path, found.device) == (str(tmp_path), os.stat(tmp_path).st_dev)
        volume = os.statvfs(tmp_path)
        assert 0 < found.free_bytes <= volume.f_blocks * volume.f_frsize

    def test_is_another_one_below_a_link(self, tmp_path):
        (tmp_path / "shm").symlink_to("/dev/shm")
        found = find_room(str(tmp_path / "shm" / "a" / "b"))
        assert found.device == os.stat("/dev/shm").st_dev != os.stat(tmp_path).st_dev

    def test_a_file_in_the_way_is_the_writers_business(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        assert find_room(str(tmp_path / "file" / "a" / "b")).path == str(tmp_path / "file")

    @pytest.mark.parametrize("number", [0, 13])
    def test_where_nobody_can_tell_there_is_no_answer(self, tmp_path, monkeypatch, number):
        def statvfs(path):
            if number:
                raise PermissionError(number, "no")
            return os.statvfs_result((PAGE, PAGE, 0, 0, 0, 0, 0, 0, 0, 255))

        monkeypatch.setattr(os, "statvfs", statvfs)
        assert find_room(str(tmp_path / "a")) is None
        assert claim_room(str(tmp_path / "a"), "-1-1-", 1 << 60, []) is None

    def test_a_quota_counts_where_it_leaves_less(self, tmp_path, monkeypatch):
        monkeypatch.setattr(room_module, "quota_room", lambda path: QuotaRoom("user 7", 10))
        found = find_room(str(tmp_path / "a"))
        assert (found.free_bytes, found.rule) == (10, "quota of user 7")
        with pytest.raises(DiskFull, match=rf"{tmp_path} \(quota of user 7\): 11 bytes wanted, 10 free; "):
            claim_room(str(tmp_path / "a"), "-1-1-", 11, [])
        monkeypatch.setattr(room_module, "quota_room", lambda path: QuotaRoom("user 7", 1 << 62))
        assert find_room(str(tmp_path / "a")).rule == ""


class TestTheRule:
    def room(self, nbytes):
        return Room("/disk", 5, nbytes)

    def test_a_save_that_just_fits_is_taken_and_one_byte_more_is_not(self, tmp_path):
        check_room(claim(tmp_path), self.room(1000), [])
        with pytest.raises(DiskFull) as caught:
            check_room(claim(tmp_path), self.room(999), [])
        assert caught.value.report().facts == {
            "path": "/disk",
            "wanted_bytes": 1000,
            "free_bytes": 999,
            "promised_bytes": 0,
            "rule": "",
        }

    def test_saves_under_way_count_but_not_what_they_have(self, tmp_path):
        other = claim(tmp_path, "other", 10 * PAGE, number=2)
        mine = claim(tmp_path, nbytes=10 * PAGE)
        check_room(mine, self.room(20 * PAGE), [other])
        with pytest.raises(DiskFull, match=f"{9 * PAGE} free beside {10 * PAGE} for saves under way"):
            check_room(mine, self.room(19 * PAGE), [other])
        write_file(hidden_directory(other.checkpoint_id, "job-1-2-ab"), "__0_0.distcp", 4 * PAGE)
        check_room(mine, self.room(16 * PAGE), [other])
        with pytest.raises(DiskFull):
            check_room(mine, self.room(15 * PAGE), [other])

    def test_what_other_ranks_of_this_save_have_is_not_wanted_again(self, tmp_path):
        mine = claim(tmp_path, nbytes=10 * PAGE)
        write_file(hidden_directory(mine.checkpoint_id, "job-1-1-ab"), "__0_0.distcp", 4 * PAGE)
        check_room(mine, self.room(6 * PAGE), [])
        with pytest.raises(DiskFull):
            check_room(mine, self.room(5 * PAGE), [])

    def test_saves_to_another_volume_do_not_count(self, tmp_path):
        room = find_room(str(tmp_path / "a"))
        wanted = room.free_bytes * 2 // 3
        first = claim_room(str(tmp_path / "a"), "-1-1-", wanted, [])
        with pytest.raises(DiskFull):
            claim_room(str(tmp_path / "b"), "-1-2-", wanted, [first])
        elsewhere = type(first)(first.claim, first.device + 1)
        claim_room(str(tmp_path / "b"), "-1-2-", wanted, [elsewhere])


def test_in_a_steady_state_nothing_but_the_volume_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(Claim, "has_bytes", lambda self: pytest.fail("a look into directories"))
    others = [claim_room(str(tmp_path / "a"), "-1-1-", 10, [])]
    begun = time.perf_counter()
    for _ in range(100):
        claim_room(str(tmp_path / "b"), "-1-2-", 10, others)
    assert (time.perf_counter() - begun) / 100 < 1e-3  # some 10 us; the bound is for a machine that is busy
