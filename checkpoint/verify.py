"""Reads a whole checkpoint and compares it with its index. Imports no torch and changes nothing.

Invariant: a fault is a result, not an end: whatever is wrong with one read, all others are still made.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import xxhash

from ckptd.checkpoint.folder.locks import reading
from ckptd.checkpoint.image.frame import METADATA_HASH, frame_hash, frame_hashes, frame_ranges
from ckptd.checkpoint.indexing.columns import Index, Int64
from ckptd.checkpoint.indexing.open import is_metadata_of, read_index
from ckptd.checkpoint.names import METADATA_NAME
from ckptd.checkpoint.reading.blocks import BLOCK_BYTES
from ckptd.checkpoint.reading.files import DiskFile
from ckptd.checkpoint.reading.read import huge_buffer
from ckptd.checkpoint.stock.records import WrongRecord, check_record
from ckptd.checkpoint.system import named
from ckptd.protocol.errors import CkptdError, MissingFile, SystemCallFailed, TruncatedFile, WrongBits

# One read: large enough that its costs vanish beside its bytes. Smaller items are read together.
READ_BYTES: Final = 8 << 20
# Who hashes has nothing in the disk's queue; see READERS in ckptd.checkpoint.reading.read.
THREADS: Final = 8


@dataclass(frozen=True)
class VerifyReport:
    """What was found.

    Attributes:
        path: The checkpoint's directory.
        items: Number of tensor chunks and objects in the index.
        bytes: Their size in bytes, as the index says.
        hashes_checked: Whether payloads were held against our hashes; a stock checkpoint has none.
        faults: MissingFile, TruncatedFile, WrongBits or SystemCallFailed, by file and offset.
        crcs_checked: Of a stock checkpoint, how many parts of records were held against their CRC; torch writes one
            for each unless it was told not to.
    """

    path: str
    items: int
    bytes: int
    hashes_checked: bool
    faults: tuple[CkptdError, ...]
    crcs_checked: int = 0

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


def verify_checkpoint(
    path: str,
    *,
    threads: int = THREADS,
    progress: Callable[[int, int], None] | None = None,
    share: tuple[int, int] = (0, 1),
) -> VerifyReport:
    """Check that the checkpoint in a directory is what was saved. It is not removed by retention meanwhile.

    Args:
        path: The directory.
        threads: How many read and hash at a time; each holds a buffer of 8 MiB.
        progress: Called in this thread with bytes done and bytes in all, now and then and at the end.
        share: ``(n, count)``: read only the n-th of so many parts of about the same size, because others read theirs;
            the index, and the sizes of files, are always looked at.

    Returns:
        The faults and what was looked at.

    Raises:
        UnknownCheckpoint: There is neither index nor metadata; check the checkpoint id.
        BadIndex: The index itself is damaged, so that nothing can be compared with it.
        Unsupported: A stock checkpoint whose files were transformed; load it with torch.
        SystemCallFailed: The index cannot be read.
    """
    with reading(path):
        return _verify(read_index(path), path, threads=threads, progress=progress or (lambda *_: None), share=share)


def _verify(
    index: Index, path: str, *, threads: int, progress: Callable[[int, int], None], share: tuple[int, int]
) -> VerifyReport:
    payload_bytes = int((index.data_bytes if index.has_hashes else index.record_bytes).sum())
    faults, readable = _check_files(index, path)
    done_bytes = crcs = 0
    mine = slice(share[0], None, share[1])
    with (
        contextlib.closing(_Verifier(index, path, readable)) as verifier,
        ThreadPoolExecutor(max(threads, 1), thread_name_prefix="ckptd-verify") as pool,
    ):
        check = verifier.check if index.has_hashes else verifier.check_records
        for found in pool.map(check, list(_batches(index, readable))[mine]):
            faults += found.faults
            crcs += found.crcs
            done_bytes += found.read_bytes
            progress(done_bytes, payload_bytes)
    if index.has_hashes:
        faults += _check_frames(index, path, range(len(index.files))[mine])
        faults += _check_metadata(index, path) if share[0] == 0 else []
    if done_bytes < payload_bytes:
        progress(payload_bytes, payload_bytes)
    return VerifyReport(path, len(index.item_name), payload_bytes, index.has_hashes, tuple(faults), crcs)


def _check_files(index: Index, path: str) -> tuple[list[CkptdError], Int64]:
    """Return what is wrong with the files as such, and the items whose bytes are all there."""
    faults: list[CkptdError] = []
    record_ends = index.record_offset + index.record_bytes
    wanted_bytes = np.zeros(len(index.files), np.int64)
    np.maximum.at(wanted_bytes, index.item_file, record_ends)
    found_bytes = np.zeros(len(index.files), np.int64)
    for row, name in enumerate(index.files):
        file = f"{path}/{name}"
        size = _file_bytes(file)
        if isinstance(size, CkptdError):
            faults.append(size)
            size = -1
        elif size < wanted_bytes[row]:
            faults.append(TruncatedFile(file, int(wanted_bytes[row]), size))
        found_bytes[row] = size
    return faults, np.flatnonzero(record_ends <= found_bytes[index.item_file])


def _check_frames(index: Index, path: str, rows: range) -> list[CkptdError]:
    """Return what is wrong with the bytes around the payloads: record headers, tails and padding."""
    faults: list[CkptdError] = []
    expected_hashes = frame_hashes(index)
    for row in rows[: len(expected_hashes)]:
        expected = expected_hashes[row]
        file = f"{path}/{index.files[row]}"
        size = _file_bytes(file)
        if isinstance(size, CkptdError):
            continue  # said already
        mine = np.flatnonzero(index.item_file == row)
        ranges = frame_ranges(index.data_offset[mine], index.data_bytes[mine], size)
        descriptor = named("open", file, partial(os.open, file, os.O_RDONLY | os.O_CLOEXEC))
        try:
            if frame_hash(ranges, partial(_read_range, descriptor, file)) != expected:
                faults.append(WrongBits(file, "(record headers and padding)", 0))
        except CkptdError as error:
            faults.append(error)
        finally:
            os.close(descriptor)
    return faults


def _read_range(descriptor: int, file: str, begin: int, end: int) -> bytes:
    return named("pread", file, lambda: os.pread(descriptor, end - begin, begin))


def _check_metadata(index: Index, path: str) -> list[CkptdError]:
    """Return what is wrong with stock's ``.metadata``, by which torch itself would load."""
    file = f"{path}/{METADATA_NAME}"
    if METADATA_HASH not in index.header:
        return []
    try:
        metadata = named("read", file, Path(file).read_bytes)
    except SystemCallFailed as error:
        return [error if os.path.lexists(file) else MissingFile(file)]
    return [] if is_metadata_of(index, metadata) else [WrongBits(file, "(stock metadata)", 0)]


