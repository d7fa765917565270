"""Records exit traces: every head of a model on every batch, once."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastkd.data.labels import label_rule, names_of_classes
from fastkd.data.row_hashes import Hashes, row_hashes
from fastkd.data.tensors import tensor_bytes
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.exits.certificate import CalibrationWarning
from fastkd.exits.fingerprints import HasWeights, model_fingerprint
from fastkd.exits.flops import FlopsShape
from fastkd.exits.trace import ExitTrace, TraceSource
from fastkd.model.seen_rows import count_seen

if TYPE_CHECKING:
    from fastkd.data.batches import LengthSortedBatches
    from fastkd.data.rows import Rows, RowSource


class TracedModel(HasWeights, Protocol):
    """What recording needs of an early-exit model."""

    training: bool
    config: EarlyExitConfig
    seen_rows: dict[str, Hashes]

    def changed_weights(self) -> str | None: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def weights_dtype(self) -> str: ...

    @property
    def exit_layers(self) -> list[int]: ...

    @property
    def all_exits(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """Logits [B, K, C] of every head, and the log-odds [B, K] of the learned exit, if there is one."""
        ...

    def train(self, mode: bool = True) -> Any: ...


OnBatch = Callable[[int, int], None]
"""Called after each batch with how many are done, and how many there are."""


@torch.no_grad()
def record_trace(
    model: TracedModel,
    batches: Iterable[Mapping[str, Tensor]],
    fingerprint: str | None = None,
    rows: Rows | None = None,
) -> ExitTrace:
    """Run every head of `model`, in evaluation mode, on every batch.

    Args:
        model: its training mode is restored afterwards.
        batches: keyword arguments of `model.forward`, with or without `labels`.
        fingerprint: of the rows (`Rows.digest`); default: that of `rows`, or one of the tokens.
        rows: those in the batches, in any order; how many of them training has seen is then counted.

    Warns:
        CalibrationWarning: the weights were changed by a training that left no record of its rows.

    Raises:
        TypeError: batches that are no dictionaries.
        ValueError: no batches, or labels in some of them only.
    """
    changed = model.changed_weights()
    if changed is not None:
        warnings.warn(
            f"model: its weights were changed by something that left no record of its rows ({changed}), so it is not "
            "known whether training has seen these",
            CalibrationWarning,
            stacklevel=3,
        )
    seen, seen_anywhere = ({}, 0) if rows is None else count_seen(model.seen_rows, row_hashes(rows))
    if fingerprint is None and rows is not None:
        fingerprint = rows.digest()
    recorder = _Recorder()
    was_training = model.training
    model.train(False)
    try:
        for batch in batches:
            _record_batch(model, batch, recorder)
    finally:
        model.train(was_training)
    if not recorder.logits:
        raise ValueError("batches: got none, expected at least one; is the data set empty?")
    if recorder.labels and len(recorder.labels) != len(recorder.logits):
        raise ValueError("batches: some have labels and some do not; give labels to all of them or to none")
    return ExitTrace(
        logits=torch.cat(recorder.logits),
        labels=torch.cat(recorder.labels) if recorder.labels else None,
        lengths=torch.cat(recorder.lengths),
        exit_layers=list(model.exit_layers),
        max_length=recorder.max_length,
        shape=FlopsShape.of(model.config),
        source=TraceSource(
            model=model_fingerprint(model),
            data=fingerprint or f"tokens:{recorder.tokens.hexdigest()}",
            training_data=dict(model.config.training_data),
            dtype=model.weights_dtype,
            seen=seen,
            seen_anywhere=seen_anywhere,
            # a model in "." is called as its folder is
            model_name=Path(os.path.abspath(name)).name if (name := model.config.name_or_path) else "",
            data_name="" if rows is None else data_name(rows.source),
            label_names=list(names_of_classes(model.config.id2label) or ()),
        ),
        certainty=torch.cat(recorder.certainty) if recorder.certainty else None,
    )


def data_name(source: str) -> str:
    """The folder and the name of a file: where it lies on this machine is private."""
    return "/".join([part for part in Path(source).parts if part != ".."][-2:]).lstrip("/")


@dataclass
class _Recorder:
    """Collects the batches of one trace on the host."""

    logits: list[Tensor] = field(default_factory=list)
    certainty: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    lengths: list[Tensor] = field(default_factory=list)
    max_length: int = 0
    tokens: Any = field(default_factory=hashlib.sha256)


def record_rows(
    model: TracedModel,
    rows: RowSource,
    tokenizer: PreTrainedTokenizerBase,
    fingerprint: str | None = None,
    *,
    max_length: int,
    batch_size: int,
    on_batch: OnBatch = lambda done, total: None,
) -> ExitTrace:
    """`record_trace` of rows of any kind that `fastkd.load_rows` takes, longest first; `ExitTrace.rows` says which.

    Args:
        model, fingerprint: as in `record_trace`.
        rows: with or without labels, which must be the model's.
        tokenizer: of the model.
        max_length: tokens after which a text is cut.
        batch_size: rows run together.
        on_batch: see `OnBatch`.
    """
    from fastkd.data.batches import LengthSortedBatches, tokenize  # brings datasets
    from fastkd.data.rows import load_rows

    rows = load_rows(rows, require_labels=False, name="rows", **label_rule(model.config))
    batches = LengthSortedBatches(tokenize(rows, tokenizer, max_length), tokenizer, batch_size)
    trace = record_trace(model, _counted(batches, on_batch), fingerprint, rows)
    order = torch.tensor(batches.order)
    return replace(trace, rows=order, queries=None if (queries := _queries(rows)) is None else queries[order])


def _queries(rows: Rows) -> Tensor | None:
    """A number for each first text of pairs, [n]; None for single texts."""
    if not rows.is_pair:
        return None
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(text, len(numbers)) for text in rows.dataset["text_a"][:]])


def _counted(batches: LengthSortedBatches, on_batch: OnBatch) -> Iterator[Mapping[str, Tensor]]:
    for number, batch in enumerate(batches, start=1):
        yield batch
        on_batch(number, len(batches))


def _record_batch(model: TracedModel, batch: Mapping[str, Tensor], recorder: _Recorder) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batches: got a {type(batch).__name__} instead of a batch; expected dictionaries of tensors, or rows "
            "together with tokenizer="
        )
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    logits, log_odds = model.all_exits(**inputs)
    tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    mask = inputs.get("attention_mask")
    lengths = torch.full((len(tokens),), tokens.shape[1]) if mask is None else mask.bool().sum(dim=1)
    recorder.tokens.update(tensor_bytes(tokens))
    recorder.logits.append(logits.float().cpu())
    if log_odds is not None:
        recorder.certainty.append(log_odds.sigmoid().float().cpu())
    recorder.lengths.append(lengths.int().cpu())
    recorder.max_length = max(recorder.max_length, tokens.shape[1])
    if batch.get("labels") is not None:
        recorder.labels.append(batch["labels"].cpu())
