"""`dcp_to_torch_save` and `torch_save_to_dcp` of torch.distributed.checkpoint.format_utils, tensor by tensor.

Stock's hold the whole checkpoint in memory; these hold some MiB, and what they write appears whole or not at all.
As stock's, they unpickle whatever the input names: convert only what comes from whom you trust.
"""

from __future__ import annotations

import os

from ckptd.checkpoint.formats.checkpoint import CheckpointSource
from ckptd.checkpoint.formats.convert import Format, Wish, convert
from ckptd.checkpoint.formats.torch_source import TorchSource

_LIKE_STOCK = Wish(overwrite=True, trust=True)


def dcp_to_torch_save(dcp_checkpoint_dir: str | os.PathLike[str], torch_save_path: str | os.PathLike[str]) -> None:
    """Convert a DCP checkpoint, ours or stock's, into one torch.save file.

    Args:
        dcp_checkpoint_dir: Directory of the checkpoint.
        torch_save_path: The file; an existing one is replaced, as stock does.

    Raises:
        UnknownCheckpoint: There is no checkpoint.
        StorageError: Bytes are missing or wrong; nothing was changed.
    """
    with CheckpointSource(os.fspath(dcp_checkpoint_dir)) as source:
        convert(source, os.fspath(torch_save_path), Format.TORCH, wish=_LIKE_STOCK)


def torch_save_to_dcp(torch_save_path: str | os.PathLike[str], dcp_checkpoint_dir: str | os.PathLike[str]) -> None:
    """Convert a torch.save file into a DCP checkpoint, which stock reads and `ckptd verify` verifies.

    Args:
        torch_save_path: The file; it holds a state dict, nested or flat.
        dcp_checkpoint_dir: Directory of the checkpoint; an existing one is replaced, as stock does.

    Raises:
        BadFile: The file cannot be loaded, or holds no state dict.
        Unsupported: It holds what a checkpoint cannot; the key is named.
        StorageError: Nothing was changed.
    """
    with TorchSource(os.fspath(torch_save_path), trust=True) as source:
        convert(source, os.fspath(dcp_checkpoint_dir), Format.DCP, wish=_LIKE_STOCK)
