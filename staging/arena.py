"""One rank's arena: a file on tmpfs that holds a header and some slots. Maps and touches memory, copies no tensor.

Layout of the file, in bytes::

    [0, 4096)                              header: magic, version, slots, slot size; then one state word per slot
    [4096 + i * slot_bytes, ... + slot)    slot i: control area (the encoded seal), then the image

Invariant: every page is reserved when the arena is made, so that no later access can end in SIGBUS.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import Final

from ckptd.protocol.errors import BadMessage, ShmTooSmall, SystemCallFailed

# O_DIRECT needs offset, length and address aligned to the device's logical block size; 4096 covers every NVMe format
# in use. Source: open(2), NOTES, "O_DIRECT".
ALIGNMENT_BYTES: Final = 4096
HEADER_BYTES: Final = 4096
MAX_SLOTS: Final = 128

_MAGIC: Final = b"ckptd\x00\x00\x01"
_HEADER: Final = struct.Struct("<8sIIQ")
_STATE: Final = struct.Struct("<IIQ")  # state, length of the seal, sequence
_STATES_OFFSET: Final = 64
# The daemon reads as much as a trainer's slot claims to hold: 64 MiB are a seal over 8,000,000 objects.
_SEAL_LENGTH_LIMIT: Final = 1 << 26
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14, asm-generic/mman-common.h; Python 3.11 has no name for it

_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2  # linux/falloc.h

_libc = ctypes.CDLL(None, use_errno=True)


class SlotState(IntEnum):
    """Who owns a slot. FREE, STAGING and RETAINED: the client; SEALED and PERSISTING: the daemon.

    RETAINED is free, but still holds a committed image that loads may read.
    """

    FREE = 0
    STAGING = 1
    SEALED = 2
    PERSISTING = 3
    RETAINED = 4


def arena_bytes(slots: int, slot_bytes: int) -> int:
    """Return the size of an arena file in bytes."""
    return HEADER_BYTES + slots * slot_bytes


def slot_offset(slot: int, slot_bytes: int) -> int:
    """Return where a slot begins in its arena file, in bytes."""
    return HEADER_BYTES + slot * slot_bytes


def available_bytes(directory: str) -> int:
    """Return how many bytes a new arena in ``directory`` may have: free room on the tmpfs, and free memory."""
    volume = os.statvfs(directory)
    free = volume.f_bavail * volume.f_frsize
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return min(free, int(line.split()[1]) * 1024)
    return free


def create_arena(path: str, *, slots: int, slot_bytes: int, owner: tuple[int, int] | None = None) -> int:
    """Make an arena file, reserve all its pages and return its descriptor.

    Args:
        path: File to make; must not exist.
        slots: Number of slots, 1 to :data:`MAX_SLOTS`.
        slot_bytes: Size of a slot in bytes, a multiple of :data:`ALIGNMENT_BYTES`.
        owner: uid and gid that the file is given to; None keeps ours.

    Raises:
        ShmTooSmall: It does not fit; nothing is left behind.
        BadMessage: Slots or size are out of bounds.
        SystemCallFailed: The file cannot be made.
    """
    if not 1 <= slots <= MAX_SLOTS or slot_bytes % ALIGNMENT_BYTES or slot_bytes <= 0:
        raise BadMessage(f"an arena of {slots} slots of {slot_bytes} bytes")
    directory = os.path.dirname(path)
    size = arena_bytes(slots, slot_bytes)
    free = available_bytes(directory)
    if size > free:
        raise ShmTooSmall(directory, size, free)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SystemCallFailed("open", path, error.errno or 0) from None
    try:
        if owner is not None:
            os.fchown(descriptor, *owner)
        os.posix_fallocate(descriptor, 0, size)
        os.pwrite(descriptor, _HEADER.pack(_MAGIC, 1, slots, slot_bytes), 0)
    except OSError as error:
        os.close(descriptor)
        os.unlink(path)
        if error.errno == errno.ENOSPC:
            raise ShmTooSmall(directory, size, free) from None
        raise SystemCallFailed("fallocate", path, error.errno or 0) from None
    return descriptor


def discard_pages(descriptor: int) -> None:
    """Give back the pages of an arena that nobody uses any more, though a worker may still have it mapped.

    A mapping keeps a removed file's pages, and the next arena may need that room. Where the system cannot do it, they
    go with the last mapping.
    """
    mode = _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE
    _libc.fallocate(descriptor, mode, ctypes.c_long(0), ctypes.c_long(os.fstat(descriptor).st_size))


def read_slot(descriptor: int, slot: int) -> tuple[SlotState, int, int]:
    """Return state, length of the seal and sequence of a slot, read by descriptor: no mapping, so no SIGBUS."""
    data = os.pread(descriptor, _STATE.size, _STATES_OFFSET + slot * _STATE.size)
    if len(data) < _STATE.size:
        return SlotState.FREE, 0, 0  # the client cut its own arena short: nothing in it can be used
    state, length, sequence = _STATE.unpack(data)
    known = state in SlotState._value2member_map_
    return (SlotState(state) if known else SlotState.FREE), length, sequence


def count_slots(descriptor: int) -> int:
    """Return how many slots an arena file has, read by descriptor; 0 for a file that is no arena."""
    data = os.pread(descriptor, _HEADER.size, 0)
    if len(data) < _HEADER.size:
        return 0
    magic, _, slots, _ = _HEADER.unpack(data)
    return int(slots) if magic == _MAGIC and slots <= MAX_SLOTS else 0


def read_seal(descriptor: int, slot: int, slot_bytes: int) -> bytes | None:
    """Return the encoded seal that stands in a slot's control area, or None if the slot is not sealed."""
    state, length, _ = read_slot(descriptor, slot)
    if state is not SlotState.SEALED or not 0 < length <= min(slot_bytes, _SEAL_LENGTH_LIMIT):
        return None
    return os.pread(descriptor, length, slot_offset(slot, slot_bytes))


