"""A temperature for each early head: how certain it may be of the last head's probabilities, or of its answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

from fastkd.encoders.heads import ExitHead

_BOUNDS = (math.log(0.05), math.log(20.0))


def agreement_temperatures(early_logits: Tensor, last_logits: Tensor) -> list[float]:
    """By what to divide the logits of each early head so that it predicts the class of the last head best.

    The temperature scaling of Guo et al. (ICML 2017), with the answers of the last head in the place of labels: what
    early exit costs is that answers change. A head that learned the last one's probabilities is as unsure as the last
    one is of the label, which is more, in deep layers much more, than it is of the last one's answer; a head that
    overfitted is less. Every class has one row more than were counted, so that a head which is always right is not
    infinitely certain.

    Args:
        early_logits: [n, M, C] of M heads, of rows that trained none of them; C at least 2.
        last_logits: [n, C].

    Returns:
        M numbers from 0.05 to 20; lower is more certain.
    """
    rows, classes = last_logits.shape
    counted = F.one_hot(last_logits.argmax(-1), classes).double()
    return _temperatures(early_logits, (rows * counted + 1) / (rows + classes))


def probability_temperatures(early_logits: Tensor, last_logits: Tensor) -> list[float]:
    """By what to divide the logits of each early head so that it predicts the probabilities of the last head best.

    It undoes what training on few rows added of certainty, and leaves a head that is as certain as the last one alone.
    Arguments and result are those of `agreement_temperatures`.
    """
    return _temperatures(early_logits, last_logits.double().softmax(-1))


HEAD_TEMPERATURES: Mapping[str, Callable[[Tensor, Tensor], list[float]] | None] = MappingProxyType(
    {"none": None, "probabilities": probability_temperatures, "answers": agreement_temperatures}
)
"""What a head's temperature may be fitted to: the last head's answers, or its probabilities."""


def _temperatures(early_logits: Tensor, target: Tensor) -> list[float]:
    """Those of the lowest cross-entropy with the distributions `target` [n, C]."""

    def loss(log_temperature: float, logits: Tensor) -> float:
        return -(target * (logits / math.exp(log_temperature)).log_softmax(-1)).sum(-1).mean().item()

    return [
        math.exp(minimize_scalar(loss, bounds=_BOUNDS, args=(logits,), method="bounded").x)
        for logits in early_logits.double().unbind(1)
    ]


@torch.no_grad()
def divide_logits(heads: Sequence[ExitHead], temperatures: Sequence[float]) -> None:
    """Put a temperature into the weights of each head, so that everything which runs them has it."""
    for head, temperature in zip(heads, temperatures, strict=True):
        for weights in (head.out_proj.weight, head.out_proj.bias):
            weights.div_(temperature)
