"""safetensors files, and folders of them as Hugging Face lays them out, read and written piece by piece.

A file is a length, a JSON header and the values in C order. The library maps files, so that a whole one counts as
memory of the process; reading ranges does not. Source: safetensors/README.md, "Format".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Final

import msgspec

from ckptd.checkpoint.formats.output import new_file, new_folder
from ckptd.checkpoint.formats.record import read_exactly
from ckptd.checkpoint.formats.source import Box, Entry, Source
from ckptd.checkpoint.formats.whole import whole
from ckptd.checkpoint.system import named
from ckptd.protocol.errors import BadFile, MissingFile, SystemCallFailed, UnknownCheckpoint, Unsupported
from ckptd.staging.dtypes import by_code, by_name

SUFFIX: Final = ".safetensors"
INDEX_SUFFIX: Final = ".safetensors.index.json"
# As transformers cuts them: save_pretrained(max_shard_size="5GB").
SHARD_BYTES: Final = 5_000_000_000
# The library itself refuses longer headers.
_MAX_HEADER_BYTES: Final = 100_000_000
_NAMES: Final = {
    **{"bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32"},
    **{"int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "complex64": "C64"},
    **{"float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ"},
}
_CODES: Final = {theirs: by_name(ours).code for ours, theirs in _NAMES.items()}
_Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class _Tensor(msgspec.Struct):
    dtype: str
    shape: list[_Size]
    data_offsets: tuple[_Size, _Size]


class _Shards(msgspec.Struct):
    weight_map: dict[str, str]


class SafetensorsSource(Source):
    """A file, or a folder with one or more and an index.

    Args:
        path: The file or the folder.

    Raises:
        UnknownCheckpoint: There is no such file in the folder.
        BadFile, MissingFile, SystemCallFailed: A header cannot be read or trusted.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._files: list[tuple[str, int, int]] = []  # path, descriptor, where the values begin
        self.entries: list[Entry] = []
        self._begins: list[int] = []  # by item: where in its file
        self._file_of: list[int] = []
        try:
            for file, names in _files_of(path).items():
                self._add(file, names)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.pop()[1])

    def place(self, entry: Entry, box: Box) -> str:
        """Return the file of a tensor."""
        del entry
        return self._files[self._file_of[box.item]][0]

    def position(self, box: Box) -> int:
        """Return where a tensor's values begin in its file."""
        return self._begins[box.item]

    def fill(self, entry: Entry, box: Box, begin: int, target: memoryview) -> None:
        """Read a part of a tensor; see :class:`Source`."""
        del entry
        path, descriptor, _ = self._files[self._file_of[box.item]]
        read_exactly(descriptor, path, self._begins[box.item] + begin, target)

    def object_bytes(self, entry: Entry) -> bytes:
        """Never called: the format has tensors only."""
        raise BadFile(self.path, f"{entry.name} is no object")

    def object_value(self, entry: Entry, *, trust: bool) -> object:
        """Never called: the format has tensors only."""
        raise BadFile(self.path, f"{entry.name} is no object")

    def _add(self, path: str, names: set[str] | None) -> None:
        try:
            descriptor = named("open", path, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except SystemCallFailed as error:
            raise error if os.path.lexists(path) else MissingFile(path) from None
        file_bytes = os.fstat(descriptor).st_size
        self._files.append((path, descriptor, file_bytes))
        header, begin = _header(descriptor, path, file_bytes)
        if names is not None and not names <= set(header):
            raise BadFile(path, f"it lacks {min(names - set(header))}, which the folder's index names")
        for name in sorted(header, key=lambda name: header[name].data_offsets):
            if names is None or name in names:
                self._add_tensor(name, header[name], begin)

    def _add_tensor(self, name: str, tensor: _Tensor, begin: int) -> None:
        path, _, file_bytes = self._files[-1]
        if tensor.dtype not in _CODES:
            raise Unsupported(f"{path}: {name} of dtype {tensor.dtype}", "convert the tensor first")
        shape, code = tuple(tensor.shape), _CODES[tensor.dtype]
        first, end = tensor.data_offsets
        if end - first != math.prod(shape) * by_code(code).itemsize_bytes or begin + end > file_bytes:
            raise BadFile(
                path, f"{name} has offsets that do not fit its shape or the file: it was cut short or damaged"
            )
        box = Box((0,) * len(shape), shape, len(self._begins))
        self.entries.append(Entry(name, (name,), code, shape, False, (box,)))
        self._begins.append(begin + first)
        self._file_of.append(len(self._files) - 1)


def _header(descriptor: int, path: str, file_bytes: int) -> tuple[dict[str, _Tensor], int]:
    """Return the tensors of a file by name, and where the values begin."""
    start = bytearray(8)
    if file_bytes >= 8:
        read_exactly(descriptor, path, 0, memoryview(start))
    length = int.from_bytes(start, "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, file_bytes - 8):
        raise BadFile(path, "it is no safetensors file, or it was cut short")
    text = bytearray(length)
    read_exactly(descriptor, path, 8, memoryview(text))
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        return {name: msgspec.json.decode(value, type=_Tensor) for name, value in raw.items()}, 8 + length
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFile(path, f"its header cannot be decoded: {error}"[:200]) from None


def _files_of(path: str) -> dict[str, set[str] | None]:
    """Return the files of a source, and which names are taken from each (None: all)."""
    if not os.path.isdir(path):
        return {path: None}
    found = sorted(os.listdir(path))
    indexes = [name for name in found if name.endswith(INDEX_SUFFIX)]
    if not indexes:
        files = [name for name in found if name.endswith(SUFFIX)]
        if not files:
            raise UnknownCheckpoint(path)
        return {os.path.join(path, name): None for name in files}
    if len(indexes) > 1:
        raise BadFile(path, f"it has several indexes ({indexes[0]}, {indexes[1]}); name a file instead")
    index = os.path.join(path, indexes[0])
    try:
        shards = msgspec.json.decode(named("read", index, Path(index).read_bytes), type=_Shards)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadFile(index, f"it cannot be decoded: {error}"[:200]) from None
    files_of: dict[str, set[str] | None] = {}
    for name, file in shards.weight_map.items():
        if os.path.basename(file) != file or not file:
            raise BadFile(index, f"it names a file outside of its folder: {file!r}"[:200])
        wanted = files_of.setdefault(os.path.join(path, file), set())
        assert wanted is not None
        wanted.add(name)
    return files_of


def write_file(source: Source, path: str, *, overwrite: bool, done: Callable[[int], None]) -> None:
    """Write a source of tensors to one file.

    Args:
        source: Where they are.
        path: The file.
        overwrite: Whether an existing one is replaced.
        done: Called with bytes written.

    Raises:
        Unsupported: The format has no such dtype.
        OutputExists, StorageError: Nothing was changed.
    """
    entries = _aligned(source.entries)
    header = _encoded_header(entries)
    with new_file(path, overwrite=overwrite) as file:
        _write(file, header, source, entries, done)


def write_folder(
    source: Source,
    path: str,
    *,
    shard_bytes: int,
    overwrite: bool,
    done: Callable[[int], None],
) -> None:
    """Write a source of tensors to a folder: one file, or several and an index as Hugging Face names them.

    Raises what :func:`write_file` does.
    """
    shards = [_aligned(shard) for shard in _cut(source.entries, shard_bytes)]
    headers = [_encoded_header(shard) for shard in shards]
    weight_map: dict[str, str] = {}
    with new_folder(path, overwrite=overwrite, ours=(SUFFIX, INDEX_SUFFIX)) as folder:
        for number, (shard, header) in enumerate(zip(shards, headers, strict=True), 1):
            part = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
            weight_map |= {entry.name: f"model{part}{SUFFIX}" for entry in shard}
            with new_file(os.path.join(folder, f"model{part}{SUFFIX}"), overwrite=False) as file:
                _write(file, header, source, shard, done)
        if len(shards) > 1:
            total = {"total_size": sum(entry.nbytes for entry in source.entries)}
            index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
            with new_file(os.path.join(folder, f"model{INDEX_SUFFIX}"), overwrite=False) as file:
                file.write(json.dumps(index, indent=2).encode() + b"\n")


def _cut(entries: Sequence[Entry], shard_bytes: int) -> Iterator[list[Entry]]:
    """Cut tensors into files of at most ``shard_bytes``; a larger tensor is a file of its own."""
    shard: list[Entry] = []
    nbytes = 0
    for entry in entries:
        if shard and nbytes + entry.nbytes > shard_bytes:
            yield shard
            shard, nbytes = [], 0
        shard.append(entry)
        nbytes += entry.nbytes
    yield shard


def _aligned(entries: Sequence[Entry]) -> list[Entry]:
    """Return tensors with the widest elements first, as the library does, so that none lies across its alignment."""
    return sorted(entries, key=lambda entry: -entry.itemsize_bytes)


def _encoded_header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that lack it
    at = 0
    for entry in entries:
        theirs = _NAMES.get(by_code(entry.dtype).name)
        if theirs is None:
            raise Unsupported(f"{entry.name}: dtype {entry.kind} in a safetensors file", "convert to another format")
        header[entry.name] = {"dtype": theirs, "shape": entry.shape, "data_offsets": (at, at + entry.nbytes)}
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values begin on a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _write(
    file: IO[bytes], header: bytes, source: Source, entries: Sequence[Entry], done: Callable[[int], None]
) -> None:
    file.write(header)
    for entry in entries:
        for piece in whole(source, entry):
            file.write(piece)
            done(len(piece))
