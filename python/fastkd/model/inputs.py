"""Checks of what `forward` is given."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tokens(tokens: Tensor, embedded: bool, longest: int) -> None:
    """Raise for input_ids that are no [B, T] integers, inputs_embeds that are no [B, T, E], no or too many tokens."""
    name, form = ("inputs_embeds", "[B, T, E] floats") if embedded else ("input_ids", "[B, T] integers")
    if tokens.dim() != 2 + embedded or tokens.is_floating_point() != embedded:
        raise ValueError(f"{name}: got shape {tuple(tokens.shape)} of {tokens.dtype}, expected {form}")
    if tokens.shape[0] and not tokens.shape[1]:
        raise ValueError(
            f"{name}: got shape {tuple(tokens.shape)}, which has no tokens; expected at least one token per row"
        )
    if tokens.shape[1] > longest:
        raise ValueError(
            f"{name}: got {tokens.shape[1]} tokens per row, but this encoder takes at most {longest}; truncate the "
            f"texts (tokenizer(..., truncation=True, max_length={longest}))"
        )


def checked_mask(attention_mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """`attention_mask` as [B, T] bool, None where nothing is padded.

    Raises:
        ValueError: another shape than the tokens', or a row whose first token is masked.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, expected {tuple(tokens.shape[:2])}, one value "
            "per token"
        )
    mask = attention_mask.bool()
    if torch.compiler.is_compiling():
        return mask
    # one read for both questions, because on a GPU it waits for the device
    nothing_padded, first_tokens_count = torch.stack([mask.all(), mask[:, :1].all()]).tolist()
    if not first_tokens_count:
        raise ValueError(
            "attention_mask: the first token of a row is masked, but the heads read it; pad on the right "
            "(tokenizer.padding_side = 'right') and drop empty rows"
        )
    return None if nothing_padded else mask
