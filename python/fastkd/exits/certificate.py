"""`Certificate`: what a calibration guarantees. It stays with the weights that it was made for."""

from __future__ import annotations

import os
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch

from fastkd.data.files import read_json, write_json
from fastkd.exits.fingerprints import HasWeights, file_fingerprint, model_fingerprint
from fastkd.exits.guarantees import GUARANTEES, METHODS, binomial_upper_bound

if TYPE_CHECKING:
    from typing_extensions import Self


class CalibrationWarning(UserWarning):
    """The guarantee rests on rows that it should not rest on."""


class CertifiedConfig(Protocol):
    """The configuration that carries a certificate, and says how a model answers where a call says nothing."""

    @property
    def certificate(self) -> Mapping[str, Any] | None: ...

    @property
    def rank_certificate(self) -> Mapping[str, Any] | None: ...

    @property
    def speed(self) -> float | list[float]: ...

    @property
    def criterion(self) -> str: ...

    @property
    def top_n(self) -> int | None: ...

    @property
    def exit_layers(self) -> list[int]: ...

    @property
    def num_hidden_layers(self) -> int: ...


class CertifiedModel(HasWeights, Protocol):
    """A model with such a configuration."""

    @property
    def config(self) -> CertifiedConfig: ...

    @property
    def weights_dtype(self) -> str:
        """As torch calls it, or "int8"."""
        ...

    def confirm_weights(self) -> None:
        """Say that the configuration describes the weights as they are now."""
        ...

    def changed_weights(self) -> str | None:
        """How the weights differ from those that the configuration describes; None where they do not."""
        ...


@dataclass(frozen=True)
class KeptCertificate:
    """What all certificates share: they are kept in the configuration of the model that they were made for."""

    KEY: ClassVar[str]
    """Where in the configuration."""
    model: str
    """Fingerprint of the weights."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: fields that no certificate has, or missing ones.
        """
        expected = {field.name for field in fields(cls)}
        if value.keys() != expected:
            wrong = sorted(value.keys() ^ expected)
            raise ValueError(f"certificate: fields {', '.join(wrong)} are missing or unknown; calibrate again")
        for field in fields(cls):
            if not any(_is_kind(value[field.name], kind) for kind in str(field.type).split(" | ")):
                got = reprlib.repr(value[field.name])
                raise ValueError(f"certificate: {field.name} is {got}, expected {field.type}; calibrate again")
        cls._check(value)
        return cls(**value)

    @classmethod
    def _check(cls, value: Mapping[str, Any]) -> None:
        """Raise ValueError for values that no calibration gives."""

    @classmethod
    def of(cls, config: CertifiedConfig) -> Self | None:
        """The certificate in a model's configuration."""
        value = getattr(config, cls.KEY)
        return None if value is None else cls.from_dict(value)

    def apply(self, model: CertifiedModel, *, set_default: bool = False) -> None:
        """Write the certificate into `model.config`, from where `save_pretrained` takes it along.

        Args:
            model: the traced model.
            set_default: make this the speed that the model runs at where a call gives none.

        Raises:
            ValueError: the weights are not the traced ones.
        """
        self._check_model(model_fingerprint(model))
        for name, value in self._settings(set_default).items():
            setattr(model.config, name, value)
        model.confirm_weights()

    def save(self, folder: str | os.PathLike[str], model: str, *, set_default: bool = False) -> None:
        """Write the certificate into the config.json of a saved model, and nothing else.

        Args:
            folder: of the model.
            model: fingerprint of its weights (`model_fingerprint`).
            set_default: as in `apply`.

        Raises:
            ValueError: the weights are not the traced ones.
        """
        self._check_model(model)
        path = Path(folder) / "config.json"
        config = read_json(path, "model", "save the model again")
        fingerprint = file_fingerprint(folder) or config.get("weights_fingerprint")
        write_json(path, {**config, **self._settings(set_default), "weights_fingerprint": fingerprint})

    def _settings(self, set_default: bool) -> dict[str, Any]:
        return {self.KEY: self.to_dict()}

    def _check_model(self, fingerprint: str) -> None:
        if not self.model:
            raise ValueError("certificate: its trace does not say which weights made it; trace again with this version")
        if fingerprint != self.model:
            raise ValueError(
                f"certificate: it is for other weights (fingerprint {self.model[:12]}) than this model's "
                f"({fingerprint[:12]}); trace this model and calibrate again"
            )


