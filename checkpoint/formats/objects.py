"""Objects that are no tensors, in their ``torch.save`` form.

Plain values are read without torch and without unpickling. Anything else goes through torch: as ``weights_only`` unless
the caller trusts the file, because a pickle may run whatever its maker wanted.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Final

from ckptd.checkpoint.formats.plain import plain_value
from ckptd.checkpoint.formats.record import stored_members
from ckptd.protocol.errors import BadFile, Unsupported
from ckptd.staging.image import scalar_record

_PLAIN: Final = frozenset({int, float, bool, str, type(None)})
# Members of an archive that say nothing about the value.
_INCIDENTAL: Final = frozenset(
    {"version", ".format_version", ".storage_alignment", "byteorder", ".data/serialization_id"}
)


def object_value(data: bytes, name: str, path: str, *, trust: bool) -> object:
    """Return the object in a ``torch.save`` record.

    Args:
        data: The record.
        name: Its key, for errors.
        path: Its file, for errors.
        trust: Run the pickle whatever classes it names.

    Raises:
        BadFile: It cannot be unpickled, or names classes and is not trusted.
    """
    known, value = plain_value(data)
    return value if known else load_pickle(io.BytesIO(data), f"{path}: {name}", trust=trust, mmap=False)


def load_pickle(file: io.BytesIO | str, where: str, *, trust: bool, mmap: bool) -> object:
    """Return what ``torch.load`` makes of a file. Raises BadFile, in one line."""
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=not trust, mmap=mmap)
    except pickle.UnpicklingError as error:
        if trust or "weights_only" not in str(error).lower():
            raise BadFile(where, f"it cannot be unpickled ({_line(error)})") from None
        reason = f"its pickle names classes that may run code ({_forbidden(error)})"
        raise BadFile(where, f"{reason}; with --trust it is run if you trust who made it") from None
    except Exception as error:  # noqa: BLE001  # whatever torch, or a class of the user's, makes of damaged bytes
        raise BadFile(where, f"it cannot be loaded ({_line(error)})") from None


def object_record(value: object, name: str) -> bytes:
    """Return the ``torch.save`` form of an object.

    Raises:
        Unsupported: It cannot be pickled; the key is named.
    """
    if type(value) in _PLAIN:
        return scalar_record(value)  # type: ignore[arg-type]  # one of the plain types
    import torch

    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception as error:  # noqa: BLE001  # whatever pickle, or the object itself, has against it
        what = f"{name}: a {type(value).__name__} that cannot be pickled ({_line(error)})"
        raise Unsupported(what, "leave it out") from None
    return buffer.getvalue()


def same_objects(one: bytes, other: bytes) -> bool:
    """Return whether two records hold the same pickle and the same tensors; torch need not be asked."""
    return one == other or _content(one) == _content(other)


def _content(data: bytes) -> dict[str, bytes] | bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = stored_members(archive)
            return {name: archive.read(member) for name, member in members.items() if name not in _INCIDENTAL}
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError):
        return data


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def _forbidden(error: Exception) -> str:
    """Return what of torch's long message names the class."""
    lines = str(error).splitlines()
    told = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])
    return " ".join(told.split())[:160]
