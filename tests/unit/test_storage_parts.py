"""The small parts of the storage back-ends: how items are dealt out, copied, retried and written."""

from __future__ import annotations

import errno
import fcntl
import io
import os

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import _create_write_item_for_tensor

from ckptd.checkpoint.storage import posix_sink
from ckptd.checkpoint.storage.copy_ahead import resolved_objects, resolved_tensors
from ckptd.checkpoint.storage.distribute import chunk_bytes, distribute
from ckptd.checkpoint.storage.options import SerializationFormat, WriterOptions
from ckptd.checkpoint.storage.posix_sink import PosixSink
from ckptd.checkpoint.storage.retrying import Backoff, is_transient
from ckptd.checkpoint.storage.sink import RawStream, RecordStream
from ckptd.protocol.errors import ObjectStoreFailed, SaveAborted, SystemCallFailed, Unsupported


def tensor_item(name, elements=1):
    return _create_write_item_for_tensor(name, torch.zeros(elements))


def object_item(name):
    return WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)


def options(**changes):
    given = {
        "single_file_per_rank": True,
        "sync_files": True,
        "thread_count": 1,
        "copy_ahead_bytes": 0,
        "extensions": (),
        "serialization_format": SerializationFormat.TORCH_SAVE,
    }
    return WriterOptions(**{**given, **changes})


def names(buckets):
    return [[item.index.fqn for item in bucket] for bucket in buckets]


class TestDistribution:
    def test_one_thread_writes_one_file_in_the_planners_order(self):
        items = [tensor_item("b", 3), tensor_item("a", 9), object_item("o")]
        assert names(distribute(items, options())) == [["o", "b", "a"]]

    def test_threads_get_about_the_same_bytes(self):
        items = [tensor_item(f"w{n}", n) for n in (100, 60, 50, 40, 30, 20)]
        buckets = distribute(items, options(thread_count=3))
        assert sorted(sum(map(chunk_bytes, bucket)) for bucket in buckets) == [360, 400, 440]

    def test_objects_are_dealt_out_in_turn(self):
        items = [object_item(f"o{n}") for n in range(4)]
        assert names(distribute(items, options(thread_count=2))) == [["o0", "o2"], ["o1", "o3"]]

    def test_no_file_is_empty(self):
        assert names(distribute([tensor_item("a")], options(thread_count=8))) == [["a"]]
        assert distribute([], options(thread_count=8)) == []

    def test_an_item_may_have_a_file_of_its_own(self):
        items = [tensor_item("a"), object_item("o")]
        assert names(distribute(items, options(single_file_per_rank=False))) == [["a"], ["o"]]


class Planner:
    """Resolves items by name, and notes when."""

    def __init__(self, values):
        self.values, self.resolved = values, []

    def resolve_data(self, item):
        self.resolved.append(item.index.fqn)
        return self.values[item.index.fqn]


class TestResolving:
    def test_is_done_one_by_one(self):
        planner = Planner({"a": torch.ones(2), "b": torch.ones(3)})
        stream = resolved_tensors([tensor_item("a"), tensor_item("b")], planner, ahead_bytes=1000)
        next(stream)
        assert planner.resolved == ["a"]

    def test_what_needs_a_gradient_is_given_without(self):
        planner = Planner({"a": torch.ones(2, requires_grad=True)})
        [(_, tensor)] = resolved_tensors([tensor_item("a")], planner, ahead_bytes=0)
        assert not tensor.requires_grad

    def test_a_planner_that_mixes_tensors_and_objects_up_is_named(self):
        planner = Planner({"a": io.BytesIO(), "o": torch.ones(1)})
        with pytest.raises(Unsupported, match="a: a BytesIO for a tensor"):
            list(resolved_tensors([tensor_item("a")], planner, ahead_bytes=0))
        with pytest.raises(Unsupported, match="o: a Tensor for an object"):
            list(resolved_objects([object_item("o")], planner))

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("ahead", [0, 100, 10_000_000])
    def test_tensors_of_a_gpu_come_in_order_and_whole(self, ahead):
        values = {f"w{n}": torch.full((n + 1,), float(n), device="cuda" if n % 3 else "cpu") for n in range(40)}
        found = resolved_tensors([tensor_item(name) for name in values], Planner(values), ahead_bytes=ahead)
        for (item, tensor), (name, value) in zip(found, values.items(), strict=True):
            assert item.index.fqn == name
            assert torch.equal(tensor, value.cpu())


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("sizes", [[], [1], [4096], [4095, 2], [5000, 4096 * 3, 7], [100_000] * 5])
def test_a_file_holds_what_was_written(tmp_path, monkeypatch, sync, sizes):
    monkeypatch.setattr(posix_sink, "_BUFFER_BYTES", 16384)
    sink = PosixSink(str(tmp_path / "f"), sync=sync)
    data = [os.urandom(size) for size in sizes]
    for part in data:
        sink.write(part)
    sink.close()
    assert (tmp_path / "f").read_bytes() == b"".join(data)


