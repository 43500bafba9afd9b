"""From any format to any other: what a path holds, and what a name asks for. Torch is loaded for its files only."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from ckptd.checkpoint.formats.checkpoint import CheckpointSource
from ckptd.checkpoint.formats.dcp_target import write_checkpoint
from ckptd.checkpoint.formats.output import check_free
from ckptd.checkpoint.formats.safetensors import (
    SHARD_BYTES,
    SUFFIX,
    SafetensorsSource,
    write_file,
    write_folder,
)
from ckptd.checkpoint.formats.source import Source, Subset
from ckptd.checkpoint.names import INDEX_NAME, METADATA_NAME
from ckptd.checkpoint.system import named
from ckptd.protocol.errors import BadConfig, BadFile, UnknownCheckpoint, Unsupported

TORCH_SUFFIXES: Final = (".pt", ".pth", ".bin", ".ckpt")
_ZIP: Final = b"PK\3\4"
_PICKLE: Final = b"\x80"  # torch before 1.6


class Format(StrEnum):
    """What a checkpoint can be."""

    DCP = "dcp"
    TORCH = "torch"
    SAFETENSORS = "safetensors"


@dataclass(frozen=True)
class Wish:
    """How a conversion is wanted.

    Attributes:
        overwrite: Replace what exists.
        trust: Run pickles whatever classes they name.
        tensors_only: Leave out what is no tensor; otherwise a format that cannot hold it is refused.
        shard_bytes: Most bytes of values in one file of a safetensors folder.
    """

    overwrite: bool = False
    trust: bool = False
    tensors_only: bool = False
    shard_bytes: int = SHARD_BYTES


def format_of(path: str) -> Format:
    """Return what a path holds, by what is in it.

    Raises:
        UnknownCheckpoint: Nothing is there, or nothing known.
        BadFile: The file is of no known format.
        SystemCallFailed: It cannot be read.
    """
    if os.path.isdir(path):
        found = named("listdir", path, lambda: os.listdir(path))
        if INDEX_NAME in found or METADATA_NAME in found:
            return Format.DCP
        if any(name.endswith(SUFFIX) for name in found):
            return Format.SAFETENSORS
        raise UnknownCheckpoint(path)
    if not os.path.isfile(path):
        named("stat", path, lambda: os.stat(path))  # says what the system has against it
        raise BadFile(path, "it is no regular file")
    start = named("read", path, lambda: _start(path))
    if start.startswith((_ZIP, _PICKLE)):
        return Format.TORCH
    if path.endswith(SUFFIX) or start[8:9] == b"{":
        return Format.SAFETENSORS
    raise BadFile(path, "it is neither a torch.save nor a safetensors file")


def format_named(path: str) -> Format:
    """Return what a path is to become, by its name: a suffix for a file, none for a checkpoint's directory.

    Raises:
        BadConfig: The name does not tell.
    """
    suffix = os.path.splitext(path.rstrip("/"))[1]
    if suffix == SUFFIX:
        return Format.SAFETENSORS
    if suffix in TORCH_SUFFIXES:
        return Format.TORCH
    if suffix[1:].isdigit() or not suffix:  # step.100
        return Format.DCP
    raise BadConfig(path, f"the suffix {suffix} tells no format; give one with --to")


def open_source(path: str, *, trust: bool = False) -> Source:
    """Open a checkpoint, a torch.save file, or a safetensors file or folder.

    Args:
        path: The file or the directory.
        trust: Run the pickle of a torch.save file whatever classes it names.

    Raises:
        CkptdError: It is not there, not known, or damaged.
    """
    match format_of(path):
        case Format.DCP:
            return CheckpointSource(path)
        case Format.SAFETENSORS:
            return SafetensorsSource(path)
        case Format.TORCH:
            from ckptd.checkpoint.formats.torch_source import TorchSource

            return TorchSource(path, trust=trust)


def convert(
    source: Source, path: str, to: Format, *, wish: Wish = Wish(), done: Callable[[int], None] = lambda _: None
) -> None:
    """Write a source in another format; it appears whole or not at all.

    Args:
        source: What to convert.
        path: A directory for DCP, a file for torch; for safetensors a file if the name ends so, else a folder.
        to: The format.
        wish: How.
        done: Called with bytes of tensors written, again and again.

    Raises:
        OutputExists: ``path`` is taken.
        Unsupported: The format cannot hold what the source has.
        BadConfig: The output would lie in the source.
        CkptdError: Bytes are missing or wrong, or could not be written; nothing was changed.
    """
    check_free(path, overwrite=wish.overwrite)
    _check_apart(source.path, path)
    objects = [entry.name for entry in source.entries if entry.is_object]
    if objects and wish.tensors_only:
        source = Subset(source, [entry for entry in source.entries if not entry.is_object])
    match to:
        case Format.DCP:
            write_checkpoint(source, path, overwrite=wish.overwrite, done=done)
        case Format.TORCH:
            from ckptd.checkpoint.formats.torch_target import write_torch_file

            write_torch_file(source, path, overwrite=wish.overwrite, trust=wish.trust, done=done)
        case Format.SAFETENSORS:
            if objects and not wish.tensors_only:
                what = f"{len(objects)} entries that are no tensors ({objects[0]} ...) in a safetensors file"
                raise Unsupported(what, "leave them out with --tensors-only")
            if path.endswith(SUFFIX):
                write_file(source, path, overwrite=wish.overwrite, done=done)
            else:
                write_folder(source, path, shard_bytes=wish.shard_bytes, overwrite=wish.overwrite, done=done)


def _check_apart(source: str, target: str) -> None:
    """Refuse an output that is the input or lies in it."""
    one, other = os.path.realpath(source), os.path.realpath(target)
    if one == other or os.path.commonpath([one, other]) == one:
        raise BadConfig(target, f"it would be written into {source}; choose another place")


def _start(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(16)
