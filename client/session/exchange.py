"""Steps that the ranks of a process group take together, through the group's key-value store and no collective.

In a step every rank makes something, the coordinator (rank 0) looks at all of it and answers each rank. Invariant: a
step ends alike on all ranks, with what each was answered or with the same error; no wait is without a deadline.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, cast

import msgspec
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ckptd.protocol.errors import (
    CkptdError,
    DeadlineExceeded,
    ErrorReport,
    RankFailed,
    UnexpectedError,
    Unsupported,
    for_rank,
    from_report,
)

logger = logging.getLogger(__name__)

COORDINATOR: Final = 0

# TCPStore's libuv server refuses values of more than 8 MiB (TCPStoreLibUvBackend.cpp, MAX_PAYLOAD_LEN).
_PART_BYTES: Final = 4 << 20
_COMPRESS_FROM_BYTES: Final = 64 << 10  # plans shrink to a tenth; below one packet nothing is gained
_HEAD: Final = struct.Struct("<I?")  # number of parts, whether they are compressed together
# An answer mostly comes within milliseconds; later, 256 ranks that ask ten times a second are no load for the store.
_FIRST_PAUSE_S: Final = 0.001
_LONGEST_PAUSE_S: Final = 0.1
_LAST_BEAT_S: Final = 5.0  # a store that does not answer is not waited for for longer
_GOOD, _BAD = b"+", b"-"


class Store(Protocol):
    """The part of torch's Store that is used; it takes bytes, though its stubs say text."""

    def set(self, key: str, value: bytes) -> None:
        """Set a key."""

    def get(self, key: str) -> bytes:
        """Return the value of a key that is set."""

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are set."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number, 0 at first, and return the sum."""

    def delete_key(self, key: str) -> bool:
        """Remove a key."""


@dataclass(frozen=True)
class Patience:
    """How long ranks wait for each other, in seconds.

    Attributes:
        step_s: For a rank that has not come yet, or does not come to an end; torch's own default for a group.
        silence_s: For a rank that has come and gives no more sign of life: its process ended or is stopped.
        beat_s: Between two signs of life, and between two looks at those of others.
    """

    step_s: float = 1800.0
    silence_s: float = 60.0
    beat_s: float = 2.0


@dataclass(frozen=True)
class Place:
    """Who this process is among the ranks, and where they meet. ``store`` is None where there is one rank only."""

    rank: int = 0
    world_size: int = 1
    store: Store | None = None
    prefix: str = ""


# How many exchanges this process has begun per group: all ranks begin them in the same order.
_begun: dict[str, int] = {}


def place_in(group: dist.ProcessGroup | None, *, no_dist: bool) -> Place:
    """Return this process's place in a group, with keys that no other exchange uses.

    Args:
        group: The ranks; None is the default group.
        no_dist: Be alone, whatever groups there are.

    Raises:
        Unsupported: This process is not in the group; do not call from here.
    """
    if no_dist or not dist.is_available() or not dist.is_initialized():
        return Place()
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise Unsupported("a call from outside the process group", "call it on the ranks of the group alone")
    if world_size == 1:
        return Place()
    ranks = "-".join(str(r) for r in dist.get_process_group_ranks(group or dist.group.WORLD))
    where = ranks if len(ranks) < 200 else f"{zlib.crc32(ranks.encode()):08x}-{world_size}"
    _begun[where] = _begun.get(where, 0) + 1
    return Place(rank, world_size, cast(Store, _get_default_store()), f"ckptd/exchange/{where}/{_begun[where]}")


