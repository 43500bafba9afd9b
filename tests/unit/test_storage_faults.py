"""What goes wrong under a writer or a reader, and that nobody is told it went well."""

from __future__ import annotations

import errno
import os
import pickle
import threading

import pytest
import torch
import torch.distributed.checkpoint as stock
from support.backends import files_in, load, loaded, play_ranks, save, small_state
from torch.distributed.checkpoint.api import CheckpointException

from ckptd.checkpoint.publishing import commit
from ckptd.checkpoint.storage import hidden_directory, posix_sink
from ckptd.checkpoint.storage.filesystem import FileSystemReader, FileSystemWriter
from ckptd.checkpoint.storage.threads import run_all
from ckptd.checkpoint.verify import verify_checkpoint
from ckptd.protocol.errors import (
    BadIndex,
    CkptdError,
    ItemNotReported,
    MissingFile,
    SaveAborted,
    SeveralFailed,
    SystemCallFailed,
    TruncatedFile,
    Unsupported,
    WrongBits,
)


def many(number=1.0):
    """Enough tensors for several files."""
    return {f"w{row}": torch.full((100 + row,), number) for row in range(8)}


@pytest.fixture
def full_disk(monkeypatch):
    """Lets writes to files with this ending fail as on a full disk; returns what names the ending."""
    endings = set()
    original = posix_sink.PosixSink._pwrite

    def write(sink, data, offset):
        if any(sink._path.endswith(ending) for ending in endings):
            raise SystemCallFailed("pwrite", sink._path, errno.ENOSPC)
        return original(sink, data, offset)

    monkeypatch.setattr(posix_sink.PosixSink, "_pwrite", write)
    return endings.add


class TestAWriterThatFails:
    @pytest.mark.parametrize("file", ["__0_0.distcp", "__0_1.distcp", "__0_2.distcp"])
    @pytest.mark.parametrize("threads", [1, 3])
    def test_any_writers_error_reaches_the_caller(self, full_disk, tmp_path, file, threads):
        full_disk(file)
        options = {"thread_count": threads, "single_file_per_rank": threads == 3}
        with pytest.raises(CheckpointException, match=f"{file}: No space left on device"):
            save(many(), FileSystemWriter(tmp_path / "ckpt", **options))
        assert os.listdir(tmp_path) == []

    def test_all_threads_errors_are_told(self, tmp_path):
        together = threading.Barrier(2, timeout=20)

        def fail(number):
            def task(check):
                together.wait()
                raise SystemCallFailed("pwrite", f"file-{number}", errno.EIO)

            return task

        with pytest.raises(SeveralFailed) as caught:
            run_all([fail(1), fail(2)], threads=2)
        assert caught.value.count == 2
        assert "file-1" in str(caught.value)
        assert "file-2" in str(caught.value)

    def test_the_others_stop(self):
        failed, ran = threading.Event(), []

        def fail(check):
            failed.set()
            raise ValueError("no")

        def follow(check):
            assert failed.wait(20)
            ran.append("began")
            with pytest.raises(Exception) as stopped:
                while True:
                    check()
            raise stopped.value

        with pytest.raises(ValueError, match="no"):
            run_all([fail, follow, follow, follow], threads=2)
        assert len(ran) <= 1

    def test_an_error_of_the_users_planner_is_handed_on_and_nothing_stays(self, tmp_path):
        class Planner(stock.DefaultSavePlanner):
            def resolve_data(self, write_item):
                if write_item.index.fqn == "w3":
                    raise ValueError("not today")
                return super().resolve_data(write_item)

        with pytest.raises(CheckpointException, match="not today"):
            save(many(), FileSystemWriter(tmp_path / "ckpt", thread_count=2), planner=Planner())
        assert os.listdir(tmp_path) == []

    def test_one_rank_fails_and_the_others_files_go_too(self, full_disk, tmp_path):
        full_disk("__1_0.distcp")
        with pytest.raises(SystemCallFailed, match="__1_0"):
            play_ranks([{f"w{rank}": torch.ones(9)} for rank in range(3)], FileSystemWriter(tmp_path / "ckpt"))
        assert os.listdir(tmp_path) == []

    def test_a_rank_after_a_failure_says_why_it_cannot_write(self, tmp_path):
        writers = [FileSystemWriter(tmp_path / "ckpt") for _ in range(2)]
        with pytest.raises(SaveAborted, match="another rank"):
            play_ranks(
                [{"a": torch.ones(1)}, {"b": torch.ones(1)}],
                writers,
                before_writing=lambda rank: writers[0].abort() if rank else None,
            )
        assert os.listdir(tmp_path) == []


