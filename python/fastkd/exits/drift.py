"""Drift: does the traffic still get the answers that the certificate promises?

A small share of the rows also runs to full depth, and their early answers are compared with the full model's. A row's
number and a seed alone decide whether it is watched, so batch size and engine do not matter, and no answer depends on
being watched.

    interval   Clopper-Pearson (1934), of the agreement so far
    alarm      E = integral of p^k (1-p)^(n-k) w(p) dp / (p0^k (1-p0)^(n-k)) >= 1 / (1 - confidence)

after k disagreements among n watched rows, where p0 is the disagreement that the certificate allows and w a
Beta(1, 1 / (4 p0)) density on p > p0. While the true rate is at most p0, E is a supermartingale that starts at 1, so by
Ville's inequality it ever reaches the bound with probability 1 - confidence at most: the alarm may be checked after
every row, for ever, and still keeps its level.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import betaincc, betaln
from torch import Tensor

from fastkd.exits.certificate import Certificate, CertifiedModel, warn_if_uncertified
from fastkd.exits.guarantees import binomial_interval


class WatchedModel(CertifiedModel, Protocol):
    """A model that answers a batch, `logits` [B, C] among its answers, at the speed that the call names."""

    @property
    def __call__(self) -> Callable[..., Any]: ...


Model = TypeVar("Model", bound=WatchedModel)


class DriftWarning(UserWarning):
    """Early answers agree with the full model's less often than the certificate promises."""


