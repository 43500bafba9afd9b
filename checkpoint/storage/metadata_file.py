"""Stock's ``.metadata`` as torch's own objects, without trusting the file.

Stock unpickles whatever stands there. Here the opcodes are scanned first, as
:mod:`ckptd.checkpoint.stock.metadata_unpickle` does, and only the classes that a checkpoint needs are found.
"""

from __future__ import annotations

import collections
import io
import pathlib
import pickle
from typing import Any, Final

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.metadata import Metadata

from ckptd.checkpoint.stock.metadata_unpickle import collector_paused, scan_opcodes
from ckptd.protocol.errors import BadIndex

_DCP: Final = dcp.__name__
# torch before 2.3 had the properties of a tensor there.
_SHARDED: Final = "torch.distributed._shard.sharded_tensor.metadata"
_PATHS: Final = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")


def _known() -> dict[tuple[str, str], Any]:
    names = (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    )
    known: dict[tuple[str, str], Any] = {(_DCP, name): getattr(dcp, name) for name in names}
    known[_SHARDED, "TensorProperties"] = dcp.TensorProperties
    known[_SHARDED, "MEM_FORMAT_ENCODING"] = dcp._MEM_FORMAT_ENCODING
    known[filesystem.__name__, "_StorageInfo"] = filesystem._StorageInfo
    known["torch", "Size"] = torch.Size
    known["torch.serialization", "_get_layout"] = torch.serialization._get_layout
    known["collections", "OrderedDict"] = collections.OrderedDict
    for module in ("pathlib", "pathlib._local"):  # the latter is Python 3.13's
        known |= {
            (module, name): pathlib.PurePosixPath if "Posix" in name else pathlib.PureWindowsPath for name in _PATHS
        }
        known[module, "PosixPath"] = pathlib.Path
    return known


_KNOWN: Final = _known()
_MALFORMED: Final = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


def decode_stock(data: bytes, path: str) -> Metadata:
    """Return the metadata in the bytes of a ``.metadata``, ours or stock's.

    Args:
        data: The whole file.
        path: Named in errors.

    Raises:
        BadIndex: Damaged, or with classes that no checkpoint needs; load another checkpoint.
    """
    scan_opcodes(data, path)
    try:
        with collector_paused():
            metadata = _Unpickler(data, path).load()
    except BadIndex:
        raise
    except _MALFORMED as error:
        raise BadIndex(path, f"not the metadata of a checkpoint ({type(error).__name__}: {error})"[:200]) from None
    if type(metadata) is not Metadata:
        raise BadIndex(path, "not the metadata of a checkpoint")
    return metadata


class _Unpickler(pickle.Unpickler):
    """CPython's unpickler, confined to what a checkpoint needs."""

    def __init__(self, data: bytes, path: str) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of torch's, or an element type; called by the unpickler."""
        found = _KNOWN.get((module, name))
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise BadIndex(self._path, f"it wants the forbidden class {module}.{name}"[:200])
        return found
