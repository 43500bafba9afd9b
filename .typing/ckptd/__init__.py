"""ckptd: a checkpoint daemon for PyTorch.

``import ckptd.client as dcp`` replaces ``import torch.distributed.checkpoint as dcp``. This root module imports
nothing, so that the daemon, which never loads torch, and the trainer, which always does, share only a name.
"""

from typing import Final

__version__: Final = "0.1.0"
