"""What trainers import: ``import ckptd.client as dcp`` replaces ``import torch.distributed.checkpoint as dcp``."""

from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from ckptd.client.futures import SaveFuture, SaveProgress
from ckptd.client.loader import load
from ckptd.client.saver import async_save, save
from ckptd.client.session import Session
from ckptd.client.sessions import connect, wait_for_staging
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
