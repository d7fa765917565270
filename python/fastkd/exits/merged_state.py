"""The weights of a model with its adapters merged, as peft's `merge_and_unload` leaves them; the model stays as it is.

Adapters are layers of peft around layers of the model (LoRA and others), and copies of whole modules that train in the
place of the originals (`modules_to_save`).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def is_adapter(module: Any) -> bool:
    """Whether the module is one that peft put around another one."""
    return hasattr(module, "modules") and any(base.__module__.startswith("peft.") for base in type(module).__mro__)


@torch.no_grad()
def merged_state(model: Any) -> Mapping[str, Any]:
    """`model.state_dict()` as it would be if the active adapters were merged."""
    if "peft" not in sys.modules or not isinstance(model, nn.Module) or not any(map(is_adapter, model.modules())):
        return model.state_dict()
    state: dict[str, Any] = {}
    _collect(model, "", state)
    return state


@torch.no_grad()
def take_off_adapters(model: nn.Module) -> None:
    """Put the merged module in the place of every adapter in `model`; peft leaves some that lie in another one."""
    for name, child in list(model.named_children()):
        if is_adapter(child):
            child = _merged(child)
            setattr(model, name, child)
        take_off_adapters(child)


def _collect(module: nn.Module, prefix: str, state: dict[str, Any]) -> None:
    module = _merged(module)
    module._save_to_state_dict(state, prefix, keep_vars=False)
    for name, child in module.named_children():
        _collect(child, f"{prefix}{name}.", state)


def _merged(module: nn.Module) -> nn.Module:
    """What stands for an adapter once it is merged; a module that is none itself."""
    while is_adapter(module):
        adapter: Any = module
        is_copy = hasattr(adapter, "unload_and_optionally_merge_module")
        if getattr(adapter, "disable_adapters", False):
            module = adapter.original_module if is_copy else adapter.get_base_layer()
        elif is_copy:
            module = copy.deepcopy(adapter).unload_and_optionally_merge_module(True, False, None)
        else:
            if not adapter.merged:
                adapter = copy.deepcopy(adapter)
                adapter.merge()
            module = adapter.get_base_layer()
    return module
