"""Messages of images that come in waves; the rest, and the rule of change, are in :mod:`ckptd.protocol.messages`."""

from __future__ import annotations

from ckptd.protocol.wire import Count, Hash, Message, Name, NBytes, Rank, Seconds, Sequence


class WaveSealed(Message, frozen=True, tag="wave_sealed"):
    """A slot holds the bytes of an image from ``begin`` on; more waves follow, and Sealed with the last.

    Answer: SlotFreed, once they are in the file. The same bytes stand in the slot's control area.
    """

    sequence: Sequence
    checkpoint_id: Name
    digest: Name
    arena: int
    slot: int
    control_bytes: NBytes
    image_bytes: NBytes
    begin: NBytes
    nbytes: NBytes


class WriteWaveTask(Message, frozen=True, tag="write_wave_task"):
    """Write one wave of a rank's image from its slot to its place in ``directory/file``. ``first``: make the file."""

    arena_path: Name
    wave_offset: NBytes  # in the arena
    nbytes: NBytes
    directory: Name
    file: Name
    begin: NBytes
    image_bytes: NBytes
    first: bool
    threads: Count
    chunk_bytes: NBytes


class FinishWavesTask(Message, frozen=True, tag="finish_waves_task"):
    """All waves of a rank's image are in ``directory/file``: make it durable. Answer: WriteDone, with these hashes."""

    plan_path: Name
    rank: Rank
    object_bytes: bytes
    directory: Name
    file: Name
    image_bytes: NBytes
    hashes: bytes
    frame_hash: Hash
    write_s: Seconds
    direct: bool


class WaveWritten(Message, frozen=True, tag="wave_written"):
    """The wave is in the file, and is lost with no process; the file is yet to be synced."""

    write_s: Seconds
    direct: bool
