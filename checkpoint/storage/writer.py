"""What both writers share: torch's storage protocol, carried out by a :class:`Publication`.

Each method gets what it needs from its arguments, so that one process can play all ranks, with one writer or several.
Invariant: nothing is published unless every planned item was reported, and every file is there in its reported size.
"""

from __future__ import annotations

import dataclasses
import os
import uuid
import weakref
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future
from torch.utils._pytree import tree_flatten

from ckptd.checkpoint.names import METADATA_NAME
from ckptd.checkpoint.storage.claim import Claim, discard_after_failure
from ckptd.checkpoint.storage.distribute import chunk_bytes, distribute
from ckptd.checkpoint.storage.filling import fill_file
from ckptd.checkpoint.storage.options import WriterOptions
from ckptd.checkpoint.storage.placement import Assignment
from ckptd.checkpoint.storage.publication import Publication
from ckptd.checkpoint.storage.sidecar import complete_metadata, encode_sidecar, encode_stock, file_reports
from ckptd.checkpoint.storage.threads import run_all
from ckptd.protocol.errors import CheckpointExists, Unsupported


class CheckpointWriter(StorageWriter, BlockingAsyncStager):
    """A writer of checkpoints; see :class:`FileSystemWriter` and :class:`FsspecWriter` for its arguments."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        options: WriterOptions,
        *,
        cache_staged_state_dict: bool,
        overwrite: bool,
    ) -> None:
        # Attributes have stock's names, since code out there looks at them.
        StorageWriter.__init__(self)
        BlockingAsyncStager.__init__(self, cache_staged_state_dict=cache_staged_state_dict)
        self.path = path
        self.single_file_per_rank = options.single_file_per_rank
        self.sync_files = options.sync_files
        self.thread_count = options.thread_count
        self.per_thread_copy_ahead = options.copy_ahead_bytes
        self.extensions = options.extensions
        self.serialization_format = options.serialization_format
        self.overwrite = overwrite
        self.save_id = str(uuid.uuid4())
        self.rank: int | None = None
        self.use_collectives = True
        self._claim: Claim | None = None
        self._forgotten: weakref.finalize[Any, Any] | None = None
        self._staged_structure: object = None

    # --- what a kind of storage adds ---------------------------------------------------------------------------

    @abstractmethod
    def _exists(self, name: str) -> bool:
        """Return whether a file of this name is published under the id."""

    @abstractmethod
    def _begin(self, save_id: str, *, prefix: str) -> Claim:
        """Begin a save as its coordinator, whose files begin with ``prefix``."""

    @abstractmethod
    def _token_anew(self) -> str:
        """Return the token for a rank whose plan was kept from an earlier save."""

    @abstractmethod
    def _publication(self, token: str, *, prefix: str) -> Publication:
        """Return the save that a token names, as a rank sees it."""

    # --- torch's protocol ------------------------------------------------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Get ready for another save. One that was begun and not finished is given up."""
        self.abort()
        if checkpoint_id:
            self.path = checkpoint_id
        self.save_id = str(uuid.uuid4())

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learn the rank, and whether ranks save together; the coordinator is told by what it is asked to do."""
        del is_coordinator, args
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what must not be overwritten. Raises CheckpointExists."""
        if not self.overwrite and self._exists(
            METADATA_NAME if self.use_collectives else f"__{self.rank or 0}{METADATA_NAME}"
        ):
            raise CheckpointExists(str(self.path))
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the save; tell each rank its name and how to name files."""
        self.abort()
        prefixes = [f"__{rank}_" for rank in range(len(plans))] if not self._alone else [f"__{self.rank}_"]
        self._claim = self._begin(self.save_id, prefix=prefixes[0])
        self._forgotten = weakref.finalize(self, self._claim.discard)
        return [
            dataclasses.replace(plan, storage_data=Assignment(prefix, self._claim.token))
            for plan, prefix in zip(plans, prefixes, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items.

        Raises:
            StorageError: A file could not be written; the save is thrown away on this rank's side.
            SeveralFailed: More than one could not.
        """
        publication = self._publication_of(plan)
        options = self._options()
        buckets = distribute(plan.items, options)

        def fill(number: int, check: Callable[[], None]) -> list[WriteResult]:
            name, items = publication.file_name(number), buckets[number]
            # What extensions make of it nobody knows before.
            expected_bytes = 0 if options.extensions else sum(map(chunk_bytes, items))
            sink = publication.create(name, expected_bytes=expected_bytes)
            return fill_file(sink, name, items, planner, options=options, check=check)

        try:
            written = run_all([partial(fill, number) for number in range(len(buckets))], threads=options.thread_count)
        except BaseException:
            discard_after_failure(publication)
            self.abort()  # if this writer coordinates the save: it cannot be finished any more
            raise
        future: Future[list[WriteResult]] = Future()
        future.set_result([result for results in written for result in results])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Check that all was written, and publish it.

        Raises:
            ItemNotReported: Something was not.
            CheckpointExists: Another checkpoint has appeared meanwhile, and must not be overwritten.
            StorageError: It could not be published; readers find what they found before.
        """
        if self._claim is None:
            raise Unsupported("finish without prepare_global_plan", "call it on the writer that coordinates")
        publication = self._claim.publication
        try:
            complete_metadata(metadata, results)
            metadata.storage_meta = self.storage_meta()
            data = encode_stock(metadata)
            header = {"origin": "ckptd.storage", "checkpoint_id": str(self.path), "save_id": self.save_id}
            sidecar = None if self._alone else encode_sidecar(data, results, header=header)
            publication.check_files({name: file.nbytes for name, file in file_reports(results).items()})
            publication.publish((self._metadata_name, data), sidecar=sidecar, overwrite=self.overwrite)
        except BaseException:
            self.abort()
            raise
        self._claim.release()
        self._forget()

    def storage_meta(self) -> StorageMeta | None:
        """Return what the metadata says of this save."""
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self.save_id)

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """Where the next checkpoint goes."""
        return self.path

    # --- the end of a save that fails ------------------------------------------------------------------------------

    def abort(self) -> None:
        """Give up a save that was begun and not finished: nothing of it stays behind."""
        if self._claim is not None:
            self._claim.discard()
        self._forget()

    def _forget(self) -> None:
        if self._forgotten is not None:
            self._forgotten.detach()
        self._claim = self._forgotten = None

    # --- async_save's stager -----------------------------------------------------------------------------------------

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of the state dict on the CPU; see ``cache_staged_state_dict``."""
        if not self.cache_staged_state_dict:
            copy: dict[str, Any] = super().stage(state_dict)
            return copy
        structure = _structure(state_dict)
        if self.state_dict_cache is None or structure != self._staged_structure:
            # Stock pins without asking, which fails where there is no accelerator.
            self.state_dict_cache = _create_cpu_state_dict(state_dict, pin_memory=torch.cuda.is_available())
            self._staged_structure = structure
        return _copy_state_dict(state_dict, self.state_dict_cache)

    # --- small things ------------------------------------------------------------------------------------------------

    @property
    def _alone(self) -> bool:
        """Whether this rank saves for itself (``use_collectives=False``)."""
        return not self.use_collectives and self.rank is not None

    @property
    def _metadata_name(self) -> str:
        return f"__{self.rank}{METADATA_NAME}" if self._alone else METADATA_NAME

    def _options(self) -> WriterOptions:
        return WriterOptions(
            single_file_per_rank=self.single_file_per_rank,
            sync_files=self.sync_files,
            thread_count=self.thread_count,
            copy_ahead_bytes=self.per_thread_copy_ahead,
            extensions=self.extensions,
            serialization_format=self.serialization_format,
        )

    def _publication_of(self, plan: SavePlan) -> Publication:
        assignment = plan.storage_data
        if not isinstance(assignment, Assignment):
            raise Unsupported("a plan that no prepare_global_plan of ours has seen", "call it on the coordinator")
        token = assignment.token
        if assignment.used:
            token = self._claim.token if self._claim is not None else self._token_anew()
        assignment.used = True
        return self._publication(token, prefix=assignment.prefix)

    def __getstate__(self) -> dict[str, Any]:
        """Return what travels to another process: a save under way stays where it was begun."""
        return {**self.__dict__, "_claim": None, "_forgotten": None, "state_dict_cache": None}


def _structure(state_dict: dict[str, Any]) -> object:
    """Return what a staged copy depends on: keys, shapes and element types."""
    leaves, spec = tree_flatten(state_dict)
    return spec, [(leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in leaves]
