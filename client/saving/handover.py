"""Saves by a user's own planner or storage writer: staged here like any other save, carried out by a worker."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ckptd.checkpoint.user_code.handover import UserSave, offsets_of, pack
from ckptd.checkpoint.user_code.stand_in import Piece
from ckptd.client.saving.layout import RankLayout
from ckptd.client.saving.snapshot import Snapshot, Source, Structure, state_of
from ckptd.protocol.messages import Committed
from ckptd.staging.arena import ALIGNMENT_BYTES
from ckptd.staging.views import Placed

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlanner
    from torch.distributed.checkpoint.storage import StorageWriter

# By which the daemon's messages know the plan of a hand-over: there is none, the user's planner makes it.
HANDED_OVER: Final = "handed over"
_CODE: Final = "\0code"  # no key of a state dict: those are joined by dots from text
_CONTROL_BYTES: Final = 8192 + ALIGNMENT_BYTES  # as for any seal, and 8 bytes for the one object
_STEP_BYTES: Final = 4096


@dataclass(frozen=True)
class HandOver:
    """Who shall do a save. ``checkpoint_id``: as the user gave it; None leaves it to the writer."""

    checkpoint_id: str | None
    planner: SavePlanner
    writer: StorageWriter

    def __str__(self) -> str:
        return f"{type(self.planner).__name__} with {type(self.writer).__name__}"


@dataclass(frozen=True)
class HandOverSnapshot(Snapshot):
    """A look at a state dict that is handed over. ``sources`` are its tensors' pieces, and last the pickle."""

    pieces: list[Piece] = field(kw_only=True)


def take_hand_over(state_dict: Mapping[str, Any], hand_over: HandOver, *, last: Snapshot | None) -> HandOverSnapshot:
    """Look at a state dict, and pickle all of it but the tensors, with the planner and the writer.

    Args:
        state_dict: What shall be saved.
        hand_over: By whom.
        last: The hand-over before this one: what it reserved for the pickle is kept where it still fits.

    Raises:
        Unsupported: Something cannot be pickled or staged.
    """
    save = UserSave(hand_over.checkpoint_id, hand_over.planner, hand_over.writer, state_of(state_dict))
    packed = pack(save)
    capacity = 0 if last is None else last.capacities[_CODE]
    if not len(packed.code) <= capacity <= 4 * (len(packed.code) + _STEP_BYTES):
        capacity = -(-(len(packed.code) * 5 // 4) // _STEP_BYTES) * _STEP_BYTES
    structure = (HANDED_OVER, tuple(packed.pieces), capacity)
    sources: list[Source] = [*packed.sources, packed.code]
    return HandOverSnapshot(structure, [], [], [], sources, {_CODE: capacity}, pieces=packed.pieces)


def make_hand_over_layout(structure: Structure, snapshot: HandOverSnapshot) -> RankLayout:
    """Return where the pieces and the pickle of a hand-over are staged."""
    offsets, end = offsets_of(snapshot.pieces)
    placed = [
        Placed(offset, offset, piece.nbytes, b"", b"", piece.dtype, piece.sizes)
        for offset, piece in zip(offsets, snapshot.pieces, strict=True)
    ]
    begin = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    capacity = snapshot.capacities[_CODE]
    placed.append(Placed(begin, begin, capacity, b"", b"", None, ()))
    items = list(range(len(placed)))
    return RankLayout(structure, HANDED_OVER, items, placed, begin + capacity, _CONTROL_BYTES, begin)


def metadata_told(_checkpoint_id: str, committed: Committed) -> Metadata:
    """Return the metadata that the worker, which is of our own user, has sent."""
    return pickle.loads(committed.metadata)  # type: ignore[no-any-return]
