"""How far the uncertainty of the heads can be relied on: figures 4 and 6 of FastBERT (ACL 2020) in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.exits.intervals import Interval, mean_interval, share_interval
from fastkd.exits.trace import ExitTrace, predictions

FEWEST_ROWS = 20
"""An interval with fewer rows says nothing about its accuracy."""


@dataclass(frozen=True)
class AccuracyByUncertainty:
    """Figure 4 for one head: how good its answers are in equal intervals of uncertainty, which cut [0, 1].

    What an interval with fewer than `FEWEST_ROWS` rows would say is None.
    """

    layer: int
    counts: list[int]
    """Rows whose uncertainty lies in each interval."""
    accuracies: list[float | None]
    """Share of right answers among them; None without labels, and for regression."""
    errors: list[float | None]
    """For regression the mean of |answer - label|; None without labels, and for classes."""
    bounds: list[Interval | None]
    """Of accuracy or error, for rows to come, with 95 % confidence."""

    @property
    def qualities(self) -> list[float | None]:
        """Accuracies, or for regression errors."""
        return self.errors if any(value is not None for value in self.errors) else self.accuracies


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
    """How good every head is over equal intervals of uncertainty (figure 4), in layer order.

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
    parts = _parts(uncertainty, intervals)
    counts = _counted(parts, intervals)
    nothing: list[float | None] = [None] * intervals
    if trace.labels is None:
        return AccuracyByUncertainty(layer, counts, nothing, nothing, [None] * intervals)
    answers = predictions(logits)
    found = [_quality_of(answers[parts == part], trace.labels[parts == part]) for part in range(intervals)]
    values = [None if quality is None else quality[0] for quality in found]
    bounds = [None if quality is None else quality[1] for quality in found]
    if trace.is_regression:
        return AccuracyByUncertainty(layer, counts, nothing, values, bounds)
    return AccuracyByUncertainty(layer, counts, values, nothing, bounds)


def _quality_of(answers: Tensor, labels: Tensor) -> tuple[float, Interval] | None:
    """Accuracy of classes, or mean absolute error of numbers, with its interval; None for too few rows."""
    if len(answers) < FEWEST_ROWS:
        return None
    if answers.is_floating_point():
        errors = (answers.double() - labels.double()).abs()
        return errors.mean().item(), mean_interval(errors.numpy())
    right = int((answers == labels).sum())
    return right / len(answers), share_interval(right, len(answers))


def _parts(uncertainty: Tensor, parts: int) -> Tensor:
    """Into which of the equal parts of [0, 1] each value falls, [n]; -1 for NaN."""
    # an uncertainty of 1 belongs to the last part
    found = (uncertainty.double().nan_to_num(nan=0.0) * parts).long().clamp(0, parts - 1)
    return torch.where(uncertainty.isnan(), -1, found)


def _counted(found: Tensor, parts: int) -> list[int]:
    return torch.bincount(found[found >= 0], minlength=parts).tolist()


def _histogram(uncertainty: Tensor, parts: int) -> list[int]:
    return _counted(_parts(uncertainty, parts), parts)
