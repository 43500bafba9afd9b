"""Which back-end an id means, and stock's storage objects turned into ours."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch.distributed.checkpoint as stock
from support.backends import loaded, same, save, small_state
from torch.distributed.checkpoint import _fsspec_filesystem as stock_fsspec
from torch.distributed.checkpoint._extension import ExtensionRegistry as StockRegistry
from torch.distributed.checkpoint._extension import ZStandard as StockZStandard
from torch.distributed.checkpoint.filesystem import SerializationFormat

from ckptd.checkpoint.storage.filesystem import FileSystemReader, FileSystemWriter
from ckptd.checkpoint.storage.objects import FsspecReader, FsspecWriter
from ckptd.checkpoint.storage.select import as_ours, local_path, reader_for, writer_for
from ckptd.protocol.errors import Unsupported

OPTIONS = {
    "single_file_per_rank": False,
    "sync_files": False,
    "thread_count": 3,
    "per_thread_copy_ahead": 5,
    "cache_staged_state_dict": True,
    "overwrite": False,
    "serialization_format": SerializationFormat.SAFETENSORS,
}


@pytest.mark.parametrize(
    ("checkpoint_id", "path"),
    [
        ("/a/b", "/a/b"),
        ("a/b", "a/b"),
        (Path("/a//b"), "/a/b"),
        ("file:///a/b", "/a/b"),
        ("local:///a/b", "/a/b"),
        ("s3://bucket/a//b", None),
        ("memory://a", None),
        ("simplecache::file:///a", None),
    ],
)
def test_an_id_is_a_path_or_the_url_of_a_store(checkpoint_id, path):
    assert local_path(checkpoint_id) == path


def test_paths_go_to_the_file_system_and_urls_to_stores(tmp_path):
    assert type(writer_for(tmp_path)) is type(writer_for(f"file://{tmp_path}")) is FileSystemWriter
    assert type(reader_for(str(tmp_path))) is FileSystemReader
    assert type(writer_for("memory://a//b")) is FsspecWriter
    assert reader_for("memory://a//b").path == "memory://a//b"


def test_a_file_url_is_written_by_the_file_system_writer_and_read_by_stock(tmp_path):
    save(small_state(), writer_for(f"file://{tmp_path}/ckpt"))
    assert same(loaded(stock_fsspec.FsspecReader(f"file://{tmp_path}/ckpt")), small_state())
    assert same(loaded(reader_for(f"file://{tmp_path}/ckpt")), small_state())


def test_options_reach_the_back_end():
    assert writer_for("/a", thread_count=5).thread_count == 5
    with pytest.raises(TypeError, match="thred_count"):
        writer_for("/a", thred_count=5)
    with pytest.raises(TypeError, match="thred_count"):
        writer_for("memory://a", thred_count=5)


@pytest.mark.parametrize(
    ("theirs", "ours", "place"),
    [
        (stock.FileSystemWriter, FileSystemWriter, "/a/b"),
        (stock_fsspec.FsspecWriter, FsspecWriter, "memory://a//b"),
    ],
)
class TestStocksWriters:
    def test_keep_every_option(self, theirs, ours, place):
        given = theirs(place, **OPTIONS)
        found = as_ours(given)
        assert type(found) is ours
        assert str(found.path) == place
        for name in OPTIONS:
            assert getattr(found, name) == getattr(given, name)

    def test_keep_their_defaults(self, theirs, ours, place):
        for name in OPTIONS:
            assert getattr(as_ours(theirs(place)), name) == getattr(theirs(place), name)

    def test_keep_their_extensions(self, theirs, ours, place):
        extension = StockZStandard()
        assert as_ours(theirs(place, _extensions=[extension])).extensions == (extension,)

    def test_of_a_users_own_class_are_refused(self, theirs, ours, place):
        own = type("Own", (theirs,), {})
        with pytest.raises(Unsupported, match="Own"):
            as_ours(own(place))

    def test_of_ours_stay_what_they_are(self, theirs, ours, place):
        writer = ours(place)
        assert as_ours(writer) is writer

    def test_travel(self, theirs, ours, place):
        assert pickle.loads(pickle.dumps(as_ours(theirs(place)))).thread_count == 1


def test_stocks_readers_keep_their_registry(tmp_path):
    registry = StockRegistry()
    found = as_ours(stock.FileSystemReader(tmp_path, registry))
    assert type(found) is FileSystemReader
    assert found.extension_registry is registry
    assert found.path == tmp_path


def test_options_of_the_store_come_along():
    found = as_ours(stock_fsspec.FsspecReader("memory://a", global_store=False, skip_instance_cache=True))
    assert type(found) is FsspecReader
    assert found._fs.global_store is False


def test_what_is_no_storage_is_refused():
    with pytest.raises(Unsupported, match="str"):
        as_ours("/a/b")
    with pytest.raises(Unsupported, match="string or a path"):
        writer_for(b"/a/b")
