"""Exit traces: one pass through every head answers every threshold and every criterion offline.

Who leaves early never changes anybody's hidden states, so the logits of all heads, recorded once, contain every
answer that the model can give at any speed.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import fastkd_kernels as fk
from fastkd.configuration import check_speed
from fastkd.files import atomic_path
from fastkd.flops import CONVENTIONS, FlopsShape, flops

if TYPE_CHECKING:
    from fastkd.modeling import EarlyExitForSequenceClassification

_FORMAT = "fastkd exit trace 1"


@dataclass(frozen=True)
class ExitAnswers:
    """What the model answers at one speed, one entry a row."""

    prediction: Tensor
    """[n] int64, the class."""
    exit_layer: Tensor
    """[n] int32, 1 after the first layer."""
    uncertainty: Tensor
    """[n] float32, at that layer."""
    logits: Tensor
    """[n, C] float32, of that layer's head."""


@dataclass(frozen=True)
class SweepRow:
    """The cost and the quality of one speed."""

    speed: float
    accuracy: float | None
    """Share of right answers in [0, 1]; None without labels."""
    average_layers: float
    exits_per_layer: list[int]
    """How many rows left after each of the layers, 0 where a layer has no head."""
    flops: dict[str, float]
    """Mean operations a row, by convention (`fastkd.flops`)."""
    speedup: dict[str, float]
    """Operations of the full model (all layers, one head) divided by `flops`."""


