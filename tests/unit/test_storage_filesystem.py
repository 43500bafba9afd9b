"""Our file-system back-end under stock's `save` and `load`: every option, and both ways between ours and stock's."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from typing import ClassVar

import pytest
import torch
import torch.distributed.checkpoint as stock
from safetensors.torch import load_file
from support.backends import (
    blank_state,
    files_in,
    load,
    loaded,
    play_ranks,
    read_parts,
    same,
    save,
    sharded,
    small_state,
)
from support.states import assert_same, blank, everything
from torch.distributed.checkpoint._extension import ZStandard as StockZStandard
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageInfo

from ckptd.checkpoint.indexing.open import read_index
from ckptd.checkpoint.publishing import commit
from ckptd.checkpoint.storage.filesystem import FileSystemReader, FileSystemWriter
from ckptd.checkpoint.verify import verify_checkpoint
from ckptd.protocol.errors import CheckpointExists, UnknownCheckpoint, Unsupported

OPTIONS = {
    "defaults": {},
    "threads": {"thread_count": 3},
    "a file per item": {"single_file_per_rank": False},
    "a file per item, threads": {"single_file_per_rank": False, "thread_count": 4},
    "unsynced": {"sync_files": False},
    "no copy ahead": {"per_thread_copy_ahead": 0},
    "no overwriting": {"overwrite": False},
    "torch_save": {"serialization_format": SerializationFormat.TORCH_SAVE},
    "no extensions": {"_extensions": []},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class TestEveryOption:
    @every_option
    def test_stock_reads_what_ours_writes(self, options, tmp_path):
        save(small_state(), FileSystemWriter(tmp_path / "ckpt", **options))
        assert same(loaded(stock.FileSystemReader(tmp_path / "ckpt")), small_state())

    @every_option
    def test_ours_reads_what_ours_writes_and_can_verify_it(self, options, tmp_path):
        save(small_state(), FileSystemWriter(tmp_path / "ckpt", **options))
        assert same(loaded(FileSystemReader(tmp_path / "ckpt")), small_state())
        report = verify_checkpoint(str(tmp_path / "ckpt"))
        assert report.good
        assert report.hashes_checked

    @every_option
    def test_ours_reads_what_stock_writes(self, options, tmp_path):
        save(small_state(), stock.FileSystemWriter(tmp_path / "ckpt", **options))
        assert same(loaded(FileSystemReader(tmp_path / "ckpt")), small_state())

    @every_option
    def test_files_are_named_as_stock_names_them(self, options, tmp_path):
        save(small_state(), FileSystemWriter(tmp_path / "ours", **options))
        save(small_state(), stock.FileSystemWriter(tmp_path / "stock", **options))
        filled = {file.name for file in (tmp_path / "stock").iterdir() if file.stat().st_size}
        assert {*os.listdir(tmp_path / "ours")} == filled | {".ckptd"}  # a thread without work makes no file

    @every_option
    def test_the_metadata_says_what_stocks_says(self, options, tmp_path):
        ours = save(small_state(), FileSystemWriter(tmp_path / "ours", **options))
        theirs = save(small_state(), stock.FileSystemWriter(tmp_path / "stock", **options))
        assert ours.state_dict_metadata == theirs.state_dict_metadata
        assert ours.planner_data == theirs.planner_data
        assert ours.version == theirs.version
        assert {type(place) for place in ours.storage_data.values()} == {_StorageInfo}
        assert ours.storage_data.keys() == theirs.storage_data.keys()

    def test_threads_and_files_per_item(self, tmp_path):
        save(small_state(), FileSystemWriter(tmp_path / "a", thread_count=2))
        save(small_state(), FileSystemWriter(tmp_path / "b", single_file_per_rank=False, thread_count=2))
        assert len(list((tmp_path / "a").glob("__0_*.distcp"))) == 2
        assert len(list((tmp_path / "b").glob("__0_*.distcp"))) == 4


@pytest.mark.filterwarnings("ignore:.*ComplexHalf|.*deprecated")
class TestEveryKindOfValue:
    def test_from_ours_to_stock(self, tmp_path):
        save(everything(), FileSystemWriter(tmp_path / "ckpt", thread_count=2))
        assert_same(load(blank(everything()), stock.FileSystemReader(tmp_path / "ckpt")), everything())

    def test_from_ours_to_ours(self, tmp_path):
        save(everything(), FileSystemWriter(tmp_path / "ckpt"))
        assert_same(load(blank(everything()), FileSystemReader(tmp_path / "ckpt")), everything())

    def test_from_stock_to_ours(self, tmp_path):
        save(everything(), stock.FileSystemWriter(tmp_path / "ckpt"))
        assert_same(load(blank(everything()), FileSystemReader(tmp_path / "ckpt")), everything())

    def test_tensors_that_are_more_than_their_values_are_left_to_torch(self, tmp_path):
        quantized = torch.quantize_per_tensor(torch.arange(8.0), 0.5, 0, torch.qint8)
        save({"q": quantized, "w": torch.ones(3)}, FileSystemWriter(tmp_path / "ckpt"))
        blank_one = torch.quantize_per_tensor(torch.zeros(8), 0.5, 0, torch.qint8)
        for reader in (stock.FileSystemReader, FileSystemReader):
            found = load({"q": blank_one.clone(), "w": torch.zeros(3)}, reader(tmp_path / "ckpt"))
            assert torch.equal(found["q"].dequantize(), quantized.dequantize())


class TestRanks:
    @pytest.mark.parametrize("one_writer", [True, False])
    def test_one_process_plays_all_ranks(self, tmp_path, one_writer):
        states = [{f"w{rank}": torch.full((9,), float(rank)), "both": torch.ones(4)} for rank in range(3)]
        count = 1 if one_writer else 3
        writers = [FileSystemWriter(tmp_path / "ckpt") for _ in range(count)]
        play_ranks(states, writers[0] if one_writer else writers)
        found = {key: torch.zeros(9) for key in ("w0", "w1", "w2")} | {"both": torch.zeros(4)}
        load(found, stock.FileSystemReader(tmp_path / "ckpt"))
        assert [found[f"w{rank}"][0].item() for rank in range(3)] == [0, 1, 2]
        assert verify_checkpoint(str(tmp_path / "ckpt")).good
        assert os.listdir(tmp_path) == ["ckpt"]

    def test_writers_that_were_pickled_to_other_processes(self, tmp_path):
        writers = [pickle.loads(pickle.dumps(FileSystemWriter(tmp_path / "ckpt"))) for _ in range(2)]
        play_ranks([{"a": torch.ones(2)}, {"b": torch.ones(3)}], writers)
        assert verify_checkpoint(str(tmp_path / "ckpt")).items == 2

    def test_a_resharded_load(self, tmp_path):
        whole = torch.arange(48.0).reshape(6, 8)
        rows = [{"w": sharded(whole, [((0, 0), (4, 8))])}, {"w": sharded(whole, [((4, 0), (2, 8))])}]
        play_ranks(rows, FileSystemWriter(tmp_path / "ckpt"))
        columns = sharded(torch.zeros_like(whole), [((0, 5), (6, 3)), ((0, 0), (6, 5))])
        read_parts({"w": columns}, FileSystemReader(tmp_path / "ckpt"))
        assert torch.equal(columns._shards[0], whole[:, 5:])
        assert torch.equal(columns._shards[1], whole[:, :5])

    def test_ranks_that_save_apart(self, tmp_path):
        for rank in range(2):
            writer = FileSystemWriter(tmp_path / "ckpt")
            writer.set_up_storage_writer(True, rank=rank, use_collectives=False)
            planner = stock.DefaultSavePlanner()
            planner.set_up_planner({"w": torch.full((3,), float(rank))}, is_coordinator=True)
            plan = writer.prepare_local_plan(planner.create_local_plan())
            [plan], metadata = planner.create_global_plan([plan])
            [plan] = writer.prepare_global_plan([plan])
            results = writer.write_data(planner.finish_plan(plan), planner).value()
            writer.finish(metadata, [results])
        assert sorted(p.name for p in (tmp_path / "ckpt").glob("*.metadata")) == ["__0.metadata", "__1.metadata"]
        for kind in (stock.FileSystemReader, FileSystemReader):
            reader = kind(tmp_path / "ckpt")
            metadata = reader.read_metadata(rank=1)
            reader.set_up_storage_reader(metadata, True, rank=1, use_collectives=False)
            planner, found = stock.DefaultLoadPlanner(), {"w": torch.zeros(3)}
            planner.set_up_planner(found, metadata, True)
            reader.read_data(planner.create_local_plan(), planner).wait()
            assert found["w"].tolist() == [1, 1, 1]

    def test_stocks_own_function_with_ranks_that_save_apart(self, tmp_path):
        for number in (1.0, 2.0):
            save(small_state(number), FileSystemWriter(tmp_path / "ckpt"), use_collectives=False)
            assert same(loaded(stock.FileSystemReader(tmp_path / "ckpt")), small_state(number))
        assert len(list((tmp_path / "ckpt").iterdir())) == 2  # the first save's files went with it


class TestOverwriting:
    def test_a_second_save_replaces_the_first(self, tmp_path):
        writer = FileSystemWriter(tmp_path / "ckpt", thread_count=2)
        save(small_state(1.0), writer)
        save({"only": torch.ones(2)}, FileSystemWriter(tmp_path / "ckpt"))
        assert sorted(os.listdir(tmp_path / "ckpt")) == [".ckptd", ".metadata", "__0_0.distcp"]
        assert os.listdir(tmp_path) == ["ckpt"]

    def test_is_refused_if_asked_and_so_does_stock(self, tmp_path):
        save(small_state(1.0), FileSystemWriter(tmp_path / "ckpt"))
        before = files_in(tmp_path)
        for kind in (FileSystemWriter, stock.FileSystemWriter):
            with pytest.raises(CheckpointException, match="already exists"):
                save(small_state(2.0), kind(tmp_path / "ckpt", overwrite=False))
            with pytest.raises(RuntimeError, match="already exists"):
                kind(tmp_path / "ckpt", overwrite=False).prepare_local_plan(stock.SavePlan([]))
            assert files_in(tmp_path) == before

    def test_a_checkpoint_that_appears_while_we_write_is_not_overwritten(self, tmp_path):
        def another(rank):
            save(small_state(5.0), stock.FileSystemWriter(tmp_path / "ckpt"))

        with pytest.raises(CheckpointExists):
            play_ranks([small_state()], FileSystemWriter(tmp_path / "ckpt", overwrite=False), before_writing=another)
        assert loaded(FileSystemReader(tmp_path / "ckpt"))["step"] == 5
        assert os.listdir(tmp_path) == ["ckpt"]

    def test_nor_one_that_appears_between_our_look_and_our_rename(self, tmp_path, monkeypatch):
        save(small_state(5.0), FileSystemWriter(tmp_path / "ckpt"))
        before = files_in(tmp_path)
        answers = iter([False])  # as it was a moment ago
        original = commit.has_checkpoint
        monkeypatch.setattr(commit, "has_checkpoint", lambda path: next(answers, original(path)))
        writer = FileSystemWriter(tmp_path / "ckpt")
        with pytest.raises(CheckpointExists):
            play_ranks([small_state()], writer, before_writing=lambda _: setattr(writer, "overwrite", False))
        assert files_in(tmp_path) == before

    def test_an_empty_directory_is_no_checkpoint(self, tmp_path):
        (tmp_path / "ckpt").mkdir()
        (tmp_path / "ckpt" / "notes.txt").write_text("mine")
        save(small_state(), FileSystemWriter(tmp_path / "ckpt", overwrite=False))
        assert (tmp_path / "ckpt" / "notes.txt").read_text() == "mine"
        assert same(loaded(FileSystemReader(tmp_path / "ckpt")), small_state())

    def test_what_stock_saved_over_ours_is_what_is_read(self, tmp_path):
        save(small_state(1.0), FileSystemWriter(tmp_path / "ckpt"))
        save(small_state(2.0), stock.FileSystemWriter(tmp_path / "ckpt"))
        assert (tmp_path / "ckpt" / ".ckptd").exists()
        assert same(loaded(FileSystemReader(tmp_path / "ckpt")), small_state(2.0))

    def test_through_a_symbolic_link_the_target_is_replaced(self, tmp_path):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        save(small_state(3.0), FileSystemWriter(tmp_path / "link"))
        assert (tmp_path / "link").is_symlink()
        assert loaded(FileSystemReader(tmp_path / "real"))["step"] == 3


class TestAsyncSave:
    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
    @pytest.mark.parametrize("cached", [False, True])
    def test_the_writer_stages_for_stocks_async_save(self, tmp_path, cached):
        writer = FileSystemWriter(tmp_path / "0", cache_staged_state_dict=cached)
        state = small_state(4.0)
        for number in range(2):
            future = stock.async_save(state, checkpoint_id=tmp_path / str(number), storage_writer=writer, no_dist=True)
            future.result(30)
            assert same(loaded(stock.FileSystemReader(tmp_path / str(number))), small_state(4.0 + number))
            state["model"]["w"] += 1
            state["model"]["b"] += 1
            state |= {"step": 5, "names": ["a", ("b", 5.0)]}

    def test_a_cached_copy_is_reused_until_the_structure_changes(self, tmp_path):
        writer = FileSystemWriter(tmp_path, cache_staged_state_dict=True)
        first = writer.stage({"w": torch.ones(3)})["w"]
        again = writer.stage({"w": torch.full((3,), 2.0)})["w"]
        other = writer.stage({"w": torch.ones(4), "v": torch.ones(1)})
        assert again.data_ptr() == first.data_ptr()
        assert again.tolist() == [2, 2, 2]
        assert other["w"].shape == (4,)

    def test_without_a_cache_every_copy_is_new(self, tmp_path):
        writer = FileSystemWriter(tmp_path)
        state = {"w": torch.ones(3)}
        assert writer.stage(state)["w"].data_ptr() != writer.stage(state)["w"].data_ptr()


class TestPlanCaching:
    def test_a_planner_that_keeps_plans_does_not_write_into_the_last_save(self, tmp_path):
        cached = {"enable_plan_caching": True}
        for number in range(3):
            for folder in ("same", f"own-{number}"):
                state = small_state(float(number))
                save(state, FileSystemWriter(tmp_path / folder), planner=stock.DefaultSavePlanner(**cached))
                assert same(loaded(stock.FileSystemReader(tmp_path / folder)), small_state(float(number)))
        assert sorted(os.listdir(tmp_path)) == ["own-0", "own-1", "own-2", "same"]

    @pytest.fixture(autouse=True)
    def forget(self):
        yield
        planner = stock.DefaultSavePlanner
        for cache in ("_cached_save_plan", "_cached_final_save_plan", "_cached_all_plans", "_cached_global_plan"):
            getattr(planner, cache).clear()
        planner._cached_metadata.clear()


class TestSafetensors:
    OPTIONS: ClassVar = {"serialization_format": SerializationFormat.SAFETENSORS}

    def test_files_say_what_stocks_say(self, tmp_path):
        from safetensors import safe_open

        state = {"w": torch.arange(6.0).reshape(2, 3), "i": torch.arange(3), "h": torch.ones(5, dtype=torch.bfloat16)}
        found = {}
        for kind in (FileSystemWriter, stock.FileSystemWriter):
            save(state, kind(tmp_path / kind.__module__, **self.OPTIONS))
            with safe_open(tmp_path / kind.__module__ / "__0_0.distcp", framework="pt") as file:
                metadata = {
                    key: json.loads(value) if value[0] == "{" else value for key, value in file.metadata().items()
                }
                found[kind] = (metadata, {key: file.get_tensor(key).tolist() for key in file.keys()})  # noqa: SIM118
        assert found[FileSystemWriter] == found[stock.FileSystemWriter]

    def test_stocks_hugging_face_reader_puts_shards_together(self, tmp_path):
        whole = torch.arange(48.0).reshape(6, 8)
        halves = [{"w": sharded(whole, [((0, 0), (4, 8))])}, {"w": sharded(whole, [((4, 0), (2, 8))])}]
        play_ranks(halves, FileSystemWriter(tmp_path / "ckpt", **self.OPTIONS))
        (tmp_path / "hf").mkdir()
        for file in (tmp_path / "ckpt").glob("*.distcp"):
            shutil.copy(file, tmp_path / "hf" / f"{file.stem}.safetensors")
        found = {"w": torch.zeros(6, 8)}
        load(found, stock.HuggingFaceStorageReader(str(tmp_path / "hf")))
        assert torch.equal(found["w"], whole)

    def test_ours_reads_and_verifies_them_objects_included(self, tmp_path):
        save(small_state(), FileSystemWriter(tmp_path / "ckpt", thread_count=2, **self.OPTIONS))
        assert same(loaded(FileSystemReader(tmp_path / "ckpt")), small_state())
        assert verify_checkpoint(str(tmp_path / "ckpt")).good

    def test_several_chunks_of_one_tensor_lose_none(self, tmp_path):
        whole = torch.arange(24.0).reshape(6, 4)
        chunks = [((0, 0), (2, 4)), ((2, 0), (2, 4)), ((4, 0), (2, 4))]
        play_ranks([{"w": sharded(whole, chunks)}], FileSystemWriter(tmp_path / "ckpt", **self.OPTIONS))
        found = read_parts({"w": torch.zeros(6, 4)}, FileSystemReader(tmp_path / "ckpt"))
        assert torch.equal(found["w"], whole)
        files = (tmp_path / "ckpt").glob("*.distcp")
        assert sorted(load_file(file)["w"][0, 0].item() for file in files) == [0, 8, 16]

    def test_with_extensions_is_refused(self, tmp_path):
        with pytest.raises(Unsupported, match="safetensors"):
            FileSystemWriter(tmp_path, _extensions=[StockZStandard()], **self.OPTIONS)


class TestArguments:
    def test_an_unknown_option_is_a_type_error(self, tmp_path):
        for kind in (FileSystemWriter, stock.FileSystemWriter):
            with pytest.raises(TypeError, match="thred_count"):
                kind(tmp_path, thred_count=8)

    @pytest.mark.parametrize("options", [{"thread_count": 0}, {"per_thread_copy_ahead": -1}])
    def test_numbers_that_cannot_be_meant_are_refused(self, options, tmp_path):
        with pytest.raises(Unsupported):
            FileSystemWriter(tmp_path, **options)

    def test_urls_are_no_paths(self):
        assert not FileSystemWriter.validate_checkpoint_id("s3://bucket/a")
        assert not FileSystemReader.validate_checkpoint_id("memory://a")
        with pytest.raises(Unsupported, match="FsspecWriter"):
            FileSystemWriter("s3://bucket/a")

    def test_ids_that_are_good_for_stock_are_good_for_ours(self, tmp_path):
        for good in (tmp_path / "a" / "b", str(tmp_path / "a"), "relative"):
            assert FileSystemWriter.validate_checkpoint_id(good) == stock.FileSystemWriter.validate_checkpoint_id(good)
            assert FileSystemReader.validate_checkpoint_id(good)

    def test_a_relative_path_means_the_same_as_for_stock(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save(small_state(), FileSystemWriter("relative/ckpt"))
        assert same(loaded(stock.FileSystemReader(tmp_path / "relative" / "ckpt")), small_state())

    def test_what_is_not_there_is_an_error(self, tmp_path):
        with pytest.raises(UnknownCheckpoint):
            FileSystemReader(tmp_path / "nothing").read_metadata()
        with pytest.raises(CheckpointException):
            load(blank_state(), FileSystemReader(tmp_path / "nothing"))

    def test_reset_leads_both_elsewhere(self, tmp_path):
        writer, reader = FileSystemWriter(tmp_path / "a"), FileSystemReader(tmp_path / "a")
        save(small_state(7.0), writer, checkpoint_id=tmp_path / "b")
        assert load(blank_state(), reader, checkpoint_id=tmp_path / "b")["step"] == 7
        assert os.listdir(tmp_path) == ["b"]


def test_payloads_lie_where_they_can_be_read_directly(tmp_path):
    save({"large": torch.ones(5000), "small": torch.ones(3)}, FileSystemWriter(tmp_path / "ckpt"))
    index = read_index(str(tmp_path / "ckpt"))
    places = dict(zip((index.names[row] for row in index.item_name), index.data_offset.tolist(), strict=True))
    assert places["large"] % 4096 == 0
    assert places["small"] % 64 == 0
