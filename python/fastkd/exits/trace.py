"""Exit traces: one pass through every head answers every threshold and every criterion offline.

A row that leaves early changes no other row's hidden states, so the logits of all heads, recorded once, contain every
answer that the model can give at any speed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

import fastkd_kernels as fk
from fastkd.data.tensors import damaged, load_tensors, save_tensors
from fastkd.exits import criteria
from fastkd.exits.catalogue import default_criterion
from fastkd.exits.flops import CONVENTIONS, FlopsShape, flops
from fastkd.exits.intervals import Interval, correlation_interval, share_interval
from fastkd.exits.rule import ExitRule, head_speeds
from fastkd.exits.sweep import Sweep, SweepRow

_FORMAT = "fastkd exit trace 1"
_REMEDY = "write it again with `fastkd trace`; in float32 if the model overflows"


@dataclass(frozen=True)
class ExitAnswers:
    """What the model answers at one speed, one entry a row."""

    prediction: Tensor
    """[n] int64, the class; float32, the number, for regression."""
    exit_layer: Tensor
    """[n] int32, 1 after the first layer."""
    uncertainty: Tensor
    """[n] float32, at that layer."""
    logits: Tensor
    """[n, C] float32, of that layer's head."""


@dataclass(frozen=True)
class TraceSource:
    """Where a trace comes from, as fingerprints; empty where that is unknown."""

    model: str = ""
    """Of the weights (`model_fingerprint`)."""
    data: str = ""
    """Of the rows (`Rows.digest`), before any were drawn from them."""
    training_data: Mapping[str, str] = field(default_factory=dict)
    """Of the rows that the weights have seen, by their part in training."""
    dtype: str = ""
    """Of the weights, as torch calls it: "float32"."""
    seen: Mapping[str, int] = field(default_factory=dict)
    """How many of the traced rows were in each part of training; empty where that is unknown."""
    seen_anywhere: int = 0
    """How many were in any part."""
    model_name: str = ""
    """What people call the model: the name of its folder."""
    data_name: str = ""
    """What people call the rows: the last parts of their path."""
    label_names: list[str] = field(default_factory=list)
    """Of the classes, in order; empty where the model calls them by number."""


class SpeedThresholds(Protocol):
    """A threshold for each head at every speed, under one criterion; `ThresholdPath` is one."""

    @property
    def criterion(self) -> str: ...

    @property
    def top_n(self) -> int | None: ...

    def at(self, speed: float) -> list[float]:
        """The thresholds at a speed in [0, 1], one for each head below the last."""
        ...