def _file_bytes(file: str) -> int | CkptdError:
    try:
        status = named("stat", file, lambda: Path(file).stat())
    except SystemCallFailed as error:
        return error if os.path.lexists(file) else MissingFile(file)
    # Anything but a regular file is not what was saved, and opening a pipe could wait for ever.
    return status.st_size if stat.S_ISREG(status.st_mode) else MissingFile(file)


def _batches(index: Index, items: Int64) -> Iterator[Int64]:
    """Yield the items by file and offset, as many together as one read covers."""
    offsets, lengths = (
        (index.data_offset, index.data_bytes) if index.has_hashes else (index.record_offset, index.record_bytes)
    )
    items = items[np.lexsort((offsets[items], index.item_file[items]))]
    files, begins = index.item_file[items], offsets[items]
    ends = begins + lengths[items]
    first = 0
    while first < len(items):
        # Begins are sorted, ends need not be: take what begins within the read, then cut.
        same_file = int(np.searchsorted(files, files[first], side="right"))
        limit = begins[first] + READ_BYTES
        last = first + int(np.searchsorted(begins[first:same_file], limit, side="left"))
        beyond = np.flatnonzero(ends[first:last] > limit)
        last = max(first + int(beyond[0]), first + 1) if len(beyond) else last
        yield items[first:last]
        first = last


