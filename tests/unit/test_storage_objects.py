"""Our object back-end on stores without a server: ids as strings, one last object, nothing mixed, nothing left."""

from __future__ import annotations

import errno
import os
import pickle
import uuid

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as stock
from fsspec.implementations.memory import MemoryFileSystem
from support.backends import blank_state, load, loaded, play_ranks, same, save, small_state
from torch.distributed.checkpoint import _fsspec_filesystem as stock_fsspec
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import SerializationFormat

from ckptd.checkpoint.storage.fresh_names import FreshNames
from ckptd.checkpoint.storage.object_store import ObjectStore
from ckptd.checkpoint.storage.objects import FsspecReader, FsspecWriter
from ckptd.checkpoint.storage.retrying import Backoff
from ckptd.checkpoint.verify import verify_checkpoint
from ckptd.protocol.errors import (
    CheckpointExists,
    MissingFile,
    ObjectStoreFailed,
    TruncatedFile,
    UnknownCheckpoint,
    Unsupported,
    WrongBits,
    WrongUpload,
)


@pytest.fixture
def memory():
    """An id in memory that holds nothing yet; with a double slash in it."""
    root = uuid.uuid4().hex
    yield f"memory://{root}/run//step-1"
    store = MemoryFileSystem.store
    for path in [path for path in store if path.startswith(f"/{root}")]:
        del store[path]


@pytest.fixture(params=["memory", "file"])
def place(request, tmp_path, memory):
    """An id that holds nothing yet."""
    return memory if request.param == "memory" else f"file://{tmp_path}/run//step-1"


def names(place):
    """Return the names of all objects of a checkpoint, without our code."""
    fs, path = fsspec.core.url_to_fs(place)
    return sorted(os.path.basename(found) for found in fs.find(path))


def data_names(place):
    return [name for name in names(place) if name.endswith(".distcp")]


