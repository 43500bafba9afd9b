"""Objects of a checkpoint that are plain values, read without torch and without running what their pickle names.

Numbers, text, and lists, tuples, dicts and sets of them: what most objects of a checkpoint are (steps, learning rates,
parameter groups). Anything else is left to torch.
"""

from __future__ import annotations

import codecs
import io
import pickle
import zipfile
from collections import OrderedDict
from typing import Any, Final

from ckptd.checkpoint.formats.record import stored_members
from ckptd.staging.image import scalar_value

# Longer ones are left to torch: CPython hashes nested tuples by recursion, and 16 Ki levels fit any stack.
_MAX_PICKLE_BYTES: Final = 16 << 10
_NOT_PLAIN: Final = (
    *(zipfile.BadZipFile, pickle.UnpicklingError, NotImplementedError, ArithmeticError, AttributeError, EOFError),
    *(LookupError, RecursionError, TypeError, ValueError, MemoryError),
)


def plain_value(data: bytes) -> tuple[bool, Any]:
    """Return ``(True, value)`` for the ``torch.save`` record of a plain value, or ``(False, None)``."""
    known, value = scalar_value(data)
    if known:
        return True, value
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            member = stored_members(archive)["data.pkl"]
            if member.file_size > _MAX_PICKLE_BYTES:
                return False, None
            return True, _Unpickler(io.BytesIO(archive.read(member))).load()
    except _NOT_PLAIN:
        return False, None


def _encode(text: object, encoding: object) -> bytes:
    """Stand in for ``_codecs.encode``, by which pickles of protocol 2 spell bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("no bytes")
    return codecs.latin_1_encode(text)[0]


class _Unpickler(pickle._Unpickler):
    """Python's unpickler, whose memo is a dict and costs what is put into it, confined to plain values."""

    _KNOWN: Final[dict[tuple[str, str], Any]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _encode,
        **{(module, "set"): set for module in ("builtins", "__builtin__")},
        **{(module, "frozenset"): frozenset for module in ("builtins", "__builtin__")},
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return one of a few harmless classes; called by the unpickler."""
        found = self._KNOWN.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name} is not plain")
        return found

    def persistent_load(self, pid: Any) -> Any:
        """Refuse storages; called by the unpickler."""
        raise pickle.UnpicklingError("a storage is not plain")
