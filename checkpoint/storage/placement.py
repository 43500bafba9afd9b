"""What ranks and coordinator tell each other in plans and results: where a rank writes, and what it has written.

Both travel pickled through torch's own collectives, or stay in one process that plays all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.checkpoint.filesystem import _StorageInfo


@dataclass
class Assignment:
    """``storage_data`` of a rank's plan.

    Attributes:
        prefix: Begin of its files' names.
        token: Names the save, the same on all ranks.
        used: Whether the plan was written already. A planner that caches plans (``enable_plan_caching``) gives the
            last save's plan again, with the last save's token in it.
    """

    prefix: str
    token: str
    used: bool = False


@dataclass
class FileReport:
    """One file that a rank has written: its name in the checkpoint, its size in bytes, the hash of its frame."""

    name: str
    nbytes: int = 0
    frame_hash: int = 0


@dataclass
class PlacedItem(_StorageInfo):
    """``storage_data`` of one item's result: torch's own, and what the index and the hashes need.

    Attributes:
        data_offset: Where the payload begins in the file, in bytes; -1 where only the record would tell.
        data_bytes: Its length.
        item_hash: xxh3-64 of the payload.
        file: The file; one object for all items in it.
    """

    data_offset: int = -1
    data_bytes: int = -1
    item_hash: int = 0
    file: FileReport | None = None

    def plain(self) -> _StorageInfo:
        """Return what stock's metadata holds."""
        return _StorageInfo(self.relative_path, self.offset, self.length, self.transform_descriptors)