class Exchange:
    """Some steps of a group of ranks; use it as a context, so that others see that this rank lives."""

    def __init__(self, place: Place, *, patience: Patience | None = None) -> None:
        self.rank, self.world_size = place.rank, place.world_size
        self._patience = patience or Patience()
        self._line = _Line(place.store, place.prefix, self._patience) if place.store is not None else None
        self._beats = _Beats(self._line, place, self._patience.beat_s) if self._line is not None else None

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank answers the others."""
        return self.rank == COORDINATOR

    def __enter__(self) -> Exchange:
        if self._beats is not None:
            self._beats.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._beats is not None:
            # Whoever is torn out of a step just falls silent, so that nobody goes on waiting for it to come.
            self._beats.stop(orderly=kind is None or issubclass(kind, CkptdError))

    def together(
        self, step: str, make: Callable[[], bytes], answer: Callable[[list[bytes]], list[bytes]] | None = None
    ) -> bytes:
        """Take one step.

        Args:
            step: Its name; another one for each step of an exchange.
            make: Makes this rank's part.
            answer: Given all ranks' parts, returns what each is answered; runs on the coordinator. None: an empty
                answer, to agree that all are done.

        Returns:
            What this rank was answered.

        Raises:
            CkptdError: A rank's part, or the answer, could not be made; the first such rank's error, on all ranks.
                Alone, the error is raised as it is.
            DeadlineExceeded, RankFailed: A rank did not come, or went away.
        """
        if self._line is None:
            part = make()
            return answer([part])[0] if answer is not None else b""
        part, failure = self._try(make)
        if self.is_coordinator:
            return self._coordinate(step, part, answer, failure)
        return self._attend(step, part, failure)

    def _attend(self, step: str, part: bytes, failure: BaseException | None) -> bytes:
        assert self._line is not None
        self._line.post(f"{step}/part/{self.rank}", part)
        _raise_if_interrupted(failure)
        try:
            return _opened(self._line.take_answer(f"{step}/answer/{self.rank}", step))
        except CkptdError as error:
            raise error from failure

    def _try(self, make: Callable[[], bytes]) -> tuple[bytes, BaseException | None]:
        try:
            return _GOOD + make(), None
        except CkptdError as error:
            return _closed(for_rank(self.rank, error)), error
        except Exception as error:  # noqa: BLE001  # the other ranks must hear of it
            return _closed(for_rank(self.rank, UnexpectedError(repr(error)))), error
        except BaseException as error:  # noqa: BLE001  # raised again by the caller
            return _closed(for_rank(self.rank, UnexpectedError(f"interrupted by {error!r}"))), error

    def _coordinate(
        self,
        step: str,
        part: bytes,
        answer: Callable[[list[bytes]], list[bytes]] | None,
        failure: BaseException | None,
    ) -> bytes:
        assert self._line is not None
        try:
            # Whoever was interrupted waits for nobody, but tells the others.
            sealed = [part] if _is_interruption(failure) else self._line.take_parts(step, part, self.world_size)
            answers, failure = self._answered([_opened(one) for one in sealed], answer, failure)
        except CkptdError as error:
            answers = [_closed(error)] * self.world_size
        for rank in range(self.world_size):
            if rank != self.rank:
                self._line.post(f"{step}/answer/{rank}", answers[rank])
        _raise_if_interrupted(failure)
        try:
            return _opened(answers[self.rank])
        except CkptdError as error:
            raise error from failure

    def _answered(
        self,
        parts: list[bytes],
        answer: Callable[[list[bytes]], list[bytes]] | None,
        failure: BaseException | None,
    ) -> tuple[list[bytes], BaseException | None]:
        if answer is None:
            return [_GOOD] * self.world_size, failure
        made: list[bytes] = []

        def make() -> bytes:
            made.extend(_GOOD + one for one in answer(parts))
            if len(made) != self.world_size:
                raise UnexpectedError(f"{len(made)} answers for {self.world_size} ranks")
            return b""

        sealed, failure = self._try(make)
        return (made, None) if failure is None else ([sealed] * self.world_size, failure)


class _Line:
    """Keys of one exchange in the store."""

    def __init__(self, store: Store, prefix: str, patience: Patience) -> None:
        self._store, self._prefix, self._patience = store, prefix, patience
        self._seen: dict[int, tuple[bytes, float]] = {}  # last sign of life of a rank, and when it changed

    def post(self, name: str, data: bytes) -> None:
        """Put a value of any size under a name. Raises CkptdError if the store is gone."""
        compressed = len(data) >= _COMPRESS_FROM_BYTES
        if compressed:
            data = zlib.compress(data, 1)
        parts = [data[begin : begin + _PART_BYTES] for begin in range(0, len(data), _PART_BYTES)] or [b""]
        with _store_errors():
            for number, part in enumerate(parts[1:], 1):
                self._store.set(f"{self._prefix}/{name}/{number}", part)
            self._store.set(f"{self._prefix}/{name}", _HEAD.pack(len(parts), compressed) + parts[0])

    def take_parts(self, step: str, own: bytes, world_size: int) -> list[bytes]:
        """Return all ranks' parts, as the coordinator. Raises RankFailed if one does not come."""
        until = time.monotonic() + self._patience.step_s
        parts = [own]
        for rank in range(COORDINATOR + 1, world_size):
            self._wait(f"{step}/part/{rank}", rank, step, come_by=until, end_by=until)
            parts.append(self._take(f"{step}/part/{rank}"))
        return parts

    def take_answer(self, name: str, step: str) -> bytes:
        """Return what the coordinator answers; once it has come, it waits for all others. Raises RankFailed."""
        come_by = time.monotonic() + self._patience.step_s
        end_by = come_by + self._patience.step_s + self._patience.silence_s
        self._wait(name, COORDINATOR, step, come_by=come_by, end_by=end_by)
        return self._take(name)

    def _take(self, name: str) -> bytes:
        """Remove a value that is there, and return it."""
        with _store_errors():
            head = self._store.get(f"{self._prefix}/{name}")
            count, compressed = _HEAD.unpack_from(head)
            rest = [f"{self._prefix}/{name}/{number}" for number in range(1, count)]
            data = head[_HEAD.size :] + b"".join(self._store.get(key) for key in rest)
            for key in [f"{self._prefix}/{name}", *rest]:
                self._store.delete_key(key)
        return zlib.decompress(data) if compressed else data

    def _wait(self, name: str, sender: int, step: str, *, come_by: float, end_by: float) -> None:
        # Asked again and again: TCPStore's own wait logs two warnings whenever its time is over, and keeps our own
        # beats from going out for so long.
        pause_s, look_at = _FIRST_PAUSE_S, time.monotonic()
        while not self._is_there(f"{self._prefix}/{name}"):
            now = time.monotonic()
            if now >= look_at:
                look_at = now + self._patience.beat_s
                self._look(sender, step, now, come_by=come_by, end_by=end_by)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _is_there(self, key: str) -> bool:
        with _store_errors():
            return self._store.check([key])

    def _look(self, sender: int, step: str, now: float, *, come_by: float, end_by: float) -> None:
        """Raise RankFailed if there is no more hope for a rank."""
        silent_s = self._silent_s(sender, now)
        if silent_s is not None and silent_s > self._patience.silence_s:
            raise _failed(sender, f"{step}: no sign of life of this rank", silent_s)
        if now > (come_by if silent_s is None else end_by):
            raise _failed(sender, f"{step}: this rank did not come, or not to an end", self._patience.step_s)

    def _silent_s(self, rank: int, now: float) -> float | None:
        """Return for how long a rank has given no sign of life; None if it never has."""
        key = self.beat_key(rank)
        if not self._is_there(key):
            return None
        with _store_errors():
            beat = self._store.get(key)
        last, since = self._seen.get(rank, (b"", now))
        if beat != last:
            self._seen[rank] = (beat, now)
            return 0.0
        return now - since

    def beat_key(self, rank: int) -> str:
        """Return the key of a rank's signs of life."""
        return f"{self._prefix}/beat/{rank}"

    def beat(self, rank: int, number: int) -> None:
        """Give a sign of life."""
        self._store.set(self.beat_key(rank), str(number).encode())

    def leave(self, world_size: int) -> None:
        """Leave in order; the last to do so clears up: a sign of life may be read until then, and a read would wait."""
        if self._store.add(f"{self._prefix}/left", 1) == world_size:
            for key in [*map(self.beat_key, range(world_size)), f"{self._prefix}/left"]:
                self._store.delete_key(key)


