"""Stock's ``.metadata`` read without torch, and without trusting it.

Two guards stand before the unpickler. A scan over the opcodes allows only those that a checkpoint's metadata
is made of, and no position of the memo that the file cannot fill: one flipped bit can turn REDUCE into
LONG_BINPUT, and CPython then allocates, and touches, up to 64 GiB. ``find_class`` knows a closed set of names
and gives stand-ins of our own, made anew for each file, so that a pickle which changes one changes no other.
What is left: a file made for the purpose can nest tuples until CPython's hash of them overflows the C stack.
Sources: torch/distributed/checkpoint/metadata.py of torch 2.3 to 2.13; Modules/_pickle.c, _Unpickler_MemoPut.
"""

from __future__ import annotations

import io
import pickle
import posixpath
import re
from typing import Final

from ckptd.checkpoint.collector import collector_paused
from ckptd.checkpoint.indexing.check import check_columns
from ckptd.checkpoint.indexing.columns import Index
from ckptd.checkpoint.stock.metadata_columns import StandIns, to_index
from ckptd.protocol.errors import BadIndex, Unsupported
from ckptd.staging.dtypes import by_name

__all__ = ["collector_paused", "decode_metadata", "scan_opcodes"]

_DCP: Final = "torch.distributed.checkpoint.metadata"
# torch before 2.3 had the properties of a tensor there; later ones still read them from old files.
_SHARDED: Final = "torch.distributed._shard.sharded_tensor.metadata"
_FILESYSTEM: Final = "torch.distributed.checkpoint.filesystem"


def _short_text() -> bytes:
    """Return the pattern of SHORT_BINUNICODE: sixteen times sixteen lengths, so that none is looked for long."""
    groups = (
        b"(?=[\\x%02x-\\x%02x])(?:%b)"
        % (first, first + 15, b"|".join(b"\\x%02x.{%d}" % (length, length) for length in range(first, first + 16)))
        for first in range(0, 256, 16)
    )
    return rb"\x8c(?:" + b"|".join(groups) + b")"


# Opcodes without an argument, then those with one: all that pickle.dump of protocol 2 to 5 writes for classes,
# tuples, lists, dicts, numbers, None and short strings. Long strings, GLOBAL and LONG_BINPUT are looked at singly.
# The scan takes 7 % of the time of stock's unpickling.
_BARE: Final = rb"[()\]}.0NRabestu\x81\x85-\x89\x93\x94]*+"
_RUN: Final = re.compile(
    _BARE
    + (rb"(?:(?:[Khq].|[Jj].{4}|" + _short_text() + rb"|M..|G.{8}|\x80[\x02-\x05]|\x95.{8}")
    + (rb"|\x8a(?:\0|\x01.|\x02..|\x03.{3}|\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}))" + _BARE + b")*+"),
    re.DOTALL,
)
_GLOBAL: Final = re.compile(rb"c[\w.]{1,200}\n[\w.]{1,200}\n")
# A path of the file system is at most 4096 bytes (PATH_MAX); the rest is for a URL's sake.
_MAX_PATH_CHARACTERS: Final = 1 << 16
# Stands in for torch.Size: returns its argument if that is a tuple, or else raises TypeError. Not `tuple`: that copies
# a list, and a small file that has it do so again and again would fill the memory. Nothing else of builtins either.
_SIZE: Final = ().__add__
# What the unpickler, and the reading of what it made, raise at malformed input.
_MALFORMED: Final = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def decode_metadata(data: bytes, path: str) -> Index:
    """Return the index that a stock ``.metadata`` (torch 2.3 or later) amounts to.

    What such a file does not say: there are no hashes (``item_hash`` is empty); of tensors only the records
    are known (``data_offset`` is the record's offset, ``data_bytes`` is -1); names without planner data have
    themselves as path.

    Args:
        data: The whole file.
        path: Named in errors.

    Raises:
        BadIndex: Damaged, contradictory, or with classes that no checkpoint needs; load another checkpoint.
        Unsupported: Its files were transformed (compressed, say) by an extension of DCP; load it with torch.
    """
    scan_opcodes(data, path)
    classes = StandIns()
    try:
        with collector_paused():
            metadata = _Unpickler(data, classes, path).load()
            index = to_index(metadata, classes)
    except _MALFORMED as error:
        raise BadIndex(path, f"not the metadata of a checkpoint ({type(error).__name__}: {error})"[:200]) from None
    reason = check_columns(index)
    if reason is not None:
        raise BadIndex(path, reason)
    return index


def scan_opcodes(data: bytes, path: str) -> None:
    """Refuse opcodes that a checkpoint's metadata does not have; see the module's head."""
    at, size = 0, len(data)
    while True:
        match = _RUN.match(data, at)
        at = match.end() if match else at
        opcode, argument = data[at : at + 1], int.from_bytes(data[at + 1 : at + 5], "little")
        if opcode == b"X":
            at += 5 + argument
        elif opcode == b"r" and argument < size:
            at += 5
        elif opcode == b"c" and (found := _GLOBAL.match(data, at)):
            at = found.end()
        elif opcode:
            raise BadIndex(path, f"not the metadata of a checkpoint: opcode {opcode!r} at offset {at}")
        else:
            break
    if at != size or data[-1:] != b".":
        raise BadIndex(path, "not the metadata of a checkpoint: it is cut short")


def _known(classes: StandIns) -> dict[tuple[str, str], object]:
    """Return everything that a stock ``.metadata`` may name, except dtypes."""

    def join(*parts: str) -> str:
        if sum(map(len, parts)) > _MAX_PATH_CHARACTERS:
            raise ValueError("a path is too long")
        return posixpath.join(*parts)

    paths = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    return {
        (_DCP, "Metadata"): classes.metadata,
        (_DCP, "TensorStorageMetadata"): classes.tensor,
        (_DCP, "BytesStorageMetadata"): classes.object,
        (_DCP, "ChunkStorageMetadata"): classes.chunk,
        (_DCP, "MetadataIndex"): classes.key,
        (_DCP, "StorageMeta"): classes.storage_meta,
        (_DCP, "TensorProperties"): classes.properties,
        (_SHARDED, "TensorProperties"): classes.properties,
        (_DCP, "_MEM_FORMAT_ENCODING"): lambda encoding: None,
        (_SHARDED, "MEM_FORMAT_ENCODING"): lambda encoding: None,
        (_FILESYSTEM, "_StorageInfo"): classes.place,
        ("torch", "Size"): _SIZE,
        ("torch.serialization", "_get_layout"): lambda name: None,
        ("collections", "OrderedDict"): lambda: {},
        **{("pathlib", name): join for name in paths},
        **{("pathlib._local", name): join for name in paths},  # Python 3.13
    }


class _Unpickler(pickle.Unpickler):
    """CPython's unpickler, confined to the stand-ins."""

    def __init__(self, data: bytes, classes: StandIns, path: str) -> None:
        super().__init__(io.BytesIO(data))
        self._known = _known(classes)
        self._path = path

    def find_class(self, module: str, name: str) -> object:
        """Return a stand-in, or a dtype's code; called by the unpickler."""
        found = self._known.get((module, name))
        if found is not None:
            return found
        if module == "torch":
            try:
                return by_name(name).code
            except Unsupported:
                pass
        raise BadIndex(self._path, f"it wants the forbidden class {module}.{name}"[:200])