def write_slot_state(descriptor: int, slot: int, state: SlotState, sequence: int = 0) -> None:
    """Set a slot's state by descriptor, as the daemon does."""
    os.pwrite(descriptor, _STATE.pack(state, 0, sequence), _STATES_OFFSET + slot * _STATE.size)


def hold(descriptor: int) -> int:
    """Mark an arena as in use by this process, until the returned descriptor is closed or the process is dead.

    The mark is a lock that the kernel drops, whatever kills us. It needs a file description of its own: the one that
    came from the daemon is shared with it.

    Raises:
        SystemCallFailed: The arena cannot be opened anew.
    """
    path = f"/proc/self/fd/{descriptor}"
    try:
        own = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(own, fcntl.LOCK_SH)
    except OSError as error:
        raise SystemCallFailed("flock", path, error.errno or 0) from None
    _holds.add(own)
    return own


def let_go(own: int) -> None:
    """Take the mark of :func:`hold` back."""
    if own in _holds:
        _holds.remove(own)
        os.close(own)


def _let_all_go() -> None:
    """A forked child, a data loader's worker say, may outlive the trainer: the mark must not."""
    for own in list(_holds):
        let_go(own)


_holds: set[int] = set()
os.register_at_fork(after_in_child=_let_all_go)


def is_held(descriptor: int) -> bool:
    """Return whether a process other than the one asking marks the arena as in use; see :func:`hold`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


def open_arena(path: str, *, slots: int, slot_bytes: int) -> int | None:
    """Open an arena that another process has made; return its descriptor, or None if it is no such arena any more."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    head = os.pread(descriptor, _HEADER.size, 0)
    whole = os.fstat(descriptor).st_size == arena_bytes(slots, slot_bytes)
    if head != _HEADER.pack(_MAGIC, 1, slots, slot_bytes) or not whole:
        os.close(descriptor)
        return None
    return descriptor


def touch(memory: mmap.mmap, *, threads: int) -> None:
    """Bring every page of a mapping into this process, in parallel.

    The first touch of shared memory runs at 0.2-0.6 GB/s on a virtual machine, the copies after it at 17-20 GB/s, so
    it is done before the first save.
    """
    address, size = ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory)
    share = -(-size // threads // mmap.PAGESIZE) * mmap.PAGESIZE

    def populate(begin: int) -> None:
        length = min(share, size - begin)
        populated = _libc.madvise(
            ctypes.c_void_p(address + begin), ctypes.c_size_t(length), ctypes.c_int(_MADV_POPULATE_WRITE)
        )
        if populated != 0:  # Linux before 5.14: write one byte of each page
            for offset in range(begin, begin + length, mmap.PAGESIZE):
                memory[offset] = memory[offset]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(populate, range(0, size, share)))


class ArenaView:
    """A client's mapping of its arena.

    Args:
        descriptor: The arena's file; owned by this object from now on.
        arena: Number by which client and daemon call this arena.
        slots: Number of slots.
        slot_bytes: Size of a slot in bytes.
    """

    def __init__(self, descriptor: int, *, arena: int, slots: int, slot_bytes: int) -> None:
        self.arena, self.slots, self.slot_bytes = arena, slots, slot_bytes
        self._descriptor = descriptor
        self._hold = hold(descriptor)
        self.memory = mmap.mmap(descriptor, arena_bytes(slots, slot_bytes))

    @property
    def address(self) -> int:
        """Address of the first byte of the mapping."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def touch(self, *, threads: int = 2) -> None:
        """Bring all pages into this process; see :func:`touch`."""
        touch(self.memory, threads=threads)

    def offset(self, slot: int) -> int:
        """Return where a slot begins in :attr:`memory`, in bytes."""
        return slot_offset(slot, self.slot_bytes)

    def set_state(self, slot: int, state: SlotState, *, sequence: int = 0, seal: bytes = b"") -> None:
        """Set a slot's state; a seal is written into the control area before the state says so."""
        if seal:
            begin = self.offset(slot)
            self.memory[begin : begin + len(seal)] = seal
        at = _STATES_OFFSET + slot * _STATE.size
        self.memory[at : at + _STATE.size] = _STATE.pack(state, len(seal), sequence)

    def close(self) -> None:
        """Give the descriptor back; the mapping goes when the last view of it goes."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            let_go(self._hold)
            self._descriptor = -1

    def remove_file(self) -> None:
        """Remove the arena's file, whose daemon is gone for good; where we may not, the next daemon does."""
        path = os.readlink(f"/proc/self/fd/{self._descriptor}")
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(self._descriptor)):
                os.unlink(path)

    def state(self, slot: int) -> SlotState:
        """Return a slot's state, as the daemon may have set it."""
        at = _STATES_OFFSET + slot * _STATE.size
        return SlotState(_STATE.unpack(self.memory[at : at + _STATE.size])[0])
