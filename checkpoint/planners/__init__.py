"""DCP's planners: what of a state dict is written or read, and by whom. Imports torch.

`save` and `load` are the classes, `plans` what they are made of, `cache` what need not be sent again, `settings` tells
the default planners from a user's own.
"""

from ckptd.checkpoint.planners.load import DefaultLoadPlanner, EmptyStateDictLoadPlanner
from ckptd.checkpoint.planners.plans import (
    create_default_global_load_plan,
    create_default_global_save_plan,
    create_default_local_load_plan,
    create_default_local_save_plan,
)
from ckptd.checkpoint.planners.save import DefaultSavePlanner
from ckptd.checkpoint.planners.settings import LoadSettings, SaveSettings, load_settings, save_settings

__all__ = [
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "EmptyStateDictLoadPlanner",
    "LoadSettings",
    "SaveSettings",
    "create_default_global_load_plan",
    "create_default_global_save_plan",
    "create_default_local_load_plan",
    "create_default_local_save_plan",
    "load_settings",
    "save_settings",
]
