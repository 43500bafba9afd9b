"""DCP's save protocol, played for all ranks by one process, with any planner and any storage writer.

Source of the order of calls: the docstrings of torch.distributed.checkpoint's `StorageWriter` and `SavePlanner`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from ckptd.checkpoint.user_code.handover import UserSave
from ckptd.protocol.errors import CkptdError, UserCodeFailed

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


def save_all(saves: Sequence[UserSave], *, on_item: Callable[[int], None] = lambda _: None) -> Metadata:
    """Carry out the saves of all ranks, which are theirs in order, and return what was saved.

    Args:
        saves: What each rank handed over; each has a planner and a writer of its own. Rank 0 coordinates.
        on_item: Called with the number of items that writers have asked for so far.

    Raises:
        UserCodeFailed: A planner or a writer failed; named with the rank and the call. Every writer that has an
            ``abort()`` has been called to remove what it wrote.
    """
    _Counter(on_item).count(saves)
    try:
        return _save_all(saves)
    except BaseException:
        for save in saves:
            _abort(save)
        raise


def _save_all(saves: Sequence[UserSave]) -> Metadata:
    plans = [_local_plan(rank, save) for rank, save in enumerate(saves)]
    first = saves[0]
    plans, metadata = _call(0, first.planner, "create_global_plan", plans)
    plans = _call(0, first.writer, "prepare_global_plan", plans)
    writing = []
    for rank, (save, plan) in enumerate(zip(saves, plans, strict=True)):
        final = _call(rank, save.planner, "finish_plan", plan)
        writing.append(_call(rank, save.writer, "write_data", final, save.planner))
    results = [_guard(rank, saves[rank].writer, "write_data", done.wait) for rank, done in enumerate(writing)]
    _call(0, first.writer, "finish", metadata, results)
    return metadata  # type: ignore[no-any-return]


def _abort(save: UserSave) -> None:
    """Tell a writer that its save has failed, if it has an ear for it; DCP's protocol has no word, our writers do."""
    abort = getattr(save.writer, "abort", None)
    if abort is not None:
        try:
            abort()
        except Exception:  # the user's code: the error that came first is the one to tell
            logger.exception("%s.abort failed", type(save.writer).__name__)


def _local_plan(rank: int, save: UserSave) -> SavePlan:
    coordinates = rank == 0
    _call(rank, save.writer, "reset", save.checkpoint_id)
    meta = _call(rank, save.writer, "storage_meta")
    if "storage_meta" in inspect.signature(save.planner.set_up_planner).parameters:
        _call(rank, save.planner, "set_up_planner", save.state_dict, storage_meta=meta, is_coordinator=coordinates)
    else:  # planners from before torch 2.3
        _call(rank, save.planner, "set_up_planner", save.state_dict, coordinates)
    if "kwargs" in inspect.signature(save.writer.set_up_storage_writer).parameters:
        _call(rank, save.writer, "set_up_storage_writer", coordinates, rank=rank, use_collectives=True)
    else:
        _call(rank, save.writer, "set_up_storage_writer", coordinates)
    plan = _call(rank, save.planner, "create_local_plan")
    return _call(rank, save.writer, "prepare_local_plan", plan)  # type: ignore[no-any-return]


class _Counter:
    """Counts what writers ask of planners: the one sign of progress that all writers give."""

    def __init__(self, on_item: Callable[[int], None]) -> None:
        self._on_item, self._items = on_item, 0

    def count(self, saves: Sequence[UserSave]) -> None:
        """Listen at every planner."""
        for save in saves:
            save.planner.resolve_data = self._counted(save.planner.resolve_data)  # type: ignore[method-assign, assignment]

    def _counted(self, resolve: Callable[[Any], _T]) -> Callable[[Any], _T]:
        def counted(item: Any) -> _T:
            self._items += 1
            self._on_item(self._items)
            return resolve(item)

        return counted


def _call(rank: int, target: object, method: str, /, *arguments: Any, **named: Any) -> Any:
    return _guard(rank, target, method, lambda: getattr(target, method)(*arguments, **named))


def _guard(rank: int, target: object, method: str, call: Callable[[], _T]) -> _T:
    try:
        return call()
    except CkptdError:
        raise
    except (Exception, CheckpointException) as error:  # the user's code: any kind of failure, told with its place
        where = f"{type(target).__name__}.{method}"
        raise UserCodeFailed(rank, where, f"{type(error).__name__}: {error}") from error
