"""A save by a user's own planner or storage writer, as it crosses from the trainer to a worker.

The tensors of the state dict lie in a slot, one behind the other; everything else - the state dict around them, the
planner, the writer - is pickled behind them, with a number in each tensor's place. The worker puts views of the slot
where the numbers are. Only a worker under the user's own uid ever loads that pickle.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import cloudpickle
import torch
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from ckptd.checkpoint.planning.chunks import shape_of, written_chunks_of
from ckptd.checkpoint.user_code.stand_in import Piece, StagedShards, Stand
from ckptd.protocol.errors import BadMessage, Unsupported

# What a worker has of its own, and what differs from rank to rank: the worker plays them all.
_WORKERS_OWN: Final = frozenset({"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"})
_RANKS_OWN: Final = frozenset({"RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK"})

# Every dtype's alignment divides it, and torch's own allocator aligns so.
_ALIGNMENT_BYTES: Final = 64


@dataclass(frozen=True)
class UserSave:
    """What one rank hands over.

    Attributes:
        checkpoint_id: As the user gave it; None leaves it to the writer.
        planner: The user's planner, or ours.
        writer: The user's writer, or ours.
        state_dict: As the planner shall see it.
    """

    checkpoint_id: str | None
    planner: SavePlanner
    writer: StorageWriter
    state_dict: dict[str, Any]


@dataclass
class Packed:
    """A save ready to be staged.

    Attributes:
        sources: The tensors to copy, in the order of ``pieces``.
        pieces: What is staged of each.
        code: The pickle of all the rest.
    """

    sources: list[torch.Tensor] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    code: bytes = b""


def offsets_of(pieces: Sequence[Piece], *, begin: int = 0) -> tuple[list[int], int]:
    """Return where each piece begins in the image, none before ``begin``, and where the last one ends, in bytes."""
    offsets, end = [], begin
    for piece in pieces:
        offsets.append(-(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
        end = offsets[-1] + piece.nbytes
    return offsets, end


# --- in the trainer ----------------------------------------------------------------------------------------------


def pack(save: UserSave) -> Packed:
    """Take a save apart; copies no tensor.

    Raises:
        Unsupported: The planner, the writer or a value cannot be pickled, or a tensor cannot be staged.
    """
    packed = Packed()
    buffer = io.BytesIO()
    try:
        # Where its modules are found, what relative paths are relative to, and the keys of object stores, which stand
        # in the environment: all must be known before it is loaded. The daemon may have been started by anybody.
        environment = {name: value for name, value in os.environ.items() if name not in _WORKERS_OWN | _RANKS_OWN}
        pickle.dump((sys.path, os.getcwd(), environment), buffer)
        _Pickler(buffer, packed).dump(save)
    except Unsupported:
        raise
    except Exception as error:  # whatever pickle, or the user's own objects, have against it
        what = f"{type(save.planner).__name__} with {type(save.writer).__name__}: it cannot be pickled ({error})"
        raise Unsupported(
            what, "keep open files, locks and sockets out of the planner, the writer and the state dict"
        ) from error
    packed.code = buffer.getvalue()
    return packed


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]  # cloudpickle has no types
    """Pickles everything but tensors. Classes of the main script go by value: nobody runs it a second time."""

    def __init__(self, file: io.BytesIO, packed: Packed) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._packed = packed
        # By id; the tensor is kept, so that its id is not given to another one meanwhile.
        self._known: dict[int, tuple[int, Stand, torch.Tensor]] = {}

    def persistent_id(self, obj: Any) -> Any:
        """Return what stands for a tensor; None for anything else."""
        if not isinstance(obj, torch.Tensor):
            return None
        if id(obj) not in self._known:
            self._known[id(obj)] = (len(self._known), self._add(obj), obj)
        number, stand, _ = self._known[id(obj)]
        return number, stand

    def _add(self, tensor: torch.Tensor) -> Stand:
        chunks = written_chunks_of("a tensor that is handed over", tensor)
        pieces = tuple(Piece(chunk.data.dtype, chunk.offsets, chunk.sizes) for chunk in chunks)
        self._packed.sources.extend(chunk.data for chunk in chunks)
        self._packed.pieces.extend(pieces)
        whole = type(tensor) in {torch.Tensor, torch.nn.Parameter}
        return Stand(shape_of(tensor), tensor.dtype, tensor.requires_grad, whole, pieces)


# --- in the worker -----------------------------------------------------------------------------------------------


def unpack(image: memoryview, code: memoryview) -> UserSave:
    """Put a save together again; its tensors are views of ``image``.

    Args:
        image: The staged pieces; writable, so that torch takes it, and private, so that nobody is harmed.
        code: The pickle.

    Raises:
        BadMessage: The pickle does not fit the image.
        Exception: Whatever the user's modules raise when they are imported.
    """
    file = io.BytesIO(code)
    path, directory, environment = pickle.load(file)
    os.environ.update(environment)
    sys.path.extend(entry for entry in path if entry not in sys.path)
    os.chdir(directory)
    save = _Unpickler(file, image).load()
    if not isinstance(save, UserSave):
        raise BadMessage("a hand-over that holds no save")
    return save


class _Unpickler(pickle.Unpickler):
    """Puts views of the image where tensors were. They come in the order in which they were numbered."""

    def __init__(self, file: io.BytesIO, image: memoryview) -> None:
        super().__init__(file)
        self._image = torch.frombuffer(image, dtype=torch.uint8) if image.nbytes else torch.empty(0, dtype=torch.uint8)
        self._end = 0
        self._known: list[torch.Tensor] = []

    def persistent_load(self, pid: tuple[int, Stand]) -> torch.Tensor:
        """Return the tensor that a number stands for."""
        number, stand = pid
        if number == len(self._known):
            self._known.append(self._make(stand))
        return self._known[number]

    def _make(self, stand: Stand) -> torch.Tensor:
        parts = [self._view(piece) for piece in stand.pieces]
        return parts[0].requires_grad_(stand.requires_grad) if stand.whole else StagedShards(stand, parts)

    def _view(self, piece: Piece) -> torch.Tensor:
        offsets, end = offsets_of([piece], begin=self._end)
        if end > self._image.nbytes:
            raise BadMessage(f"a hand-over of {end} bytes in an image of {self._image.nbytes}")
        self._end = end
        return self._image[offsets[0] : end].view(piece.dtype).view(piece.sizes)
