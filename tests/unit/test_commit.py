"""Publishing: under an id stands the old checkpoint or the new one, whole, whatever fails."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch.distributed.checkpoint as dcp
from safetensors.numpy import save_file
from support.images import aligned
from support.plans import Held, local_plan, make_image, rows

from ckptd.checkpoint.image.write import Pace, Payloads, write_image
from ckptd.checkpoint.indexing.open import read_index
from ckptd.checkpoint.names import hidden_directory
from ckptd.checkpoint.planning.plan import make_plan
from ckptd.checkpoint.planning.planfile import StoredPlan, load_plan, store_plan
from ckptd.checkpoint.publishing import commit as commit_module
from ckptd.checkpoint.publishing import foreign as foreign_module
from ckptd.checkpoint.publishing.commit import commit, prepare_directory, publish
from ckptd.checkpoint.publishing.leftovers import discard_save
from ckptd.checkpoint.verify import verify_checkpoint
from ckptd.protocol.errors import CheckpointExists, SystemCallFailed, TruncatedFile
from ckptd.protocol.messages import CommitTask

PLANS = [
    local_plan({"w": rows(0, 3, of=(8, 4)), "o": 512, "r": Held((9,))}),
    local_plan({"w": rows(3, 8, of=(8, 4)), "o": 512, "r": Held((9,)), "big": Held((2048,))}),
]
JOB = make_plan(PLANS)


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> StoredPlan:
    path = str(tmp_path_factory.mktemp("plans") / "1.plan")
    store_plan(path, JOB)
    return load_plan(path)


@pytest.fixture
def checkpoint_id(tmp_path) -> str:
    return str(tmp_path / "step-7")


def write_images(plan: StoredPlan, checkpoint_id: str, *, seed: int, overwrite: bool = True) -> CommitTask:
    """Write the images of a save, as its workers do, and return what is then left to do."""
    directory = hidden_directory(checkpoint_id, f"save{seed}")
    prepare_directory(directory)
    hashes, frames, lengths = [], [], []
    for rank, rank_rows in enumerate(plan.ranks):
        image, object_bytes = make_image(PLANS[rank], JOB, rank, seed=seed)
        items = Payloads(rank_rows.data_offset, rank_rows.true_bytes(object_bytes), rank_rows.index_rows >= 0)
        file = os.path.join(directory, plan.index.files[rank])
        pace = Pace(threads=1, chunk_bytes=1 << 20)
        written = write_image(file, aligned(image), items, pace=pace, on_progress=lambda done: None)
        hashes.append(written.hashes.astype("<u8").tobytes())
        frames.append(written.frame_hash)
        lengths.append(object_bytes)
    return CommitTask(
        plan_path="",
        directory=directory,
        checkpoint_id=checkpoint_id,
        save_id=f"save{seed}",
        hashes=hashes,
        frame_hashes=frames,
        object_bytes=lengths,
        overwrite=overwrite,
        header={"save_id": f"save{seed}"},
    )


def save(plan: StoredPlan, checkpoint_id: str, *, seed: int, overwrite: bool = True) -> int:
    return commit(plan, write_images(plan, checkpoint_id, seed=seed, overwrite=overwrite))


def standing(checkpoint_id: str) -> str:
    """Return which save stands under an id, after having looked at its every byte."""
    assert verify_checkpoint(checkpoint_id).faults == ()
    return read_index(checkpoint_id).header["save_id"]


def siblings(checkpoint_id: str) -> list[str]:
    return sorted(os.listdir(os.path.dirname(checkpoint_id)))


@pytest.fixture(params=["renameat2", "without it"])
def renames(request, monkeypatch):
    """With the file system's renameat2 flags, and without."""
    if request.param == "without it":
        monkeypatch.setattr(commit_module, "rename_new", lambda source, target: False)
        monkeypatch.setattr(commit_module, "rename_exchange", lambda one, other: False)
    return request.param


