"""Compares exit criteria on the plane of speed-up and accuracy.

Besides the criteria that a model can run (`fastkd.exits.catalogue`), it knows the two rules that share the name PCEE:

    pcee_bert     leave when the last `patience` heads all had an entropy of at most the speed (PCEE-BERT, NAACL 2022);
                  on traces only
    performance   a threshold for each head, from the failures of other rows that were as uncertain (performance
                  control, arXiv 2412.19325); runs in the model with `speed=path.at(s)`
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

import fastkd_kernels as fk
from fastkd.exits.sweep import Sweep
from fastkd.exits.threshold_path import threshold_path
from fastkd.exits.trace import ExitAnswers, ExitTrace, check_trace


def compare(
    trace: ExitTrace,
    reliability: ExitTrace | None = None,
    *,
    points: int = 30,
    top_n: int = 2,
    patience: int = 2,
    seq_len: int | None = None,
) -> dict[str, Sweep]:
    """Every criterion at its own speeds, on the same rows.

    Args:
        trace: labelled rows for a comparison of accuracies.
        reliability: other rows, from which "performance" learns its thresholds; default: a random half of `trace`, and
            all criteria are then compared on the other half. A regression has no "performance" and needs no such rows.
        points: at most so many speeds for each criterion, quantiles of the uncertainties that its gates see.
        top_n: classes that the "top_n" criterion looks at; it stands for "entropy" again where there are no more.
        patience: heads in a row that "pcee_bert" wants certain.
        seq_len: length for which operations are counted; default that of the trace.

    Returns:
        A sweep for each criterion, speed 0 first; "learned" where the trace has a learned exit. For a regression,
        "agreement" takes the place of what needs classes.

    Raises:
        TypeError: no trace; `model.compare` takes rows.
        ValueError: fewer than two rows, or counts out of range.
    """
    check_trace(trace, "compare")
    if len(trace) < 2:
        raise ValueError(f"trace: got {len(trace)} rows, expected at least 2")
    if points < 2 or patience < 1:
        raise ValueError(f"points, patience: got {points} and {patience}, expected at least 2 and 1")
    if reliability is None and not trace.is_regression:
        reliability, trace = _halves(trace)
    swept: dict[str, Sweep] = {}
    for criterion in _criteria(trace):
        n = top_n if criterion == "top_n" else None
        speeds = _quantiles(trace.uncertainties(criterion, n)[:, :-1].numpy(), points)
        swept[criterion] = trace.sweep(speeds, criterion, n, seq_len=seq_len)
    if reliability is None or trace.is_regression:
        return swept
    speeds = _quantiles(trace.uncertainties("entropy")[:, :-1].numpy(), points)
    rows = [trace.cost(speed, speed, patient_answers(trace, speed, patience), seq_len) for speed in speeds]
    swept["pcee_bert"] = Sweep(rows, "pcee_bert", None, swept["entropy"].seq_len, trace.about)
    path = threshold_path(reliability)
    swept["performance"] = trace.sweep(_quantiles(np.concatenate(path.shares), points), path=path, seq_len=seq_len)
    return swept


def patient_answers(trace: ExitTrace, speed: float, patience: int = 2) -> ExitAnswers:
    """PCEE-BERT: leave at the first head that ends `patience` heads in a row with an entropy of at most `speed`.

    At speed 0 the full model answers.
    """
    uncertainty = trace.uncertainties("entropy")
    run = torch.zeros(len(trace), dtype=torch.int64)
    chosen = torch.full((len(trace),), len(trace.exit_layers) - 1)
    # backwards over the runs would need their ends; forwards, a row keeps the first head that it left at
    has_left = torch.zeros(len(trace), dtype=torch.bool)
    for index in range(len(trace.exit_layers) - 1):
        is_certain = (uncertainty[:, index] <= speed) & (speed > 0)
        run = torch.where(is_certain, run + 1, 0)
        leaves = (run >= patience) & ~has_left
        chosen[leaves] = index
        has_left |= leaves
    rows = torch.arange(len(trace))
    logits = trace.logits[rows, chosen]
    layers = torch.tensor(trace.exit_layers, dtype=torch.int32)[chosen]
    return ExitAnswers(logits.argmax(-1), layers, uncertainty[rows, chosen], logits)


def _criteria(trace: ExitTrace) -> list[str]:
    learned = [] if trace.certainty is None else ["learned"]
    return [*(["agreement"] if trace.is_regression else fk.CRITERIA), *learned]


def _halves(trace: ExitTrace) -> tuple[ExitTrace, ExitTrace]:
    order = torch.randperm(len(trace), generator=torch.Generator().manual_seed(0))
    middle = len(trace) // 2
    return trace.select(order[:middle]), trace.select(order[middle:])


def _quantiles(values: npt.NDArray[np.floating], points: int) -> list[float]:
    """0 and at most `points` of the values above it, evenly spread over their ranks."""
    known = values[np.isfinite(values) & (values > 0)]
    if not len(known):
        return [0.0, 1.0]
    chosen = np.quantile(known, np.linspace(0, 1, points), method="inverted_cdf")
    return [0.0, *np.unique(chosen).astype(float).tolist()]