class _Beats:
    """A thread that shows the other ranks that this one lives, whatever its main thread does."""

    def __init__(self, line: _Line, place: Place, beat_s: float) -> None:
        self._line, self._beat_s = line, beat_s
        self._rank, self._world_size = place.rank, place.world_size
        self._done, self._orderly = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="ckptd-beats", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _run(self) -> None:
        number = 0
        try:
            while True:
                self._line.beat(self._rank, number)
                number += 1
                if self._done.wait(self._beat_s):
                    break
            if self._orderly:
                self._line.leave(self._world_size)
        except RuntimeError as error:  # the store is gone, and with it whoever could look
            logger.debug("rank %d gives no more signs of life: %s", self._rank, error)

    def stop(self, *, orderly: bool) -> None:
        """End; in order: leave nothing in the store."""
        self._orderly = orderly
        self._done.set()
        self._thread.join(timeout=_LAST_BEAT_S)


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    """Turn the errors of a store that is gone into ours."""
    try:
        yield
    except RuntimeError as error:  # DistNetworkError, and what a file store makes of a file that is gone
        lost = f"the process group's store is gone ({error}); its host, rank 0 mostly, has ended"
        raise RankFailed(COORDINATOR, UnexpectedError.code, lost) from None


def _closed(error: CkptdError) -> bytes:
    return _BAD + msgspec.msgpack.encode(error.report())


def _opened(sealed: bytes) -> bytes:
    if sealed[:1] == _BAD:
        raise from_report(msgspec.msgpack.decode(sealed[1:], type=ErrorReport))
    return sealed[1:]


def _failed(rank: int, what: str, after_s: float) -> RankFailed:
    cause = DeadlineExceeded(what, after_s)
    return RankFailed(rank, cause.code, str(cause))


def _is_interruption(failure: BaseException | None) -> bool:
    """Return whether it is Ctrl-C or the like, which no step turns into an error."""
    return failure is not None and not isinstance(failure, Exception)


def _raise_if_interrupted(failure: BaseException | None) -> None:
    if failure is not None and _is_interruption(failure):
        raise failure
