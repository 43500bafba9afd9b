"""An object store, or anything else that fsspec reaches, as a flat place for the files of one checkpoint.

Ids are strings: ``s3://bucket/a//b`` is not ``s3://bucket/a/b``, and no path class ever sees one.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Mapping
from typing import Any, Final

from ckptd.checkpoint.storage.folder_store import FolderStore
from ckptd.checkpoint.storage.fresh_names import Store
from ckptd.checkpoint.storage.retrying import Backoff
from ckptd.checkpoint.storage.s3_upload import S3Sink
from ckptd.checkpoint.storage.sink import Bytes, Sink
from ckptd.protocol.errors import Unsupported, WrongUpload

# One part of an upload, and one block of a stream: at 1 GB/s eight of them in flight hide 100 ms of latency.
PART_BYTES: Final = 16 << 20
# Options that fsspec itself takes, by its documentation of AbstractFileSystem.
_OPTIONS_OF_ALL: Final = {
    *("use_listings_cache", "listings_expiry_time", "max_paths", "skip_instance_cache"),
    *("asynchronous", "loop", "batch_size", "target_protocol", "target_options", "fo", "protocol"),
}
# Stores in which an object appears whole, or not at all, when it is put.
_ATOMIC: Final = {"s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "abfss", "oci", "oss", "memory"}


def open_file_system(url: str, options: Mapping[str, Any], *, caller: str) -> Any:
    """Return fsspec's file system for a URL.

    Args:
        url: The id.
        options: What goes to its constructor.
        caller: Named in errors.

    Raises:
        TypeError: An option that no constructor on the way knows: a misspelt one would have been swallowed.
        Unsupported: fsspec, or the package of the protocol, is not installed, or knows no such protocol.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise Unsupported(f"{url} without fsspec", "pip install ckptd[objects]") from None
    _check_options(url, options, caller)
    try:
        fs, _ = url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise Unsupported(f"{url} ({error})", "install what its protocol needs, or give another id") from None
    return fs


def _check_options(url: str, options: Mapping[str, Any], caller: str) -> None:
    from fsspec import get_filesystem_class

    protocols = [part.partition("://")[0] for part in url.split("::") if "://" in part or "::" in url] or ["file"]
    known = set(_OPTIONS_OF_ALL) | set(protocols)
    for protocol in protocols:
        try:
            kind = get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            raise Unsupported(f"{url} ({error})", "install what its protocol needs, or give another id") from None
        for each in kind.__mro__[:-1]:
            known |= set(inspect.signature(each.__init__).parameters)
    known -= {"self", "args", "kwargs", "storage_options"}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, {*known, *_WRITER_OPTIONS}, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}{hint}")


_WRITER_OPTIONS: Final = {
    *("single_file_per_rank", "sync_files", "thread_count", "per_thread_copy_ahead"),
    *("cache_staged_state_dict", "overwrite", "serialization_format"),
}


def store_for(url: str, fs: Any, *, sync: bool) -> Store:
    """Return the store of a checkpoint; a local directory is one of our own, which can make files durable."""
    from fsspec.implementations.local import LocalFileSystem

    if isinstance(fs, LocalFileSystem):
        return FolderStore(fs._strip_protocol(url), sync=sync)
    return ObjectStore(url, fs)


