"""Engine `batch`: the batch is compacted after every layer whose head let a row leave.

The host learns how many sequences are left after each head. On a CPU that is free. On a GPU it waits for the device
once a layer, and once more where a shrunken batch still has padding, because transformers looks into a mask to see
whether it is needed.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

import fastkd_kernels as fk
from fastkd.encoders.recording import EncoderInputs
from fastkd.engines.protocol import ExitModel
from fastkd.exits.rule import ExitRule


@torch.no_grad()
def run(model: ExitModel, inputs: EncoderInputs, rule: ExitRule) -> fk.ExitRecord:
    """Answer every sequence at the first head that is certain enough.

    Args:
        model: in evaluation mode.
        inputs: the batch.
        rule: which heads are asked, and which rows leave there.

    Returns:
        The logits, uncertainty and exit layer of all B sequences.
    """
    hidden_states, layout = model.start(inputs)
    record = fk.ExitRecord.allocate(hidden_states.shape[0], model.config.num_classes, hidden_states.device)
    row_ids: Tensor | None = None
    last = rule.last_layer
    checksums = []
    for stage in rule.stages:
        layer = stage[-1]
        hidden_states = model.run_layers(stage, hidden_states, layout)
        if layer == last:
            rows_left = _all_rows(hidden_states) if row_ids is None else row_ids
            checksums.append(model.answer(hidden_states, layout, rule, record=record, row_ids=rows_left).sum())
            break
        decided = model.decide(layer, hidden_states, layout, rule, record=record, row_ids=row_ids)
        checksums.append(decided.uncertainty.sum())
        survivors = decided.kept()
        if survivors.shape[0] == 0:
            break
        if survivors.shape[0] < hidden_states.shape[0]:
            # dropping columns that became all padding needs their number, for which a GPU would have to be waited for
            drops = hidden_states.device.type == "cpu" and not model.reads_padding
            hidden_states, mask, row_ids = _compact(hidden_states, layout.attention_mask, row_ids, survivors, drops)
            layout = model.narrowed(layout, survivors, hidden_states, mask)
    warn_about_nan(checksums)
    return record


def _compact(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    row_ids: Tensor | None,
    survivors: Tensor,
    drops_columns: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    if row_ids is None:
        row_ids = _all_rows(hidden_states)
    if attention_mask is None:
        hidden_states, row_ids = fk.compact([hidden_states, row_ids], survivors)
        return hidden_states, None, row_ids
    if drops_columns:
        longest = _longest(attention_mask, survivors)
        hidden_states, attention_mask = hidden_states[:, :longest], attention_mask[:, :longest]
    hidden_states, mask, row_ids = fk.compact([hidden_states, attention_mask, row_ids], survivors)
    return hidden_states, None if drops_columns and bool(mask.all()) else mask, row_ids


def _longest(attention_mask: Tensor, rows: Tensor) -> int:
    """The number of columns up to the last one in which any of `rows` attends."""
    attended = attention_mask.index_select(0, rows).any(dim=0)
    return int(attended.nonzero()[-1]) + 1


def _all_rows(hidden_states: Tensor) -> Tensor:
    return torch.arange(hidden_states.shape[0], dtype=torch.int32, device=hidden_states.device)


def warn_about_nan(checksums: list[Tensor]) -> None:
    """Warn where a sum of uncertainties is NaN, which it is where a head's logits are."""
    if checksums and bool(torch.stack(checksums).isnan().any()):
        warn_that_logits_are_nan(stacklevel=6)


def warn_that_logits_are_nan(stacklevel: int = 5) -> None:
    warnings.warn(
        "a head returned NaN logits: the sequences concerned were not answered early. The weights or the inputs "
        "overflowed; check the checkpoint for NaN, or use bfloat16 or float32 instead of float16",
        RuntimeWarning,
        stacklevel=stacklevel,
    )
