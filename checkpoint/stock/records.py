"""Checks the records of stock's files, which have no hashes of ours: each is a zip archive with a CRC per member."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from functools import partial
from typing import Final

from typing_extensions import Buffer

from ckptd.checkpoint.system import named
from ckptd.protocol.errors import SystemCallFailed

_READ_BYTES: Final = 4 << 20


class WrongRecord(Exception):
    """A record is no whole archive, or a member of it does not match its CRC. ``args[0]``: which one, or why."""


def check_record(descriptor: int, file: str, offset: int, nbytes: int) -> int:
    """Read a record and compare its members with their CRCs.

    Args:
        descriptor: The open file.
        file: Its path, for errors.
        offset: Where the record begins.
        nbytes: Its length.

    Returns:
        How many members had a CRC to compare with: torch leaves it 0 where it was told not to compute any.

    Raises:
        WrongRecord: Bits have turned.
        SystemCallFailed: It cannot be read.
    """
    checked = 0
    try:
        with zipfile.ZipFile(_Window(descriptor, file, offset, nbytes)) as archive:
            for member in archive.infolist():
                if member.CRC:
                    _read_through(archive, member)
                    checked += 1
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, ValueError, RuntimeError) as error:
        if isinstance(error, SystemCallFailed):
            raise
        raise WrongRecord(str(error)) from None
    return checked


def _read_through(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Read a member to its end, where zipfile compares the CRC."""
    with archive.open(member) as file:
        while file.read(_READ_BYTES):
            pass


class _Window(io.RawIOBase):
    """A stretch of an open file as a file of its own."""

    def __init__(self, descriptor: int, file: str, begin: int, nbytes: int) -> None:
        self._descriptor, self._file = descriptor, file
        self._begin, self._nbytes, self._at = begin, nbytes, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; before the beginning is an error."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._nbytes}[whence]
        if base + offset < 0:
            raise ValueError("a seek before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, target: Buffer) -> int:
        """Fill a buffer; short at the end."""
        view = memoryview(target).cast("B")[: max(self._nbytes - self._at, 0)]
        if not view:
            return 0
        read = partial(os.preadv, self._descriptor, [view], self._begin + self._at)
        count = named("pread", self._file, read)
        self._at += count
        return count
