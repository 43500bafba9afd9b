"""An index as torch's own metadata objects. Imports torch; everything else about indexes does without."""

from __future__ import annotations

import pickle
from typing import Final

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from ckptd.checkpoint.collector import collector_paused
from ckptd.checkpoint.indexing.columns import Index
from ckptd.checkpoint.stock.metadata_pickle import encode_metadata
from ckptd.protocol.errors import Unsupported
from ckptd.staging.dtypes import DTYPES, by_code, by_name

# A torch that is older than the newest dtype simply lacks it.
_TORCH: Final[dict[int, torch.dtype]] = {
    dtype.code: getattr(torch, dtype.name) for dtype in DTYPES if hasattr(torch, dtype.name)
}
_CODES: Final = {torch_dtype: code for code, torch_dtype in _TORCH.items()}


def torch_dtype(code: int) -> torch.dtype:
    """Return torch's dtype for a code of :mod:`ckptd.staging.dtypes`.

    Raises:
        Unsupported: No such code, or this torch lacks the dtype; upgrade torch.
    """
    found = _TORCH.get(code)
    if found is None:
        raise Unsupported(f"dtype torch.{by_code(code).name} with torch {torch.__version__}", "upgrade torch")
    return found


def dtype_code(dtype: torch.dtype) -> int:
    """Return the code of torch's dtype.

    Raises:
        Unsupported: The table has no such dtype; convert the tensor first.
    """
    code = _CODES.get(dtype)
    return by_name(str(dtype).removeprefix("torch.")).code if code is None else code


def to_metadata(index: Index) -> Metadata:
    """Return what stock's reader would return for this index.

    Args:
        index: A checked index. ``checkpoint_id`` and ``save_id`` come from its header, if it has them.
    """
    header = index.header
    data = encode_metadata(index, checkpoint_id=header.get("checkpoint_id", ""), save_id=header.get("save_id", ""))
    # Our own bytes, made in the line above: torch's C unpickler makes the objects faster than Python could.
    with collector_paused():
        metadata: Metadata = pickle.loads(data)
    if "checkpoint_id" not in header:
        metadata.storage_meta = StorageMeta(save_id=header.get("save_id"))
    return metadata