class TestNothingStaysBehind:
    def start(self, writer):
        planner = stock.DefaultSavePlanner()
        planner.set_up_planner(many(), is_coordinator=True)
        plan = writer.prepare_local_plan(planner.create_local_plan())
        [plan], metadata = planner.create_global_plan([plan])
        [plan] = writer.prepare_global_plan([plan])
        return plan, metadata, planner

    def test_when_the_writer_is_forgotten(self, tmp_path):
        writer = FileSystemWriter(tmp_path / "ckpt")
        plan, _, planner = self.start(writer)
        writer.write_data(plan, planner)
        assert len(os.listdir(tmp_path)) == 1
        del writer
        assert os.listdir(tmp_path) == []

    def test_when_the_writer_is_given_another_save(self, tmp_path):
        writer = FileSystemWriter(tmp_path / "a")
        self.start(writer)
        save(many(), writer, checkpoint_id=tmp_path / "b")
        assert os.listdir(tmp_path) == ["b"]

    def test_when_a_forked_child_ends_it_leaves_its_parents_save_alone(self, tmp_path):
        writer = FileSystemWriter(tmp_path / "ckpt")
        self.start(writer)
        writer._claim.pid += 1  # as a child sees it
        writer.abort()
        assert len(os.listdir(tmp_path)) == 1

    def test_what_a_killed_save_left_goes_with_the_next_one(self, tmp_path):
        left = hidden_directory.HiddenDirectory(
            str(tmp_path / "ckpt"), "api-killed", prefix="__0_", sync=True
        ).directory
        os.mkdir(left)
        save(many(), FileSystemWriter(tmp_path / "ckpt"))
        assert os.listdir(tmp_path) == ["ckpt"]

    def test_but_not_what_another_save_is_writing(self, tmp_path):
        other = FileSystemWriter(tmp_path / "ckpt")
        plan, metadata, planner = self.start(other)
        save(many(2.0), FileSystemWriter(tmp_path / "ckpt"))
        results = other.write_data(plan, planner).value()
        other.finish(metadata, [results])
        assert os.listdir(tmp_path) == ["ckpt"]

    def test_nor_what_the_daemon_is_writing(self, tmp_path):
        (tmp_path / ".ckpt.ckptd-0123").mkdir()
        save(many(), FileSystemWriter(tmp_path / "ckpt"))
        assert sorted(os.listdir(tmp_path)) == [".ckpt.ckptd-0123", "ckpt"]

    def test_a_checkpoint_that_is_being_replaced_is_no_rest(self, tmp_path):
        (tmp_path / ".ckpt.ckptd-api-1.old").mkdir()
        hidden_directory.sweep(str(tmp_path / "ckpt"))
        assert os.listdir(tmp_path) == [".ckpt.ckptd-api-1.old"]


class TestNothingIsPublished:
    @pytest.fixture(autouse=True)
    def quiet(self, caplog):
        caplog.set_level("WARNING")  # stock's logger tells every step

    @pytest.fixture
    def first(self, tmp_path):
        save(small_state(1.0), FileSystemWriter(tmp_path / "ckpt"))
        return files_in(tmp_path)

    @pytest.mark.parametrize("call", ["write_file", "sync_directory", "publish"])
    def test_if_a_call_of_the_commit_fails(self, first, tmp_path, monkeypatch, call):
        failures, real = [SystemCallFailed(call, "somewhere", errno.EIO)], getattr(hidden_directory, call)

        def fail_once(*arguments, **options):
            if failures:
                raise failures.pop()
            return real(*arguments, **options)

        monkeypatch.setattr(hidden_directory, call, fail_once)
        with pytest.raises(CheckpointException, match="Input/output error"):
            save(small_state(2.0), FileSystemWriter(tmp_path / "ckpt"))
        assert files_in(tmp_path) == first

    def test_what_a_disk_that_syncs_no_names_may_still_call_the_checkpoint_stays(self, first, tmp_path, monkeypatch):
        """The new name was given and taken back, and nobody knows which of the two a power failure would leave."""

        def fail(path):
            if path == str(tmp_path):
                raise SystemCallFailed("fsync", path, errno.EIO)

        monkeypatch.setattr(commit, "sync_directory", fail)
        monkeypatch.setattr(hidden_directory, "sync_directory", fail)
        with pytest.raises(CheckpointException, match="fsync"):
            save(small_state(2.0), FileSystemWriter(tmp_path / "ckpt"))
        [hidden] = tmp_path.glob(".ckpt.ckptd-*")
        assert verify_checkpoint(str(hidden)).faults == ()
        monkeypatch.undo()
        save(small_state(3.0), FileSystemWriter(tmp_path / "ckpt"))
        assert os.listdir(tmp_path) == ["ckpt"]

    def test_if_the_parent_directory_cannot_be_made_durable(self, first, tmp_path, monkeypatch):
        original = commit.sync_directory

        def sync(path):
            if path == str(tmp_path):
                raise SystemCallFailed("fsync", path, errno.EIO)
            original(path)

        monkeypatch.setattr(commit, "sync_directory", sync)
        with pytest.raises(CheckpointException, match="fsync"):
            save(small_state(2.0), FileSystemWriter(tmp_path / "ckpt"))
        assert files_in(tmp_path) == first

    def test_if_an_item_was_not_reported(self, first, tmp_path):
        writer = FileSystemWriter(tmp_path / "ckpt")
        planner = stock.DefaultSavePlanner()
        planner.set_up_planner(many(), is_coordinator=True)
        [plan], metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
        [plan] = writer.prepare_global_plan([plan])
        results = writer.write_data(plan, planner).value()
        with pytest.raises(ItemNotReported, match="w7"):
            writer.finish(metadata, [[result for result in results if result.index.fqn != "w7"]])
        assert files_in(tmp_path) == first

    @pytest.mark.parametrize(
        ("harm", "error"), [(os.unlink, MissingFile), (lambda p: os.truncate(p, 10), TruncatedFile)]
    )
    def test_if_a_file_is_not_what_was_reported(self, first, tmp_path, monkeypatch, harm, error):
        original = hidden_directory.HiddenDirectory.check_files

        def check(publication, sizes):
            harm(os.path.join(publication.directory, "__0_0.distcp"))
            original(publication, sizes)

        monkeypatch.setattr(hidden_directory.HiddenDirectory, "check_files", check)
        with pytest.raises(error):
            play_ranks([many()], FileSystemWriter(tmp_path / "ckpt"))
        assert files_in(tmp_path) == first

    def test_by_a_writer_that_never_began(self, tmp_path):
        with pytest.raises(Unsupported, match="prepare_global_plan"):
            FileSystemWriter(tmp_path).finish(None, [])
        with pytest.raises(Unsupported, match="prepare_global_plan"):
            FileSystemWriter(tmp_path).write_data(stock.SavePlan([]), stock.DefaultSavePlanner())

    def test_that_the_old_one_cannot_be_removed_fails_no_save(self, first, tmp_path, monkeypatch, caplog):
        def fail(*_):
            raise SystemCallFailed("unlink", "old", errno.EACCES)

        monkeypatch.setattr(hidden_directory, "clear_away", fail)
        save(small_state(2.0), FileSystemWriter(tmp_path / "ckpt"))
        assert loaded(FileSystemReader(tmp_path / "ckpt"))["step"] == 2
        assert "could not remove" in caplog.text


