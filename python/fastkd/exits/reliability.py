"""What the heads' uncertainty is worth: figures 4 and 6 of FastBERT (ACL 2020) as numbers, from an exit trace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.exits.trace import ExitTrace


@dataclass(frozen=True)
class IntervalAccuracy:
    """How right one head is, by how certain it is; the intervals cut [0, 1] into equal parts (figure 4)."""

    layer: int
    counts: list[int]
    """Rows whose uncertainty lies in each interval."""
    accuracies: list[float | None]
    """Share of right answers among them; None where there are none, or no labels, or for regression."""


@dataclass(frozen=True)
class Arrivals:
    """The uncertainty of the rows that reach one head at one speed (figure 6)."""

    layer: int
    rows: int
    counts: list[int]
    """By equal parts of [0, 1]; rows whose uncertainty is NaN are in none of them."""


def accuracy_by_interval(trace: ExitTrace, uncertainties: Tensor, intervals: int = 10) -> list[IntervalAccuracy]:
    """Accuracy over equal intervals of uncertainty, one entry a head, in layer order.

    Args:
        trace: with or without labels.
        uncertainties: of `ExitTrace.uncertainties`, [n, K].
        intervals: how many parts [0, 1] is cut into.
    """
    return [
        _interval_accuracy(trace, layer, trace.logits[:, index], uncertainties[:, index], intervals)
        for index, layer in enumerate(trace.exit_layers)
    ]


def _interval_accuracy(
    trace: ExitTrace, layer: int, logits: Tensor, uncertainty: Tensor, intervals: int
) -> IntervalAccuracy:
    counts = _histogram(uncertainty, intervals)
    if trace.labels is None or trace.is_regression:
        return IntervalAccuracy(layer, counts, [None] * intervals)
    right = _histogram(uncertainty[logits.argmax(dim=-1) == trace.labels], intervals)
    shares = [hits / count if count else None for hits, count in zip(right, counts, strict=True)]
    return IntervalAccuracy(layer, counts, shares)


def arrivals(trace: ExitTrace, uncertainties: Tensor, left_after: Tensor, bins: int = 25) -> list[Arrivals]:
    """The distribution of uncertainty at every head over the rows that reach it.

    Args:
        trace: whose heads these are.
        uncertainties: of `ExitTrace.uncertainties`, [n, K].
        left_after: the layer after which each row leaves, [n]: `trace.answers(speed, ...).exit_layer`.
        bins: how many parts [0, 1] is cut into.
    """
    found = []
    for index, layer in enumerate(trace.exit_layers):
        arrived = uncertainties[left_after >= layer, index]
        found.append(Arrivals(layer, len(arrived), _histogram(arrived, bins)))
    return found


def _histogram(uncertainty: Tensor, parts: int) -> list[int]:
    known = uncertainty[~uncertainty.isnan()].double()
    # an uncertainty of 1 belongs to the last part
    return torch.bincount((known * parts).long().clamp(0, parts - 1), minlength=parts).tolist()