class TestANewCheckpoint:
    def test_it_is_published_whole(self, plan, checkpoint_id, renames):
        nbytes = save(plan, checkpoint_id, seed=1)
        assert standing(checkpoint_id) == "save1"
        assert siblings(checkpoint_id) == ["step-7"]
        assert nbytes == sum(file.stat().st_size for file in Path(checkpoint_id).iterdir())

    def test_its_index_has_the_true_lengths_of_objects(self, plan, checkpoint_id):
        save(plan, checkpoint_id, seed=1)
        index = read_index(checkpoint_id)
        row = [index.names[name] for name in index.item_name].index("o")
        assert 0 < index.data_bytes[row] == index.record_bytes[row] < 512

    def test_stock_reads_its_metadata(self, plan, checkpoint_id):
        save(plan, checkpoint_id, seed=1)
        metadata = dcp.FileSystemReader(checkpoint_id).read_metadata()
        assert set(metadata.state_dict_metadata) == {"w", "o", "r", "big"}

    def test_no_directory_but_the_hidden_one_is_there_before(self, plan, checkpoint_id):
        task = write_images(plan, checkpoint_id, seed=1)
        assert siblings(checkpoint_id) == [".step-7.ckptd-save1"]
        commit(plan, task)

    def test_everything_is_synced_before_the_name_and_the_name_after_it(self, plan, checkpoint_id, monkeypatch):
        task = write_images(plan, checkpoint_id, seed=1)
        order = []
        real_sync, real_rename = commit_module.sync_directory, commit_module.rename_new
        monkeypatch.setattr(commit_module, "sync_directory", lambda path: (order.append(path), real_sync(path)))
        monkeypatch.setattr(
            commit_module, "rename_new", lambda *names: (order.append("rename"), real_rename(*names))[1]
        )
        commit(plan, task)
        assert order == [task.directory, "rename", os.path.dirname(checkpoint_id)]