class TestDamage:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        save(small_state(), FileSystemWriter(tmp_path / "ckpt"))
        return tmp_path / "ckpt"

    def flip(self, file, at):
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)

    def failure(self, checkpoint):
        reader = FileSystemReader(checkpoint)
        with pytest.raises(CkptdError) as caught:
            metadata = reader.read_metadata()
            planner = stock.DefaultLoadPlanner()
            state = {"model": {"w": torch.zeros(60, 100), "b": torch.zeros(7)}, "step": -1, "names": None}
            planner.set_up_planner(state, metadata, True)
            reader.set_up_storage_reader(metadata, True)
            reader.read_data(planner.create_local_plan(), planner)
        return caught.value

    def test_a_wrong_bit_in_a_tensor_is_named(self, checkpoint):
        metadata = stock.FileSystemReader(checkpoint).read_metadata()
        place = next(place for key, place in metadata.storage_data.items() if key.fqn == "model.w")
        self.flip(checkpoint / "__0_0.distcp", place.offset + place.length // 2)
        error = self.failure(checkpoint)
        assert isinstance(error, WrongBits)
        assert error.item == "model.w"

    def test_a_wrong_bit_in_an_object_is_named(self, checkpoint):
        metadata = stock.FileSystemReader(checkpoint).read_metadata()
        place = next(place for key, place in metadata.storage_data.items() if key.fqn == "step")
        self.flip(checkpoint / "__0_0.distcp", place.offset + place.length // 2)
        assert self.failure(checkpoint).item == "step"

    def test_no_wrong_bit_of_the_metadata_goes_unnoticed(self, checkpoint):
        good = (checkpoint / ".metadata").read_bytes()
        for at in range(0, len(good), 67):
            self.flip(checkpoint / ".metadata", at)
            assert isinstance(self.failure(checkpoint), WrongBits | BadIndex), at
            (checkpoint / ".metadata").write_bytes(good)
        assert loaded(FileSystemReader(checkpoint))["step"] == 1

    def test_a_missing_or_short_file_is_named(self, checkpoint):
        os.truncate(checkpoint / "__0_0.distcp", 100)
        assert isinstance(self.failure(checkpoint), TruncatedFile)
        os.unlink(checkpoint / "__0_0.distcp")
        assert isinstance(self.failure(checkpoint), MissingFile)

    def test_metadata_with_code_in_it_is_refused(self, tmp_path):
        class Code:
            def __reduce__(self):
                return os.system, (f"touch {tmp_path}/ran",)

        (tmp_path / ".metadata").write_bytes(pickle.dumps(Code()))
        with pytest.raises(BadIndex):
            FileSystemReader(tmp_path).read_metadata()
        assert not (tmp_path / "ran").exists()

    def test_metadata_that_points_out_of_the_checkpoint_is_refused(self, tmp_path):
        save({"w": torch.ones(2)}, stock.FileSystemWriter(tmp_path / "ckpt"))
        metadata = stock.FileSystemReader(tmp_path / "ckpt").read_metadata()
        for place in metadata.storage_data.values():
            place.relative_path = "../ckpt/__0_0.distcp"
        (tmp_path / "ckpt" / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointException, match="no file of the checkpoint"):
            load({"w": torch.zeros(2)}, FileSystemReader(tmp_path / "ckpt"))
