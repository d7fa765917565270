"""What a guarantee says about early answers, and the exact bounds behind it.

A row fails at a speed where leaving early costs the answer:

    consistency   the early answer differs from the full model's; no labels needed, and the accuracy can drop by no more
    accuracy      the full model is right and the early answer is wrong. Accuracy drops by P(this) minus P(the
                  reverse), so a bound on P(this) bounds the drop; gains of leaving early are not counted against it

Three ways to choose from speeds s_1 < s_2 < ... with k_j failures among n rows:

    fixed-sequence   Learn then Test (Angelopoulos et al., 2021; CALM, Schuster et al., 2022): the exact binomial upper
                     bound (Clopper and Pearson, 1934) of each speed's failure rate is compared with `max_drop`, slowest
                     speed first, until the first one fails. All speeds before it hold at once with the stated
                     confidence, without a correction, because the order was fixed beforehand
    conformal        conformal risk control (Angelopoulos et al., 2022): (k + 1) / (n + 1) <= `max_drop`, where a row
                     that failed once counts as failing from then on. Holds on average over calibration sets
    empirical        k / n <= `max_drop`; measures, and guarantees nothing

The guarantee is about new rows drawn like the calibration rows, for a criterion that was chosen without them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv
from torch import Tensor

from fastkd.exits.trace import ExitTrace

GUARANTEES = ("consistency", "accuracy")
METHODS = ("fixed-sequence", "conformal", "empirical")


def check_guarantee(trace: ExitTrace, guarantee: str, tolerance: float | None) -> None:
    """Raise ValueError for a guarantee that is unknown or that these rows cannot give."""
    is_regression = trace.is_regression
    if guarantee not in GUARANTEES:
        raise ValueError(f"guarantee: got {guarantee!r}, expected one of {', '.join(GUARANTEES)}")
    if is_regression and guarantee == "accuracy":
        raise ValueError("guarantee: got 'accuracy', but a regression has no right answers; use 'consistency'")
    if is_regression != (tolerance is not None):
        raise ValueError(
            f"tolerance: got {tolerance}; a regression needs the largest difference between two answers that count as "
            "the same, in units of the label; classes need none"
        )
    if guarantee == "accuracy" and trace.labels is None:
        raise ValueError("guarantee: got 'accuracy', but the trace has no labels; trace labelled rows, or use "
                         "'consistency', which needs none")  # fmt: skip


def failed_rows(early: Tensor, full: Tensor, labels: Tensor | None, guarantee: str, tolerance: float | None) -> Tensor:
    """[n] bool: which rows lose by leaving early."""
    if tolerance is not None:
        return (early - full).abs().le(tolerance).logical_not()
    if guarantee == "consistency":
        return early.ne(full)
    assert labels is not None
    return (full == labels) & (early != labels)


def holding(
    failures: npt.NDArray[Any], n: int, max_drop: float, confidence: float, method: str
) -> npt.NDArray[np.bool_]:
    """Which speeds keep the guarantee, [..., S] bool, of `failures` [..., S] among `n` rows, slowest speed first."""
    is_below = failure_bounds(failures, n, confidence, method) <= max_drop
    return is_below if method == "empirical" else np.logical_and.accumulate(is_below, axis=-1)


def smallest_sample(max_drop: float, confidence: float, method: str = "fixed-sequence", rate: float = 0.0) -> int:
    """Rows with which a speed is allowed that fails in a share `rate` of them."""

    def is_enough(n: int) -> bool:
        return bool(failure_bounds(np.array(math.ceil(rate * n)), n, confidence, method) <= max_drop)

    high = 1
    while not is_enough(high):
        high *= 2
    # rounding up makes single sizes fail; what counts is the size from which on none in the neighbourhood does
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def failure_bounds(failures: npt.NDArray[Any], n: int, confidence: float, method: str) -> npt.NDArray[np.float64]:
    """What `method` compares with `max_drop`, for failures [...] among `n` rows."""
    if method == "fixed-sequence":
        return binomial_upper_bound(failures, n, confidence)
    return (failures + 1) / (n + 1) if method == "conformal" else failures / n


def binomial_upper_bound(failures: npt.ArrayLike, n: int, confidence: float) -> npt.NDArray[np.float64]:
    """The largest failure rate under which so few failures among n rows have probability 1 - confidence or more.

    One-sided Clopper-Pearson: exact, so it holds for every n and rate.
    """
    failures = np.asarray(failures, dtype=np.float64)
    return np.where(failures >= n, 1.0, betaincinv(failures + 1, np.maximum(n - failures, 1), confidence))


def binomial_interval(failures: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The two-sided Clopper-Pearson interval of a failure rate; (0, 1) for no rows."""
    if n == 0:
        return 0.0, 1.0
    each_side = (1 + confidence) / 2
    upper = float(binomial_upper_bound(failures, n, each_side))
    return 1 - float(binomial_upper_bound(n - failures, n, each_side)), upper
