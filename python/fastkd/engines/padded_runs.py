"""`PaddedRuns`: the runs of a stream in padded batches of like lengths, for encoders that know no packed tokens.

Rows wait packed, so that nothing is padded between runs. For a run they are sorted by length and cut into batches with
little padding; what the layers take beside hidden states is recorded anew for each batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastkd.encoders.layout import TokenLayout
from fastkd.encoders.recording import EncoderInputs
from fastkd.engines.packed_encoder import PackedTokens, round_up_tokens
from fastkd.engines.protocol import ExitModel

_MOST_PADDING = 0.125  # places of padding for each token in a batch


class PaddedRuns:
    """The encoder of one early-exit model on packed tokens, which it pads for its layers."""

    reads_tokens = True
    """Whether runs after the first stage need the tokens."""

    def __init__(self, model: ExitModel) -> None:
        self._model = model
        self._most_padding = 0 if model.reads_padding else _MOST_PADDING
        self._padding = model.config.backbone.pad_token_id or 0

    def run(self, numbers: range, tokens: PackedTokens | None, waiting: Tensor | None, layout: TokenLayout) -> Tensor:
        """Hidden states [R, H] after these layers; see `PackedEncoder.run`."""
        assert tokens is not None
        starts = [0]
        for length in tokens.lengths:
            starts.append(starts[-1] + length)
        output: Tensor | None = None
        for rows in batches_of_like_lengths(tokens.lengths, self._most_padding):
            places, mask = _places(starts, tokens.lengths, rows, tokens.input_ids.device)
            inputs = EncoderInputs(
                tokens.input_ids[places].masked_fill(~mask, self._padding),
                None if bool(mask.all()) else mask,
                None if tokens.token_type_ids is None else tokens.token_type_ids[places].masked_fill(~mask, 0),
            )
            hidden_states, padded = self._model.start(inputs)
            if waiting is not None:
                hidden_states = waiting[places].masked_fill(~mask[..., None], 0)
            hidden_states = self._model.run_layers(numbers, hidden_states, padded)
            if output is None:
                output = hidden_states.new_zeros(round_up_tokens(starts[-1]), hidden_states.shape[-1])
            output[places[mask]] = hidden_states[mask]
        assert output is not None
        return output


def batches_of_like_lengths(lengths: Sequence[int], most_padding: float) -> Iterator[list[int]]:
    """The numbers of all sequences in batches, the shortest first, each with so much padding a token at most."""
    batch: list[int] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        tokens += lengths[row]
        places = (len(batch) + 1) * lengths[row]
        if batch and places > tokens * (1 + most_padding):
            yield batch
            batch, tokens = [], lengths[row]
        batch.append(row)
    if batch:
        yield batch


def _places(
    starts: Sequence[int], lengths: Sequence[int], rows: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where the tokens of `rows` lie among packed ones [B, T], and where these are tokens and not padding [B, T]."""
    counts = torch.tensor([lengths[row] for row in rows], device=device)
    tokens = torch.arange(int(lengths[rows[-1]]), device=device)
    mask = tokens < counts[:, None]
    first = torch.tensor([starts[row] for row in rows], device=device)
    return (first[:, None] + tokens).masked_fill(~mask, 0), mask
