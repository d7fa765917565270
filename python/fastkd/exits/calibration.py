"""Speeds with a guarantee, chosen on rows that training has not seen.

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

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import betaincinv
from torch import Tensor

import fastkd_kernels as fk
from fastkd.data.files import write_json
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.exits.catalogue import check_criterion
from fastkd.exits.trace import ExitAnswers, ExitTrace, SweepRow, model_fingerprint, predictions

if TYPE_CHECKING:
    from fastkd.model.modeling import EarlyExitForSequenceClassification

GUARANTEES = ("consistency", "accuracy")
METHODS = ("fixed-sequence", "conformal", "empirical")
SPEEDS = tuple(step / 200 for step in range(1, 201))
"""The speeds that are tried unless others are given."""


class CalibrationError(ValueError):
    """No speed can be vouched for with these rows."""


class CalibrationWarning(UserWarning):
    """The guarantee rests on rows that it should not rest on."""


@dataclass(frozen=True)
class Certificate:
    """What a calibration vouches for, and on what grounds."""

    guarantee: str
    """One of `GUARANTEES`: what counts as a failure."""
    method: str
    """One of `METHODS`."""
    max_drop: float
    """The share of rows that may fail."""
    confidence: float | None
    """Probability that the calibration rows led to a speed that keeps `max_drop`; None where the method has none."""
    speed: float | list[float]
    """What `forward` takes: one number, or one for each head below the last."""
    position: float
    """The speed's name: itself, or its place on the threshold path."""
    criterion: str
    top_n: int | None
    exit_layers: list[int]
    """After which layers it is decided, and the last."""
    dtype: str
    """Of the weights, as torch calls it: "float32"; empty if the trace did not say."""
    tolerance: float | None
    """Regression: up to which difference two answers are the same, in units of the label."""
    n: int
    """Calibration rows."""
    failures: int
    """How many of them failed."""
    bound: float
    """On the share of failures, by `method`; at most `max_drop`."""
    disagreements: int
    """How many answers differed from the full model's; equal to `failures` under consistency."""
    speedup: float
    """Operations of the full model divided by those at this speed (`fastkd.flops`, convention fastbert)."""
    average_layers: float
    accuracy: float | None
    """At this speed on the calibration rows; None without labels and for regression."""
    full_accuracy: float | None
    seq_len: int
    """Length for which operations were counted."""
    data: str
    """Fingerprint of the calibration rows."""
    model: str
    """Fingerprint of the weights."""
    seen_as: str | None
    """The part in training that the calibration rows had, which voids the guarantee; None if none is known."""
    date: str
    """ISO 8601, UTC."""
    version: str
    """Of fastkd-kernels."""

    @property
    def agreement(self) -> float:
        """The share of rows that are promised the full model's answer, against which drift is measured."""
        if self.guarantee == "consistency":
            return 1 - self.max_drop
        return 1 - float(binomial_upper_bound(self.disagreements, self.n, self.confidence or 0.95))

    def mismatches(
        self,
        config: EarlyExitConfig,
        dtype: torch.dtype | str,
        speed: float | Sequence[float] | None = None,
        criterion: str | None = None,
        top_n: int | None = None,
        exit_layers: Sequence[int] | None = None,
    ) -> list[str]:
        """Where what is in use is not what was certified, a sentence each; none where the guarantee holds.

        It holds for the full model (speed 0) whatever was certified.

        Args:
            config: of the model.
            dtype: of its weights.
            speed, criterion, top_n, exit_layers: as given to `forward`; None takes what the model says.
        """
        speeds = _as_list(config.speed if speed is None else speed)
        if not any(speeds):
            return []
        layers = config.exit_layers if exit_layers is None else sorted({*exit_layers, config.num_hidden_layers})
        compared: dict[str, tuple[Sequence[object], Sequence[object]]] = {
            "dtype": ([self.dtype or "unknown"], [str(dtype).removeprefix("torch.")]),
            "speed": (_as_list(self.speed), speeds),
            "criterion": ([self.criterion], [config.criterion if criterion is None else criterion]),
            "top_n": ([self.top_n], [config.top_n if top_n is None else top_n]),
            "exit layers": (self.exit_layers, layers),
        }
        return [
            f"it is for {name} {', '.join(map(str, certified))}, in use is {', '.join(map(str, used))}"
            for name, (certified, used) in compared.items()
            if certified != used
        ]

    def __str__(self) -> str:
        what = {
            "consistency": "get another answer than from the full model",
            "accuracy": "lose a right answer of the full model",
        }[self.guarantee]
        share = f"at most {_percent(self.max_drop)} of rows {what}"
        counted = f"{self.failures} of {self.n:,} did"
        if self.method == "fixed-sequence":
            assert self.confidence is not None
            return (
                f"with {_percent(self.confidence)} confidence {share} ({counted}; exact binomial upper bound "
                f"{_percent(self.bound)})"
            )
        if self.method == "conformal":
            return f"on average over calibration sets {share} ({counted}; conformal bound {_percent(self.bound)})"
        return f"on the calibration rows {share} ({counted}); measured, not guaranteed"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Certificate:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: fields that no certificate has, or missing ones.
        """
        expected = {field.name for field in fields(cls)}
        if value.keys() != expected:
            wrong = sorted(value.keys() ^ expected)
            raise ValueError(f"certificate: fields {', '.join(wrong)} are missing or unknown; calibrate again")
        return cls(**value)

    @classmethod
    def of(cls, config: EarlyExitConfig) -> Certificate | None:
        """The certificate in a model's configuration."""
        return None if config.certificate is None else cls.from_dict(config.certificate)

    def apply(self, model: EarlyExitForSequenceClassification, *, set_default: bool = False) -> None:
        """Write the certificate into `model.config`, from where `save_pretrained` takes it along.

        Args:
            model: the one that was traced.
            set_default: also make this the speed that the model runs at where it is given none.

        Raises:
            ValueError: other weights than those that were traced.
        """
        self._check_model(model_fingerprint(model))
        for name, value in self._settings(set_default).items():
            setattr(model.config, name, value)

    def save(self, folder: str | os.PathLike[str], model: str, *, set_default: bool = False) -> None:
        """Write the certificate into the config.json of a saved model, and nothing else.

        Args:
            folder: of the model.
            model: fingerprint of its weights (`model_fingerprint`).
            set_default: as in `apply`.

        Raises:
            ValueError: other weights than those that were traced.
        """
        self._check_model(model)
        path = Path(folder) / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**config, **self._settings(set_default)})

    def _settings(self, set_default: bool) -> dict[str, Any]:
        default = {"speed": self.speed, "criterion": self.criterion, "top_n": self.top_n} if set_default else {}
        return {"certificate": self.to_dict(), **default}

    def _check_model(self, fingerprint: str) -> None:
        if not self.model:
            raise ValueError("certificate: its trace does not say which weights made it; trace again with this version")
        if fingerprint != self.model:
            raise ValueError(
                f"certificate: it is for other weights (fingerprint {self.model[:12]}) than this model's "
                f"({fingerprint[:12]}); trace this model and calibrate again"
            )


