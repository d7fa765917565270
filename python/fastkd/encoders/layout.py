"""`TokenLayout`: where the tokens of each sequence lie in a tensor of hidden states."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenLayout(NamedTuple):
    """Padded sequences [B, T, H], or packed ones [N, H], one behind the other; the default is padded without a mask.

    Hidden states are packed where there are `cu_seqlens`.
    """

    attention_mask: Tensor | None = None
    """[B, T] bool, True where a token counts; None where nothing is padded."""
    layer_mask: Any = None
    """The same in the form that the layers take."""
    cu_seqlens: Tensor | None = None
    """[B + 1] int32, sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1]."""
    max_seqlen: int = 0
    """Tokens of the longest packed sequence, or more."""

    def first_tokens(self, hidden_states: Tensor) -> Tensor:
        """The hidden state of the first token of each sequence, [B, H]."""
        if self.cu_seqlens is None:
            return hidden_states[:, 0]
        return hidden_states.index_select(0, self.cu_seqlens[:-1])

    def padded(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hidden states [B, T, H] and their mask [B, T] bool; what stands in padding is arbitrary."""
        if self.cu_seqlens is None:
            return hidden_states, self.attention_mask
        tokens = torch.arange(self.max_seqlen, device=hidden_states.device)
        mask = tokens < self.cu_seqlens.diff()[:, None]
        # as many columns as the host knows of, so that no device is waited for
        places = (self.cu_seqlens[:-1, None] + tokens).clamp(max=hidden_states.shape[0] - 1)
        return hidden_states[places], mask

    def with_mean_first(self, hidden_states: Tensor) -> tuple[Tensor, TokenLayout]:
        """Padded hidden states [B, T + 1, H] that begin with the mean of each sequence's tokens, and their layout."""
        hidden_states, mask = self.padded(hidden_states)
        if mask is None:
            return torch.cat([hidden_states.mean(1, keepdim=True), hidden_states], dim=1), NO_PADDING
        # what stands in padding is arbitrary, NaN too
        hidden_states = hidden_states.masked_fill(~mask[..., None], 0)
        mean = hidden_states.sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        return torch.cat([mean, hidden_states], dim=1), TokenLayout(torch.cat([mask[:, :1], mask], dim=1))


NO_PADDING = TokenLayout()
