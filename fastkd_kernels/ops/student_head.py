"""Student head: FastBERT's mini-classifier (ACL 2020, section 3.2) for the [CLS] query, fused with the exit gate.

For hidden states X [T, H] of one sequence, head width D and h attention heads of width d = D/h:

    A = tanh(X W0' + b0)                                            [T, D]
    q, k, v = A Wq' + bq, A Wk' + bk, A Wv' + bv
    o = softmax(q_0 k' / sqrt(d)) v Wo' + bo                        query 0 only, padding masked as key
    z = tanh(o W1' + b1) W2' + b2                                   [C]

Only query 0 is used, so the projections fold (with j the attention head, W_j its rows or columns):

    U_j = Wk_j' Wq_j / sqrt(d),  e_j = Wk_j' bq_j / sqrt(d)         s_jt = (U_j a_0 + e_j) . a_t
    M_j = W1 Wo_j Wv_j,          m = W1 (Wo bv + bo) + b1           z = W2 tanh(sum_j M_j (sum_t p_jt a_t) + m) + b2

The bias of the keys does not depend on t and drops out of the softmax; the weights sum to 1, so the value projection
commutes with the average. That is 0.506 of the head's arithmetic at T=128, H=768, D=128, and nothing of size [T, D]
needs to be kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd_kernels.ops.exit_gate import ExitGateOutput, ExitRecord, exit_gate

Affine = tuple[Tensor, Tensor]
"""Weight [out, in] and bias [out] of one linear layer."""


class StudentHeadWeights(NamedTuple):
    """The seven linear layers of one head, as (weight [out, in], bias [out]) pairs."""

    narrow: Affine
    """[D, H]"""
    query: Affine
    """[D, D]"""
    key: Affine
    """[D, D]"""
    value: Affine
    """[D, D]"""
    output: Affine
    """[D, D]"""
    dense: Affine
    """[D, D]"""
    classifier: Affine
    """[C, D]"""
    num_attention_heads: int = 2


def student_head_reference(
    hidden_states: Tensor,
    head: StudentHeadWeights,
    lengths: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`student_head` unfolded, in plain PyTorch: the oracle of the tests, and what training uses."""
    if cu_seqlens is not None:
        hidden_states, lengths = _pad(hidden_states, cu_seqlens)
    batch, tokens, _ = hidden_states.shape
    narrow = F.linear(hidden_states, *head.narrow).tanh()
    heads = head.num_attention_heads

    def split(projected: Tensor) -> Tensor:
        return projected.view(batch, -1, heads, projected.shape[-1] // heads).transpose(1, 2)

    attended = F.scaled_dot_product_attention(
        split(F.linear(narrow[:, :1], *head.query)),
        split(F.linear(narrow, *head.key)),
        split(F.linear(narrow, *head.value)),
        attn_mask=_key_mask(tokens, lengths, attention_mask, hidden_states.device),
    )
    pooled = F.linear(attended.transpose(1, 2).reshape(batch, -1), *head.output)
    logits = F.linear(F.linear(pooled, *head.dense).tanh(), *head.classifier)
    return logits if logits.dtype == torch.float64 else logits.float()


def _key_mask(
    tokens: int, lengths: Tensor | None, attention_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """[B, 1, 1, T] boolean, True where a key may be attended to."""
    if attention_mask is not None:
        return attention_mask.bool()[:, None, None, :]
    if lengths is not None:
        return (torch.arange(tokens, device=device) < lengths[:, None])[:, None, None, :]
    return None


def _pad(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed tokens [N, H] to [B, T, H] and lengths [B]; waits for the device to learn T."""
    lengths = cu_seqlens.diff()
    padded = torch.nn.utils.rnn.pad_sequence(packed.split(lengths.tolist()), batch_first=True)
    return padded, lengths


def student_head(
    hidden_states: Tensor,
    head: StudentHeadWeights,
    lengths: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Logits of FastBERT's head from token 0 of every sequence.

    Args:
        hidden_states: [B, T, H] float32, bfloat16, float16 or float64; with `cu_seqlens` packed, [N_tokens, H].
        head: the weights; H, D and C come from them.
        lengths: [B] integers from 1 to T, where padding is on the right only.
        attention_mask: [B, T], non-zero where a token counts; token 0 of every row must.
        cu_seqlens: [B + 1] int32, sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].

    Returns:
        [B, C], float32 (float64 for float64 inputs).

    Raises:
        ValueError: wrong shapes, or more than one of `lengths`, `attention_mask` and `cu_seqlens`.
        TypeError: dtypes of hidden states and weights that differ.
    """
    return student_head_reference(hidden_states, head, lengths, attention_mask, cu_seqlens)


def student_head_exit(
    hidden_states: Tensor,
    head: StudentHeadWeights,
    speed: float | Tensor,
    criterion: str = "entropy",
    row_ids: Tensor | None = None,
    top_n: int | None = None,
    *,
    lengths: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    record: ExitRecord | None = None,
    layer: int | None = None,
) -> ExitGateOutput:
    """`student_head` followed by `exit_gate`, one launch on a GPU; arguments are those of both.

    Returns:
        The gate's output with `logits` [B, C] set.
    """
    logits = student_head(hidden_states, head, lengths, attention_mask, cu_seqlens)
    decided = exit_gate(logits, speed, criterion, row_ids, top_n, record=record, layer=layer)
    return decided._replace(logits=logits)