class TestAnExistingCheckpoint:
    def test_it_is_replaced(self, plan, checkpoint_id, renames):
        save(plan, checkpoint_id, seed=1)
        save(plan, checkpoint_id, seed=2)
        assert standing(checkpoint_id) == "save2"
        assert siblings(checkpoint_id) == ["step-7"]

    def test_it_is_never_written_into(self, plan, checkpoint_id):
        save(plan, checkpoint_id, seed=1)
        with open(os.path.join(checkpoint_id, "__0_0.distcp"), "rb") as reader:
            before = reader.read()
            save(plan, checkpoint_id, seed=2)
            reader.seek(0)
            assert reader.read() == before

    def test_what_its_user_put_beside_it_is_kept(self, plan, checkpoint_id, renames):
        save(plan, checkpoint_id, seed=1)
        folder = Path(checkpoint_id)
        (folder / "notes.txt").write_text("mine")
        (folder / "logs" / "deep").mkdir(parents=True)
        (folder / "logs" / "deep" / "events").write_text("mine too")
        (folder / "to-notes").symlink_to("notes.txt")
        (folder / "to-logs").symlink_to("logs")
        save(plan, checkpoint_id, seed=2)
        assert standing(checkpoint_id) == "save2"
        assert (folder / "notes.txt").read_text() == "mine"
        assert (folder / "logs" / "deep" / "events").read_text() == "mine too"
        assert os.readlink(folder / "to-notes") == "notes.txt"
        assert os.readlink(folder / "to-logs") == "logs"

    def test_files_of_a_wider_checkpoint_go(self, plan, checkpoint_id, renames):
        save(plan, checkpoint_id, seed=1)
        (Path(checkpoint_id) / "__7_0.distcp").write_text("of rank 7")
        save(plan, checkpoint_id, seed=2)
        assert sorted(os.listdir(checkpoint_id)) == [".ckptd", ".metadata", "__0_0.distcp", "__1_0.distcp"]

    def test_a_file_that_came_at_the_last_moment_is_kept(self, plan, checkpoint_id, monkeypatch):
        save(plan, checkpoint_id, seed=1)
        exchange = commit_module.rename_exchange

        def late(one, other):
            (Path(other) / "late.txt").write_text("late")
            return exchange(one, other)

        monkeypatch.setattr(commit_module, "rename_exchange", late)
        save(plan, checkpoint_id, seed=2)
        assert (Path(checkpoint_id) / "late.txt").read_text() == "late"
        assert siblings(checkpoint_id) == ["step-7"]

    @pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
    def test_where_files_cannot_be_linked_they_are_copied(self, plan, checkpoint_id, monkeypatch, number):
        def refuse(*_, **__):
            raise OSError(number, "no links")

        save(plan, checkpoint_id, seed=1)
        (Path(checkpoint_id) / "notes.txt").write_text("mine")
        (Path(checkpoint_id) / "logs").mkdir()
        (Path(checkpoint_id) / "logs" / "events").write_text("mine too")
        monkeypatch.setattr(os, "link", refuse)
        save(plan, checkpoint_id, seed=2)
        assert (Path(checkpoint_id) / "notes.txt").read_text() == "mine"
        assert (Path(checkpoint_id) / "logs" / "events").read_text() == "mine too"

    def test_a_save_has_not_failed_because_the_old_one_cannot_be_removed(
        self, plan, checkpoint_id, monkeypatch, caplog
    ):
        def fail(*_):
            raise SystemCallFailed("unlink", "old", errno.EIO)

        save(plan, checkpoint_id, seed=1)
        monkeypatch.setattr(commit_module, "discard", fail)
        assert save(plan, checkpoint_id, seed=2) > 0
        assert standing(checkpoint_id) == "save2"
        assert "unlink old" in caplog.text

    def test_a_file_that_its_user_removes_at_the_last_moment_does_no_harm(self, plan, checkpoint_id, monkeypatch):
        save(plan, checkpoint_id, seed=1)
        for name in ("gone.txt", "notes.txt"):
            (Path(checkpoint_id) / name).write_text("mine")
        real = os.link

        def late(source, target, **options):
            Path(source).with_name("gone.txt").unlink(missing_ok=True)
            real(source, target, **options)

        monkeypatch.setattr(os, "link", late)
        save(plan, checkpoint_id, seed=2)
        assert sorted(set(os.listdir(checkpoint_id)) & {"gone.txt", "notes.txt"}) == ["notes.txt"]

    def test_copies_and_late_files_are_durable_before_the_originals_go(self, plan, checkpoint_id, monkeypatch):
        def refuse(*_, **__):
            raise OSError(errno.EMLINK, "no links")

        save(plan, checkpoint_id, seed=1)
        (Path(checkpoint_id) / "notes.txt").write_text("mine")
        exchange, synced, fsync = commit_module.rename_exchange, [], os.fsync

        def late(one, other):
            (Path(other) / "late.txt").write_text("late")
            return exchange(one, other)

        def watch(descriptor):
            synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(commit_module, "rename_exchange", late)
        monkeypatch.setattr(os, "fsync", watch)
        task = write_images(plan, checkpoint_id, seed=2)
        commit(plan, task)
        assert os.path.join(task.directory, "notes.txt") in synced
        assert synced[-1] == checkpoint_id  # of the late file, behind the parent's
        assert synced[-2] == os.path.dirname(checkpoint_id)

    def test_a_pipe_in_place_of_its_index_keeps_nobody_waiting(self, plan, checkpoint_id):
        os.mkdir(checkpoint_id)
        os.mkfifo(os.path.join(checkpoint_id, ".ckptd"))
        save(plan, checkpoint_id, seed=2)
        assert standing(checkpoint_id) == "save2"

    @pytest.mark.parametrize("header", ["[" * 100_000, "[]", "{", "7"])
    def test_an_index_with_a_strange_header_is_none_of_ours(self, plan, checkpoint_id, header):
        os.mkdir(checkpoint_id)
        save_file({"x": np.zeros(1)}, os.path.join(checkpoint_id, ".ckptd"), metadata={"header": header})
        save(plan, checkpoint_id, seed=2)
        assert standing(checkpoint_id) == "save2"

    def test_an_empty_folder_becomes_the_checkpoint(self, plan, checkpoint_id, renames):
        os.mkdir(checkpoint_id)
        save(plan, checkpoint_id, seed=1)
        assert standing(checkpoint_id) == "save1"

    def test_it_is_kept_where_overwriting_is_forbidden(self, plan, checkpoint_id, renames):
        save(plan, checkpoint_id, seed=1)
        task = write_images(plan, checkpoint_id, seed=2, overwrite=False)
        with pytest.raises(CheckpointExists, match=checkpoint_id):
            commit(plan, task)
        assert standing(checkpoint_id) == "save1"
        discard_save(task.directory)
        assert siblings(checkpoint_id) == ["step-7"]

    def test_one_that_appears_at_the_last_moment_is_kept_too(self, plan, checkpoint_id, renames, monkeypatch):
        save(plan, checkpoint_id, seed=1)
        task = write_images(plan, checkpoint_id, seed=2, overwrite=False)
        answers, real = iter([False]), commit_module.has_checkpoint  # as it was a moment ago
        monkeypatch.setattr(commit_module, "has_checkpoint", lambda path: next(answers, real(path)))
        with pytest.raises(CheckpointExists):
            commit(plan, task)
        assert standing(checkpoint_id) == "save1"
        discard_save(task.directory)
        assert siblings(checkpoint_id) == ["step-7"]

    def test_a_folder_without_a_checkpoint_needs_no_leave_to_overwrite(self, plan, checkpoint_id, renames):
        """As in stock: what must not be overwritten is a checkpoint."""
        os.mkdir(checkpoint_id)
        (Path(checkpoint_id) / "notes.txt").write_text("mine")
        save(plan, checkpoint_id, seed=1, overwrite=False)
        assert standing(checkpoint_id) == "save1"
        assert (Path(checkpoint_id) / "notes.txt").read_text() == "mine"

    def test_a_first_save_needs_no_leave_to_overwrite(self, plan, checkpoint_id, renames):
        save(plan, checkpoint_id, seed=1, overwrite=False)
        assert standing(checkpoint_id) == "save1"

    @pytest.mark.parametrize("what", ["file", "link"])
    def test_what_is_no_folder_is_left_alone(self, plan, checkpoint_id, renames, what, tmp_path):
        (tmp_path / "else").mkdir()
        Path(checkpoint_id).write_text("mine") if what == "file" else os.symlink(tmp_path / "else", checkpoint_id)
        with pytest.raises(SystemCallFailed) as caught:
            save(plan, checkpoint_id, seed=1)
        assert caught.value.errno == errno.ENOTDIR
        assert os.path.isfile(checkpoint_id) or os.readlink(checkpoint_id) == str(tmp_path / "else")
        assert list((tmp_path / "else").iterdir()) == []


