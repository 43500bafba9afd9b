"""The options of a writer, as torch's ``FileSystemWriter`` names them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.checkpoint.filesystem import SerializationFormat

from ckptd.checkpoint.storage.extensions import StreamTransformExtension
from ckptd.protocol.errors import Unsupported

__all__ = ["SerializationFormat", "WriterOptions"]


@dataclass(frozen=True)
class WriterOptions:
    """How files are written.

    Attributes:
        single_file_per_rank: One file per thread and rank; otherwise one per item.
        sync_files: Make the files durable before they are published.
        thread_count: How many files are written at a time.
        copy_ahead_bytes: How much is copied from an accelerator ahead of being written, per thread.
        extensions: What transforms the records.
        serialization_format: Records of ``torch.save``, or safetensors files.
    """

    single_file_per_rank: bool
    sync_files: bool
    thread_count: int
    copy_ahead_bytes: int
    extensions: tuple[StreamTransformExtension, ...]
    serialization_format: SerializationFormat

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.thread_count < 1:
            raise Unsupported(f"thread_count={self.thread_count}", "give 1 or more")
        if self.copy_ahead_bytes < 0:
            raise Unsupported(f"per_thread_copy_ahead={self.copy_ahead_bytes}", "give 0 or more bytes")
        if self.extensions and self.serialization_format is SerializationFormat.SAFETENSORS:
            raise Unsupported("_extensions with safetensors", "leave out one of them: others could not read the files")