@dataclass(frozen=True)
class _Found:
    """What came of one batch."""

    read_bytes: int
    faults: list[CkptdError]
    crcs: int = 0


class _Verifier:
    """Reads and hashes batches of items; one per checkpoint, used by several threads.

    Args:
        index: The checkpoint's index.
        path: Its directory.
        readable: The items whose bytes are all there.
    """

    def __init__(self, index: Index, path: str, readable: Int64) -> None:
        self._index = index
        self._path = path
        self._local = threading.local()
        self._opening = threading.Lock()
        self._files: dict[int, DiskFile] = {}
        self._ends = np.zeros(len(index.files), np.int64)
        np.maximum.at(self._ends, index.item_file[readable], (index.data_offset + index.data_bytes)[readable])

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.popitem()[1].close()

    def _open(self, row: int) -> DiskFile:
        """Return a file, which is read past the page cache where it is not in it."""
        with self._opening:
            if row not in self._files:
                self._files[row] = DiskFile(f"{self._path}/{self._index.files[row]}", 0, int(self._ends[row]))
            return self._files[row]

    def check_records(self, items: Int64) -> _Found:
        """Hold records of stock's, all of one file, against the CRCs in them."""
        index = self._index
        file = self._file_of(items)
        faults: list[CkptdError] = []
        crcs = 0
        try:
            descriptor = named("open", file, lambda: os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        except CkptdError as error:
            return _Found(0, [error])
        try:
            for item in items.tolist():
                begin, nbytes = int(index.record_offset[item]), int(index.record_bytes[item])
                try:
                    crcs += check_record(descriptor, file, begin, nbytes)
                except WrongRecord:
                    faults.append(WrongBits(file, index.names[int(index.item_name[item])], begin))
                except CkptdError as error:
                    faults.append(error)
        finally:
            os.close(descriptor)
        return _Found(int(index.record_bytes[items].sum()), faults, crcs)

    def _file_of(self, items: Int64) -> str:
        return f"{self._path}/{self._index.files[int(self._index.item_file[items[0]])]}"

    def check(self, items: Int64) -> _Found:
        """Hold items of one file, in order of offset, against their hashes."""
        index = self._index
        begins = index.data_offset[items]
        lengths = index.data_bytes[items]
        nbytes = int(lengths.sum())
        try:
            file = self._open(int(index.item_file[items[0]]))
            hashes = self._hashes(file, begins.tolist(), lengths.tolist())
        except CkptdError as error:
            return _Found(nbytes, [error])
        wrong = np.flatnonzero(np.fromiter(hashes, np.uint64, len(items)) != index.item_hash[items])
        names = [index.names[int(index.item_name[items[row]])] for row in wrong.tolist()]
        faults = [
            WrongBits(self._file_of(items), name, int(begins[row]))
            for name, row in zip(names, wrong.tolist(), strict=True)
        ]
        return _Found(nbytes, [*faults])

    def _hashes(self, file: DiskFile, begins: list[int], lengths: list[int]) -> Iterable[int]:
        end = max(begin + length for begin, length in zip(begins, lengths, strict=True))
        if end - begins[0] > READ_BYTES:
            digest = xxhash.xxh3_64()
            for offset in range(begins[0], end, READ_BYTES):
                digest.update(self._read(file, offset, min(offset + READ_BYTES, end)))
            return [digest.intdigest()]
        first = begins[0]
        data = self._read(file, first, end)
        return [
            xxhash.xxh3_64_intdigest(data[begin - first : begin - first + length])
            for begin, length in zip(begins, lengths, strict=True)
        ]

    def _read(self, file: DiskFile, begin: int, end: int) -> memoryview:
        """Return a range of a file, in this thread's buffer. Raises TruncatedFile, SystemCallFailed."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = huge_buffer(READ_BYTES + 2 * BLOCK_BYTES)
        buffer: memoryview = self._local.buffer
        target = buffer[: end - begin]
        return target if file.fill(begin, [target]) else file.view(begin, end, buffer)
