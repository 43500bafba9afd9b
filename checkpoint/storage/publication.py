"""What one save is to a writer: where its files go, how it is published and how it is thrown away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ckptd.checkpoint.storage.sink import Sink


class Publication(Protocol):
    """One save under way, on one rank."""

    def file_name(self, number: int) -> str:
        """Return the name of this rank's ``number``-th file in the checkpoint."""

    def create(self, name: str, *, expected_bytes: int) -> Sink:
        """Begin a file; ``expected_bytes`` is about its size."""

    def check_files(self, sizes: Mapping[str, int]) -> None:
        """Check that the files are there with the sizes that were reported. Raises a StorageError."""

    def publish(self, metadata: tuple[str, bytes], *, sidecar: bytes | None, overwrite: bool) -> None:
        """Make the save the checkpoint that readers find, in one step; older files go afterwards.

        Args:
            metadata: Name and bytes of the file that makes it one.
            sidecar: Bytes of ``.ckptd``, if there is one.
            overwrite: Whether it may replace another checkpoint.

        Raises:
            CheckpointExists: It may not, and there is one.
            StorageError: It failed; readers find what they found before.
        """

    def discard(self) -> None:
        """Remove all that the save has left behind; what is gone already is no error."""
