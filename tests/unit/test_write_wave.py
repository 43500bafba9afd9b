"""A wave is in the file when the call returns, in its place; and a file is durable when the image is finished."""

from __future__ import annotations

import errno
import os
from collections import namedtuple

import numpy as np
import pytest
from support.images import aligned, random_bytes, takes_direct
from support.plans import Held, local_plan, make_image
from xxhash import xxh3_64_intdigest

from ckptd.checkpoint.image.write import Pace
from ckptd.checkpoint.image.write_wave import Place, finish_waves, write_wave
from ckptd.checkpoint.planning.plan import make_plan
from ckptd.checkpoint.planning.planfile import store_plan
from ckptd.daemon.workers.worker import _finish_waves
from ckptd.protocol.errors import BadMessage, DiskFull, SystemCallFailed, TruncatedFile
from ckptd.protocol.wave_messages import FinishWavesTask

PAGE = 4096
DATA = random_bytes(10 * PAGE)
PACE = Pace(2, PAGE)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "__0_0.distcp")


def write(path, begin, end, *, first=False, on_progress=lambda done: None):
    place = Place(begin * PAGE, len(DATA), first)
    return write_wave(path, aligned(DATA[begin * PAGE : end * PAGE]), place, pace=PACE, on_progress=on_progress)


def content(path) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def test_waves_in_any_order_make_up_the_file(path, tmp_path):
    told = []
    seconds, direct = write(path, 7, 10, first=True, on_progress=told.append)
    assert os.stat(path).st_size == len(DATA)  # all of it is reserved
    assert os.stat(path).st_blocks * 512 >= len(DATA)
    write(path, 0, 3)
    write(path, 3, 7)
    assert content(path) == DATA
    assert (sorted(told), direct) == ([PAGE, 2 * PAGE, 3 * PAGE], takes_direct(tmp_path))
    assert seconds >= 0
    assert finish_waves(path, len(DATA)) >= 0


def test_the_first_wave_empties_what_a_worker_before_has_left(path):
    with open(path, "wb") as file:
        file.write(b"x" * 20 * PAGE)
    write(path, 0, 5, first=True)
    write(path, 5, 10)
    assert content(path) == DATA


def test_a_wave_may_be_written_again(path):
    write(path, 0, 10, first=True)
    with open(path, "r+b") as file:
        file.write(b"half of what a dead worker wrote")
    write(path, 0, 5)
    assert content(path) == DATA


def test_a_later_wave_makes_no_file(path):
    with pytest.raises(SystemCallFailed, match=f"open {path}: No such file"):
        write(path, 3, 5)
    assert not os.path.exists(path)


def test_too_little_room_for_the_whole_is_told_before_the_first_wave(path, monkeypatch):
    volume = namedtuple("Volume", "f_blocks f_bavail f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda directory: volume(100, 9, PAGE))
    with pytest.raises(DiskFull) as caught:
        write(path, 0, 1, first=True)
    assert (caught.value.wanted_bytes, caught.value.free_bytes) == (10 * PAGE, 9 * PAGE)
    assert not os.path.exists(path)


@pytest.mark.parametrize("refuses", ["open", "pwrite"])
def test_through_the_page_cache_each_wave_is_synced_before_it_counts(path, monkeypatch, refuses):
    real, synced = getattr(os, refuses), []

    def refuse(what, *arguments):
        direct = arguments[0] if refuses == "open" else int(_flags_of(what), 8)
        if direct & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real(what, *arguments)

    def fdatasync(descriptor):
        synced.append(content(path)[:PAGE])

    monkeypatch.setattr(os, refuses, refuse)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    assert write(path, 0, 5, first=True)[1] is False
    assert write(path, 5, 10)[1] is False
    assert content(path) == DATA
    assert synced == [DATA[:PAGE]] * 2


def _flags_of(descriptor: int) -> str:
    with open(f"/proc/self/fdinfo/{descriptor}") as info:
        return next(line.split()[1] for line in info if line.startswith("flags:"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failed_write_names_call_path_and_number_and_leaves_nothing_open(path, monkeypatch, number):
    write(path, 0, 5, first=True)

    def fail(*_):
        raise OSError(number, "no")

    monkeypatch.setattr(os, "pwrite", fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(SystemCallFailed) as caught:
        write(path, 5, 10)
    assert caught.value.report().facts == {"call": "pwrite", "path": path, "errno": number}
    assert os.listdir("/proc/self/fd") == before


class TestTheEnd:
    def test_a_file_of_another_length_is_an_error(self, path):
        write(path, 0, 10, first=True)
        os.truncate(path, 9 * PAGE)
        with pytest.raises(TruncatedFile) as caught:
            finish_waves(path, len(DATA))
        assert (caught.value.wanted_bytes, caught.value.found_bytes) == (10 * PAGE, 9 * PAGE)

    def test_a_file_that_is_gone_is_an_error(self, path):
        with pytest.raises(SystemCallFailed, match=f"open {path}"):
            finish_waves(path, len(DATA))

    def test_a_file_that_cannot_be_synced_is_an_error(self, path, monkeypatch):
        def fail(descriptor):
            raise OSError(errno.EIO, "lost")

        write(path, 0, 10, first=True)
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(SystemCallFailed, match=f"fsync {path}"):
            finish_waves(path, len(DATA))


class TestTheWorker:
    """What it makes of the hashes that the client has told."""

    def task(self, tmp_path, *, hashes=2, fixed=None):
        plans = [local_plan({"w": Held((700,)), "v": Held((900,))}), local_plan({"w": Held((700,))})]
        job = make_plan(plans, fixed)
        store_plan(str(tmp_path / "plan"), job)
        image, lengths = make_image(plans[0], job, 0)
        (tmp_path / "__0_0.distcp").write_bytes(image)
        told = bytes(8 * hashes)
        names = (str(tmp_path / "plan"), 0, lengths, str(tmp_path), "__0_0.distcp")
        return job, image, FinishWavesTask(*names, len(image), told, 77, 0.5, True)

    def test_are_passed_on_where_all_items_are_named(self, tmp_path):
        _, image, task = self.task(tmp_path, fixed=[np.array([0, 1]), np.zeros(0, np.int64)])
        done = _finish_waves(task)
        assert (done.bytes_written, done.hashes, done.frame_hash) == (len(image), task.hashes, 77)
        assert (done.write_s, done.direct) == (0.5, True)

    def test_the_frame_is_read_where_the_plan_names_another_ranks_copy(self, tmp_path):
        both = [np.array([0, 1]), np.array([0])]  # each has staged w
        job, image, task = self.task(tmp_path, fixed=both)
        [named] = np.flatnonzero(job.index_rows[0] >= 0).tolist()
        begin = int(job.layouts[0].data_offset[named])
        frame = image[:begin] + image[begin + int(job.layouts[0].data_bytes[named]) :]
        assert _finish_waves(task).frame_hash == xxh3_64_intdigest(frame)

    def test_must_be_as_many_as_the_items(self, tmp_path):
        _, _, task = self.task(tmp_path, hashes=3, fixed=[np.array([0, 1]), np.zeros(0, np.int64)])
        with pytest.raises(BadMessage, match="24 bytes of hashes for 2 items"):
            _finish_waves(task)
