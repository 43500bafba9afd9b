"""Bytes could not be written, read or trusted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from ckptd.protocol.errors.base import StorageError


@dataclass(eq=False)
class SystemCallFailed(StorageError):
    """A system call on a file of the checkpoint failed."""

    code: ClassVar[str] = "system_call_failed"
    call: str
    path: str
    errno: int

    def __str__(self) -> str:
        return f"{self.call} {self.path}: {os.strerror(self.errno)} (errno {self.errno})"


@dataclass(eq=False)
class RankFailed(StorageError):
    """One rank's part failed; the cause of every rank's failure."""

    code: ClassVar[str] = "rank_failed"
    rank: int
    cause_code: str
    cause: str

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.cause}"


@dataclass(eq=False)
class SeveralFailed(StorageError):
    """Several writers of one rank failed, each for a reason of its own."""

    code: ClassVar[str] = "several_failed"
    count: int
    causes: str

    def __str__(self) -> str:
        return f"{self.count} writers failed: {self.causes}"


@dataclass(eq=False)
class SaveAborted(StorageError):
    """The hidden directory of a save is not there, so that this rank cannot write its part."""

    code: ClassVar[str] = "save_aborted"
    path: str

    def __str__(self) -> str:
        return (
            f"{self.path} is gone: another rank of this save has failed, "
            "or this node does not share the coordinator's file system"
        )


@dataclass(eq=False)
class ObjectStoreFailed(StorageError):
    """A call to an object store failed, and went on failing when it was made again."""

    code: ClassVar[str] = "object_store_failed"
    call: str
    url: str
    reason: str

    def __str__(self) -> str:
        return f"{self.call} {self.url}: {self.reason}"


@dataclass(eq=False)
class WrongUpload(StorageError):
    """What an object store holds is not what was sent to it."""

    code: ClassVar[str] = "wrong_upload"
    url: str
    sent: str
    found: str

    def __str__(self) -> str:
        return f"{self.url}: sent {self.sent}, the store has {self.found}; save again"


@dataclass(eq=False)
class ItemNotReported(StorageError):
    """The metadata names an item that no rank has written."""

    code: ClassVar[str] = "item_not_reported"
    item: str

    def __str__(self) -> str:
        return f"{self.item}: the plan holds it, but no rank reported it written; nothing was published"


@dataclass(eq=False)
class MissingFile(StorageError):
    """A file that the index names is not there."""

    code: ClassVar[str] = "missing_file"
    path: str

    def __str__(self) -> str:
        return f"{self.path} is missing though the index names it; restore it or load another checkpoint"


@dataclass(eq=False)
class TruncatedFile(StorageError):
    """A file is shorter than its index says."""

    code: ClassVar[str] = "truncated_file"
    path: str
    wanted_bytes: int
    found_bytes: int

    def __str__(self) -> str:
        sizes = f"{self.path} has {self.found_bytes} bytes, the index needs {self.wanted_bytes}"
        return f"{sizes}: it was cut short; load another checkpoint"


@dataclass(eq=False)
class WrongBits(StorageError):
    """The bytes of an item are not those that were saved."""

    code: ClassVar[str] = "wrong_bits"
    path: str
    item: str
    offset: int

    def __str__(self) -> str:
        where = f"{self.path}: item {self.item!r} at offset {self.offset} does not match its hash"
        return f"{where}: the file was damaged after it was saved; load another checkpoint"


@dataclass(eq=False)
class BadIndex(StorageError):
    """An index or metadata file that cannot be read or trusted."""

    code: ClassVar[str] = "bad_index"
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; load another checkpoint"


@dataclass(eq=False)
class SavesFailing(StorageError):
    """More saves failed in a row than are put up with."""

    code: ClassVar[str] = "saves_failing"
    count: int
    last: str

    def __str__(self) -> str:
        return f"{self.count} saves in a row have failed, the last one: {self.last}"


@dataclass(eq=False)
class NoGoodCheckpoint(StorageError):
    """There are checkpoints, but none of them is whole."""

    code: ClassVar[str] = "no_good_checkpoint"
    path: str
    count: int
    faults: str

    def __str__(self) -> str:
        return f"{self.path}: none of {self.count} checkpoints is good ({self.faults}); see `ckptd scrub {self.path}`"


@dataclass(eq=False)
class BadFile(StorageError):
    """A file of another format (torch.save, safetensors) that cannot be read or trusted."""

    code: ClassVar[str] = "bad_file"
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(eq=False)
class WriteIncomplete(StorageError):
    """A rank's report does not cover its plan."""

    code: ClassVar[str] = "write_incomplete"
    rank: int
    planned_bytes: int
    written_bytes: int

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.written_bytes} of {self.planned_bytes} bytes reported durable"
