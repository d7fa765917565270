"""How far the uncertainty of the heads can be relied on: figures 4 and 6 of FastBERT (ACL 2020) in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.exits.trace import ExitTrace


@dataclass(frozen=True)
class AccuracyByUncertainty:
    """Figure 4 for one head: the accuracy of its answers in equal intervals of uncertainty, which cut [0, 1]."""

    layer: int
    counts: list[int]
    """Rows whose uncertainty lies in each interval."""
    accuracies: list[float | None]
    """Share of right answers among them; None where there are none, or no labels, or for regression."""


@dataclass(frozen=True)
class UncertaintyAtLayer:
    """Figure 6 for one head: the distribution of uncertainty over the rows that reach it at one speed."""

    layer: int
    rows: int
    counts: list[int]
    """Rows in each of the equal parts of [0, 1]; a row whose uncertainty is NaN is in none of them."""


def accuracy_by_uncertainty(
    trace: ExitTrace, uncertainties: Tensor, intervals: int = 10
) -> list[AccuracyByUncertainty]:
    """The accuracy of every head over equal intervals of uncertainty (figure 4), in layer order.

    Args:
        trace: with or without labels.
        uncertainties: of `ExitTrace.uncertainties`, [n, K].
        intervals: how many parts [0, 1] is cut into.
    """
    return [
        _accuracy_of_head(trace, layer, trace.logits[:, index], uncertainties[:, index], intervals)
        for index, layer in enumerate(trace.exit_layers)
    ]


def uncertainty_per_layer(
    trace: ExitTrace, uncertainties: Tensor, left_after: Tensor, bins: int = 25
) -> list[UncertaintyAtLayer]:
    """The distribution of uncertainty at every head over the rows that reach it (figure 6), in layer order.

    Args:
        trace: of the heads.
        uncertainties: of `ExitTrace.uncertainties`, [n, K].
        left_after: the layer after which each row leaves, [n]: `trace.answers(speed, ...).exit_layer`.
        bins: how many parts [0, 1] is cut into.
    """
    found = []
    for index, layer in enumerate(trace.exit_layers):
        arrived = uncertainties[left_after >= layer, index]
        found.append(UncertaintyAtLayer(layer, len(arrived), _histogram(arrived, bins)))
    return found


def _accuracy_of_head(
    trace: ExitTrace, layer: int, logits: Tensor, uncertainty: Tensor, intervals: int
) -> AccuracyByUncertainty:
    counts = _histogram(uncertainty, intervals)
    if trace.labels is None or trace.is_regression:
        return AccuracyByUncertainty(layer, counts, [None] * intervals)
    right = _histogram(uncertainty[logits.argmax(dim=-1) == trace.labels], intervals)
    shares = [hits / count if count else None for hits, count in zip(right, counts, strict=True)]
    return AccuracyByUncertainty(layer, counts, shares)


def _histogram(uncertainty: Tensor, parts: int) -> list[int]:
    known = uncertainty[~uncertainty.isnan()].double()
    # an uncertainty of 1 belongs to the last part
    return torch.bincount((known * parts).long().clamp(0, parts - 1), minlength=parts).tolist()
