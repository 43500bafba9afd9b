"""Plans that need not be sent again: `DefaultSavePlanner(enable_plan_caching=True)`.

Everything is named by its content, so a plan of another model, another world or other settings is another entry, and
nothing stale can be found. A rank offers only the name of its plan once the coordinator has shown that it knows it; the
coordinator sends only the name of what is to be written if that is what the rank has at hand.

Invariant: every step can be left out. A writer or planner that makes plans anew loses the names, and with them only the
saving; an offer that was never answered (the save failed) is made in full the next time.

A planner never hears of the commit. Entries are made when the plan is final; as they are named by content, they are
right whether or not that save was committed in the end.
"""

from __future__ import annotations

import dataclasses
import pickle
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import msgspec
import xxhash
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from ckptd.protocol.errors import BadPlan

# Several models that take turns (policy, critic, average) each keep their plans. An entry holds plans, never tensors.
MOST_KEPT: Final = 8
# A coordinator forgets later than its ranks: they are the ones that ask, and saves that fail are counted by them only.
MOST_KEPT_OF_A_RANK: Final = 2 * MOST_KEPT

K = TypeVar("K")
V = TypeVar("V")
GlobalPlan = tuple[list[SavePlan], Metadata]


@dataclass(frozen=True)
class NamedPlan(SavePlan):
    """A plan, or with ``usable=False`` only the names of one.

    Attributes:
        local: Name of the sender's local plan; in an answer, the one that the coordinator now knows.
        final: Name of what this rank writes: has at hand, or is told.
    """

    local: str = ""
    final: str = ""


def name_of(plan: SavePlan, settings: str) -> str:
    """Return the name of a plan: 128 bits of its items, its planner data and the settings it was made with."""
    content = [settings, [_describe(item) for item in plan.items], plan.planner_data]
    return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(content, enc_hook=_as_pickle))


def _describe(item: WriteItem) -> list[Any]:
    """Return what makes two items equal. Whether memory is pinned is left out: it changes nothing that is written."""
    index, data = item.index, item.tensor_data
    where = [index.fqn, None if index.offset is None else list(index.offset), index.index, item.type.name]
    if data is None:
        return [*where, item.bytes_io_data.nbytes if item.bytes_io_data else None]
    kept = data.properties
    properties = [str(kept.dtype), str(kept.layout), kept.requires_grad, str(kept.memory_format)]
    chunk = None if data.chunk is None else [list(data.chunk.offsets), list(data.chunk.sizes)]
    return [*where, list(data.size), chunk, *properties, getattr(kept, "strides", None)]


def _as_pickle(value: Any) -> bytes:
    return pickle.dumps(value)  # planner data of a user's own making; it has to cross processes in any case


