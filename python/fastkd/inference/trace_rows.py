"""The trace of a model on rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from fastkd.data.batches import LengthSortedBatches, tokenize
from fastkd.data.rows import Rows
from fastkd.exits.trace import ExitTrace
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.model.tokenizers import length_limit

OnBatch = Callable[[int, int], None]
"""Called after each batch with how many are done, and how many there are."""


def trace_rows(
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    limit: int | None = None,
    seed: int = 0,
    max_length: int | None = None,
    batch_size: int = 32,
    on_batch: OnBatch = lambda done, total: None,
) -> ExitTrace:
    """What every head says about every row, shortest rows first; `ExitTrace.rows` has their places in `rows`.

    Args:
        model: in evaluation mode on its device.
        tokenizer: of the model.
        rows: with or without labels.
        limit: trace at most so many, drawn at random; None traces all.
        seed: of the draw.
        max_length: tokens after which a text is cut; None takes the most that model and tokenizer allow.
        batch_size: rows run together.
        on_batch: see `OnBatch`.
    """
    fingerprint = rows.digest()
    places = torch.arange(len(rows))
    if limit is not None:
        # places are drawn as the rows are, so that the trace names rows of the whole table
        numbers = datasets.Dataset.from_dict({"row": places.tolist()})
        places = torch.tensor(replace(rows, dataset=numbers).sample(limit, seed).dataset["row"][:])
        rows = rows.sample(limit, seed)
    encoded = tokenize(rows, tokenizer, max_length or length_limit(model, tokenizer))
    batches = LengthSortedBatches(encoded, tokenizer, batch_size)
    trace = model.trace(_counted(batches, on_batch), fingerprint, rows)
    return replace(trace, rows=places[batches.order])


def _counted(batches: LengthSortedBatches, on_batch: OnBatch) -> Iterator[Any]:
    for number, batch in enumerate(batches, start=1):
        yield batch
        on_batch(number, len(batches))