OPTIONS = {
    "defaults": {},
    "threads": {"thread_count": 3},
    "an object per item": {"single_file_per_rank": False, "thread_count": 2},
    "unsynced": {"sync_files": False},
    "no copy ahead": {"per_thread_copy_ahead": 0},
    "no overwriting": {"overwrite": False},
    "torch_save": {"serialization_format": SerializationFormat.TORCH_SAVE},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class TestBothWays:
    @every_option
    def test_stock_reads_what_ours_writes(self, place, options):
        save(small_state(), FsspecWriter(place, **options))
        assert same(loaded(stock_fsspec.FsspecReader(place)), small_state())

    @every_option
    def test_ours_reads_what_ours_writes(self, place, options):
        save(small_state(), FsspecWriter(place, **options))
        assert same(loaded(FsspecReader(place)), small_state())

    @every_option
    def test_ours_reads_what_stock_writes(self, place, options):
        save(small_state(), stock_fsspec.FsspecWriter(place, **options))
        assert same(loaded(FsspecReader(place)), small_state())

    def test_compressed(self, place):
        save(small_state(), FsspecWriter(place, _extensions=["stream.zstd"]))
        assert same(loaded(stock_fsspec.FsspecReader(place)), small_state())
        assert same(loaded(FsspecReader(place)), small_state())

    def test_a_file_url_holds_what_the_file_system_reader_reads(self, tmp_path):
        save(small_state(), FsspecWriter(f"file://{tmp_path}/ckpt"))
        assert same(loaded(stock.FileSystemReader(tmp_path / "ckpt")), small_state())
        assert verify_checkpoint(str(tmp_path / "ckpt")).good


class TestIds:
    def test_are_strings_in_which_every_slash_counts(self, memory):
        writer = FsspecWriter(memory)
        save(small_state(), writer)
        assert writer.path == writer.checkpoint_id == memory
        root = memory.partition("://")[2]
        assert any(path.startswith(f"/{root}/__0_0.") for path in MemoryFileSystem.store)
        assert writer.storage_meta().checkpoint_id == memory

    def test_objects_are_where_stock_would_put_them(self, place):
        for url in (place, f"{place}/"):
            store = ObjectStore(url, None)
            assert store.url(".metadata") == stock_fsspec.FileSystem().concat_path(url, ".metadata")

    def test_what_fsspec_cannot_reach_is_refused(self):
        assert not FsspecWriter.validate_checkpoint_id("nothing://a")
        assert not FsspecReader.validate_checkpoint_id("nothing://a")
        assert FsspecWriter.validate_checkpoint_id("memory://a")
        with pytest.raises(Unsupported, match="nothing"):
            FsspecWriter("nothing://a")

    def test_reset_leads_both_elsewhere(self, memory):
        writer, reader = FsspecWriter(f"{memory}/a"), FsspecReader(f"{memory}/a")
        save(small_state(7.0), writer, checkpoint_id=f"{memory}/b")
        assert load(blank_state(), reader, checkpoint_id=f"{memory}/b")["step"] == 7
        assert names(f"{memory}/a") == []

    def test_what_is_not_there_is_an_error(self, place):
        with pytest.raises(UnknownCheckpoint, match="step-1"):
            FsspecReader(place).read_metadata()


class TestArguments:
    def test_a_misspelt_option_is_refused_where_stock_swallows_it(self):
        with pytest.raises(TypeError, match=r"thred_count.*did you mean 'thread_count'"):
            FsspecWriter("memory://x", thred_count=8)
        with pytest.raises(TypeError, match="glbal_store"):
            FsspecReader("memory://x", glbal_store=False)
        assert stock_fsspec.FsspecWriter("memory://x", thred_count=8).thread_count == 1

    def test_options_of_the_store_reach_it(self):
        writer = FsspecWriter("memory://x", global_store=False, skip_instance_cache=True)
        assert writer._fs.store is not MemoryFileSystem.store
        assert FsspecWriter("memory://x", memory={"anything": 1})  # fsspec's own way to address one of a chain

    def test_writers_and_readers_travel_to_other_processes(self, memory):
        writer, reader = (pickle.loads(pickle.dumps(kind(memory))) for kind in (FsspecWriter, FsspecReader))
        save(small_state(), writer)
        assert same(loaded(reader), small_state())

    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
    def test_the_writer_stages_for_stocks_async_save(self, place):
        future = stock.async_save(small_state(3.0), storage_writer=FsspecWriter(place), no_dist=True)
        future.result(30)
        assert loaded(FsspecReader(place))["step"] == 3


class TestOverwriting:
    def test_the_old_objects_go_with_the_old_metadata(self, place):
        save(small_state(1.0), FsspecWriter(place, thread_count=3))
        old = set(data_names(place))
        save(small_state(2.0), FsspecWriter(place))
        assert len(data_names(place)) == 1
        assert not old & set(data_names(place))
        assert loaded(FsspecReader(place))["step"] == 2

    def test_what_is_not_ours_stays(self, place):
        fs, path = fsspec.core.url_to_fs(place)
        fs.makedirs(path, exist_ok=True)
        fs.pipe_file(f"{path}/notes.txt", b"mine")
        save(small_state(1.0), FsspecWriter(place))
        save(small_state(2.0), FsspecWriter(place))
        assert fs.cat_file(f"{path}/notes.txt") == b"mine"

    def test_of_a_checkpoint_of_stocks(self, place):
        save(small_state(1.0), stock_fsspec.FsspecWriter(place))
        save(small_state(2.0), FsspecWriter(place))
        assert "__0_0.distcp" not in names(place)
        assert same(loaded(stock_fsspec.FsspecReader(place)), small_state(2.0))

    def test_by_stock(self, place):
        save(small_state(1.0), FsspecWriter(place))
        save(small_state(2.0), stock_fsspec.FsspecWriter(place))
        assert same(loaded(FsspecReader(place)), small_state(2.0))

    def test_with_a_save_that_has_no_index_takes_the_index_away(self, place):
        save(small_state(1.0), FsspecWriter(place))
        save(small_state(2.0), FsspecWriter(place, _extensions=["stream.zstd"]))
        assert ".ckptd" not in names(place)

    def test_is_refused_if_asked_and_so_does_stock(self, place):
        save(small_state(1.0), FsspecWriter(place))
        before = names(place)
        for kind in (FsspecWriter, stock_fsspec.FsspecWriter):
            with pytest.raises(CheckpointException, match="already exists"):
                save(small_state(2.0), kind(place, overwrite=False))
        with pytest.raises(CheckpointExists):
            play_ranks(
                [small_state(2.0)],
                FsspecWriter(f"{place}-2", overwrite=False),
                before_writing=lambda _: save(small_state(9.0), FsspecWriter(f"{place}-2")),
            )
        assert names(place) == before
        assert loaded(FsspecReader(f"{place}-2"))["step"] == 9
        assert len(data_names(f"{place}-2")) == 1

    def test_at_every_moment_a_reader_finds_one_whole_checkpoint(self, memory, monkeypatch):
        save(small_state(1.0), FsspecWriter(memory))
        seen = []

        def look(original):
            def call(self, *args, **kwargs):
                result = original(self, *args, **kwargs)
                if not seen or seen[-1] is not None:
                    seen.append(None)  # looking makes calls of its own
                    seen[-1:] = [
                        loaded(FsspecReader(memory))["step"],
                        loaded(stock_fsspec.FsspecReader(memory))["step"],
                    ]
                return result

            return call

        for method in ("put", "remove", "create"):
            monkeypatch.setattr(ObjectStore, method, look(getattr(ObjectStore, method)))
        save(small_state(2.0), FsspecWriter(memory, thread_count=2))
        assert set(seen) == {1, 2}
        assert seen == sorted(seen)


class Flaky(MemoryFileSystem):
    """A store of its own whose calls fail as told."""

    protocol = ("flaky", "memory")
    cachable = False

    def __init__(self, **options):
        super().__init__(**options)
        self.store, self.pseudo_dirs = {}, [""]
        self.failures = []
        self.calls = []

    def _meet(self, method, path):
        self.calls.append((method, path.rpartition("/")[2]))
        for failure in self.failures:
            if failure["method"] == method and path.endswith(failure["ending"]) and failure["times"]:
                failure["times"] -= 1
                raise failure["error"]

    def fail(self, method, ending, *, times=1, error=None):
        self.failures.append(
            {"method": method, "ending": ending, "times": times, "error": error or ConnectionError("reset")}
        )

    def _open(self, path, mode="rb", **options):
        self._meet(f"open {mode}", path)
        return super()._open(path, mode, **options)

    def pipe_file(self, path, value, **options):
        self._meet("pipe", path)
        super().pipe_file(path, value, **options)
        self._meet("pipe's answer", path)

    def cat_file(self, path, *args, **options):
        self._meet("cat", path)
        return super().cat_file(path, *args, **options)

    def rm_file(self, path):
        self._meet("rm", path)
        super()._rm(path)


@pytest.fixture
def flaky():
    """A store that fails as told, and what makes our store of it."""
    return Flaky()


def publication(fs, token="t", *, waits=None):
    sleep = (lambda _: None) if waits is None else waits.append
    store = ObjectStore("memory://run/step", fs, part_bytes=1 << 20, backoff=Backoff(attempts=3, sleep=sleep))
    return FreshNames(store, token, prefix="__0_"), store


def write(save_of, data=b"payload"):
    sink = save_of.create(save_of.file_name(0), expected_bytes=len(data))
    sink.write(data)
    sink.close()


class TestFailures:
    def test_in_passing_are_tried_again_with_growing_waits(self, flaky):
        waits = []
        one, store = publication(flaky, waits=waits)
        flaky.fail("open wb", "__0_0.t.distcp", times=2)
        write(one)
        assert store.size("__0_0.t.distcp") == 7
        assert len(waits) == 2
        assert 0.05 <= waits[0] <= 0.15
        assert 0.1 <= waits[1] <= 0.3

    def test_that_last_name_call_object_and_cause(self, flaky):
        one, _ = publication(flaky)
        flaky.fail("open wb", "distcp", times=3)
        with pytest.raises(ObjectStoreFailed, match=r"open memory://run/step/__0_0.t.distcp: .*reset \(3 attempts\)"):
            write(one)

    def test_that_will_not_pass_are_not_tried_again(self, flaky):
        one, _ = publication(flaky)
        flaky.fail("open wb", "distcp", error=PermissionError(errno.EACCES, "no"))
        with pytest.raises(ObjectStoreFailed, match="PermissionError"):
            write(one)
        assert flaky.calls == [("open wb", "__0_0.t.distcp")]

    def test_of_the_last_object_leave_what_was_there(self, flaky):
        first, store = publication(flaky, "one")
        write(first)
        first.publish((".metadata", b"old"), sidecar=b"old index", overwrite=True)
        second, _ = publication(flaky, "two")
        write(second)
        flaky.fail("pipe", ".metadata", times=3)
        with pytest.raises(ObjectStoreFailed):
            second.publish((".metadata", b"new"), sidecar=b"new index", overwrite=True)
        second.discard()
        assert store.list() == [".ckptd", ".metadata", "__0_0.one.distcp"]
        assert (store.read(".metadata"), store.read(".ckptd")) == (b"old", b"old index")

    def test_of_only_its_answer_are_none(self, flaky):
        one, store = publication(flaky)
        write(one)
        flaky.fail("pipe's answer", ".metadata", times=3)
        one.publish((".metadata", b"new"), sidecar=None, overwrite=True)
        assert store.read(".metadata") == b"new"

    def test_after_which_nobody_knows_leave_all_objects(self, flaky):
        one, store = publication(flaky)
        write(one)
        flaky.fail("pipe's answer", ".metadata", times=3)
        answers = iter([None])  # to the question what is to be replaced; the next one is not answered
        original = store.read

        def read(name):
            if name == ".metadata" and next(answers, "none") == "none":
                raise ObjectStoreFailed("get", store.url(name), "gone")
            return original(name)

        store.read = read
        with pytest.raises(ObjectStoreFailed, match="gone"):
            one.publish((".metadata", b"new"), sidecar=None, overwrite=True)
        one.discard()
        assert "__0_0.t.distcp" in store.list()

    def test_where_objects_do_not_appear_whole_the_last_one_gets_its_name_by_a_rename(self, flaky, monkeypatch):
        monkeypatch.setattr(Flaky, "protocol", "flaky")
        one, store = publication(flaky)
        write(one)
        one.publish((".metadata", b"new"), sidecar=None, overwrite=True)
        piped = [name for method, name in flaky.calls if method == "pipe"]
        assert piped
        assert all(name.endswith(".tmp") for name in piped)
        assert store.list() == [".metadata", "__0_0.t.distcp"]

    def test_to_remove_the_old_fail_no_save(self, flaky, caplog):
        caplog.set_level("WARNING")
        first, store = publication(flaky, "one")
        write(first)
        first.publish((".metadata", b"old"), sidecar=b"old index", overwrite=True)
        second, _ = publication(flaky, "two")
        flaky.fail("rm", ".ckptd", times=3)
        second.publish((".metadata", b"new"), sidecar=None, overwrite=True)
        assert store.read(".metadata") == b"new"
        assert "could not remove" in caplog.text

    def test_of_a_rank_take_its_objects_along(self, memory, monkeypatch):
        original = FreshNames.create

        def create(self, name, *, expected_bytes):
            if name.startswith("__1_1"):
                raise ObjectStoreFailed("put", name, "full")
            return original(self, name, expected_bytes=expected_bytes)

        monkeypatch.setattr(FreshNames, "create", create)
        states = [{f"w{rank}.{row}": torch.ones(9) for row in range(3)} for rank in range(2)]
        with pytest.raises(ObjectStoreFailed, match="full"):
            play_ranks(states, FsspecWriter(memory, single_file_per_rank=False))
        assert names(memory) == []

    def test_short_uploads_are_found(self, flaky, monkeypatch):
        one, store = publication(flaky)
        monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.size", property(lambda file: 3))
        with pytest.raises(WrongUpload, match="sent 7 bytes, the store has 3 bytes"):
            write(one)
        monkeypatch.undo()
        with pytest.raises(MissingFile):
            one.check_files({"__0_9.t.distcp": 7})
        with pytest.raises(WrongUpload, match="8 bytes"):
            one.check_files({"__0_0.t.distcp": 8})
        assert store.size("nothing") is None


class TestDamage:
    def flip(self, place, name, at):
        fs, path = fsspec.core.url_to_fs(place)
        data = bytearray(fs.cat_file(f"{path}/{name}"))
        data[at] ^= 1
        fs.pipe_file(f"{path}/{name}", bytes(data))

    def test_a_wrong_bit_is_named(self, place):
        metadata = save(small_state(), FsspecWriter(place))
        where = next(where for key, where in metadata.storage_data.items() if key.fqn == "model.w")
        self.flip(place, where.relative_path, where.offset + where.length // 2)
        with pytest.raises(CheckpointException, match=r"model\.w"):
            loaded(FsspecReader(place))

    @pytest.mark.parametrize(("harm", "error"), [("cut", TruncatedFile), ("gone", MissingFile)])
    def test_a_missing_or_short_object_is_named(self, place, harm, error):
        save(small_state(), FsspecWriter(place))
        fs, path = fsspec.core.url_to_fs(place)
        [name] = data_names(place)
        if harm == "cut":
            fs.pipe_file(f"{path}/{name}", fs.cat_file(f"{path}/{name}")[:100])
        else:
            fs.rm_file(f"{path}/{name}")
        with pytest.raises(CheckpointException) as caught:
            loaded(FsspecReader(place))
        assert error.__name__ in str(caught.value) or name in str(caught.value)

    def test_a_wrong_bit_in_the_metadata_is_found(self, place):
        save(small_state(), FsspecWriter(place))
        fs, path = fsspec.core.url_to_fs(place)
        at = fs.cat_file(f"{path}/.metadata").index(b"__0_0") + 3
        self.flip(place, ".metadata", at)
        with pytest.raises(WrongBits, match="metadata"):
            FsspecReader(place).read_metadata()


def test_several_ranks_in_one_process(place):
    states = [{f"w{rank}": torch.full((9,), float(rank)), "both": torch.ones(4)} for rank in range(3)]
    play_ranks(states, [FsspecWriter(place) for _ in range(3)])
    found = {key: torch.zeros(9) for key in ("w0", "w1", "w2")} | {"both": torch.zeros(4)}
    load(found, FsspecReader(place))
    assert [found[f"w{rank}"][0].item() for rank in range(3)] == [0, 1, 2]


def test_ranks_that_save_apart(place):
    for number in (1.0, 2.0):
        save(small_state(number), FsspecWriter(place), use_collectives=False)
        assert same(loaded(stock_fsspec.FsspecReader(place)), small_state(number))
        assert same(loaded(FsspecReader(place)), small_state(number))
    assert len(names(place)) == 2