class ObjectStore:
    """The objects below one URL.

    Args:
        url: The checkpoint's id.
        fs: fsspec's file system for it.
        part_bytes: Size of an upload's part.
        backoff: How calls are made again.
    """

    def __init__(self, url: str, fs: Any, *, part_bytes: int = PART_BYTES, backoff: Backoff | None = None) -> None:
        self._root, self._fs, self._part_bytes = url, fs, part_bytes
        self._backoff = backoff or Backoff()

    def url(self, name: str) -> str:
        """Return an object's URL, by the rule of stock: one slash, unless the id ends with one."""
        return f"{self._root}{name}" if self._root.endswith("/") else f"{self._root}/{name}"

    def create(self, name: str, *, expected_bytes: int) -> Sink:
        """Begin an object."""
        url, part_bytes = self.url(name), self._part_bytes
        if _is_s3(self._fs):
            return S3Sink(self._fs, url, part_bytes=part_bytes, expected_bytes=expected_bytes, backoff=self._backoff)
        return StreamSink(self._fs, url, part_bytes=part_bytes, backoff=self._backoff)

    def put(self, name: str, data: bytes) -> None:
        """Make or replace an object. Raises ObjectStoreFailed, WrongUpload."""
        url = self.url(name)
        if _is_s3(self._fs):
            sink = S3Sink(self._fs, url, part_bytes=self._part_bytes, expected_bytes=len(data), backoff=self._backoff)
            try:
                sink.write(data)
                sink.close()
            except BaseException:
                sink.abort_upload()
                raise
            return
        if _protocols(self._fs) & _ATOMIC:
            self._backoff.call("put", url, lambda: self._fs.pipe_file(url, data))
        else:
            # A file of a remote file system is seen while it is written: it gets its name when it is whole.
            self._backoff.call("mkdir", self._root, lambda: self._fs.makedirs(self._root, exist_ok=True))
            temporary = self.url(f".{name}.{os.getpid()}.tmp")
            self._backoff.call("put", temporary, lambda: self._fs.pipe_file(temporary, data))
            self._backoff.call("rename", url, lambda: self._fs.mv(temporary, url))
        if (found := self.size(name)) != len(data):
            raise WrongUpload(url, f"{len(data)} bytes", f"{found} bytes")

    def read(self, name: str) -> bytes | None:
        """Return an object's bytes, or None. Raises ObjectStoreFailed."""
        url = self.url(name)
        try:
            return bytes(self._backoff.call("get", url, lambda: self._fs.cat_file(url)))
        except FileNotFoundError:
            return None

    def read_range(self, name: str, begin: int, end: int) -> bytes:
        """Return some of an object's bytes; fewer if it ends before. Raises FileNotFoundError, ObjectStoreFailed."""
        url = self.url(name)
        return bytes(self._backoff.call("get", url, lambda: self._fs.cat_file(url, start=begin, end=end)))

    def size(self, name: str) -> int | None:
        """Return an object's size in bytes, or None. Raises ObjectStoreFailed."""
        url = self.url(name)
        self._fs.invalidate_cache()
        try:
            return int(self._backoff.call("head", url, lambda: self._fs.info(url)["size"]))
        except FileNotFoundError:
            return None

    def list(self) -> list[str]:
        """Return the names of all objects. Raises ObjectStoreFailed."""
        self._fs.invalidate_cache()
        try:
            found = self._backoff.call("list", self._root, lambda: self._fs.ls(self.url(""), detail=False))
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)

    def remove(self, name: str) -> None:
        """Remove an object. Raises ObjectStoreFailed."""
        url = self.url(name)
        try:
            self._backoff.call("delete", url, lambda: self._fs.rm_file(url))
        except FileNotFoundError:
            return


class StreamSink:
    """A new file that fsspec writes block by block; it is compared by size when it is closed."""

    def __init__(self, fs: Any, url: str, *, part_bytes: int, backoff: Backoff) -> None:
        self._fs, self._url, self._backoff = fs, url, backoff
        self._sent_bytes = 0
        if not _protocols(fs) & _ATOMIC:
            parent = url.rpartition("/")[0]
            backoff.call("mkdir", parent, lambda: fs.makedirs(parent, exist_ok=True))
        self._file = backoff.call("open", url, lambda: fs.open(url, "wb", block_size=part_bytes))

    def write(self, data: Bytes) -> None:
        """Append bytes. Raises ObjectStoreFailed: a stream cannot be taken up again where it broke."""
        once = Backoff(attempts=1)
        once.call("write", self._url, lambda: self._file.write(data))
        self._sent_bytes += len(data)

    def close(self) -> None:
        """Finish the file and check its size. Raises ObjectStoreFailed, WrongUpload."""
        Backoff(attempts=1).call("close", self._url, self._file.close)
        self._fs.invalidate_cache()
        found = self._backoff.call("head", self._url, lambda: self._fs.info(self._url)["size"])
        if found != self._sent_bytes:
            raise WrongUpload(self._url, f"{self._sent_bytes} bytes", f"{found} bytes")

    def abort(self) -> None:
        """Discard what was sent, and remove the file if it is there already."""
        if not self._file.closed and hasattr(self._file, "discard"):
            self._backoff.call("discard", self._url, self._file.discard)
            self._file.closed = True  # closing it would send the rest and make the file appear
        try:
            self._backoff.call("delete", self._url, lambda: self._fs.rm_file(self._url))
        except FileNotFoundError:
            return


def _is_s3(fs: Any) -> bool:
    return bool(_protocols(fs) & {"s3", "s3a"}) and hasattr(fs, "call_s3")


def _protocols(fs: Any) -> set[str]:
    protocol = fs.protocol
    return {protocol} if isinstance(protocol, str) else set(protocol)
