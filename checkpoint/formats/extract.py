"""Some entries of a checkpoint as a file of their own: torch.save, safetensors or numpy."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from ckptd.checkpoint.formats.convert import Format, Wish, convert, format_named
from ckptd.checkpoint.formats.numbers import NUMPY_TYPES
from ckptd.checkpoint.formats.output import new_file
from ckptd.checkpoint.formats.source import Entry, Source, Subset
from ckptd.checkpoint.formats.whole import whole
from ckptd.protocol.errors import BadConfig, MissingKeys, Unsupported
from ckptd.staging.dtypes import by_code

NUMPY_SUFFIX: Final = ".npy"


def choose(source: Source, keys: Sequence[str]) -> list[Entry]:
    """Return the entries that keys name: each is a name, what stands before a dot in names, or a pattern with ``*``.

    Raises:
        MissingKeys: A key names nothing.
    """
    chosen: dict[str, Entry] = {}
    missing = []
    for key in keys:
        found = [entry for entry in source.entries if entry.name == key]
        found = found or [entry for entry in source.entries if entry.name.startswith(f"{key}.")]
        found = found or [entry for entry in source.entries if fnmatch.fnmatchcase(entry.name, key)]
        chosen |= {entry.name: entry for entry in found}
        if not found:
            missing.append(key)
    if missing:
        raise MissingKeys(source.path, len(missing), missing[0])
    return list(chosen.values())


def extract(
    source: Source, entries: Sequence[Entry], path: str, *, wish: Wish, done: Callable[[int], None] = lambda _: None
) -> None:
    """Write entries to a file, in the format that its suffix names; names stay whole, as keys of a flat dict.

    Raises:
        BadConfig: The suffix names no file format, or one of a single tensor for several.
        OutputExists, Unsupported, StorageError: Nothing was changed.
    """
    if path.endswith(NUMPY_SUFFIX):
        _to_numpy(source, entries, path, overwrite=wish.overwrite, done=done)
        return
    to = format_named(path)
    if to is Format.DCP:
        raise BadConfig(path, "the name tells no format; let it end in .pt, .safetensors or .npy")
    flat = [dataclasses.replace(entry, path=(entry.name,)) for entry in entries]
    convert(Subset(source, flat), path, to, wish=wish, done=done)


def _to_numpy(
    source: Source, entries: Sequence[Entry], path: str, *, overwrite: bool, done: Callable[[int], None]
) -> None:
    if len(entries) != 1 or entries[0].is_object:
        raise BadConfig(path, f"a .npy file holds one tensor, not {len(entries)} entries; use .pt or .safetensors")
    (entry,) = entries
    kind = by_code(entry.dtype)
    if kind.name not in NUMPY_TYPES:
        raise Unsupported(f"{entry.name}: dtype {kind.name} in a .npy file", "use .pt or .safetensors")
    with new_file(path, overwrite=overwrite) as file:
        header = {"descr": np.dtype(kind.name).str, "fortran_order": False, "shape": entry.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in whole(source, entry):
            file.write(piece)
            done(len(piece))