class _Recent(Generic[K, V]):
    """The entries that were used last; the oldest goes when there are too many."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._most = most
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: K, value: V) -> None:
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            if len(self._entries) > self._most:
                self._entries.popitem(last=False)


@dataclass
class Known:
    """On a rank: what to write for a local plan that the coordinator knows."""

    plan: SavePlan
    final: str
    unanswered: bool = False  # offered by name, and nothing came back yet


@dataclass(frozen=True)
class Offer:
    """What a rank sent of its local plan, and what it has at hand for it."""

    sent: NamedPlan
    known: Known | None


@dataclass(frozen=True)
class PlanCache:
    """What one process remembers of plans, as a rank and as a coordinator."""

    known: _Recent[str, Known] = field(default_factory=_Recent)
    local: defaultdict[int, _Recent[str, SavePlan]] = field(
        default_factory=lambda: defaultdict(lambda: _Recent(MOST_KEPT_OF_A_RANK))
    )
    made: _Recent[tuple[str, ...], tuple[GlobalPlan, list[str]]] = field(default_factory=_Recent)

    # --- on every rank -------------------------------------------------------------------------------------------

    def offer(self, plan: SavePlan, settings: str) -> Offer:
        """Return what is to be sent of a local plan: all of it, or its name if the coordinator knows it."""
        local = name_of(plan, settings)
        known = self.known.get(local)
        if known is None or known.unanswered:
            return Offer(_named(plan, local, ""), None)
        known.unanswered = True
        return Offer(NamedPlan([], usable=False, local=local, final=known.final), known)

    def accept(self, answer: SavePlan, offer: Offer, settings: str) -> SavePlan:
        """Return what is to be written by the coordinator's answer.

        Raises:
            BadPlan: The answer names a plan that this rank does not have; save again.
        """
        known, local = offer.known, offer.sent.local
        if answer.usable:
            # A storage writer may have changed the items: then they are not what the coordinator named.
            kept = isinstance(answer, NamedPlan) and answer.local == local and answer.final
            if kept and name_of(answer, settings) == kept:
                self.known.put(local, Known(answer, kept))
            return answer
        if known is None or not isinstance(answer, NamedPlan) or answer.final != known.final:
            raise BadPlan(
                "(all)", "the coordinator answered with a cached plan that this rank does not have; save again"
            )
        known.unanswered = False
        storage_data = known.plan.storage_data if answer.storage_data is None else answer.storage_data
        return dataclasses.replace(known.plan, storage_data=storage_data)

    # --- on the coordinator --------------------------------------------------------------------------------------

    def answer(
        self, offers: list[SavePlan], settings: str, make: Callable[[list[SavePlan]], GlobalPlan]
    ) -> tuple[list[SavePlan], GlobalPlan]:
        """Return what is sent to each rank, and the global plan.

        Args:
            offers: What the ranks sent.
            settings: Of the planner.
            make: Makes the global plan of full local plans; what it raises leaves the cache as it was.

        Raises:
            BadPlan: A rank named a plan that this coordinator does not know; the next save sends it in full.
        """
        plans = [self._full(rank, offer) for rank, offer in enumerate(offers)]
        names = [self._checked(offer, settings) for offer in offers]
        key = tuple(names)
        made = self.made.get(key) if all(names) else None
        if made is None:
            whole = make(plans)
            made = (whole, [name_of(plan, settings) for plan in whole[0]])
            if all(names):
                self.made.put(key, made)
        (finals, metadata), final_names = made
        for rank, (plan, name) in enumerate(zip(plans, names, strict=True)):
            if name:
                self.local[rank].put(name, plan)
        answers: list[SavePlan] = []
        for offer, plan, name, final in zip(offers, finals, names, final_names, strict=True):
            at_hand = isinstance(offer, NamedPlan) and not offer.usable and offer.final == final
            empty = NamedPlan([], usable=False, local=name, final=final)
            answers.append(empty if at_hand else _named(plan, name, final))
        # The storage writer fills the metadata in, so that every save needs one of its own.
        own = dataclasses.replace(metadata, state_dict_metadata=dict(metadata.state_dict_metadata))
        return answers, (finals, own)

    def _full(self, rank: int, offer: SavePlan) -> SavePlan:
        if offer.usable:
            return offer
        plan = self.local[rank].get(offer.local) if isinstance(offer, NamedPlan) else None
        if plan is None:
            reason = (
                f"rank {rank} left out a plan which this coordinator does not know; save again, it will be sent in full"
            )
            raise BadPlan("(all)", reason)
        return plan

    @staticmethod
    def _checked(offer: SavePlan, settings: str) -> str:
        """Return the name of an offer; none if what came is not what was named, because a writer changed it."""
        if not isinstance(offer, NamedPlan):
            return ""
        return offer.local if not offer.usable or name_of(offer, settings) == offer.local else ""


def _named(plan: SavePlan, local: str, final: str) -> NamedPlan:
    return NamedPlan(plan.items, plan.storage_data, plan.planner_data, plan.usable, local=local, final=final)


# One for the process, because planners are made anew for every save.
PROCESS_CACHE: Final = PlanCache()
