"""Speeds with a guarantee (`fastkd.exits.guarantees`), chosen on rows that training has not seen."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial

import numpy as np
import torch

import fastkd_kernels as fk
from fastkd.exits.catalogue import check_criterion
from fastkd.exits.certificate import CalibrationWarning, Certificate, percent
from fastkd.exits.guarantees import METHODS, check_guarantee, failed_rows, failure_bounds, holding, smallest_sample
from fastkd.exits.sweep import SweepRow
from fastkd.exits.threshold_path import ThresholdPath
from fastkd.exits.trace import ExitAnswers, ExitTrace, check_trace

_SEEN_SHARE = 0.01  # of the rows may have been in training: splits with a few duplicates are common
SPEEDS = tuple(step / 200 for step in range(1, 201))
"""The speeds that are tried unless others are given."""


class CalibrationError(ValueError):
    """These rows guarantee no speed."""


def calibrate(
    trace: ExitTrace,
    max_drop: float = 0.01,
    confidence: float = 0.95,
    *,
    guarantee: str = "consistency",
    method: str = "fixed-sequence",
    criterion: str | None = None,
    top_n: int | None = None,
    path: ThresholdPath | None = None,
    speeds: Sequence[float] | None = None,
    tolerance: float | None = None,
    seq_len: int | None = None,
    allow_seen: bool = False,
) -> Certificate:
    """The speed that saves most operations among those that keep a guarantee.

    Args:
        trace: of rows drawn like the rows to come. They neither trained the model nor chose its weights or criterion.
        max_drop: the share of rows that may fail, in (0, 1).
        confidence: with which the fixed-sequence guarantee holds, in (0, 1).
        guarantee: "consistency" or "accuracy" (`fastkd.exits.guarantees`); the latter needs labels.
        method: "fixed-sequence", "conformal" or "empirical".
        criterion, top_n: as in `ExitTrace.answers`.
        path: a threshold for each head instead of one for all, learned from other rows; criterion and top_n are then
            the path's.
        speeds: tried in ascending order; default `SPEEDS`. Choose them without looking at the trace.
        tolerance: for regression, the difference up to which two answers are the same, in units of the label.
        seq_len: length for which operations are counted; default that of the trace.
        allow_seen: also certify on rows of which training has seen more than 1 %; the guarantee is void for them.

    Warns:
        CalibrationWarning: training has seen some of these rows, or the method guarantees nothing.

    Raises:
        CalibrationError: training has seen more than 1 % of the rows; too few rows for this guarantee (it says how many
            are needed), or no speed keeps it and saves operations.
        TypeError: no trace; `model.calibrate` takes rows.
        ValueError: an unknown name, numbers outside their range, labels or tolerance missing, a path that was learned
            from these rows.
    """
    check_trace(trace, "calibrate")
    check_choices(max_drop, confidence, method)
    if speeds is not None and not (len(speeds) and all(0 < speed <= 1 for speed in speeds)):
        raise ValueError(f"speeds: got {list(speeds)}, expected numbers above 0 and up to 1")
    check_guarantee(trace, guarantee, tolerance)
    criterion = criterion or trace.default_criterion
    if path is not None:
        _check_path(path, trace)
        criterion, top_n = path.criterion, path.top_n
    check_criterion(criterion, top_n, trace.logits.shape[-1])
    needed = smallest_sample(max_drop, confidence, method)
    if len(trace) < needed:
        raise CalibrationError(
            f"trace: got {len(trace)} rows, but {aim(max_drop, confidence, method)} takes at least {needed}, even if "
            f"none of them fails; calibrate on {needed} rows or more, or allow a larger max_drop"
        )
    seen_as = part_that_saw(trace, allow_seen)
    if method == "empirical":
        warnings.warn(
            "method: 'empirical' measures the calibration rows and guarantees nothing for others",
            CalibrationWarning,
            stacklevel=2,
        )
    answers_at = partial(trace.answers, criterion=criterion, top_n=top_n)
    full = answers_at(0.0)
    tried = [
        _Tried(
            trace.cost(speed, thresholds, answers, seq_len, learned_exit=criterion == "learned"), thresholds, failures
        )
        for speed, thresholds, answers, failures in _failures(
            trace,
            answers_at,
            full,
            sorted(SPEEDS if speeds is None else speeds),
            path,
            guarantee,
            tolerance,
            method,
        )
    ]
    counts = np.array([step.failures for step in tried])
    allowed = holding(counts, len(trace), max_drop, confidence, method)
    chosen = _fastest([step for step, holds in zip(tried, allowed, strict=True) if holds])
    if chosen is None:
        raise CalibrationError(_why_none(tried[0], len(trace), max_drop, confidence, method, bool(allowed.any())))
    row, failures = chosen.row, chosen.failures
    early = answers_at(chosen.thresholds).prediction
    disagreements = int(failed_rows(early, full.prediction, None, "consistency", tolerance).sum())
    return Certificate(
        guarantee=guarantee,
        method=method,
        max_drop=max_drop,
        confidence=confidence if method == "fixed-sequence" else None,
        speed=chosen.thresholds,
        position=row.speed,
        criterion=criterion,
        top_n=top_n,
        exit_layers=list(trace.exit_layers),
        dtype=trace.source.dtype,
        tolerance=tolerance,
        n=len(trace),
        failures=failures,
        bound=float(failure_bounds(np.array(failures), len(trace), confidence, method)),
        disagreements=disagreements,
        speedup=row.speedup["fastbert"],
        average_layers=row.average_layers,
        accuracy=row.accuracy,
        full_accuracy=trace.cost(0.0, 0.0, full, seq_len).accuracy,
        seq_len=trace.max_length if seq_len is None else seq_len,
        data=trace.source.data,
        model=trace.source.model,
        seen_as=seen_as,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        version=fk.__version__,
    )


@dataclass(frozen=True)
class _Tried:
    """A speed: its costs, what `forward` takes, and how many rows failed."""

    row: SweepRow
    thresholds: float | list[float]
    failures: int


def _failures(
    trace: ExitTrace,
    answers_at: Callable[[float | list[float]], ExitAnswers],
    full: ExitAnswers,
    speeds: Sequence[float],
    path: ThresholdPath | None,
    guarantee: str,
    tolerance: float | None,
    method: str,
) -> Iterator[tuple[float, float | list[float], ExitAnswers, int]]:
    """Every speed's name, thresholds, answers and failures; "conformal" adds the failures of the slower speeds."""
    failed_before = torch.zeros(len(trace), dtype=torch.bool)
    for speed in speeds:
        thresholds = speed if path is None else path.at(speed)
        answers = answers_at(thresholds)
        failed = failed_rows(answers.prediction, full.prediction, trace.labels, guarantee, tolerance)
        if method == "conformal":
            failed_before |= failed
            failed = failed_before
        yield speed, thresholds, answers, int(failed.sum())