class TestPosixSink:
    def test_goes_on_buffered_where_a_write_refuses_to_be_direct(self, tmp_path, monkeypatch):
        original, refused = os.pwrite, []

        def pwrite(descriptor, data, offset):
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                refused.append(offset)
                raise OSError(errno.EINVAL, "no")
            return original(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)
        sink = PosixSink(str(tmp_path / "f"), sync=True)
        sink.write(b"a" * 10_000)
        sink.close()
        assert len(refused) <= 1
        assert (tmp_path / "f").read_bytes() == b"a" * 10_000

    def test_short_writes_are_continued(self, tmp_path, monkeypatch):
        original = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: original(fd, data[: max(1, len(data) // 3)], offset))
        sink = PosixSink(str(tmp_path / "f"), sync=False)
        sink.write(bytes(range(256)) * 10)
        sink.close()
        assert (tmp_path / "f").read_bytes() == bytes(range(256)) * 10

    def test_a_full_disk_is_told_with_its_path(self, tmp_path, monkeypatch):
        def pwrite(*_):
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(os, "pwrite", pwrite)
        sink = PosixSink(str(tmp_path / "f"), sync=True)
        sink.write(b"abc")
        with pytest.raises(SystemCallFailed, match="f: No space left on device"):
            sink.close()
        sink.abort()
        assert os.listdir(tmp_path) == []

    def test_room_is_reserved_before_anything_is_written(self, tmp_path, monkeypatch):
        def preallocate(descriptor, nbytes, path):
            raise SystemCallFailed("fallocate", path, errno.ENOSPC if nbytes > 1000 else errno.EIO)

        monkeypatch.setattr(posix_sink, "preallocate", preallocate)
        with pytest.raises(SystemCallFailed, match=r"fallocate .*f: No space left on device"):
            PosixSink(str(tmp_path / "f"), sync=True, expected_bytes=2000)
        assert os.listdir(tmp_path) == []

    def test_what_was_reserved_in_vain_is_given_back(self, tmp_path):
        sink = PosixSink(str(tmp_path / "f"), sync=True, expected_bytes=1 << 20)
        sink.write(b"abc")
        sink.close()
        assert (tmp_path / "f").read_bytes() == b"abc"

    def test_an_existing_file_is_never_written_into(self, tmp_path):
        (tmp_path / "f").write_bytes(b"old")
        with pytest.raises(SystemCallFailed, match="File exists"):
            PosixSink(str(tmp_path / "f"), sync=True)

    def test_a_directory_that_is_gone_means_that_the_save_is(self, tmp_path):
        with pytest.raises(SaveAborted):
            PosixSink(str(tmp_path / "gone" / "f"), sync=True)


class TestBackoff:
    def test_hands_answers_on(self):
        def missing():
            raise FileNotFoundError("no")

        with pytest.raises(FileNotFoundError):
            Backoff(sleep=pytest.fail).call("get", "s3://a", missing)

    def test_gives_up_after_its_attempts(self):
        waits, calls = [], []

        def fail():
            calls.append(1)
            raise TimeoutError("slow")

        with pytest.raises(ObjectStoreFailed, match=r"get s3://a: TimeoutError: slow \(4 attempts\)"):
            Backoff(attempts=4, first_wait_s=1.0, sleep=waits.append).call("get", "s3://a", fail)
        assert len(calls) == 4
        assert [0.5 * 2**n <= wait <= 1.5 * 2**n for n, wait in enumerate(waits)] == [True] * 3

    @pytest.mark.parametrize(
        ("error", "transient"),
        [
            (ConnectionResetError(), True),
            (OSError(errno.EIO, "x"), True),
            (RuntimeError("a library's own"), True),
            (OSError(errno.ENOSPC, "x"), False),
            (PermissionError(errno.EACCES, "x"), False),
            (TypeError("x"), False),
        ],
    )
    def test_knows_what_passes(self, error, transient):
        assert is_transient(error) is transient


class TestRecordStream:
    class Memory(io.BytesIO):
        def write(self, data):
            super().write(data)

    def test_pads_so_that_what_follows_the_prefix_is_aligned(self):
        sink = self.Memory()
        stream = RecordStream(sink)
        stream.frame(b"x" * 5)
        stream.pad(64, before=10)
        stream.frame(b"p" * 10)
        assert stream.offset == 64
        assert sink.getvalue() == b"x" * 5 + bytes(49) + b"p" * 10

    def test_takes_no_payload_into_the_frames_hash(self):
        one, other = RecordStream(self.Memory()), RecordStream(self.Memory())
        for stream, payload in ((one, b"abc"), (other, b"xyz")):
            stream.frame(b"head")
            stream.payload(payload)
            stream.frame(b"tail")
        assert one.frame_hash == other.frame_hash

    def test_is_not_closed_by_an_extension(self):
        written = []
        with RawStream(lambda data: written.append(bytes(data))) as raw:
            assert raw.write(torch.ones(2).numpy()) == 8
        assert len(written) == 1
