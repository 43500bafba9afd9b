"""Checkpoints in an S3 store, which the test starts for itself: parts, failures, and what is left of them."""

from __future__ import annotations

import subprocess
import sys
import uuid

import pytest
import torch
from support.backends import load, loaded, play_ranks, same, save, small_state
from support.objectstore import KEYS, Bucket, Wire, s3_server
from torch.distributed.checkpoint import _fsspec_filesystem as stock_fsspec
from torch.distributed.checkpoint.api import CheckpointException

from ckptd.checkpoint.storage import object_store
from ckptd.checkpoint.storage.objects import FsspecReader, FsspecWriter
from ckptd.checkpoint.storage.retrying import Backoff
from ckptd.checkpoint.storage.select import reader_for, writer_for
from ckptd.protocol.errors import ObjectStoreFailed

# The least that S3 takes; smaller than ours, so that a test needs no gigabytes.
PART_BYTES = 5 << 20


@pytest.fixture(scope="module")
def server():
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(server, monkeypatch):
    """A bucket of the test's own; the environment leads to it and nowhere else."""
    import s3fs

    for name, value in {**KEYS, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(
        object_store.ObjectStore.__init__, "__kwdefaults__", {"part_bytes": PART_BYTES, "backoff": None}
    )
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    name = f"b-{uuid.uuid4().hex}"
    fs.call_s3("create_bucket", Bucket=name)
    yield Bucket(fs, name)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def wire(bucket, monkeypatch):
    """What stands between s3fs and the store."""
    return Wire(monkeypatch, type(bucket.fs))


@pytest.fixture
def no_waits(monkeypatch):
    """Failed calls are made again at once."""
    monkeypatch.setattr(object_store, "Backoff", lambda **options: Backoff(sleep=lambda _: None, **options))


def large(number=1.0):
    """A state of more than three parts."""
    return {"w": torch.arange(4_500_000.0) + number, "step": int(number)}


def blank_large():
    return {"w": torch.zeros(4_500_000), "step": 0}


class TestBothWays:
    def test_stock_and_ours_read_what_ours_writes(self, bucket):
        url = f"{bucket.url}/run//step-1"
        save(small_state(), FsspecWriter(url, thread_count=2))
        assert same(loaded(stock_fsspec.FsspecReader(url)), small_state())
        assert same(loaded(FsspecReader(url)), small_state())
        assert all(key.startswith("run//step-1/") for key in bucket.objects())

    def test_ours_reads_what_stock_writes(self, bucket):
        url = f"{bucket.url}/run//step-1"
        save(small_state(), stock_fsspec.FsspecWriter(url))
        assert same(loaded(FsspecReader(url)), small_state())

    def test_the_id_chooses_the_back_end(self, bucket):
        url = f"{bucket.url}/a"
        save(small_state(), writer_for(url, _extensions=["stream.zstd"]))
        assert same(loaded(reader_for(url)), small_state())

    def test_options_of_the_store_are_arguments_as_stocks_are(self, bucket, server, monkeypatch):
        for name in ("AWS_ENDPOINT_URL", *KEYS):
            monkeypatch.delenv(name)
        options = {"key": "k", "secret": "s", "endpoint_url": server}
        url = f"{bucket.url}/a"
        save(small_state(), FsspecWriter(url, **options))
        assert same(loaded(FsspecReader(url, **options)), small_state())
        assert same(loaded(stock_fsspec.FsspecReader(url, **options)), small_state())

    def test_a_misspelt_option_of_the_store_is_refused(self, bucket):
        with pytest.raises(TypeError, match=r"secrt.*'secret'"):
            FsspecReader(f"{bucket.url}/a", secrt="x")

    def test_a_bucket_that_is_not_there_is_named_and_not_made(self, bucket, no_waits):
        with pytest.raises(CheckpointException, match="no-such-bucket"):
            save(small_state(), FsspecWriter("s3://no-such-bucket/a"))
        with pytest.raises(FileNotFoundError):
            bucket.fs.call_s3("head_bucket", Bucket="no-such-bucket")


class TestParts:
    def test_a_large_object_travels_in_parts_several_at_a_time(self, bucket, wire):
        import threading

        together = threading.Barrier(2, timeout=30)

        def meet(method, fields):
            if method == "upload_part" and fields["PartNumber"] <= 2:
                together.wait()  # unless two parts are on their way at a time, this breaks

        wire.before(meet)
        save(large(), FsspecWriter(f"{bucket.url}/a"))
        [key] = [key for key in bucket.objects() if key.endswith(".distcp")]
        assert bucket.etag(key).endswith("-4")
        assert wire.most_at_a_time["upload_part"] >= 2
        assert bucket.uploads() == []
        for reader in (FsspecReader, stock_fsspec.FsspecReader):
            assert torch.equal(load(blank_large(), reader(f"{bucket.url}/a"))["w"], large()["w"])

    def test_a_part_that_fails_in_passing_is_sent_again(self, bucket, wire, no_waits):
        wire.fail("upload_part", times=2)
        save(large(), FsspecWriter(f"{bucket.url}/a"))
        assert wire.count("upload_part") == 6
        assert torch.equal(load(blank_large(), FsspecReader(f"{bucket.url}/a"))["w"], large()["w"])

    @pytest.mark.parametrize("method", ["create_multipart_upload", "upload_part", "complete_multipart_upload"])
    def test_an_upload_that_fails_is_aborted_and_leaves_nothing(self, bucket, wire, no_waits, method):
        wire.fail(method, times=100)
        with pytest.raises(CheckpointException, match="the store is busy"):
            save(large(), FsspecWriter(f"{bucket.url}/a"))
        assert bucket.uploads() == []
        assert bucket.objects() == []

    def test_a_part_that_arrives_changed_is_found(self, bucket, wire):
        def change(method, fields):
            if method == "upload_part" and fields["PartNumber"] == 2:
                fields["Body"] = bytes(len(fields["Body"]))

        wire.before(change)
        with pytest.raises(CheckpointException, match="MD5"):
            save(large(), FsspecWriter(f"{bucket.url}/a"))
        assert bucket.uploads() == []
        assert bucket.objects() == []

    def test_an_answer_that_was_lost_is_no_failure(self, bucket, wire, monkeypatch, no_waits):
        lost = []

        def complete_twice(method, fields):
            if method == "complete_multipart_upload" and not lost:
                lost.append(True)
                bucket.fs.call_s3(method, **fields)
                raise ConnectionError("reset")

        wire.before(complete_twice)
        save(large(), FsspecWriter(f"{bucket.url}/a"))
        assert lost
        assert torch.equal(load(blank_large(), FsspecReader(f"{bucket.url}/a"))["w"], large()["w"])

    def test_small_objects_are_put_at_once(self, bucket, wire):
        save(small_state(), FsspecWriter(f"{bucket.url}/a", single_file_per_rank=False, thread_count=4))
        assert wire.count("create_multipart_upload") == 0
        assert len(bucket.objects()) == 6


class TestPublishing:
    def test_metadata_is_the_last_object(self, bucket, wire):
        save(large(), FsspecWriter(f"{bucket.url}/a", thread_count=2))
        written = [key for method, key in wire.calls if method in {"put_object", "complete_multipart_upload"}]
        assert written[-1] == "a/.metadata"
        assert written.count("a/.metadata") == 1

    def test_a_failure_before_it_leaves_the_old_checkpoint(self, bucket, wire, no_waits):
        url = f"{bucket.url}/a"
        save(small_state(1.0), FsspecWriter(url))
        before = {key: bucket.etag(key) for key in bucket.objects()}
        wire.fail("put_object", times=100, ending=".metadata")
        with pytest.raises(CheckpointException):
            save(small_state(2.0), FsspecWriter(url))
        assert {key: bucket.etag(key) for key in bucket.objects()} == before
        assert same(loaded(stock_fsspec.FsspecReader(url)), small_state(1.0))

    def test_an_overwrite_takes_new_names_and_removes_the_old_objects(self, bucket, wire):
        url = f"{bucket.url}/a"
        save(small_state(1.0), FsspecWriter(url, thread_count=2))
        old = {key for key in bucket.objects() if key.endswith(".distcp")}
        wire.calls.clear()
        save(small_state(2.0), FsspecWriter(url))
        order = [(method, key) for method, key in wire.calls if method in {"put_object", "delete_object"}]
        assert {key for method, key in order if method == "delete_object"} <= old
        assert not old & set(bucket.objects())
        assert same(loaded(stock_fsspec.FsspecReader(url)), small_state(2.0))

    def test_a_writer_that_dies_publishes_nothing(self, bucket, tmp_path):
        url = f"{bucket.url}/a"
        save(small_state(1.0), FsspecWriter(url))
        script = tmp_path / "dies.py"
        script.write_text(DIES)
        done = subprocess.run(
            [sys.executable, str(script), url], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 7, done.stderr
        assert same(loaded(FsspecReader(url)), small_state(1.0))
        assert same(loaded(stock_fsspec.FsspecReader(url)), small_state(1.0))
        assert len(bucket.objects()) == 4
        save(small_state(2.0), FsspecWriter(url))
        assert same(loaded(FsspecReader(url)), small_state(2.0))
        assert len(bucket.objects()) == 3  # what the dead one left went with the old checkpoint

    def test_all_ranks_of_one_process(self, bucket):
        url = f"{bucket.url}/a"
        states = [{f"w{rank}": torch.full((9,), float(rank))} for rank in range(3)]
        play_ranks(states, [FsspecWriter(url) for _ in range(3)])
        found = load({f"w{rank}": torch.zeros(9) for rank in range(3)}, stock_fsspec.FsspecReader(url))
        assert [found[f"w{rank}"][0].item() for rank in range(3)] == [0, 1, 2]

    def test_an_object_that_vanished_before_the_end_is_noticed(self, bucket):
        url = f"{bucket.url}/a"

        def remove(rank):
            if rank == 1:
                [key] = [key for key in bucket.objects() if "__0_" in key]
                bucket.fs.call_s3("delete_object", Bucket=bucket.name, Key=key)

        with pytest.raises(Exception, match=r"__0_0.* is missing"):
            play_ranks([{"a": torch.ones(3)}, {"b": torch.ones(3)}], FsspecWriter(url), before_writing=remove)
        assert bucket.objects() == []


class TestReading:
    def test_a_wrong_bit_is_named(self, bucket):
        url = f"{bucket.url}/a"
        metadata = save(small_state(), FsspecWriter(url))
        where = next(where for key, where in metadata.storage_data.items() if key.fqn == "model.w")
        path = f"{url}/{where.relative_path}"
        data = bytearray(bucket.fs.cat_file(path))
        data[where.offset + where.length // 2] ^= 1
        bucket.fs.pipe_file(path, bytes(data))
        with pytest.raises(CheckpointException, match=r"model\.w"):
            loaded(FsspecReader(url))

    def test_stocks_own_reader_is_turned_into_ours(self, bucket):
        from ckptd.checkpoint.storage.select import as_ours

        url = f"{bucket.url}/a"
        save(small_state(), as_ours(stock_fsspec.FsspecWriter(url, thread_count=2)))
        assert same(loaded(as_ours(stock_fsspec.FsspecReader(url))), small_state())


def test_errors_are_of_our_tree(bucket, wire, no_waits):
    wire.fail("put_object", times=100)
    with pytest.raises(ObjectStoreFailed, match=r"put s3://.*__0_0.*OSError: the store is busy \(5 attempts\)"):
        play_ranks([{"a": torch.ones(3)}], FsspecWriter(f"{bucket.url}/a"))
    assert bucket.objects() == []


# A process that ends, as by SIGKILL, between its data and its metadata.
DIES = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed.checkpoint as stock
from ckptd.checkpoint.storage.fresh_names import FreshNames
from ckptd.checkpoint.storage.objects import FsspecWriter

FreshNames._put_last = lambda *_: os._exit(7)
stock.save({"model": {"w": torch.ones(60, 100), "b": torch.ones(7)}}, storage_writer=FsspecWriter(sys.argv[1]))
"""