def warn_if_uncertified(model: EarlyExitForSequenceClassification, **exits: Any) -> list[str]:
    """`Certificate.mismatches` for a call of `model` with the options `exits`; none where it has no certificate.

    Warns:
        CalibrationWarning: there are some.
    """
    certificate = Certificate.of(model.config)
    mismatches = [] if certificate is None else certificate.mismatches(model.config, model.dtype, **exits)
    if mismatches:
        warnings.warn(f"certificate: {'; '.join(mismatches)}; nothing is promised", CalibrationWarning, stacklevel=3)
    return mismatches


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
    """For each head below the last, the failure shares of its steps, ascending."""
    thresholds: list[npt.NDArray[np.float64]]
    """The largest uncertainty of each step."""
    data: str
    """Fingerprint of the rows it was learned from."""

    @classmethod
    def fit(
        cls,
        trace: ExitTrace,
        criterion: str | None = None,
        top_n: int | None = None,
        *,
        guarantee: str = "consistency",
        tolerance: float | None = None,
    ) -> ThresholdPath:
        """Learn the shares from `trace`.

        Args:
            trace: of rows that will not be used for calibration.
            criterion, top_n: as in `ExitTrace.answers`; not "patience", which has too few values.
            guarantee, tolerance: what counts as a failure, as in `calibrate`.

        Raises:
            ValueError: as `calibrate`, or "patience".
        """
        from scipy.optimize import isotonic_regression

        _check_what_fails(trace, guarantee, tolerance)
        criterion = criterion or trace.default_criterion
        if criterion == "patience":
            raise ValueError("criterion: got 'patience', whose few values need no path; calibrate its speed")
        uncertainty = trace.uncertainties(criterion, top_n).double().numpy()
        full = predictions(trace.logits[:, -1])
        shares, thresholds = [], []
        for index in range(len(trace.exit_layers) - 1):
            failed = _failed(predictions(trace.logits[:, index]), full, trace.labels, guarantee, tolerance).numpy()
            is_known = ~np.isnan(uncertainty[:, index])
            values, where, count = np.unique(uncertainty[is_known, index], return_inverse=True, return_counts=True)
            mean = np.bincount(where, weights=failed[is_known], minlength=len(values)) / count
            steps = isotonic_regression(mean, weights=count).x if len(values) else mean
            last_of_step = np.append(np.diff(steps) > 0, True)[: len(steps)]
            shares.append(steps[last_of_step])
            thresholds.append(values[last_of_step])
        return cls(criterion, top_n, list(trace.exit_layers), shares, thresholds, trace.source.data)

    def at(self, speed: float) -> list[float]:
        """The thresholds at a speed in [0, 1], one for each head below the last; 0 nobody, 1 everybody leaves."""
        if speed in (0, 1):
            return [float(speed)] * len(self.shares)
        steps = [int(np.searchsorted(shares, speed, side="right")) for shares in self.shares]
        return [
            float(thresholds[step - 1]) if step else 0.0
            for step, thresholds in zip(steps, self.thresholds, strict=True)
        ]


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
) -> Certificate:
    """The speed that saves most operations among those that keep a guarantee.

    Args:
        trace: of rows drawn like those to come, which neither trained the model nor chose between weights or criteria.
        max_drop: the share of rows that may fail, in (0, 1).
        confidence: with which the fixed-sequence guarantee holds, in (0, 1).
        guarantee: "consistency" or "accuracy" (module docstring); the latter needs labels.
        method: "fixed-sequence", "conformal" or "empirical".
        criterion, top_n: as in `ExitTrace.answers`.
        path: a threshold for each head instead of one for all, learned from other rows; criterion and top_n are then
            the path's.
        speeds: tried in ascending order; default `SPEEDS`. Choose them without looking at the trace.
        tolerance: for regression, the difference up to which two answers are the same, in units of the label.
        seq_len: length for which operations are counted; default that of the trace.

    Warns:
        CalibrationWarning: training has seen these rows, or the method guarantees nothing.

    Raises:
        CalibrationError: too few rows for this guarantee (it says how many are needed), or no speed keeps it and saves
            operations.
        ValueError: an unknown name, numbers outside their range, labels or tolerance missing, a path that was learned
            from these rows.
    """
    _check_choices(max_drop, confidence, method, speeds)
    _check_what_fails(trace, guarantee, tolerance)
    criterion = criterion or trace.default_criterion
    if path is not None:
        _check_path(path, trace)
        criterion, top_n = path.criterion, path.top_n
    check_criterion(criterion, top_n, trace.logits.shape[-1])
    needed = smallest_sample(max_drop, confidence, method)
    if len(trace) < needed:
        raise CalibrationError(
            f"trace: got {len(trace)} rows, but {_aim(max_drop, confidence, method)} takes at least {needed}, even if "
            f"none of them fails; calibrate on {needed} rows or more, or allow a larger max_drop"
        )
    seen_as = _warn_if_seen(trace)
    if method == "empirical":
        warnings.warn(
            "method: 'empirical' measures the calibration rows and guarantees nothing for others",
            CalibrationWarning,
            stacklevel=3,
        )
    full = trace.answers(0.0, criterion, top_n)
    tried = [
        _Tried(
            trace.cost(speed, thresholds, answers, seq_len, learned_exit=criterion == "learned"), thresholds, failures
        )
        for speed, thresholds, answers, failures in _failures(
            trace,
            full,
            sorted(SPEEDS if speeds is None else speeds),
            criterion,
            top_n,
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
    early = trace.answers(chosen.thresholds, criterion, top_n).prediction
    disagreements = int(_failed(early, full.prediction, None, "consistency", tolerance).sum())
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
        bound=float(bounds(np.array(failures), len(trace), confidence, method)),
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


# Bounds; the counts may have any number of dimensions, the last one being the speeds in their order


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


def bounds(failures: npt.NDArray[Any], n: int, confidence: float, method: str) -> npt.NDArray[np.float64]:
    """What each method compares with `max_drop`."""
    if method == "fixed-sequence":
        return binomial_upper_bound(failures, n, confidence)
    return (failures + 1) / (n + 1) if method == "conformal" else failures / n


def holding(
    failures: npt.NDArray[Any], n: int, max_drop: float, confidence: float, method: str
) -> npt.NDArray[np.bool_]:
    """Which speeds keep the guarantee, of `failures` [..., S] among `n` rows, slowest speed first."""
    is_below = bounds(failures, n, confidence, method) <= max_drop
    return is_below if method == "empirical" else np.logical_and.accumulate(is_below, axis=-1)


def smallest_sample(max_drop: float, confidence: float, method: str = "fixed-sequence", rate: float = 0.0) -> int:
    """Rows with which a speed is allowed that fails in a share `rate` of them."""

    def is_enough(n: int) -> bool:
        return bool(bounds(np.array(math.ceil(rate * n)), n, confidence, method) <= max_drop)

    high = 1
    while not is_enough(high):
        high *= 2
    # rounding up makes single sizes fail; what counts is the size from which on none in the neighbourhood does
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


# Failures


@dataclass(frozen=True)
class _Tried:
    """A speed: its costs, what `forward` takes, and how many rows failed."""

    row: SweepRow
    thresholds: float | list[float]
    failures: int


def _failures(
    trace: ExitTrace,
    full: ExitAnswers,
    speeds: Sequence[float],
    criterion: str,
    top_n: int | None,
    path: ThresholdPath | None,
    guarantee: str,
    tolerance: float | None,
    method: str,
) -> Iterator[tuple[float, float | list[float], ExitAnswers, int]]:
    """Every speed's name, thresholds, answers and failures; under "conformal" with those of the slower speeds too."""
    failed_before = torch.zeros(len(trace), dtype=torch.bool)
    for speed in speeds:
        thresholds = speed if path is None else path.at(speed)
        answers = trace.answers(thresholds, criterion, top_n)
        failed = _failed(answers.prediction, full.prediction, trace.labels, guarantee, tolerance)
        if method == "conformal":
            failed_before |= failed
            failed = failed_before
        yield speed, thresholds, answers, int(failed.sum())


def _failed(early: Tensor, full: Tensor, labels: Tensor | None, guarantee: str, tolerance: float | None) -> Tensor:
    """[n] bool: which rows lose by leaving early."""
    if tolerance is not None:
        return (early - full).abs().le(tolerance).logical_not()
    if guarantee == "consistency":
        return early.ne(full)
    assert labels is not None
    return (full == labels) & (early != labels)


def _fastest(tried: Sequence[_Tried]) -> _Tried | None:
    """The one that saves most operations, the slowest of equals; None if none saves any."""
    best = max(tried, key=lambda step: step.row.speedup["fastbert"], default=None)
    return None if best is None or best.row.speedup["fastbert"] <= 1 else best


# Checks and messages


def _check_choices(max_drop: float, confidence: float, method: str, speeds: Sequence[float] | None) -> None:
    for name, value in (("max_drop", max_drop), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a share above 0 and below 1, such as 0.01 or 0.95")
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    if speeds is not None and not (len(speeds) and all(0 < speed <= 1 for speed in speeds)):
        raise ValueError(f"speeds: got {list(speeds)}, expected numbers above 0 and up to 1")


def _check_what_fails(trace: ExitTrace, guarantee: str, tolerance: float | None) -> None:
    is_regression = trace.is_regression
    if guarantee not in GUARANTEES:
        raise ValueError(f"guarantee: got {guarantee!r}, expected one of {', '.join(GUARANTEES)}")
    if is_regression and guarantee == "accuracy":
        raise ValueError("guarantee: got 'accuracy', but a regression has no right answers; use 'consistency'")
    if is_regression != (tolerance is not None):
        raise ValueError(
            f"tolerance: got {tolerance}; a regression needs the difference up to which two answers are the same, in "
            "units of the label, and classes take none"
        )
    if guarantee == "accuracy" and trace.labels is None:
        raise ValueError("guarantee: got 'accuracy', but the trace has no labels; trace labelled rows, or use "
                         "'consistency', which needs none")  # fmt: skip


def _check_path(path: ThresholdPath, trace: ExitTrace) -> None:
    if path.exit_layers != trace.exit_layers:
        raise ValueError(
            f"path: learned for heads after the layers {path.exit_layers}, the trace has {trace.exit_layers}"
        )
    if path.data and path.data == trace.source.data:
        raise ValueError("path: learned from the rows of this trace, which voids the guarantee; use other rows for it")


def _warn_if_seen(trace: ExitTrace) -> str | None:
    """The part that these rows had in training, with a warning, or None."""
    for part, fingerprint in trace.source.training_data.items():
        if fingerprint == trace.source.data:
            warnings.warn(
                f"trace: these rows were the {part} rows of this model, so it does better on them than on new ones and "
                "the guarantee does not hold; calibrate on rows that training has not seen",
                CalibrationWarning,
                stacklevel=4,
            )
            return part
    return None


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
            f"trace: already at speed {speed:g} {failures} of {n:,} rows fail, more than {_percent(max_drop)}; allow a "
            "larger max_drop, distil longer, or try slower speeds"
        )
    needed = smallest_sample(max_drop, confidence, method, rate)
    return (
        f"trace: {failures} of {n:,} rows fail at speed {speed:g}, too many for {_aim(max_drop, confidence, method)} "
        f"with so few rows; at that rate about {needed:,} rows would do; or allow a larger max_drop"
    )


def _aim(max_drop: float, confidence: float, method: str) -> str:
    with_confidence = f" with {_percent(confidence)} confidence" if method == "fixed-sequence" else ""
    return f"at most {_percent(max_drop)} failures{with_confidence}"


def _as_list(speed: float | Sequence[float]) -> list[float]:
    return [float(value) for value in np.atleast_1d(speed)]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
