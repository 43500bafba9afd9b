"""The hidden directory of a save: made with all above it, durably, and removed with all in it and no more."""

from __future__ import annotations

import errno
import os

import pytest

from ckptd.checkpoint.publishing import commit as commit_module
from ckptd.checkpoint.publishing.commit import discard, prepare_directory
from ckptd.protocol.errors import SystemCallFailed


def _die(*_, **__):
    raise KeyboardInterrupt


class TestDiscard:
    def test_it_removes_what_a_save_has_left(self, tmp_path):
        (tmp_path / "hidden" / "deep").mkdir(parents=True)
        (tmp_path / "hidden" / "file").write_text("x")
        discard(str(tmp_path / "hidden"))
        assert list(tmp_path.iterdir()) == []

    def test_nothing_to_remove_is_no_error(self, tmp_path):
        discard(str(tmp_path / "hidden"))

    def test_what_links_point_at_stays(self, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "file").write_text("x")
        (tmp_path / "hidden").mkdir()
        (tmp_path / "hidden" / "link").symlink_to(tmp_path / "mine")
        discard(str(tmp_path / "hidden"))
        assert (tmp_path / "mine" / "file").read_text() == "x"

    def test_it_takes_metadata_and_index_first(self, tmp_path, monkeypatch):
        (tmp_path / "hidden").mkdir()
        for name in ("__0_0.distcp", ".metadata", ".ckptd"):
            (tmp_path / "hidden" / name).touch()
        monkeypatch.setattr(commit_module.shutil, "rmtree", _die)
        with pytest.raises(KeyboardInterrupt):
            discard(str(tmp_path / "hidden"))
        assert os.listdir(tmp_path / "hidden") == ["__0_0.distcp"]

    def test_one_failure_is_not_the_end_of_it(self, tmp_path, monkeypatch):
        (tmp_path / "hidden").mkdir()
        (tmp_path / "hidden" / "file").touch()
        real, failures = commit_module.shutil.rmtree, [OSError(errno.EIO, "no"), None]

        def fail_once(path):
            if failure := failures.pop(0):
                raise failure
            real(path)

        monkeypatch.setattr(commit_module.shutil, "rmtree", fail_once)
        discard(str(tmp_path / "hidden"))
        assert list(tmp_path.iterdir()) == failures == []

    def test_a_failure_names_the_path(self, tmp_path, monkeypatch):
        (tmp_path / "hidden").mkdir()
        (tmp_path / "hidden" / "file").write_text("x")

        def fail(path, *_, **__):
            raise PermissionError(errno.EACCES, "no", path)

        monkeypatch.setattr(os, "unlink", fail)
        with pytest.raises(SystemCallFailed) as caught:
            discard(str(tmp_path / "hidden"))
        assert (caught.value.call, caught.value.errno) == ("unlink", errno.EACCES)


def test_a_directory_is_made_with_all_above_it_and_more_than_once(tmp_path):
    directory = str(tmp_path / "a" / "b" / ".hidden")
    prepare_directory(directory)
    prepare_directory(directory)
    assert os.path.isdir(directory)


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """The directories that are synced from now on, by a process that has not synced any."""
    found, real = [], commit_module.sync_directory
    monkeypatch.setattr(commit_module, "_durable", set())
    monkeypatch.setattr(commit_module, "sync_directory", lambda path: (found.append(path), real(path)))
    return found


def test_the_names_of_new_folders_above_it_are_made_durable(tmp_path, synced):
    prepare_directory(str(tmp_path / "a" / "b" / ".hidden"))
    assert {str(tmp_path), str(tmp_path / "a")} <= set(synced)
    synced.clear()
    prepare_directory(str(tmp_path / "a" / "b" / ".other"))
    prepare_directory(str(tmp_path / "a" / "c" / "d" / ".other"))
    assert {str(tmp_path / "a"), str(tmp_path / "a" / "c")} <= set(synced)


def test_folders_whose_maker_died_before_it_had_synced_are_made_durable_once(tmp_path, synced):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in (".hidden", ".other"):
        prepare_directory(str(tmp_path / "a" / "b" / name))
    assert synced.count(str(tmp_path)) == synced.count(str(tmp_path / "a")) == 1
    assert synced.count(str(tmp_path / "a" / "b")) == 0  # the name of the hidden directory is the commit's to sync


@pytest.mark.parametrize(("number", "harmless"), [(errno.EACCES, True), (errno.EIO, False)])
def test_a_folder_above_that_cannot_be_synced(tmp_path, monkeypatch, number, harmless):
    def fail(path):
        raise SystemCallFailed("fsync", path, number)

    monkeypatch.setattr(commit_module, "_durable", set())
    monkeypatch.setattr(commit_module, "sync_directory", fail)
    if harmless:
        prepare_directory(str(tmp_path / ".hidden"))
        assert (tmp_path / ".hidden").is_dir()
        return
    for _ in range(2):  # it is not taken for durable after a failure
        with pytest.raises(SystemCallFailed, match="fsync"):
            prepare_directory(str(tmp_path / ".hidden"))


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemCallFailed, match="mkdir"):
        prepare_directory(str(tmp_path / "file" / "hidden"))