class TestACommitDoneAgain:
    """A worker may die at any moment; another one then does its task from the start."""

    @pytest.mark.parametrize("existing", [False, True])
    def test_after_the_rename_it_finishes_what_was_begun(self, plan, checkpoint_id, renames, monkeypatch, existing):
        if existing:
            save(plan, checkpoint_id, seed=1)
            (Path(checkpoint_id) / "notes.txt").write_text("mine")
        task = write_images(plan, checkpoint_id, seed=2)
        with monkeypatch.context() as patch:
            patch.setattr(commit_module, "clear_away", _die)
            with pytest.raises(KeyboardInterrupt):
                commit(plan, task)
        assert standing(checkpoint_id) == "save2"
        commit(plan, task)
        assert standing(checkpoint_id) == "save2"
        assert siblings(checkpoint_id) == ["step-7"]
        assert not existing or (Path(checkpoint_id) / "notes.txt").read_text() == "mine"

    def test_before_the_rename_it_begins_anew(self, plan, checkpoint_id, monkeypatch):
        task = write_images(plan, checkpoint_id, seed=1)
        with monkeypatch.context() as patch:
            patch.setattr(commit_module, "publish", _die)
            with pytest.raises(KeyboardInterrupt):
                commit(plan, task)
        commit(plan, task)
        assert standing(checkpoint_id) == "save1"


