"""How far a quality that some rows measured may lie from that of rows to come: intervals of 95 % confidence.

A share of rows has Wilson's interval, a correlation the percentiles of a bootstrap over rows. Both speak of one
quality; speeds of one trace are answered by the same rows, so that differences between them are surer than that.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
_DEVIATIONS = 1.959963984540054
_RESAMPLES = 400
_DRAWN_AT_ONCE = 2_000_000

Interval = tuple[float, float]


def share_interval(hits: int, n: int) -> Interval:
    """Wilson's score interval of a share, `hits` of `n` rows (Wilson, 1927); (0, 1) for no rows."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = hits / n, _DEVIATIONS**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _DEVIATIONS / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: npt.NDArray[np.float64]) -> Interval:
    """Of a mean, from the standard error of its values [n]; infinite for fewer than two."""
    if len(values) < 2:
        return -math.inf, math.inf
    mean, half = float(values.mean()), _DEVIATIONS * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def correlation_interval(answers: npt.NDArray[np.float64], labels: npt.NDArray[np.float64]) -> Interval | None:
    """Of Pearson's correlation of answers and labels, both [n]: percentiles over resampled rows (Efron, 1979).

    The same rows are drawn for the same n, so that neighbouring speeds have neighbouring intervals. None where too few
    rows vary.
    """
    n = len(labels)
    if n < 3 or not (np.isfinite(answers).all() and answers.std() and labels.std()):
        return None
    generator = np.random.default_rng(0)
    # centred and scaled, so that float64 sums of squares lose nothing
    x, y = ((values - values.mean()) / values.std() for values in (answers, labels))
    found: list[npt.NDArray[np.float64]] = []
    at_once = max(1, min(_RESAMPLES, _DRAWN_AT_ONCE // n))
    for start in range(0, _RESAMPLES, at_once):
        rows = generator.integers(0, n, (min(at_once, _RESAMPLES - start), n))
        found.append(_correlations(x[rows], y[rows]))
    low, high = np.nanquantile(np.concatenate(found), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _correlations(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of each row of x and y [R, n]; NaN where one side is constant."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    scale = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(1) / scale
