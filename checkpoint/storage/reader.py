"""What both readers share: torch's reading protocol over byte ranges, verified where the checkpoint has hashes.

Planners are called in the caller's thread only; files are read, decoded and copied in several.
"""

from __future__ import annotations

import os
import posixpath
import uuid
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Final

from torch.distributed.checkpoint._extension import ExtensionRegistry as StockExtensionRegistry
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckptd.checkpoint.names import INDEX_NAME, METADATA_NAME
from ckptd.checkpoint.reading.read import Read
from ckptd.checkpoint.storage.extensions import ExtensionRegistry
from ckptd.checkpoint.storage.known_payloads import Known, KnownPayloads, payloads_of
from ckptd.checkpoint.storage.metadata_file import decode_stock
from ckptd.checkpoint.storage.read_tasks import Task, make_task
from ckptd.protocol.errors import BadIndex, UnknownCheckpoint, Unsupported

# A planner may allocate what it resolves, and keep it until it is committed: so many bytes are resolved at a time.
_BATCH_BYTES: Final = 1 << 30


class CheckpointReader(StorageReader):
    """A reader of checkpoints; see :class:`FileSystemReader` and :class:`FsspecReader` for its arguments."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        registry: StockExtensionRegistry | None,
        *,
        thread_count: int,
    ) -> None:
        super().__init__()
        if thread_count < 1:
            raise Unsupported(f"thread_count={thread_count}", "give 1 or more")
        self.path = path
        self.thread_count = thread_count
        self.extension_registry = ExtensionRegistry() if registry is None else registry
        self.storage_data: dict[Any, Any] = {}
        self.load_id = str(uuid.uuid4())
        self._known: KnownPayloads | None = None

    # --- what a kind of storage adds ---------------------------------------------------------------------------

    @abstractmethod
    def _read_file(self, name: str) -> bytes | None:
        """Return the bytes of a small file; None if there is none."""

    @abstractmethod
    def _read_ranges(self, reads: list[Read]) -> None:
        """Perform all reads. Raises a StorageError."""

    @abstractmethod
    def _location(self, name: str) -> str:
        """Return where a file of the checkpoint lies."""

    def _locate(self, place: _StorageInfo, file: str) -> Known | None:
        """Return where a tensor's values lie in its record, if that can be found out without reading all of it."""
        del place, file
        return None

    # --- torch's protocol ------------------------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Get ready for another load."""
        if checkpoint_id:
            self.path = checkpoint_id
        self.storage_data = {}
        self.load_id = str(uuid.uuid4())
        self._known = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checkpoint's metadata; of one rank's own part if ``rank`` is given.

        Raises:
            UnknownCheckpoint: There is none.
            BadIndex: It is damaged, or needs classes that no checkpoint needs.
        """
        del args
        rank = kwargs.get("rank")
        name = METADATA_NAME if rank is None else f"__{rank}{METADATA_NAME}"
        data = self._read_file(name)
        if data is None:
            raise UnknownCheckpoint(self._location(name))
        metadata = decode_stock(data, self._location(name))
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        assert metadata.storage_meta is not None
        self._known = self._find_known(metadata, data) if rank is None else KnownPayloads.none()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learn where everything lies. Raises BadIndex if the metadata does not tell."""
        del is_coordinator, args, kwargs
        if metadata.storage_data is None:
            raise BadIndex(self._location(METADATA_NAME), "it does not say where the items lie")
        self.storage_data = metadata.storage_data
        if self._known is None:  # another reader has read the metadata
            data = self._read_file(METADATA_NAME)
            self._known = self._find_known(metadata, data) if data is not None else KnownPayloads.none()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read all items of a plan.

        Raises:
            MissingFile, TruncatedFile, WrongBits: A file is not what was saved; load another checkpoint.
            UnknownExtension: Something has transformed it that the registry does not know.
            Mismatch: A target's size is not that of what is read.
        """
        for batch in _batches(plan.items, self.storage_data):
            tasks = [self._task(item, planner) for item in batch]
            self._read_ranges([task.read for task in tasks])
            for task in tasks:
                task.commit(planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """Which checkpoint is read."""
        return self.path

    def _task(self, item: ReadItem, planner: LoadPlanner) -> Task:
        place = self.storage_data.get(item.storage_index)
        if place is None:
            raise BadIndex(self._location(METADATA_NAME), f"{item.storage_index.fqn} lies in no file")
        name = place.relative_path
        if posixpath.isabs(name) or ".." in name.split("/") or "\0" in name:
            raise BadIndex(self._location(METADATA_NAME), f"{name[:80]!r} is no file of the checkpoint")
        file = self._location(name)
        known = self._known.of(item.storage_index) if self._known is not None else None
        if known is None and item.type is LoadItemType.TENSOR and not place.transform_descriptors:
            known = self._locate(place, file)
        return make_task(item, place, file, planner, known=known, registry=self.extension_registry)

    def _find_known(self, metadata: Metadata, data: bytes) -> KnownPayloads:
        sidecar = self._read_file(INDEX_NAME)
        if sidecar is None:
            return KnownPayloads.none()
        return payloads_of(sidecar, metadata, data, path=self._location(INDEX_NAME))


def _batches(items: list[ReadItem], storage_data: dict[Any, Any]) -> Iterator[list[ReadItem]]:
    batch: list[ReadItem] = []
    nbytes = 0
    for item in items:
        place = storage_data.get(item.storage_index)
        batch.append(item)
        nbytes += getattr(place, "length", 0)
        if nbytes >= _BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