def _die(*_, **__):
    raise KeyboardInterrupt


class Cut:
    """Lets the n-th of the named calls of a module fail, and says which it was."""

    def __init__(self, monkeypatch, *names: str, at: int) -> None:
        self.at, self.called, self.failed = at, [], ""
        for module in (commit_module, foreign_module):
            for name in names:
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, self._watch(name, getattr(module, name)))

    def _watch(self, name, real):
        def call(*arguments):
            self.called.append(name)
            if len(self.called) == self.at:
                self.failed = name
                raise SystemCallFailed(name, "cut", errno.EIO)
            return real(*arguments)

        return call


class TestAFailure:
    @pytest.mark.parametrize("at", range(1, 9))
    def test_anywhere_leaves_the_old_checkpoint(self, plan, checkpoint_id, monkeypatch, at):
        save(plan, checkpoint_id, seed=1)
        (Path(checkpoint_id) / "notes.txt").write_text("mine")
        task = write_images(plan, checkpoint_id, seed=2)
        with monkeypatch.context() as patch:
            Cut(patch, "write_file", "sync_directory", "rename_new", "rename_exchange", "_link", at=at)
            with pytest.raises(SystemCallFailed, match="cut"):
                commit(plan, task)
        # write index and metadata, sync, rename_new (EEXIST), link notes, sync, exchange, sync the parent
        assert standing(checkpoint_id) == "save1"
        assert (Path(checkpoint_id) / "notes.txt").read_text() == "mine"
        discard_save(task.directory)
        assert standing(checkpoint_id) == "save1"
        assert (Path(checkpoint_id) / "notes.txt").read_text() == "mine"
        assert siblings(checkpoint_id) == ["step-7"]

    @pytest.mark.parametrize("existing", [False, True])
    @pytest.mark.parametrize("damage", ["gone", "short"])
    def test_an_image_that_somebody_has_removed_is_never_published(self, plan, checkpoint_id, existing, damage):
        if existing:
            save(plan, checkpoint_id, seed=1)
        task = write_images(plan, checkpoint_id, seed=2)
        image = os.path.join(task.directory, "__1_0.distcp")
        os.unlink(image) if damage == "gone" else os.truncate(image, 4096)
        with pytest.raises(SystemCallFailed if damage == "gone" else TruncatedFile, match=r"__1_0\.distcp"):
            commit(plan, task)
        assert not existing or standing(checkpoint_id) == "save1"
        assert existing == os.path.lexists(checkpoint_id)

    @pytest.mark.parametrize("existing", [False, True])
    @pytest.mark.parametrize("at", [1, 2])
    def test_of_a_plain_rename_leaves_the_old_checkpoint_under_its_name(
        self, plan, checkpoint_id, monkeypatch, existing, at
    ):
        if existing:
            save(plan, checkpoint_id, seed=1)
        task = write_images(plan, checkpoint_id, seed=2)
        real, calls = os.rename, []

        def fail(source, target):
            calls.append(source)
            if len(calls) == at:
                raise OSError(errno.EIO, "no")
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(commit_module, "rename_new", lambda source, target: False)
            patch.setattr(commit_module, "rename_exchange", lambda one, other: False)
            patch.setattr(os, "rename", fail)
            if not existing and at == 2:
                commit(plan, task)
                return
            with pytest.raises(SystemCallFailed, match="rename"):
                commit(plan, task)
        discard_save(task.directory)
        assert siblings(checkpoint_id) == (["step-7"] if existing else [])
        assert not existing or standing(checkpoint_id) == "save1"

    @pytest.mark.parametrize("exchange", [True, False])
    @pytest.mark.parametrize("existing", [True, False])
    def test_of_the_last_sync_takes_the_new_name_back(self, plan, checkpoint_id, monkeypatch, existing, exchange):
        if existing:
            save(plan, checkpoint_id, seed=1)
        task = write_images(plan, checkpoint_id, seed=2)
        real, parent = commit_module.sync_directory, os.path.dirname(checkpoint_id)

        def fail(path):
            if path == parent:
                raise SystemCallFailed("fsync", path, errno.EIO)
            real(path)

        with monkeypatch.context() as patch:
            patch.setattr(commit_module, "sync_directory", fail)
            if not exchange:
                patch.setattr(commit_module, "rename_new", lambda source, target: False)
                patch.setattr(commit_module, "rename_exchange", lambda one, other: False)
            with pytest.raises(SystemCallFailed, match="fsync"):
                commit(plan, task)
        discard_save(task.directory)
        assert siblings(checkpoint_id) == (["step-7"] if existing else [])
        assert not existing or standing(checkpoint_id) == "save1"

    def test_a_failed_save_never_removes_an_old_checkpoint_that_has_its_hidden_name(self, plan, checkpoint_id):
        save(plan, checkpoint_id, seed=1)
        task = write_images(plan, checkpoint_id, seed=2)
        commit_module.discard(task.directory)
        os.rename(checkpoint_id, task.directory)  # as an exchange leaves it if its worker is killed
        os.mkdir(checkpoint_id)
        discard_save(task.directory)
        assert standing(task.directory) == "save1"
        os.rmdir(checkpoint_id)
        discard_save(task.directory)
        assert standing(checkpoint_id) == "save1"

    def test_what_was_replaced_in_a_foreign_folder_between_link_and_exchange_wins(
        self, plan, checkpoint_id, monkeypatch
    ):
        save(plan, checkpoint_id, seed=1)
        notes = Path(checkpoint_id) / "logs" / "notes.txt"
        notes.parent.mkdir()
        notes.write_text("first")
        exchange = commit_module.rename_exchange

        def late(one, other):
            (notes.parent / "late.txt").write_text("late")
            (notes.parent / "draft").write_text("second")
            os.replace(notes.parent / "draft", notes)
            return exchange(one, other)

        monkeypatch.setattr(commit_module, "rename_exchange", late)
        save(plan, checkpoint_id, seed=2)
        assert notes.read_text() == "second"
        assert (notes.parent / "late.txt").read_text() == "late"


def test_publishing_where_another_save_came_first_replaces_it(tmp_path, monkeypatch):
    """Between the two names of a plain rename another process may take the id."""
    for name in ("new", "id"):
        (tmp_path / name).mkdir()
    (tmp_path / "new" / "__0_0.distcp").write_text("new")
    publish(str(tmp_path / "new"), str(tmp_path / "id"), overwrite=True)
    assert (tmp_path / "id" / "__0_0.distcp").read_text() == "new"


def test_hashes_land_in_the_rows_of_their_items(plan, checkpoint_id):
    save(plan, checkpoint_id, seed=3)
    index = read_index(checkpoint_id)
    for rank, mine in enumerate(JOB.index_rows):
        image, _ = make_image(PLANS[rank], JOB, rank, seed=3)
        for row in mine.tolist():
            begin = int(index.data_offset[row])
            data = image[begin : begin + int(index.data_bytes[row])]
            assert int(index.item_hash[row]) == commit_module.xxh3_64_intdigest(data)
            assert np.int64(index.item_file[row]) == rank
