"""Loads with users' own planners and storage readers: DCP's protocol between the two, run by us.

Ranks compare plans through the process group's store (:mod:`ckptd.client.session.exchange`); no collective runs. Plans
cross as pickles, as in torch's own object collectives: ranks of one job trust each other.
"""

from __future__ import annotations

import inspect
import logging
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader

from ckptd.client.session.exchange import Exchange, Patience, place_in
from ckptd.protocol.errors import CkptdError, RankMismatch, UserCodeFailed

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Wish:
    """What a rank tells the coordinator.

    Attributes:
        plan: Its local plan; None if neither planner nor reader would look at the plans of all ranks.
        own_metadata: It has read metadata of its own, as for a checkpoint without global metadata.
    """

    plan: LoadPlan | None
    own_metadata: bool


def load_with(
    state_dict: dict[str, Any],
    *,
    reader: StorageReader,
    planner: LoadPlanner,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    checkpoint_id: str | os.PathLike[str] | None = None,
    patience: Patience | None = None,
) -> None:
    """Load with a planner and a reader that follow DCP's protocol, whoever wrote them.

    Args:
        state_dict: Filled in place, as `torch.distributed.checkpoint.load` does; `Stateful` values give their state
            before and are given it back after.
        reader: Where bytes come from.
        planner: What is read, and where it goes.
        process_group: The ranks that load together; None is the default group, if there is one.
        no_dist: Load alone.
        checkpoint_id: What the reader is reset to; None leaves it as it is.
        patience: How long ranks wait for each other.

    Raises:
        UserCodeFailed: A call of planner or reader failed; names rank and call, alike on all ranks.
        RankFailed: A rank did not come, or went away; start it again.
        CkptdError: Another error of ours, told of the rank that had it.
    """
    place = place_in(process_group, no_dist=no_dist)  # first of all, so that all ranks count alike
    with Exchange(place, patience=patience) as exchange:
        load = _Load(exchange, reader, planner)
        exchange.together("reading metadata", lambda: load.set_up(state_dict, checkpoint_id))
        load.plan()
        exchange.together("reading", load.read)
    load.hand_back(state_dict)