@dataclass(frozen=True)
class Certificate(KeptCertificate):
    """What a calibration guarantees, and on what grounds."""

    KEY: ClassVar[str] = "certificate"

    guarantee: str
    """One of `fastkd.exits.guarantees.GUARANTEES`: what counts as a failure."""
    method: str
    """One of `fastkd.exits.guarantees.METHODS`."""
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
    """The layers after which rows may leave, and the last layer."""
    dtype: str
    """Of the weights, as torch calls it: "float32"; "int8" of a quantised model; empty if the trace did not say."""
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
    """Operations of the full model divided by the operations at this speed (`fastkd.flops`, convention fastbert)."""
    average_layers: float
    accuracy: float | None
    """At this speed on the calibration rows; None without labels and for regression."""
    full_accuracy: float | None
    seq_len: int
    """Length for which operations were counted."""
    data: str
    """Fingerprint of the calibration rows."""
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

    @staticmethod
    def is_needed(config: CertifiedConfig, speed: float | Sequence[float] | None = None) -> bool:
        """Whether rows may leave early; the full model needs no certificate."""
        return any(_as_list(config.speed if speed is None else speed))

    def mismatches(
        self,
        config: CertifiedConfig,
        dtype: torch.dtype | str,
        speed: float | Sequence[float] | None = None,
        criterion: str | None = None,
        top_n: int | None = None,
        exit_layers: Sequence[int] | None = None,
    ) -> list[str]:
        """One sentence for each difference between use and certificate; none where the guarantee holds.

        It holds for the full model (speed 0) whatever was certified.

        Args:
            config: of the model.
            dtype: of its weights.
            speed, criterion, top_n, exit_layers: as given to `forward`; None takes what the model says.
        """
        if not self.is_needed(config, speed):
            return []
        speeds = _as_list(config.speed if speed is None else speed)
        layers = config.exit_layers if exit_layers is None else sorted({*exit_layers, config.num_hidden_layers})
        compared: dict[str, tuple[Sequence[object], Sequence[object]]] = {
            "dtype": ([self.dtype or "unknown"], [str(dtype).removeprefix("torch.")]),
            "speed": (_as_list(self.speed), speeds),
            "criterion": ([self.criterion], [config.criterion if criterion is None else criterion]),
            "top_n": ([self.top_n], [config.top_n if top_n is None else top_n]),
            "exit layers": (self.exit_layers, layers),
        }
        return [
            f"it is for {name} {', '.join(map(str, certified))}, but {', '.join(map(str, used))} is in use"
            for name, (certified, used) in compared.items()
            if certified != used
        ]

    def __str__(self) -> str:
        what = {
            "consistency": "get a different answer from the full model's",
            "accuracy": "lose a correct answer of the full model",
        }[self.guarantee]
        share = f"at most {percent(self.max_drop)} of rows {what}"
        counted = f"{self.failures} of {self.n:,} did"
        if self.method == "fixed-sequence":
            assert self.confidence is not None
            return (
                f"with {percent(self.confidence)} confidence {share} ({counted}; exact binomial upper bound "
                f"{percent(self.bound)})"
            )
        if self.method == "conformal":
            return f"on average over calibration sets {share} ({counted}; conformal bound {percent(self.bound)})"
        return f"on the calibration rows {share} ({counted}); measured, not guaranteed"

    @classmethod
    def _check(cls, value: Mapping[str, Any]) -> None:
        is_known = value["guarantee"] in GUARANTEES and value["method"] in METHODS
        if not is_known or (value["method"] == "fixed-sequence" and value["confidence"] is None):
            kind = f"{value['guarantee']}, {value['method']}, confidence {value['confidence']}"
            raise ValueError(f"certificate: got {kind}, which is not a kind of guarantee; calibrate again")

    def _settings(self, set_default: bool) -> dict[str, Any]:
        default = {"speed": self.speed, "criterion": self.criterion, "top_n": self.top_n} if set_default else {}
        return super()._settings(set_default) | default


def warn_if_uncertified(model: CertifiedModel, **exits: Any) -> list[str]:
    """`Certificate.mismatches` for a call of `model` with the options `exits`; none where it has no certificate.

    Warns:
        CalibrationWarning: there are some.
    """
    certificate = Certificate.of(model.config)
    if certificate is None or not certificate.is_needed(model.config, exits.get("speed")):
        return []
    mismatches = certificate.mismatches(model.config, model.weights_dtype, **exits)
    changed = model.changed_weights()
    if changed is not None:
        mismatches.append(f"it is for other weights: {changed}; calibrate again")
    if mismatches:
        warnings.warn(f"certificate: {'; '.join(mismatches)}; nothing is promised", CalibrationWarning, stacklevel=3)
    return mismatches


def _is_kind(value: Any, kind: str) -> bool:
    """Whether JSON's `value` is what the annotation `kind` of a field says."""
    if kind.startswith("list["):
        return isinstance(value, list) and all(_is_kind(item, kind[5:-1]) for item in value)
    if kind == "None":
        return value is None
    kinds = {"str": str, "int": int, "float": (int, float)}
    return isinstance(value, kinds[kind]) and not isinstance(value, bool)  # type: ignore[arg-type]


def _as_list(speed: float | Sequence[float]) -> list[float]:
    return [float(value) for value in np.atleast_1d(speed)]


def percent(share: float) -> str:
    """A share in three digits: "99.5%"."""
    return f"{100 * share:.3g}%"
