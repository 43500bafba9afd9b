"""From where a load gets its bytes, and that they are all of one save, whatever happens to the checkpoint meanwhile."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from ckptd.checkpoint.directory import CheckpointDirectory
from ckptd.checkpoint.folder.locks import reading
from ckptd.checkpoint.indexing.columns import Index
from ckptd.checkpoint.reading.files import Disk, Source
from ckptd.checkpoint.reading.read import ReadCount, read_all
from ckptd.client.loading.plan import LoadPlan
from ckptd.client.loading.retained import RetainedSave, open_retained
from ckptd.protocol.errors import RequestError, StorageError, Unsupported

if TYPE_CHECKING:
    from ckptd.client.loading.nodecache import NodeCache
    from ckptd.client.session.session import Session

logger = logging.getLogger(__name__)

T = TypeVar("T")

# One that is replaced as fast as it can be read is overwritten while its trainer loads: nobody wants that for long.
_ATTEMPTS: Final = 10


@dataclass(frozen=True)
class Sources:
    """Where bytes may come from besides the disk.

    Attributes:
        retained: Finds a save in memory, by its id.
        cache: The node's cache, if this load takes part in it.
    """

    retained: Callable[[str], RetainedSave | None] = lambda _: None
    cache: NodeCache | None = None

    @classmethod
    def of(cls, path: str, session: Session | None, cache: NodeCache | None) -> Sources:
        """Return the sources of a load of a process that may have a session."""
        return cls(partial(open_retained, path, runtime=None if session is None else session.runtime_dir), cache)

    def over(self, disk: Disk) -> Source:
        """Return the source for what is not in memory."""
        return disk if self.cache is None else self.cache.over(disk)


ONLY_DISK: Final = Sources()


@dataclass(frozen=True)
class Brought:
    """A plan whose reads are done. ``source``: where the bytes came from."""

    plan: LoadPlan
    count: ReadCount
    source: str


def bring(make_plan: Callable[[], LoadPlan], index: Index, disk: Disk, sources: Sources) -> Brought:
    """Perform a plan's reads: from memory if this very save is still there, or else from the disk.

    Args:
        make_plan: Makes the plan; called again if what came from memory does not count.
        index: The index that it was made from.
        disk: The opened checkpoint.
        sources: Where else bytes may come from.
    """
    plan = make_plan()
    save_id = index.header.get("save_id", "")
    if save_id and index.has_hashes and plan.reads and (retained := sources.retained(save_id)) is not None:
        count = retained.read(plan.reads)
        if count is not None:
            return Brought(plan, count, retained.name)
        plan = make_plan()
    source = sources.over(disk)
    return Brought(plan, read_all(plan.reads, source=source), source.name)


def of_one_save(path: str, sources: Sources, attempt: Callable[[CheckpointDirectory, Sources], T]) -> T:
    """Return what an attempt brings from a checkpoint that nobody has replaced or written into meanwhile.

    Args:
        path: Directory of the checkpoint, which the caller holds (:mod:`ckptd.checkpoint.folder.locks`).
        sources: Where else bytes may come from; the first attempt gets them.
        attempt: Reads the checkpoint; called again, with the disk alone, if what it read may be of two saves.

    Raises:
        Unsupported: The checkpoint was written into at every attempt.
        StorageError, RequestError: Of an attempt; what it read was one checkpoint, or it was the last.
    """
    for number in range(_ATTEMPTS):
        # The caller holds what is there at first.
        held = reading(path) if number else contextlib.nullcontext()
        with held, CheckpointDirectory(path) as directory:
            try:
                result = attempt(directory, ONLY_DISK if number else sources)
            except (StorageError, RequestError):
                # What has lost its name is being removed: that may be all that is wrong with it.
                replaced = directory.has_lost_its_name() or directory.was_written_into()
                if not replaced or number == _ATTEMPTS - 1:
                    raise
            else:
                if not directory.was_written_into():
                    return result
        logger.info("%s was replaced while it was loaded: loading it again", path)
    raise Unsupported(f"a load of {path} while others save into it", "load it when they have finished")
