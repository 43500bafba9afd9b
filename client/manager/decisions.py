"""Decisions at step boundaries that are the same on all ranks: rank 0 decides, and the others do as it does.

A clock and a signal tell each rank something else; whoever saved alone would wait in vain for the others. So rank 0
writes each decision into the process group's store and goes on; the others read it at the same step. That is one small
message for each call and rank, and no rank waits but for rank 0 to reach the step. Without a store each rank decides
alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import msgspec

from ckptd.client.session.exchange import COORDINATOR, Patience, Place, Store
from ckptd.protocol.errors import DeadlineExceeded, UnexpectedError, for_rank

_FIRST_PAUSE_S: Final = 0.0005
_LONGEST_PAUSE_S: Final = 0.05
# Ranks are a few steps apart at most, because they exchange gradients; what is older has been read by all.
_KEPT: Final = 1024


class Decision(msgspec.Struct, frozen=True):
    """What happens at a step boundary. ``save``: a checkpoint is due; ``preempted``: a rank has been told to end."""

    save: bool
    preempted: bool


@dataclass
class Decisions:
    """The decisions of one group of ranks, in the order of their calls.

    Args:
        place: This process's place among the ranks.
        patience: How long to wait for rank 0.
    """

    place: Place
    patience: Patience = Patience()  # noqa: RUF009  # frozen
    _number: int = 0
    _said: bool = False

    def take(self, mine: Decision) -> Decision:
        """Return what all ranks do now.

        Args:
            mine: What this rank would do by itself; of ranks other than 0, only whether it is preempted counts.

        Raises:
            DeadlineExceeded, RankFailed: Rank 0 did not come, or the store is gone.
        """
        store = self.place.store
        if store is None:
            return mine
        self._number += 1
        try:
            if self.place.rank != COORDINATOR:
                return self._follow(store, mine)
            return self._lead(store, mine)
        except RuntimeError as error:
            if isinstance(error, DeadlineExceeded):
                raise
            raise for_rank(COORDINATOR, UnexpectedError(f"the process group's store is gone ({error})")) from None

    def _lead(self, store: Store, mine: Decision) -> Decision:
        flag = f"{self.place.prefix}/preempted"
        preempted = mine.preempted or store.check([flag])
        decision = Decision(mine.save or preempted, preempted)
        store.set(self._key(self._number), msgspec.json.encode(decision))
        if self._number > _KEPT:
            store.delete_key(self._key(self._number - _KEPT))
        return decision

    def _follow(self, store: Store, mine: Decision) -> Decision:
        if mine.preempted and not self._said:
            self._said = True
            store.set(f"{self.place.prefix}/preempted", b"1")
        key, begun, pause_s = self._key(self._number), time.monotonic(), _FIRST_PAUSE_S
        while not store.check([key]):
            waited_s = time.monotonic() - begun
            if waited_s > self.patience.step_s:
                raise DeadlineExceeded("a step boundary waits for rank 0 to reach it", waited_s)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return msgspec.json.decode(store.get(key), type=Decision)

    def _key(self, number: int) -> str:
        return f"{self.place.prefix}/decision/{number}"
