"""The loss on labels, and what task a number of classes stands for."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastkd.losses import _hidden


def task_of(logits: Tensor) -> str:
    """ "regression" for one class, whose softmax would be constant (STS-B), else "classification"."""
    return "regression" if logits.shape[-1] == 1 else "classification"


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, or for C = 1 the squared error, as a mean over all samples; in float32 or float64.

    Args:
        logits: [B, C], or [L, B, C] of several layers, whose means are then added up; any floating dtype.
        labels: [B] int64 classes; for C = 1 [B] or [B, 1] scores.
    """
    if logits.dim() == 2:
        logits = logits.unsqueeze(0)
    (logits,) = _hidden.widen(logits)
    layers, batch, classes = logits.shape
    if task_of(logits) == "regression":
        targets = labels.reshape(1, batch, 1).to(logits.dtype).expand_as(logits)
        return layers * F.mse_loss(logits, targets)
    return layers * F.cross_entropy(logits.reshape(-1, classes), labels.repeat(layers))
