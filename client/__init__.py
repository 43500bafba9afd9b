"""What trainers import: ``import ckptd.client as dcp`` replaces ``import torch.distributed.checkpoint as dcp``.

Every public name of torch's package and of its submodules is here, as docs/names.md lists them. Metadata, plans and the
abstract bases are torch's own objects, so that subclasses and `isinstance` go on working; planners, readers, writers,
savers and loaders are ours.
"""

import importlib
import importlib.util

from torch.distributed.checkpoint import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    QuantizedHuggingFaceStorageReader,
)
from torch.distributed.checkpoint._extension import Extension, StreamTransformExtension
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemBase
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    FQNS_T,
    DictValueType,
    ListDictValueType,
    OptimizerStateType,
    PrimitiveType,
    StateDictOptions,
    ValueType,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.checkpoint.stateful import Stateful, StatefulT
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.checkpoint.utils import find_state_dict_object, find_tensor_shard

from ckptd.checkpoint.formats.broadcast import BroadcastingTorchSaveReader, DynamicMetaLoadPlanner
from ckptd.checkpoint.formats.torch_save import dcp_to_torch_save, torch_save_to_dcp
from ckptd.checkpoint.planners import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    EmptyStateDictLoadPlanner,
    create_default_global_load_plan,
    create_default_global_save_plan,
    create_default_local_load_plan,
    create_default_local_save_plan,
)
from ckptd.checkpoint.storage.extensions import ExtensionRegistry, ZStandard
from ckptd.checkpoint.storage.filesystem import FileSystemReader, FileSystemWriter, SerializationFormat
from ckptd.checkpoint.storage.objects import FsspecReader, FsspecWriter
from ckptd.client import logging_handlers, state_dict
from ckptd.client.drain import DrainReport, drain
from ckptd.client.failures import CheckpointException
from ckptd.client.loading.loader import load, load_state_dict
from ckptd.client.loading.optimizer import load_sharded_optimizer_state_dict
from ckptd.client.loading.report import LoadReport, PassedOver
from ckptd.client.manager.manager import CheckpointManager
from ckptd.client.manager.options import CheckpointInfo, ManagerOptions, Restored
from ckptd.client.preemption import PreemptionHandler, install_preemption_handler
from ckptd.client.saving.futures import SaveFuture, SaveProgress
from ckptd.client.saving.saver import async_save, save, save_state_dict
from ckptd.client.session.session import Session
from ckptd.client.session.sessions import connect, wait_for_staging
from ckptd.protocol import errors
from ckptd.protocol.errors import CkptdError

__all__ = [
    "FQNS_T",
    "AsyncCheckpointerType",
    "AsyncSaveResponse",
    "AsyncStager",
    "BlockingAsyncStager",
    "BroadcastingTorchSaveReader",
    "BytesIOWriteData",
    "BytesStorageMetadata",
    "CheckpointException",
    "CheckpointInfo",
    "CheckpointManager",
    "ChunkStorageMetadata",
    "CkptdError",
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "DefaultStager",
    "DictValueType",
    "DrainReport",
    "DynamicMetaLoadPlanner",
    "EmptyStateDictLoadPlanner",
    "Extension",
    "ExtensionRegistry",
    "FileSystem",
    "FileSystemBase",
    "FileSystemReader",
    "FileSystemWriter",
    "FsspecReader",
    "FsspecWriter",
    "HuggingFaceStorageReader",
    "HuggingFaceStorageWriter",
    "ListDictValueType",
    "LoadItemType",
    "LoadPlan",
    "LoadPlanner",
    "LoadReport",
    "ManagerOptions",
    "Metadata",
    "MetadataIndex",
    "OptimizerStateType",
    "PassedOver",
    "PreemptionHandler",
    "PrimitiveType",
    "QuantizedHuggingFaceStorageReader",
    "ReadItem",
    "Restored",
    "SaveFuture",
    "SavePlan",
    "SavePlanner",
    "SaveProgress",
    "SerializationFormat",
    "Session",
    "StagingOptions",
    "StateDictOptions",
    "Stateful",
    "StatefulT",
    "StorageMeta",
    "StorageReader",
    "StorageWriter",
    "StreamTransformExtension",
    "TensorProperties",
    "TensorStorageMetadata",
    "TensorWriteData",
    "ValueType",
    "WriteItem",
    "WriteItemType",
    "WriteResult",
    "ZStandard",
    "async_save",
    "connect",
    "create_default_global_load_plan",
    "create_default_global_save_plan",
    "create_default_local_load_plan",
    "create_default_local_save_plan",
    "create_read_items_for_chunk_list",
    "dcp_to_torch_save",
    "drain",
    "errors",
    "find_state_dict_object",
    "find_tensor_shard",
    "get_model_state_dict",
    "get_optimizer_state_dict",
    "get_state_dict",
    "install_preemption_handler",
    "load",
    "load_sharded_optimizer_state_dict",
    "load_state_dict",
    "logging_handlers",
    "save",
    "save_state_dict",
    "set_model_state_dict",
    "set_optimizer_state_dict",
    "set_state_dict",
    "state_dict",
    "torch_save_to_dcp",
    "wait_for_staging",
]

if importlib.util.find_spec("torch.distributed.checkpoint.protocol") is not None:  # torch has it from 2.15 on
    CheckpointableTensor = importlib.import_module("torch.distributed.checkpoint.protocol").CheckpointableTensor

    __all__ += ["CheckpointableTensor"]
