"""Distillation losses as modules for anybody's training loop, one file a method.

They take tensors only: logits [B, C], logits of every layer [L, B, C] (`fastkd.kd.probe.PseudoClassifiers`), or pooled
hidden states of every layer [L, B, H] (`fastkd.kd.probe.LayerProbe`), first layer first. Layers are numbered from 1,
as in the papers. Each class says whose formula or code it follows, and what its reduction and temperature scaling are.
"""

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