class _Load:
    """One load: the calls of planner and reader in their order."""

    def __init__(self, exchange: Exchange, reader: StorageReader, planner: LoadPlanner) -> None:
        self._exchange, self._reader, self._planner = exchange, reader, planner
        self._state: dict[str, Any] = {}
        self._local: LoadPlan | None = None
        self._central: LoadPlan | None = None
        self._own_metadata = False

    def set_up(self, state_dict: dict[str, Any], checkpoint_id: str | os.PathLike[str] | None) -> bytes:
        """Read metadata and make the local plan."""
        exchange, reader, planner = self._exchange, self._reader, self._planner
        if checkpoint_id is not None:
            self._call(reader, "reset", lambda: reader.reset(checkpoint_id))
        for key in sorted(state_dict):
            value = state_dict[key]
            self._state[key] = (
                self._call(value, "state_dict", value.state_dict) if isinstance(value, Stateful) else value
            )
        metadata = self._metadata()
        self._call(
            planner,
            "set_up_planner",
            lambda: planner.set_up_planner(self._state, metadata, exchange.is_coordinator),
        )
        told = {"rank": exchange.rank, "use_collectives": not self._own_metadata}
        options = told if _takes_options(reader.set_up_storage_reader) else {}
        self._call(
            reader,
            "set_up_storage_reader",
            lambda: reader.set_up_storage_reader(metadata, exchange.is_coordinator, **options),
        )
        local = self._call(planner, "create_local_plan", planner.create_local_plan)
        self._local = self._call(reader, "prepare_local_plan", lambda: reader.prepare_local_plan(local))
        return b""

    def _metadata(self) -> Metadata:
        """Return the checkpoint's metadata, or this rank's own where the reader knows such."""
        reader = self._reader
        try:
            return reader.read_metadata()
        except Exception as error:
            if not _takes_options(reader.read_metadata):
                raise self._failed(reader, "read_metadata", error) from error
            logger.info("no global metadata (%r): looking for that of rank %d", error, self._exchange.rank)
            missing = error
        try:
            found = reader.read_metadata(rank=self._exchange.rank)
        except Exception as error:
            raise self._failed(reader, "read_metadata", missing) from error
        self._own_metadata = True
        return found

    def plan(self) -> None:
        """Bring the ranks' plans together, where anybody looks at them."""
        answer = self._exchange.together("planning", self._wish, self._answer_all)
        central = pickle.loads(answer)
        self._central = self._local if central is None else central
        if self._own_metadata:
            assert self._local is not None
            [self._central] = self._global_plan([self._local])

    def _wish(self) -> bytes:
        plan = None if self._own_metadata or _leaves_plans_alone(self._planner, self._reader) else self._local
        return self._pickled(_Wish(plan, self._own_metadata), "the local plan")

    def _answer_all(self, parts: list[bytes]) -> list[bytes]:
        wishes: list[_Wish] = [pickle.loads(part) for part in parts]
        first = wishes[0]
        for rank, wish in enumerate(wishes):
            if (wish.plan is None, wish.own_metadata) != (first.plan is None, first.own_metadata):
                theirs = "a plan made from its own metadata" if wish.own_metadata else "a plan of another kind"
                raise RankMismatch(rank, theirs, "did not")
        plans = [wish.plan for wish in wishes if wish.plan is not None]
        answers: list[LoadPlan | None] = [*self._global_plan(plans)] if plans else [None] * len(wishes)
        return [self._pickled(plan, "the global plan") for plan in answers]

    def _global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        planner, reader = self._planner, self._reader
        made = self._call(planner, "create_global_plan", lambda: planner.create_global_plan(plans))
        return self._call(reader, "prepare_global_plan", lambda: reader.prepare_global_plan(made))

    def read(self) -> bytes:
        """Read."""
        planner, reader, central = self._planner, self._reader, self._central
        assert central is not None
        final = self._call(planner, "finish_plan", lambda: planner.finish_plan(central))
        self._call(reader, "read_data", lambda: reader.read_data(final, planner).wait())
        return b""

    def hand_back(self, state_dict: dict[str, Any]) -> None:
        """Put what was loaded into the caller's state dict; all ranks have read theirs."""
        for key, value in list(state_dict.items()):
            if isinstance(value, Stateful):
                value.load_state_dict(self._state[key])
            else:
                state_dict[key] = self._state[key]

    def _call(self, whose: object, name: str, call: Callable[[], _T]) -> _T:
        """Call users' code; an error of ours passes, any other is named."""
        try:
            return call()
        except CkptdError:
            raise
        except Exception as error:
            raise self._failed(whose, name, error) from error

    def _failed(self, whose: object, name: str, error: Exception) -> CkptdError:
        if isinstance(error, CkptdError):
            return error
        reason = f"{type(error).__name__}: {error}"
        return UserCodeFailed(self._exchange.rank, f"{type(whose).__name__}.{name}", reason)

    def _pickled(self, value: object, what: str) -> bytes:
        try:
            return pickle.dumps(value)
        except Exception as error:
            raise UserCodeFailed(self._exchange.rank, f"pickling {what}", f"{type(error).__name__}: {error}") from error


def _takes_options(method: Callable[..., Any]) -> bool:
    """Return whether a reader's method takes the options that DCP gives to those that do."""
    parameters = inspect.signature(method).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _leaves_plans_alone(planner: LoadPlanner, reader: StorageReader) -> bool:
    """Return whether global plans would be the local ones: then they need not cross between the ranks."""
    return (
        type(planner).create_global_plan is DefaultLoadPlanner.create_global_plan
        and type(reader).prepare_global_plan is FileSystemReader.prepare_global_plan
    )
