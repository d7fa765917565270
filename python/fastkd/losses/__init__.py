"""Distillation losses as modules for any training loop, one file a method. They know tensors only.

They take logits [B, C], logits of every layer [L, B, C] (`fastkd.kd.probe.PseudoClassifiers`), or pooled
hidden states of every layer [L, B, H] (`fastkd.kd.probe.LayerProbe`), first layer first. Layers are numbered from 1,
as in the papers. Each class says whose formula or code it follows, and what its reduction and temperature scaling are.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastkd.losses.catalogue import LOSSES

if TYPE_CHECKING:
    from fastkd.losses.alp_kd import ALPKDLoss
    from fastkd.losses.annealing_kd import AnnealingKDLoss
    from fastkd.losses.dih import DIHLoss
    from fastkd.losses.distilbert import DistilBertLoss
    from fastkd.losses.kd import KD_PRESETS, KDLoss, VanillaKDLoss
    from fastkd.losses.labels import label_loss
    from fastkd.losses.layer_maps import inner_layer_map
    from fastkd.losses.mhkd import MHKDLoss
    from fastkd.losses.pkd import PKDLoss
    from fastkd.losses.rail_kd import RAILKDLoss
    from fastkd.losses.universal_kd import UniversalKDLoss, UniversalKDMixtureLoss

# the catalogue is read where torch is not imported
_HOME = {name: loss.module for name, loss in LOSSES.items()} | {
    "KD_PRESETS": "kd",
    "inner_layer_map": "layer_maps",
    "label_loss": "labels",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


__all__ = [
    "KD_PRESETS",
    "ALPKDLoss",
    "AnnealingKDLoss",
    "DIHLoss",
    "DistilBertLoss",
    "KDLoss",
    "MHKDLoss",
    "PKDLoss",
    "RAILKDLoss",
    "UniversalKDLoss",
    "UniversalKDMixtureLoss",
    "VanillaKDLoss",
    "inner_layer_map",
    "label_loss",
]
