"""`load`: torch.distributed.checkpoint's function, and what it says of itself afterwards. Needs no daemon.

Default planners and file-system readers, torch's and ours, mean the fast path: they are not called, what they stand for
is done. Anything else is the user's own and is called as DCP would, by :mod:`ckptd.client.loading.generic`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader as TorchFileSystemReader
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from typing_extensions import deprecated

from ckptd.checkpoint.folder.locks import reading
from ckptd.checkpoint.planners.load import DefaultLoadPlanner
from ckptd.checkpoint.planners.settings import load_settings
from ckptd.checkpoint.storage.filesystem import FileSystemReader
from ckptd.checkpoint.storage.select import reader_for
from ckptd.client.arguments import CheckpointId, check_kind, path_of
from ckptd.client.failures import as_checkpoint_failure
from ckptd.client.loading.fallback import Wanted, candidates_at, load_newest_good
from ckptd.client.loading.generic import load_with
from ckptd.client.loading.load import load_into
from ckptd.client.loading.match import LoadRules
from ckptd.client.loading.nodecache import cache_of
from ckptd.client.loading.sources import Sources
from ckptd.client.logging_handlers import Phases
from ckptd.client.session.exchange import place_in
from ckptd.client.session.sessions import live_session
from ckptd.protocol.errors import Unsupported

if TYPE_CHECKING:
    from ckptd.client.loading.match import Strict
    from ckptd.client.loading.report import LoadReport

_READERS: Final = (TorchFileSystemReader, FileSystemReader)


@as_checkpoint_failure()
def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: CheckpointId | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    strict: Strict = True,
    convert_dtype: bool = True,
    verify: bool = True,
    fallback: bool = False,
) -> LoadReport | None:
    """Load a checkpoint into a state dict, in place; ours and stock's alike.

    The arguments are those of `torch.distributed.checkpoint.load`, and four more. Ranks read what they need each for
    itself: no collective runs, so ``process_group`` and ``no_dist`` matter only to planners and readers of your own.
    A job's last save is read from shared memory, as long as a daemon of this node still holds it.

    Args:
        state_dict: Tensors are filled in place, objects replaced, `Stateful` values given their state.
        checkpoint_id: Path of the checkpoint.
        storage_reader: Names the path instead, or reads in its own way.
        planner: A DefaultLoadPlanner for its options, or one of your own.
        process_group: The ranks that load together; None is the default group.
        no_dist: Load alone.
        strict: Whether keys that the checkpoint lacks, or holds in another shape, are an error, or else left as they
            are; or that by prefix, as in ``{"": True, "model.head": False}``: the longest prefix of whole steps wins.
        convert_dtype: Whether tensors of another dtype are converted, as by torch; or are a mismatch.
        verify: Hold items that are read whole against the hashes they were saved with; of an item of which only a part
            is wanted, as when resharding, the hash cannot be known.
        fallback: Take the newest checkpoint that is good: ``checkpoint_id`` is a folder of checkpoints, or one of them
            with its step in its name, behind which the older ones of its folder come. Each is verified as a whole
            before anything is touched; all ranks must make the call, and all take the same. What was passed over is
            in the report, a warning in the log, and a ``fallback`` event each.

    Returns:
        What was loaded, and which keys are missing, unexpected, mismatched or converted; None where a planner or reader
        of your own decides that.

    Raises:
        UnknownCheckpoint: There is no checkpoint under this id.
        MissingKeys, Mismatch: The state dict does not fit the checkpoint; no byte was read and nothing changed.
        WrongBits, TruncatedFile, MissingFile: The checkpoint is damaged; load another one.
        NoGoodCheckpoint: With ``fallback``, all checkpoints there are damaged.
        Unsupported: The arguments do not go together, or others save into the checkpoint all the while.

        All but the last are a `CheckpointException` too, as torch's errors are.
    """
    check_kind("planner", planner, LoadPlanner)
    check_kind("storage_reader", storage_reader, StorageReader)
    rules = LoadRules(strict=strict, convert_dtype=convert_dtype)
    settings = load_settings(planner)
    if settings is not None and _is_native(checkpoint_id, storage_reader):
        path = path_of(checkpoint_id, storage_reader, type(storage_reader), "storage_reader")
        rules = LoadRules(strict=strict, partial=settings.allow_partial_load, convert_dtype=convert_dtype)
        flat = not settings.flatten_state_dict
        session = live_session(process_group, no_dist=no_dist)

        def load_one(path: str) -> LoadReport:
            with reading(path), Phases("load", path), cache_of(session) as cache:  # the second tells of a failure
                sources = Sources.of(path, session, cache)
                return load_into(state_dict, path, rules=rules, flat=flat, verify=verify, sources=sources)

        if not fallback:
            return load_one(path)
        place = place_in(process_group, no_dist=no_dist)
        # There is a candidate at least: the path itself.
        return load_newest_good(Wanted(path, lambda: candidates_at(path)), load_one, place=place)
    if rules != LoadRules() or not verify or fallback:
        what = "strict, convert_dtype, verify or fallback with a planner or reader of your own, or an object store"
        raise Unsupported(what, "leave them out: planner and reader decide")
    if storage_reader is None:
        if checkpoint_id is None:
            raise Unsupported("a call without an id", "give checkpoint_id or storage_reader")
        storage_reader = reader_for(checkpoint_id)
    where = checkpoint_id or getattr(storage_reader, "path", None) or type(storage_reader).__name__
    with reading(str(where)), Phases("load", str(where)) as phases:
        load_with(
            state_dict,
            reader=storage_reader,
            planner=planner or DefaultLoadPlanner(),
            process_group=process_group,
            no_dist=no_dist,
            checkpoint_id=checkpoint_id,
        )
        phases.end("finish")
    return None


@deprecated(
    "`load_state_dict` is deprecated and will be removed in future versions. Please use `load` instead.",
    category=FutureWarning,
)
def load_state_dict(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """Load as :func:`load` does. Deprecated by torch; there for programs that still call it.

    Args:
        state_dict: See :func:`load`.
        storage_reader: See there.
        process_group: See there.
        coordinator_rank: Means nothing: no rank coordinates a load.
        no_dist: See there.
        planner: See there.
    """
    del coordinator_rank
    storage_reader.reset()
    load(
        state_dict,
        storage_reader=storage_reader,
        process_group=process_group,
        no_dist=no_dist,
        planner=planner,
    )


def _is_native(checkpoint_id: CheckpointId | None, reader: StorageReader | None) -> bool:
    """Return whether id and reader mean nothing but a path on this machine."""
    is_path = checkpoint_id is None or "://" not in os.fspath(checkpoint_id)
    return is_path and (reader is None or type(reader) in _READERS)
