"""What frozen layers give the early heads, kept in memory: a training of heads then runs those layers once a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding

from fastkd.encoders.layout import TokenLayout
from fastkd.encoders.recording import EncoderInputs
from fastkd.exits.rule import stages_of
from fastkd.model.modeling import EarlyExitForSequenceClassification


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states after every layer with an early head, and the last head's logits, of rows without their padding.

    Attributes:
        states: [N, H] for each early head; row i is the tokens `starts[i]` to `starts[i] + lengths[i]`.
        starts, lengths: [n] int64.
        last_logits: [n, C] float32.
        multiple: batches are padded to a multiple of so many tokens.
    """

    states: Sequence[Tensor]
    starts: Tensor
    lengths: Tensor
    last_logits: Tensor
    multiple: int = 1

    @staticmethod
    def size(model: EarlyExitForSequenceClassification, tokens: datasets.Dataset) -> int:
        """Bytes that the states of these tokenised rows take."""
        return sum(tokens["length"][:]) * model.config.hidden_size * len(model.early_heads) * model.dtype.itemsize

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: EarlyExitForSequenceClassification,
        tokens: datasets.Dataset,
        collator: DataCollatorWithPadding,
        batch_size: int,
        autocast: torch.autocast,
    ) -> HiddenStates:
        """Run all layers of `model`, in evaluation mode, on every row.

        Batches depend on the rows alone, so that a resumed training finds the same numbers.

        Args:
            model: on the device that computes.
            tokens: with `length`; `labels` are ignored.
            collator: pads on the right.
            batch_size: rows run together, of like length.
            autocast: in which the model computes.
        """
        lengths = torch.tensor(tokens["length"][:])
        ends = lengths.cumsum(0)
        starts = ends - lengths
        states: list[Tensor] = []
        last_logits = torch.empty(len(lengths), model.config.num_classes)
        inputs = tokens.select_columns([name for name in tokens.column_names if name not in ("length", "labels")])
        was_training = model.training
        model.eval()
        for rows in lengths.argsort(descending=True, stable=True).split(batch_size):
            batch = collator([inputs[row] for row in rows.tolist()])
            counts = torch.arange(batch["input_ids"].shape[1]) < lengths[rows, None]
            places = (starts[rows, None] + torch.arange(counts.shape[1]))[counts]
            with autocast:
                found = _all_states(model, {name: value.to(model.device) for name, value in batch.items()})
                last_logits[rows] = model.logits_after(model.num_layers, *found[-1]).float().cpu()
            # in the dtype that heads are given, so that they compute what they would have computed
            states = states or [torch.empty(int(ends[-1]), *of.shape[2:], dtype=of.dtype) for of, _ in found[:-1]]
            for kept, (hidden, _) in zip(states, found[:-1], strict=True):
                kept[places] = hidden.cpu()[counts]
        model.train(was_training)
        return cls(states, starts, lengths, last_logits, collator.pad_to_multiple_of or 1)

    def exits(self, model: EarlyExitForSequenceClassification, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `model.all_exits` gives for these rows [B], numbered as the dataset; the last log-odds are 0."""
        rows = rows.cpu()
        lengths = self.lengths[rows]
        tokens = torch.arange(-(-int(lengths.max()) // self.multiple) * self.multiple)
        counts = tokens < lengths[:, None]
        places = torch.where(counts, self.starts[rows, None] + tokens, self.starts[rows, None])
        layout = TokenLayout(None if bool(counts.all()) else counts.to(model.device))
        logits, log_odds = [], []
        for layer, states in zip(model.exit_layers, self.states, strict=False):
            found, odds = model.exit_after(layer, states[places].to(model.device), layout)
            logits.append(found)
            log_odds.append(odds)
        last = self.last_logits[rows].to(model.device)
        stacked = torch.stack([*logits, last], dim=1)
        if model.learned_exit is None:
            return stacked, None
        known = [odds for odds in log_odds if odds is not None]
        return stacked, torch.stack([*known, torch.zeros_like(known[0])], dim=1)


def _all_states(
    model: EarlyExitForSequenceClassification, batch: Mapping[str, Tensor]
) -> list[tuple[Tensor, TokenLayout]]:
    """Hidden states [B, T, H] after every layer with a head, and their layout."""
    mask = model.check_input(batch["input_ids"], batch.get("attention_mask"))
    hidden, layout = model.start(
        EncoderInputs(batch["input_ids"], mask, batch.get("token_type_ids"), batch.get("position_ids"), None)
    )
    found = []
    for stage in stages_of(model.exit_layers):
        hidden = model.run_layers(stage, hidden, layout)
        found.append((hidden, layout))
    return found
