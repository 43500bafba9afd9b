"""An opened checkpoint stays what it was, whatever its name shows later, and what is done to its files is noticed."""

from __future__ import annotations

import os
import shutil

import pytest

from ckptd.checkpoint.directory import CheckpointDirectory
from ckptd.checkpoint.indexing.open import read_index
from ckptd.checkpoint.reading.files import Disk
from ckptd.checkpoint.system import rename_exchange
from ckptd.protocol.errors import BadIndex, MissingFile, SystemCallFailed, TruncatedFile, UnknownCheckpoint


@pytest.fixture
def path(tmp_path):
    for name, text in (("a", b"one"), ("b", b"other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(text)
    return str(tmp_path / "a")


def read(directory, name="file"):
    descriptor = directory.open(f"{directory.path}/{name}", os.O_RDONLY)
    try:
        assert not os.get_inheritable(descriptor)
        return os.read(descriptor, 100)
    finally:
        os.close(descriptor)


def test_files_are_those_of_the_directory_that_was_opened(path, tmp_path):
    with CheckpointDirectory(path) as directory:
        assert read(directory) == b"one"
        assert rename_exchange(path, str(tmp_path / "b"))
        assert read(directory) == b"one"
        assert (tmp_path / "a" / "file").read_bytes() == b"other"
        assert directory.has_lost_its_name()
        assert not directory.was_written_into()


def test_the_disk_and_the_index_are_read_through_it(path, tmp_path):
    with CheckpointDirectory(path) as directory:
        os.rename(path, tmp_path / "elsewhere")
        file = Disk(directory.open).open(f"{path}/file", [(0, 3)])
        assert file.view(0, 3, memoryview(bytearray(9000))) == b"one"
        file.close()
        with pytest.raises(UnknownCheckpoint):
            read_index(path, opener=directory.open)
        shutil.rmtree(tmp_path / "elsewhere")
        with pytest.raises(MissingFile):
            Disk(directory.open).open(f"{path}/file", [(0, 3)])


def test_a_pipe_in_a_files_place_keeps_nobody_waiting(path):
    for name in ("pipe", ".ckptd"):
        os.mkfifo(os.path.join(path, name))
    with CheckpointDirectory(path) as directory:
        with pytest.raises(TruncatedFile):
            Disk(directory.open).open(f"{path}/pipe", [(0, 10)])
        with pytest.raises(BadIndex, match="not a file"):
            read_index(path, opener=directory.open)


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_bytes(b"another length"),
        lambda file: os.utime(file, ns=(1, 1)),
        lambda file: os.replace(shutil.copy2(file, file.with_name("new")), file),
        lambda file: file.unlink(),
    ],
    ids=["written", "written in place", "replaced", "removed"],
)
def test_a_file_that_changes_after_it_was_opened_is_noticed(path, tmp_path, change):
    with CheckpointDirectory(path) as directory:
        read(directory)
        assert not directory.was_written_into()
        change(tmp_path / "a" / "file")
        assert directory.was_written_into()
        assert not directory.has_lost_its_name()


def test_files_that_were_not_opened_may_change(path, tmp_path):
    with CheckpointDirectory(path) as directory:
        read(directory)
        (tmp_path / "a" / "notes").write_bytes(b"mine")
        assert not directory.was_written_into()


def test_a_directory_that_was_removed_has_lost_its_name(path):
    with CheckpointDirectory(path) as directory:
        shutil.rmtree(path)
        assert directory.has_lost_its_name()


def test_what_is_no_directory_is_no_checkpoint(path):
    for wrong in (f"{path}/no", f"{path}/file", f"{path}/file/no"):
        with pytest.raises(UnknownCheckpoint):
            CheckpointDirectory(wrong)


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(SystemCallFailed, match="File name too long"):
        CheckpointDirectory(str(tmp_path / ("x" * 300)))