@dataclass(frozen=True)
class Sweep:
    """A table of speeds."""

    rows: list[SweepRow]
    criterion: str
    top_n: int | None
    seq_len: int
    """The length for which operations were counted."""

    def __iter__(self) -> Iterator[SweepRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> SweepRow:
        return self.rows[index]

    def to_dicts(self) -> list[dict[str, Any]]:
        """One flat dictionary a row, ready for CSV or JSON."""
        return [
            {
                "speed": row.speed,
                "criterion": self.criterion,
                "top_n": self.top_n,
                "seq_len": self.seq_len,
                "accuracy": row.accuracy,
                "average_layers": row.average_layers,
                **{f"exits_layer_{layer}": count for layer, count in enumerate(row.exits_per_layer, start=1)},
                **{f"flops_{name}": value for name, value in row.flops.items()},
                **{f"speedup_{name}": value for name, value in row.speedup.items()},
            }
            for row in self.rows
        ]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table; the file is either whole or absent."""
        rows = self.to_dicts()
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


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
        rows: [n] int64, the row of the data (0 is the first) that each one is; None where nobody said.
    """

    logits: Tensor
    labels: Tensor | None
    lengths: Tensor
    exit_layers: list[int]
    max_length: int
    shape: FlopsShape
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        if self.logits.dim() != 3 or self.logits.shape[1] != len(self.exit_layers):
            raise ValueError(
                f"logits: got shape {tuple(self.logits.shape)}, expected [n, {len(self.exit_layers)}, C], one head an "
                "exit layer"
            )
        for name, value in (("labels", self.labels), ("lengths", self.lengths), ("rows", self.rows)):
            if value is not None and value.shape != self.logits.shape[:1]:
                raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [{self.logits.shape[0]}]")

    def __len__(self) -> int:
        return self.logits.shape[0]

    @property
    def num_layers(self) -> int:
        return self.shape.num_hidden_layers

    def answers(self, speed: float, criterion: str = "entropy", top_n: int | None = None) -> ExitAnswers:
        """What `forward(speed, criterion, top_n)` answers, by the same gate.

        Raises:
            ValueError: as `fastkd_kernels.exit_gate`.
        """
        speed = check_speed(speed)
        rows, _, num_labels = self.logits.shape
        record = fk.ExitRecord.allocate(rows, num_labels)
        staying = torch.arange(rows, dtype=torch.int32)
        # at speed 0 the full model runs, and only the last head looks
        first = len(self.exit_layers) - 1 if speed == 0 else 0
        for index, layer in list(enumerate(self.exit_layers))[first:]:
            logits = self.logits[:, index].index_select(0, staying)
            is_last = layer == self.num_layers
            gate_speed = 0.0 if is_last else speed
            gate = fk.exit_gate(logits, gate_speed, criterion, staying, top_n, record=record, layer=layer)
            if is_last:
                record.write(staying, logits, gate.uncertainty, layer)
                break
            staying = staying.index_select(0, gate.kept())
        return ExitAnswers(record.logits.argmax(dim=-1), record.exit_layer, record.uncertainty, record.logits)

    def sweep(
        self,
        speeds: Sequence[float],
        criterion: str = "entropy",
        top_n: int | None = None,
        *,
        seq_len: int | None = None,
    ) -> Sweep:
        """Accuracy and cost at every speed.

        Args:
            speeds: numbers in [0, 1].
            criterion, top_n: as in `fastkd_kernels.exit_gate`.
            seq_len: length for which operations are counted, padding included; default `max_length`.

        Raises:
            ValueError: no speeds, or as `fastkd_kernels.exit_gate`.
        """
        if not speeds:
            raise ValueError("speeds: got none, expected at least one number from 0 to 1")
        seq_len = self.max_length if seq_len is None else seq_len
        costs = {name: self._costs(seq_len, name) for name in CONVENTIONS}
        rows = [self._sweep_row(speed, self.answers(speed, criterion, top_n), seq_len, costs) for speed in speeds]
        return Sweep(rows, criterion, top_n, seq_len)

    def _sweep_row(self, speed: float, answers: ExitAnswers, seq_len: int, costs: Mapping[str, list[int]]) -> SweepRow:
        exits = torch.bincount(answers.exit_layer.long(), minlength=self.num_layers + 1)[1:].tolist()
        accuracy = None
        if self.labels is not None:
            accuracy = (answers.prediction == self.labels).double().mean().item()
        full = {name: flops(self.shape, seq_len, convention=name) for name in costs}
        spent = {
            # at speed 0 the heads below the last do not run
            name: full[name]
            if speed == 0
            else sum(count * cost for count, cost in zip(exits, costs[name], strict=True)) / len(self)
            for name in costs
        }
        return SweepRow(
            speed=float(speed),
            accuracy=accuracy,
            average_layers=answers.exit_layer.double().mean().item(),
            exits_per_layer=exits,
            flops={name: float(value) for name, value in spent.items()},
            speedup={name: full[name] / value for name, value in spent.items()},
        )

    def _costs(self, seq_len: int, convention: str) -> list[int]:
        """Operations of a row that leaves after each layer, having met every head up to there."""
        return [
            flops(
                self.shape,
                seq_len,
                layers=layer,
                heads=sum(exit_layer <= layer for exit_layer in self.exit_layers),
                convention=convention,
            )
            for layer in range(1, self.num_layers + 1)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it is either whole or absent."""
        tensors = {"logits": self.logits.contiguous(), "lengths": self.lengths.contiguous()}
        for name, value in (("labels", self.labels), ("rows", self.rows)):
            if value is not None:
                tensors[name] = value.contiguous()
        metadata = {
            "format": _FORMAT,
            "exit_layers": json.dumps(self.exit_layers),
            "max_length": json.dumps(self.max_length),
            "shape": json.dumps(asdict(self.shape)),
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExitTrace:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged or is no exit trace.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"trace: no file {path}; write one with `fastkd trace` or ExitTrace.save")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except SafetensorError as error:
            raise ValueError(f"trace: {path} is damaged or no trace ({error}); write it again") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"trace: {path} has format {metadata.get('format')!r}, expected {_FORMAT!r}; write it again with "
                "`fastkd trace` of this version"
            )
        return cls(
            logits=tensors["logits"],
            labels=tensors.get("labels"),
            lengths=tensors["lengths"],
            exit_layers=json.loads(metadata["exit_layers"]),
            max_length=json.loads(metadata["max_length"]),
            shape=FlopsShape(**json.loads(metadata["shape"])),
            rows=tensors.get("rows"),
        )


@dataclass
class _Recorder:
    """Collects the batches of one trace on the host."""

    logits: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    lengths: list[Tensor] = field(default_factory=list)
    max_length: int = 0


@torch.no_grad()
def record_trace(model: EarlyExitForSequenceClassification, batches: Iterable[Mapping[str, Tensor]]) -> ExitTrace:
    """Run every head of `model`, in evaluation mode, on every batch.

    Args:
        model: its training mode is restored afterwards.
        batches: keyword arguments of `model.forward`, with or without `labels`.

    Raises:
        ValueError: no batches, or labels in some of them only.
    """
    recorder = _Recorder()
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            _record_batch(model, batch, recorder)
    finally:
        model.train(was_training)
    if not recorder.logits:
        raise ValueError("batches: got none, expected at least one; is the data set empty?")
    if recorder.labels and len(recorder.labels) != len(recorder.logits):
        raise ValueError("batches: some have labels and some have not; give labels to all of them or to none")
    return ExitTrace(
        logits=torch.cat(recorder.logits),
        labels=torch.cat(recorder.labels) if recorder.labels else None,
        lengths=torch.cat(recorder.lengths),
        exit_layers=list(model.exit_layers),
        max_length=recorder.max_length,
        shape=FlopsShape.of(model.config),
    )


def _record_batch(model: EarlyExitForSequenceClassification, batch: Mapping[str, Tensor], recorder: _Recorder) -> None:
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    logits = model.all_exit_logits(**inputs)
    tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    mask = inputs.get("attention_mask")
    lengths = torch.full((len(tokens),), tokens.shape[1]) if mask is None else mask.bool().sum(dim=1)
    recorder.logits.append(logits.float().cpu())
    recorder.lengths.append(lengths.int().cpu())
    recorder.max_length = max(recorder.max_length, tokens.shape[1])
    if batch.get("labels") is not None:
        recorder.labels.append(batch["labels"].cpu())
