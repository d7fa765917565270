"""The trace of a model on rows of a table."""

from __future__ import annotations

from dataclasses import replace

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from fastkd.data.labels import label_rule
from fastkd.data.rows import RowSource, load_rows
from fastkd.exits.trace import ExitTrace
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.model.tracing import OnBatch


def trace_rows(
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: RowSource,
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
        rows: what `fastkd.load_rows` takes, with or without labels.
        limit: trace at most so many, drawn at random; None traces all.
        seed: of the draw.
        max_length: tokens after which a text is cut; None takes the most that model and tokenizer allow.
        batch_size: rows run together.
        on_batch: see `OnBatch`.
    """
    rows = load_rows(rows, require_labels=False, name="rows", **label_rule(model.config))
    fingerprint = rows.digest()
    places = torch.arange(len(rows))
    if limit is not None:
        # places are drawn as the rows are, so that the trace names rows of the whole table
        numbers = datasets.Dataset.from_dict({"row": places.tolist()})
        places = torch.tensor(replace(rows, dataset=numbers).sample(limit, seed).dataset["row"][:])
        rows = rows.sample(limit, seed)
    trace = model.trace(
        rows, fingerprint, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size, on_batch=on_batch
    )
    assert trace.rows is not None
    return replace(trace, rows=places[trace.rows])
