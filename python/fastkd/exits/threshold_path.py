"""`ThresholdPath`: a threshold for each head at every speed, learned from rows that are not calibrated on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastkd.exits.guarantees import check_guarantee, failed_rows
from fastkd.exits.trace import ExitTrace, predictions


@dataclass(frozen=True)
class ThresholdPath:
    """A threshold for each head below the last, growing with one number: performance control (PCEE).

    At speed s a head lets a row leave if rows as uncertain as this one were answered wrongly at that head in a share of
    at most s. The shares come from a trace of other rows: isotonic regression of the failures on the uncertainty, so
    that each head ends up with one threshold. After "Performance Control in Early Exiting" (arXiv 2412.19325), which
    bins instead.
    """

    criterion: str
    top_n: int | None
    exit_layers: list[int]
    shares: list[npt.NDArray[np.float64]]
    """For each head below the last, the shares of failures of its steps, ascending."""
    thresholds: list[npt.NDArray[np.float64]]
    """The largest uncertainty of each step."""
    data: str
    """Fingerprint of the rows that it was learned from."""

    def at(self, speed: float) -> list[float]:
        """The thresholds at a speed in [0, 1], one for each head below the last; at 0 none leave, at 1 all."""
        if speed in (0, 1):
            return [float(speed)] * len(self.shares)
        steps = [int(np.searchsorted(shares, speed, side="right")) for shares in self.shares]
        return [
            float(thresholds[step - 1]) if step else 0.0
            for step, thresholds in zip(steps, self.thresholds, strict=True)
        ]


def threshold_path(
    trace: ExitTrace,
    criterion: str | None = None,
    top_n: int | None = None,
    *,
    guarantee: str = "consistency",
    tolerance: float | None = None,
) -> ThresholdPath:
    """Thresholds for each head at every speed, learned from the failures in `trace`.

    Args:
        trace: of rows that will not be used for calibration.
        criterion, top_n: as in `ExitTrace.answers`; not "patience", which has too few values.
        guarantee, tolerance: what counts as a failure, as in `calibrate`.

    Raises:
        ValueError: as `calibrate`, or "patience".
    """
    from scipy.optimize import isotonic_regression

    check_guarantee(trace, guarantee, tolerance)
    criterion = criterion or trace.default_criterion
    if criterion == "patience":
        raise ValueError("criterion: got 'patience', whose few values need no path; calibrate its speed")
    uncertainty = trace.uncertainties(criterion, top_n).double().numpy()
    full = predictions(trace.logits[:, -1])
    shares, thresholds = [], []
    for index in range(len(trace.exit_layers) - 1):
        failed = failed_rows(predictions(trace.logits[:, index]), full, trace.labels, guarantee, tolerance).numpy()
        is_known = ~np.isnan(uncertainty[:, index])
        values, where, count = np.unique(uncertainty[is_known, index], return_inverse=True, return_counts=True)
        mean = np.bincount(where, weights=failed[is_known], minlength=len(values)) / count
        steps = isotonic_regression(mean, weights=count).x if len(values) else mean
        last_of_step = np.append(np.diff(steps) > 0, True)[: len(steps)]
        shares.append(steps[last_of_step])
        thresholds.append(values[last_of_step])
    return ThresholdPath(criterion, top_n, list(trace.exit_layers), shares, thresholds, trace.source.data)
