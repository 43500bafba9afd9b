"""A ``torch.save`` file as a source for the tools. Loads torch.

``torch.load(mmap=True)`` maps the file. The values are then read from the file, not through the map: pages of a map
that were looked at count as memory of the process, and a map of a file that was cut short kills it with SIGBUS.
"""

from __future__ import annotations

import ctypes
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from ckptd.checkpoint.formats.objects import load_pickle, object_record
from ckptd.checkpoint.formats.record import read_exactly
from ckptd.checkpoint.formats.source import Box, Entry, Source
from ckptd.checkpoint.stock.metadata import dtype_code
from ckptd.checkpoint.system import named
from ckptd.protocol.errors import BadFile, Unsupported
from ckptd.staging.dtypes import OBJECT


@dataclass(frozen=True)
class _Mapped:
    """A range of addresses that shows a range of the file."""

    begin: int
    end: int
    file_offset: int


class TorchSource(Source):
    """A file of ``torch.save`` that holds a state dict, nested or flat.

    Args:
        path: The file.
        trust: Run its pickle whatever classes it names; see :func:`ckptd.checkpoint.formats.objects.load_pickle`.

    Raises:
        BadFile: It is damaged, names classes and is not trusted, or holds no state dict.
        Unsupported: A tensor in it is of a kind that a checkpoint cannot hold.
        SystemCallFailed: It cannot be opened.
    """

    def __init__(self, path: str, *, trust: bool = False) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        self._descriptor = named("open", path, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        try:
            # A file of torch before 1.6 is no archive and cannot be mapped: it is loaded whole.
            loaded = load_pickle(path, path, trust=trust, mmap=zipfile.is_zipfile(path))
            if not isinstance(loaded, Mapping):
                raise BadFile(path, f"it holds a {type(loaded).__name__}, not a state dict")
            self._values, self.entries = _flat(loaded, path)
            self._maps = _maps_of(path)
        except BaseException:
            self.close()
            raise
        self._in_order = lru_cache(maxsize=1)(self._make_contiguous)

    def close(self) -> None:
        """Close the file and forget what was loaded."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
        self._values = {}

    def fill(self, entry: Entry, box: Box, begin: int, target: memoryview) -> None:
        """Read a part of a tensor; see :class:`Source`."""
        tensor = self._in_order(entry.name)
        first = tensor.data_ptr() + begin
        for place in self._maps:
            if place.begin <= first and first + len(target) <= place.end:
                read_exactly(self._descriptor, self.path, first - place.begin + place.file_offset, target)
                return
        target[:] = memoryview((ctypes.c_char * len(target)).from_address(first)).cast("B") if target else b""

    def object_bytes(self, entry: Entry) -> bytes:
        """Return an object's ``torch.save`` form; raises Unsupported if it has none."""
        return object_record(self._values[entry.name], entry.name)

    def object_value(self, entry: Entry, *, trust: bool) -> object:
        """Return an object, which was loaded with the file."""
        del trust
        return self._values[entry.name]

    def _make_contiguous(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._values[name].detach()
        return tensor.resolve_conj().resolve_neg().contiguous()


def _flat(loaded: Mapping[str, Any], path: str) -> tuple[dict[str, Any], list[Entry]]:
    """Return the leaves by name, and their entries."""
    try:
        flat, paths = flatten_state_dict(dict(loaded))
    except ValueError as error:  # two keys that become one name
        raise Unsupported(f"{path}: {error}", "rename one of the two") from None
    return flat, [_entry(name, paths[name], value, path) for name, value in flat.items()]


def _entry(name: str, where: tuple[str | int, ...], value: Any, path: str) -> Entry:
    if not isinstance(value, torch.Tensor):
        return Entry(name, where, OBJECT, (), False, (Box((), ()),))
    plain = type(value) in {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
    if not plain or value.layout is not torch.strided or value.is_meta:
        what = f"{path}: {name}, a {type(value).__name__} ({value.layout}, {value.device})"
        raise Unsupported(what, "make it a plain tensor first")
    shape = tuple(value.shape)
    box = Box((0,) * len(shape), shape)
    return Entry(name, where, dtype_code(value.dtype), shape, value.requires_grad, (box,))


def _maps_of(path: str) -> list[_Mapped]:
    """Return where this process has mapped a file; source: proc_pid_maps(5)."""
    real = os.path.realpath(path)
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5] == real:
                begin, _, end = fields[0].partition("-")
                found.append(_Mapped(int(begin, 16), int(end, 16), int(fields[2], 16)))
    return found
