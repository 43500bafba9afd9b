"""Stream extensions: what compresses or encrypts the records of a checkpoint, and the registry that finds them again.

The abstract classes are torch's, and so is the form of a descriptor (``name[@local-domain]/version``), so that stock
reads what was written with ours and the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any, Final, cast

from torch.distributed.checkpoint._extension import Extension, StreamTransformExtension
from torch.distributed.checkpoint._extension import ExtensionRegistry as StockExtensionRegistry

from ckptd.protocol.errors import UnknownExtension, Unsupported

__all__ = ["Extension", "ExtensionRegistry", "StreamTransformExtension", "ZStandard", "resolve_extensions"]

# The default of zstd itself: above it, compressing costs more time than a disk needs for the bytes saved.
_DEFAULT_LEVEL: Final = 3


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise Unsupported("zstd without the package zstandard", "pip install ckptd[zstd]") from None
    return zstandard


class ZStandard(StreamTransformExtension):
    """Compresses records with zstd. Frames carry a checksum, so that a wrong bit is found when they are read.

    Args:
        level: zstd's level, 1 to 22, negative for faster ones.

    Raises:
        Unsupported: The package zstandard is not installed, or there is no such level.
    """

    def __init__(self, level: int = _DEFAULT_LEVEL) -> None:
        super().__init__()
        if level > _zstandard().MAX_COMPRESSION_LEVEL:
            raise Unsupported(f"zstd level {level}", f"use at most {_zstandard().MAX_COMPRESSION_LEVEL}")
        self.level = level

    @staticmethod
    def is_available() -> bool:
        """Return whether the package zstandard is installed."""
        try:
            _zstandard()
        except Unsupported:
            return False
        return True

    @staticmethod
    def registry_name() -> str:
        """Return the name under which stock's extension is known, too."""
        return "stream.zstd"

    @staticmethod
    def from_descriptor(version: str) -> ZStandard:
        """Return the extension for the version in a descriptor. Raises UnknownExtension at any but 1."""
        if version.partition(".")[0] != "1":
            raise UnknownExtension(f"stream.zstd/{version}")
        return ZStandard()

    def get_descriptor(self) -> str:
        """Return what a checkpoint's metadata keeps; the level is not needed to read."""
        return f"{self.registry_name()}/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        """Return a stream whose bytes arrive in ``output`` compressed; closing it ends the frame."""
        compressor = _zstandard().ZstdCompressor(level=self.level, write_checksum=True)
        return cast("IO[bytes]", compressor.stream_writer(output))

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        """Return a stream that reads ``input`` and decompresses it."""
        return cast("IO[bytes]", _zstandard().ZstdDecompressor().stream_reader(input))


class ExtensionRegistry(StockExtensionRegistry):
    """Finds the extensions that a checkpoint names. Usable as stock's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.extensions: dict[str, type[Extension]] = {ZStandard.registry_name(): ZStandard}

    def register(self, cls: type[Extension], *, name: str | None = None) -> None:
        """Make a class known.

        Args:
            cls: The extension.
            name: Known by this name instead of its ``registry_name()``: an old or a local one, say.
        """
        self.extensions[name if name is not None else cls.registry_name()] = cls

    def from_descriptor(self, descriptor: str) -> Extension:
        """Return the extension that a descriptor names, ``stream.zstd/1``, say; without a version it is 1.

        Raises:
            UnknownExtension: It was not registered; register it and try again.
        """
        name, _, version = descriptor.partition("/")
        found = self.extensions.get(name)
        if found is None:
            raise UnknownExtension(descriptor)
        return found.from_descriptor(version or "1")

    def from_descriptor_list(self, descriptors: Sequence[str]) -> Sequence[Extension]:
        """Return the extensions that undo what was done to a record, in order. Raises UnknownExtension."""
        return [self.from_descriptor(descriptor) for descriptor in descriptors]


def resolve_extensions(
    extensions: Sequence[StreamTransformExtension | str] | None,
) -> tuple[StreamTransformExtension, ...]:
    """Return a writer's extensions; those given by name are looked up among ours.

    Raises:
        UnknownExtension: No such name.
        Unsupported: Something that transforms no stream.
    """
    registry = ExtensionRegistry()
    found: list[StreamTransformExtension] = []
    for extension in extensions or ():
        given = registry.from_descriptor(extension) if isinstance(extension, str) else extension
        if not isinstance(given, StreamTransformExtension):
            raise Unsupported(f"extension {type(given).__name__}", "give a StreamTransformExtension")
        found.append(given)
    return tuple(found)
