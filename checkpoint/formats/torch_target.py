"""Writes a ``torch.save`` file tensor by tensor: the pickle first, then the values, each read when its turn comes.

The file is what ``torch.save`` would write for the same nested state dict: a zip archive of ``data.pkl`` and one member
for each storage, uncompressed and aligned, so that ``torch.load(mmap=True)`` maps it. Loads torch.
Sources: torch/serialization.py of torch 2.13 (``_save``), APPNOTE.TXT 6.3.10 (zip).
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import torch
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3

from ckptd.checkpoint.formats.output import new_file
from ckptd.checkpoint.formats.source import Entry, Source
from ckptd.checkpoint.formats.whole import check_boxes, whole
from ckptd.checkpoint.stock.metadata import torch_dtype
from ckptd.protocol.errors import Unsupported
from ckptd.staging.dtypes import by_code

# torch.load maps storages as they lie; it aligns its own to 64 bytes (c10/core/alignment.h).
_ALIGNMENT_BYTES: Final = 64
_LOCAL_HEADER_BYTES: Final = 30
_ZIP64_EXTRA_BYTES: Final = 20
_PADDING_ID: Final = b"FB"  # as torch marks the bytes that align a member


@dataclass(frozen=True)
class _Storage:
    """A storage of the file, in the pickle; its values come from an entry."""

    key: str
    entry: Entry


class _Tensor:
    """Pickles as the tensor of an entry, without being one."""

    def __init__(self, key: str, entry: Entry) -> None:
        self._storage, self._entry = _Storage(key, entry), entry

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return what torch's own tensors pickle as."""
        shape = self._entry.shape
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= max(size, 1)
        hooks: collections.OrderedDict[str, Any] = collections.OrderedDict()  # of a bare class: it is pickled
        # As stock's conversion does, gradients are not asked for: a state dict is data.
        state = (self._storage, 0, shape, tuple(reversed(strides)), False, hooks)
        if by_code(self._entry.dtype).storage is not None:
            return _rebuild_tensor_v2, state
        return _rebuild_tensor_v3, (*state, torch_dtype(self._entry.dtype))


class _Pickler(pickle.Pickler):
    """Puts storages aside: those of entries, and those that objects hold."""

    def __init__(self, file: io.BytesIO, first_key: int) -> None:
        super().__init__(file, protocol=2)  # as torch.save
        self.kept: dict[int, tuple[str, torch.UntypedStorage]] = {}
        self._first_key = first_key

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        """Return a storage's name in the archive; None for all else."""
        if isinstance(value, _Storage):
            kind = by_code(value.entry.dtype)
            if kind.storage is None:
                return "storage", torch.UntypedStorage, value.key, "cpu", value.entry.nbytes
            elements = value.entry.nbytes // kind.itemsize_bytes
            return "storage", getattr(torch, kind.storage), value.key, "cpu", elements
        if isinstance(value, torch.storage.TypedStorage):
            storage_type = getattr(torch, value._pickle_storage_type())
            return "storage", storage_type, self._keep(value._untyped_storage), "cpu", value._size()
        if isinstance(value, torch.UntypedStorage):
            return "storage", torch.UntypedStorage, self._keep(value), "cpu", value.nbytes()
        return None

    def _keep(self, storage: torch.UntypedStorage) -> str:
        key, _ = self.kept.setdefault(storage._cdata, (str(self._first_key + len(self.kept)), storage))
        return key


def write_torch_file(source: Source, path: str, *, overwrite: bool, trust: bool, done: Callable[[int], None]) -> None:
    """Write all of a source to one file, as the nested state dict that it came from.

    Args:
        source: What to write.
        path: The file.
        overwrite: Whether an existing one is replaced.
        trust: Unpickle objects whatever classes they name, to put them into the new pickle.
        done: Called with bytes written.

    Raises:
        BadFile: An object names classes and is not trusted.
        Unsupported: An object cannot be pickled, or paths contradict each other.
        OutputExists, StorageError: Nothing was changed.
    """
    tensors = [entry for entry in source.entries if not entry.is_object]
    keys = {entry.name: str(number) for number, entry in enumerate(tensors)}
    state: dict[str, Any] = {}
    for entry in source.entries:
        if not entry.is_object:
            check_boxes(entry)
        value = source.object_value(entry, trust=trust) if entry.is_object else _Tensor(keys[entry.name], entry)
        set_path(state, entry.path, value)
    pickled = io.BytesIO()
    pickler = _Pickler(pickled, len(tensors))
    try:
        pickler.dump(state)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise Unsupported(f"{source.path}: an object that cannot be pickled ({error})", "leave it out") from None
    with new_file(path, overwrite=overwrite) as file, _Archive(file, path) as archive:
        archive.put("data.pkl", pickled.getvalue())
        archive.put("byteorder", b"little")
        for entry in tensors:
            with archive.member(f"data/{keys[entry.name]}", entry.nbytes) as member:
                for piece in whole(source, entry):
                    member.write(piece)
                    done(len(piece))
        for key, storage in pickler.kept.values():
            archive.put(f"data/{key}", _bytes_of(storage))
        archive.put("version", b"3\n")


def set_path(state: dict[str, Any], path: tuple[str | int, ...], value: object) -> None:
    """Put a value where its path says, making dicts and lists on the way; a list is filled up with None.

    Raises:
        Unsupported: Something else is there.
    """
    container: Any = state
    for step, following in zip(path, (*path[1:], None), strict=True):
        wanted: Any = list if isinstance(step, int) else dict
        if type(container) is not wanted:
            raise Unsupported(f"the path {path}", "two names of the checkpoint contradict each other")
        if isinstance(step, int):
            container.extend([None] * (step + 1 - len(container)))
        else:
            container.setdefault(step, None)
        if following is None:
            container[step] = value
        elif container[step] is None:
            container[step] = [] if isinstance(following, int) else {}
        container = container[step]


def _bytes_of(storage: torch.UntypedStorage) -> bytes:
    plain = storage.cpu()
    return ctypes.string_at(plain.data_ptr(), plain.nbytes()) if plain.nbytes() else b""


class _Archive:
    """A zip archive whose members begin on multiples of 64 bytes."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file = file
        self._root = os.path.splitext(os.path.basename(path))[0] or "archive"
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)

    def member(self, name: str, nbytes: int) -> Any:
        """Return a member to write ``nbytes`` bytes into."""
        info = zipfile.ZipInfo(f"{self._root}/{name}")
        info.file_size = nbytes
        before = self._zip.start_dir + _LOCAL_HEADER_BYTES + len(info.filename.encode()) + _ZIP64_EXTRA_BYTES + 4
        padding = -before % _ALIGNMENT_BYTES
        info.extra = _PADDING_ID + padding.to_bytes(2, "little") + bytes(padding)
        return self._zip.open(info, "w", force_zip64=True)

    def put(self, name: str, data: bytes) -> None:
        """Write a whole member."""
        with self.member(name, len(data)) as member:
            member.write(data)

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # On an error, too: a ZipFile that was not closed writes to its file when it is collected.
        with contextlib.suppress(*() if kind is None else (OSError, ValueError)):
            self._zip.close()