def _fastest(tried: Sequence[_Tried]) -> _Tried | None:
    """The speed that saves most operations, the slowest of equals; None if no speed saves any."""
    best = max(tried, key=lambda step: step.row.speedup["fastbert"], default=None)
    return None if best is None or best.row.speedup["fastbert"] <= 1 else best


def check_choices(max_drop: float, confidence: float, method: str) -> None:
    """Raise ValueError for shares outside (0, 1), or an unknown method."""
    for name, value in (("max_drop", max_drop), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a share above 0 and below 1, such as 0.01 or 0.95")
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")


def _check_path(path: ThresholdPath, trace: ExitTrace) -> None:
    if path.exit_layers != trace.exit_layers:
        raise ValueError(
            f"path: learned for heads after the layers {path.exit_layers}, the trace has {trace.exit_layers}"
        )
    if path.data and path.data == trace.source.data:
        raise ValueError("path: learned from the rows of this trace, which voids the guarantee; use other rows for it")


def part_that_saw(trace: ExitTrace, allowed: bool) -> str | None:
    """The part of training that saw most of these rows, where it is more than may be; with a warning where any did.

    Raises:
        CalibrationError: more than may be, and not allowed.
    """
    seen = {part: count for part, count in trace.source.seen.items() if count}
    total = trace.source.seen_anywhere
    for part, fingerprint in trace.source.training_data.items():
        if fingerprint == trace.source.data:
            seen[part] = total = len(trace)
    if not seen:
        return None
    parts = ", ".join(f"{count:,} were {part} rows" for part, count in seen.items())
    told = f"trace: {total:,} of these {len(trace):,} rows were in the training of this model ({parts})"
    if total <= _SEEN_SHARE * len(trace):
        warnings.warn(f"{told}; so few are allowed", CalibrationWarning, stacklevel=3)
        return None
    told += ", so it does better on them than on new ones and the guarantee does not hold"
    if not allowed:
        raise CalibrationError(
            f"{told}; calibrate on rows that training has not seen, or pass allow_seen=True (--allow-seen)"
        )
    warnings.warn(told, CalibrationWarning, stacklevel=3)
    return max(seen, key=lambda part: seen[part])


def _why_none(slowest: _Tried, n: int, max_drop: float, confidence: float, method: str, some_hold: bool) -> str:
    speed, failures = slowest.row.speed, slowest.failures
    if some_hold:
        return (
            "trace: every speed that keeps the guarantee costs more operations than it saves, so the full model is the "
            "faster one; allow a larger max_drop, distil longer, or try another criterion"
        )
    rate = failures / n
    if rate >= max_drop:
        return (
            f"trace: even at speed {speed:g} {failures} of {n:,} rows fail, more than {percent(max_drop)}; allow a "
            "larger max_drop, distil longer, or try slower speeds"
        )
    needed = smallest_sample(max_drop, confidence, method, rate)
    return (
        f"trace: {failures} of {n:,} rows fail at speed {speed:g}, too many for {aim(max_drop, confidence, method)} "
        f"with so few rows; at that rate about {needed:,} rows would be enough; or allow a larger max_drop"
    )


def aim(max_drop: float, confidence: float, method: str) -> str:
    """What is to be guaranteed, in words."""
    with_confidence = f" with {percent(confidence)} confidence" if method == "fixed-sequence" else ""
    return f"at most {percent(max_drop)} failures{with_confidence}"
