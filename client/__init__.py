"""What trainers import: ``import ckptd.client as dcp`` replaces ``import torch.distributed.checkpoint as dcp``."""

from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from ckptd.client.api import async_save, connect, load, save, wait_for_staging
from ckptd.client.futures import SaveFuture, SaveProgress
from ckptd.client.session import Session
from ckptd.protocol import errors
from ckptd.protocol.errors import CkptdError

__all__ = [
    "AsyncCheckpointerType",
    "CkptdError",
    "SaveFuture",
    "SaveProgress",
    "Session",
    "async_save",
    "connect",
    "errors",
    "load",
    "save",
    "wait_for_staging",
]