@dataclass(frozen=True)
class ExitTrace:
    """Every head's logits on a data set.

    Attributes:
        logits: [n, K, C] float32, heads in layer order; the last one is the full model's answer.
        labels: [n] int64, or None.
        lengths: [n] int32, tokens of each row without padding.
        exit_layers: the K layers that have a head, 1-based; the last is `shape.num_hidden_layers`.
        max_length: the longest row as it was fed, padding included.
        shape: the sizes on which operations depend.
        rows: [n] int64, the row of the data (0 is the first) that each one is; None where that is unknown.
        source: which model and which rows these are.
        certainty: [n, K] float32, what the learned exit gives each head; None where the model has none.
        queries: [n] int64, for pairs: equal numbers where the first texts are equal; None for single texts.
    """

    logits: Tensor
    labels: Tensor | None
    lengths: Tensor
    exit_layers: list[int]
    max_length: int
    shape: FlopsShape
    rows: Tensor | None = None
    source: TraceSource = TraceSource()
    certainty: Tensor | None = None
    queries: Tensor | None = None

    def __post_init__(self) -> None:
        if self.logits.dim() != 3 or self.logits.shape[1] != len(self.exit_layers):
            raise ValueError(
                f"logits: got shape {tuple(self.logits.shape)}, expected [n, {len(self.exit_layers)}, C], one head an "
                "exit layer"
            )
        for name in ("labels", "lengths", "rows", "queries"):
            value = getattr(self, name)
            if value is not None and value.shape != self.logits.shape[:1]:
                raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [{self.logits.shape[0]}]")
        if self.certainty is not None and self.certainty.shape != self.logits.shape[:2]:
            shapes = f"got shape {tuple(self.certainty.shape)}, expected {list(self.logits.shape[:2])}"
            raise ValueError(f"certainty: {shapes}, one per head")

    def __len__(self) -> int:
        return self.logits.shape[0]

    @property
    def num_layers(self) -> int:
        return self.shape.num_hidden_layers

    @property
    def is_regression(self) -> bool:
        return self.logits.shape[-1] == 1

    @property
    def has_right_answers(self) -> bool:
        """Whether the rows have labels that an answer meets or misses; a number only comes near."""
        return self.labels is not None and not self.is_regression

    @property
    def default_criterion(self) -> str:
        return default_criterion(self.logits.shape[-1])

    @property
    def about(self) -> str:
        """Data, rows and model in words: "ag_news/test.tsv, 7,600 rows; model ag, 6 layers"."""
        data = f"{self.source.data_name}, " if self.source.data_name else ""
        name = f"model {self.source.model_name}, " if self.source.model_name else "model of "
        return f"{data}{len(self):,} row{'' if len(self) == 1 else 's'}; {name}{self.num_layers} layers"

    def select(self, rows: Tensor) -> ExitTrace:
        """The trace of these rows [m] only."""
        tensors = ("logits", "labels", "lengths", "rows", "certainty", "queries")
        parts = {name: value[rows] for name in tensors if (value := getattr(self, name)) is not None}
        return replace(self, **parts)

    def answers(
        self, speed: float | Sequence[float], criterion: str | None = None, top_n: int | None = None
    ) -> ExitAnswers:
        """What `forward(speed, criterion, top_n)` answers, by the same gate.

        The criterion is "entropy" where none is given, for regression "agreement".

        Raises:
            ValueError: as `fastkd.exits.rule.head_speeds` and `fastkd.exits.criteria.decide`.
        """
        criterion = criterion or self.default_criterion
        speeds = head_speeds(speed, self.exit_layers)
        rule = ExitRule(criterion, top_n, (*speeds, self.num_layers), tuple(speeds.values()))
        rows, _, num_labels = self.logits.shape
        record = fk.ExitRecord.allocate(rows, num_labels)
        staying = torch.arange(rows, dtype=torch.int32)
        for layer in rule.layers:
            index = self.exit_layers.index(layer)
            logits = self.logits[:, index].index_select(0, staying)
            certainty = self._certainty_of(index, staying)
            gate = criteria.decide(logits, rule, layer=layer, record=record, row_ids=staying, certainty=certainty)
            if layer == rule.last_layer:
                record.write(staying, logits, gate.uncertainty, layer)
                break
            staying = staying.index_select(0, gate.kept())
        return ExitAnswers(predictions(record.logits), record.exit_layer, record.uncertainty, record.logits)

    def uncertainties(self, criterion: str | None = None, top_n: int | None = None) -> Tensor:
        """What every head's gate sees if no row leaves, [n, K] float32.

        Raises:
            ValueError: as `fastkd.exits.criteria.decide`.
        """
        # without thresholds no row leaves
        rule = ExitRule(criterion or self.default_criterion, top_n, tuple(self.exit_layers), ())
        record = fk.ExitRecord.allocate(len(self), self.logits.shape[-1])
        rows = torch.arange(len(self), dtype=torch.int32)
        seen = []
        for index, layer in enumerate(self.exit_layers):
            certainty = self._certainty_of(index, rows)
            gate = criteria.decide(
                self.logits[:, index], rule, layer=layer, record=record, row_ids=rows, certainty=certainty
            )
            seen.append(gate.uncertainty)
        return torch.stack(seen, dim=1)

    def _certainty_of(self, head: int, rows: Tensor) -> Tensor | None:
        return None if self.certainty is None else self.certainty[:, head].index_select(0, rows)

    def sweep(
        self,
        speeds: Sequence[float],
        criterion: str | None = None,
        top_n: int | None = None,
        *,
        path: SpeedThresholds | None = None,
        seq_len: int | None = None,
    ) -> Sweep:
        """Accuracy and cost at every speed.

        Args:
            speeds: numbers in [0, 1].
            criterion, top_n: as in `answers`.
            path: a threshold for each head at every speed (`fastkd.threshold_path`); criterion and top_n are then the
                path's.
            seq_len: length for which operations are counted, padding included; default `max_length`.

        Raises:
            ValueError: no speeds, or as `answers`.
        """
        if not speeds:
            raise ValueError("speeds: got none, expected at least one number from 0 to 1")
        seq_len = self.max_length if seq_len is None else seq_len
        criterion = criterion or self.default_criterion
        if path is not None:
            criterion, top_n = path.criterion, path.top_n
        is_learned = criterion == "learned"
        rows = []
        for speed in speeds:
            thresholds = speed if path is None else path.at(speed)
            answers = self.answers(thresholds, criterion, top_n)
            rows.append(self.cost(speed, thresholds, answers, seq_len, learned_exit=is_learned))
        return Sweep(rows, criterion, top_n, seq_len, self.about)

    def cost(
        self,
        speed: float,
        thresholds: float | Sequence[float],
        answers: ExitAnswers,
        seq_len: int | None = None,
        *,
        learned_exit: bool = False,
    ) -> SweepRow:
        """The row of a sweep for the `answers` at `thresholds`; `speed` is what it is called."""
        seq_len = self.max_length if seq_len is None else seq_len
        exits = torch.bincount(answers.exit_layer.long(), minlength=self.num_layers + 1)[1:].tolist()
        accuracy, pearson, interval = self._quality(answers.prediction)
        asked = [*head_speeds(thresholds, self.exit_layers), self.num_layers]
        full = {name: flops(self.shape, seq_len, convention=name) for name in CONVENTIONS}
        spent = {
            name: sum(
                count * self._cost_of_row(layer, asked, seq_len, name, learned_exit)
                for layer, count in enumerate(exits, start=1)
            )
            / len(self)
            for name in CONVENTIONS
        }
        return SweepRow(
            speed=float(speed),
            accuracy=accuracy,
            average_layers=answers.exit_layer.double().mean().item(),
            exits_per_layer=exits,
            flops=spent,
            speedup={name: full[name] / value for name, value in spent.items()},
            pearson=pearson,
            interval=interval,
        )

    def _quality(self, prediction: Tensor) -> tuple[float | None, float | None, Interval | None]:
        """Accuracy or correlation of answers [n], the other None, and its interval; nothing without labels."""
        if self.labels is None:
            return None, None, None
        if self.is_regression:
            return (
                None,
                correlation(prediction, self.labels),
                correlation_interval(prediction.double().numpy(), self.labels.double().numpy()),
            )
        right = prediction == self.labels
        return right.double().mean().item(), None, share_interval(int(right.sum()), len(self))

    def _cost_of_row(self, layer: int, asked: Sequence[int], seq_len: int, convention: str, learned_exit: bool) -> int:
        """Operations of a row that leaves after `layer`, having met every head that is asked up to there."""
        heads = sum(head <= layer for head in asked)
        # the last head answers the rows that are left without asking the learned exit
        learned = sum(head <= layer for head in asked[:-1]) if learned_exit else 0
        return flops(self.shape, seq_len, layers=layer, heads=heads, learned_exits=learned, convention=convention)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it is either whole or absent."""
        tensors = {"logits": self.logits.contiguous(), "lengths": self.lengths.contiguous()}
        for name in ("labels", "certainty", "rows", "queries"):
            value = getattr(self, name)
            if value is not None:
                tensors[name] = value.contiguous()
        metadata = {
            "format": _FORMAT,
            "exit_layers": json.dumps(self.exit_layers),
            "max_length": json.dumps(self.max_length),
            "shape": json.dumps(asdict(self.shape)),
            "source": json.dumps(asdict(self.source)),
        }
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExitTrace:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged or is no exit trace, or a model that answers NaN made it.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"trace: no file {path}; write one with `fastkd trace` or ExitTrace.save")
        tensors, metadata, _ = load_tensors(path, "trace", _REMEDY)
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"trace: {path} has format {metadata.get('format')!r}, expected {_FORMAT!r}; write it again with "
                "`fastkd trace` of this version"
            )
        try:
            trace = cls(
                logits=tensors["logits"],
                labels=tensors.get("labels"),
                lengths=tensors["lengths"],
                exit_layers=json.loads(metadata["exit_layers"]),
                max_length=json.loads(metadata["max_length"]),
                shape=FlopsShape(**json.loads(metadata["shape"])),
                rows=tensors.get("rows"),
                # traces of version 0.1 do not say where they come from
                source=TraceSource(**json.loads(metadata.get("source", "{}"))),
                certainty=tensors.get("certainty"),
                queries=tensors.get("queries"),
            )
            _check_loaded(trace)
        except KeyError as error:
            raise damaged(path, "trace", _REMEDY, f"it lacks {error}") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(path, "trace", _REMEDY, str(error)) from error
        return trace


def check_trace(value: object, function: str) -> None:
    """Raise TypeError where `function` is given rows, or anything else that is no trace."""
    if not isinstance(value, ExitTrace):
        raise TypeError(
            f"trace: got a {type(value).__name__}, expected an ExitTrace, as model.trace gives it; for rows call "
            f"model.{function}(rows, ...), which traces them first"
        )


def _check_loaded(trace: ExitTrace) -> None:
    """Raise ValueError where a trace holds what no model and no rows give."""
    rows, _, classes = trace.logits.shape
    layers = trace.exit_layers
    shape = asdict(trace.shape)
    if shape["linear_products"] is None:
        del shape["linear_products"]
    numbers = [*layers, trace.max_length, *(value for value in shape.values() if not isinstance(value, str))]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"sizes and layers are {numbers}, expected whole numbers above 0")
    if sorted(set(layers)) != layers or layers[-1] != trace.num_layers:
        raise ValueError(f"heads after layers {layers} do not fit a model of {trace.num_layers} layers")
    if not _is_text(trace.source):
        raise ValueError("its source does not hold fingerprints")
    if trace.source.label_names and len(trace.source.label_names) != classes:
        raise ValueError(f"it has {classes} classes and names for {len(trace.source.label_names)}")
    kinds = {"logits": trace.logits.is_floating_point(), "lengths": not trace.lengths.is_floating_point()}
    wrong = [name for name, is_right in kinds.items() if not is_right]
    for name in ("logits", "certainty", "labels"):
        value = getattr(trace, name)
        if value is not None and value.is_floating_point() and not value.isfinite().all():
            wrong.append(name)
    if wrong:
        raise ValueError(f"{', '.join(wrong)} are not all finite numbers of their kind")
    if rows == 0:
        raise ValueError("it has no rows")
    _check_range("lengths", trace.lengths, 0, trace.max_length)
    if trace.certainty is not None:
        _check_range("certainty", trace.certainty, 0, 1)
    for name in ("rows", "queries"):
        if (numbers_of_rows := getattr(trace, name)) is not None:
            _check_range(name, numbers_of_rows, 0, None)
    if trace.has_right_answers:
        assert trace.labels is not None
        _check_range("labels", trace.labels, 0, classes - 1)


def _is_text(source: TraceSource) -> bool:
    texts = [
        source.model, source.data, source.dtype, source.model_name, source.data_name, *source.label_names,
        *source.training_data, *source.training_data.values(),
    ]  # fmt: skip
    return all(isinstance(text, str) for text in texts)


def _check_range(name: str, value: Tensor, low: int, high: int | None) -> None:
    smallest, largest = value.min().item(), value.max().item()
    if smallest < low or (high is not None and largest > high):
        raise ValueError(f"{name} go from {smallest:g} to {largest:g}, expected {low} to {high or 'any'}")


def predictions(logits: Tensor) -> Tensor:
    """What logits [n, C] answer: a class, or for regression a number."""
    return logits[:, 0] if logits.shape[-1] == 1 else logits.argmax(dim=-1)


def correlation(answers: Tensor, labels: Tensor) -> float:
    """Pearson's; 0 where one side is constant, as a single row is."""
    if len(answers) < 2:
        return 0.0
    value = torch.corrcoef(torch.stack([answers.double(), labels.double()]))[0, 1].item()
    return 0.0 if math.isnan(value) else value