@dataclass(frozen=True)
class DriftReport:
    """What a monitor has seen so far."""

    rows: int
    """All rows that went by."""
    watched: int
    """Rows that were also run to full depth."""
    agreements: int
    agreement: float | None
    """Share of the watched rows; None before the first."""
    low: float
    high: float
    """Interval of the agreement at `confidence`."""
    confidence: float
    promised: float | None
    """The agreement that the certificate promises; None where no certificate covers what is in use."""
    mismatches: list[str]
    """One sentence for each difference between use and certificate."""
    has_drifted: bool
    """Whether the alarm has been raised."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.agreement is None:
            return f"drift: none of {self.rows:,} rows was watched yet"
        text = (
            f"drift: {self.agreements} of {self.watched:,} watched rows got the full model's answer, "
            f"{100 * self.agreement:.2f}% ({100 * self.confidence:.3g}% interval {100 * self.low:.2f} to "
            f"{100 * self.high:.2f}%)"
        )
        if self.promised is None:
            return f"{text}; nothing is promised: {'; '.join(self.mismatches) or 'the model has no certificate'}"
        promise = f"the certificate promises {100 * self.promised:.2f}%"
        if self.has_drifted:
            return f"{text}; {promise}, but these rows fall short: calibrate again on rows like these"
        return f"{text}; {promise}"


class DriftMonitor(Generic[Model]):
    """Counts how often early answers agree with the full model's."""

    def __init__(
        self,
        model: Model,
        share: float = 0.01,
        *,
        speed: float | Sequence[float] | None = None,
        criterion: str | None = None,
        top_n: int | None = None,
        exit_layers: Sequence[int] | None = None,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> None:
        """Watch `share` of the rows that `model` answers.

        Args:
            model: in evaluation mode; the traffic is held to its certificate.
            share: of the rows that run to full depth too, above 0 and up to 1.
            speed, criterion, top_n, exit_layers: how the rows are answered; default: as the model's configuration says.
            confidence: of interval and alarm.
            seed: chooses the rows that are watched.

        Warns:
            CalibrationWarning: the model's certificate is for other options, so nothing is promised for these rows.

        Raises:
            ValueError: a share or confidence outside its range.
        """
        if not 0 < share <= 1:
            raise ValueError(f"monitor: got {share!r}, expected a share of the rows above 0 and up to 1, such as 0.01")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence: got {confidence!r}, expected a number between 0 and 1, such as 0.95")
        config = model.config
        self.model = model
        self.share = share
        self.confidence = confidence
        self.seed = seed
        self.speed = config.speed if speed is None else speed
        self.criterion = config.criterion if criterion is None else criterion
        self.top_n = config.top_n if top_n is None else top_n
        self.exit_layers = exit_layers
        self._mismatches = warn_if_uncertified(model, **self.exits)
        certificate = None if self._mismatches else Certificate.of(config)
        self._promised = None if certificate is None else certificate.agreement
        self._tolerance = None if certificate is None else certificate.tolerance
        self.rows = self.watched = self.agreements = 0
        self.has_drifted = False

    @property
    def exits(self) -> dict[str, Any]:
        """How the rows are answered, as arguments of `forward`."""
        return {
            "speed": self.speed,
            "criterion": self.criterion,
            "top_n": self.top_n,
            "exit_layers": self.exit_layers,
        }

    def watches(self, numbers: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Which of the rows with these numbers are watched; every number is its own draw."""
        return _uniform(np.asarray(numbers), self.seed) < self.share

    def __call__(self, **batch: Tensor) -> Any:
        """The model's answer to a batch, whose rows are numbered in the order in which they come.

        Warns:
            DriftWarning: as `record`.
        """
        output = self.model(**batch, **self.exits)
        rows = output.logits.shape[0]
        watched = torch.from_numpy(self.watches(np.arange(self.rows, self.rows + rows)).nonzero()[0])
        if not len(watched):
            self.record(rows)
            return output
        watched = watched.to(output.logits.device)
        part = {name: values.index_select(0, watched) for name, values in batch.items()}
        with torch.no_grad():
            full = self.model(**part, **{**self.exits, "speed": 0.0}).logits
        early = output.logits.detach().index_select(0, watched)
        if full.shape[-1] > 1:
            early, full = early.argmax(-1, keepdim=True), full.argmax(-1, keepdim=True)
        self.record(rows, early.squeeze(-1).tolist(), full.squeeze(-1).tolist())
        return output

    def record(self, rows: int, early: Sequence[Any] = (), full: Sequence[Any] = ()) -> None:
        """Count `rows` more rows, and of the watched ones among them the early answers and the full model's.

        Warns:
            DriftWarning: once, when the alarm is raised.
        """
        self.rows += rows
        self.watched += len(early)
        self.agreements += sum(self._agree(*answers) for answers in zip(early, full, strict=True))
        if self.has_drifted or self._promised is None:
            return
        failures = self.watched - self.agreements
        if evidence(failures, self.watched, 1 - self._promised) >= -math.log(1 - self.confidence):
            self.has_drifted = True
            warnings.warn(str(self.report()), DriftWarning, stacklevel=2)

    def report(self) -> DriftReport:
        """What this monitor has seen so far."""
        low, high = binomial_interval(self.agreements, self.watched, self.confidence)
        return DriftReport(
            rows=self.rows,
            watched=self.watched,
            agreements=self.agreements,
            agreement=self.agreements / self.watched if self.watched else None,
            low=low,
            high=high,
            confidence=self.confidence,
            promised=self._promised,
            mismatches=self._mismatches,
            has_drifted=self.has_drifted,
        )

    def _agree(self, early: Any, full: Any) -> bool:
        if early is None or full is None:  # no finite answer, which agrees with nothing
            return False
        return early == full if self._tolerance is None else abs(early - full) <= self._tolerance


def evidence(failures: npt.ArrayLike, n: npt.ArrayLike, allowed: float) -> npt.NDArray[np.float64]:
    """ln E of the module docstring: how strongly `failures` among `n` speak for a rate above `allowed`."""
    k, n = np.asarray(failures, dtype=np.float64), np.asarray(n, dtype=np.float64)
    weight = 1 / (4 * allowed)
    log_mixture = betaln(k + 1, n - k + weight) + _log(betaincc(k + 1, n - k + weight, allowed))
    log_prior = betaln(1, weight) + _log(betaincc(1, weight, allowed))
    return log_mixture - log_prior - k * math.log(allowed) - (n - k) * math.log1p(-allowed)


def _log(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    with np.errstate(divide="ignore"):  # an integral that underflows is no evidence
        return np.log(values)


def _uniform(numbers: npt.NDArray[Any], seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each row number: splitmix64 (Steele et al., 2014), one step from each state."""
    with np.errstate(over="ignore"):
        state = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state ^= _mixed(np.asarray([seed], dtype=np.int64).astype(np.uint64))
        return (_mixed(state) >> np.uint64(11)).astype(np.float64) / 2**53


def _mixed(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
