"""Every exit criterion: the one table from which enums, help texts, checks and the docs are made. Needs no torch."""

from __future__ import annotations

from typing import NamedTuple


class Criterion(NamedTuple):
    """One way to measure how uncertain an answer is."""

    summary: str
    """What it measures, for help texts and tables."""
    is_fused: bool = True
    """Whether `fastkd_kernels.exit_gate` computes it; the others are in `fastkd.exits.criteria`."""


CRITERIA: dict[str, Criterion] = {
    "entropy": Criterion("normalised entropy of the class probabilities (FastBERT)"),
    "max_prob": Criterion("how far the largest probability is from 1"),
    "margin": Criterion("how close the two largest probabilities are"),
    "top_n": Criterion("entropy of the n largest probabilities"),
    "patience": Criterion("how many heads in a row agreed on the label (PABEE)"),
    "learned": Criterion("what a trained exit predicts from [CLS] and the margin (BERxiT)", is_fused=False),
    "agreement": Criterion("how far the answer moved since the previous head, for regression", is_fused=False),
}
"""By the name that users write."""


def default_criterion(num_labels: int) -> str:
    """The criterion of a model with so many labels, where none was chosen."""
    return "agreement" if num_labels == 1 else "entropy"


def check_criterion(criterion: str, top_n: int | None, num_labels: int) -> None:
    """Raise ValueError for a criterion that is unknown, not for this number of labels, or lacks its `top_n`."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: got {criterion!r}, expected one of {', '.join(CRITERIA)}")
    if criterion == "agreement" and num_labels > 1:
        raise ValueError(
            f"criterion: 'agreement' compares numbers, got {num_labels} classes; use 'patience', which compares labels"
        )
    if criterion == "top_n" and (top_n is None or not 2 <= top_n <= num_labels):
        raise ValueError(f"top_n: got {top_n}, criterion 'top_n' needs a whole number from 2 to {num_labels} classes")
