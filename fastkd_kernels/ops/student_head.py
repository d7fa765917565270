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

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd_kernels import _backend, _extension, _triton
from fastkd_kernels._arguments import dense, mark_written, plain, values_are_free
from fastkd_kernels._derivatives import transforming, wants_gradient
from fastkd_kernels._launch import LaunchConfig, Launcher, as_op, next_power_of_2
from fastkd_kernels._library import library
from fastkd_kernels._onednn import linear_tanh
from fastkd_kernels._student_head_weights import (
    FoldedStudentHead,
    StudentHeadWeights,
    check_head,
    fold,
    fold_cache,
    matrix_shape,
    parameters_of,
)
from fastkd_kernels._tickets import tickets
from fastkd_kernels._triton import jit, tl
from fastkd_kernels.checks import check_same_device
from fastkd_kernels.ops.encoder_layer import (
    INSTRUCTION_SETS,
    PANEL,
    encoder_layer_instructions,
    panels_of,
    product_dtype,
)
from fastkd_kernels.ops.exit_gate import (
    ExitGateConfig,
    ExitGateOutput,
    ExitRecord,
    GateCall,
    check_gate_call,
    exit_gate,
    gate_rows,
    list_survivors,
    uncertainty_scale,
)
from fastkd_kernels.ops.packed import unpack_reference


class HeadLayout(NamedTuple):
    """How the tokens of B sequences lie in hidden states: where none is given, all tokens of [B, T, H] count."""

    lengths: Tensor | None = None
    """[B], where padding is on the right only"""
    attention_mask: Tensor | None = None
    """[B, T], non-zero where a token counts"""
    cu_seqlens: Tensor | None = None
    """[B + 1], bounds of the sequences in packed hidden states [N_tokens, H]"""

    def batch_and_tokens(self, hidden_states: Tensor) -> tuple[int, int]:
        """B and the padded length T, which is 0 in the packed layout."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.shape[0] - 1, 0
        return hidden_states.shape[0], hidden_states.shape[1]

    def in_memory(self) -> HeadLayout:
        """The same as kernels read it: vectors without gaps, and no lazily negated view."""
        lengths, attention_mask, cu_seqlens = self
        return HeadLayout(
            None if lengths is None else dense(lengths),
            None if attention_mask is None else plain(attention_mask),
            None if cu_seqlens is None else dense(cu_seqlens),
        )


def student_head_reference(
    hidden_states: Tensor,
    head: StudentHeadWeights,
    lengths: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
) -> Tensor:
    """`student_head` unfolded, in plain PyTorch: the oracle of the tests, and what training uses."""
    if cu_seqlens is not None:
        hidden_states, lengths = _pad(hidden_states, cu_seqlens)
    valid = _valid_tokens(hidden_states.shape[1], lengths, attention_mask)
    if valid is not None:
        # 0 * NaN is NaN: what stands in the padding must reach neither the products nor their gradients
        hidden_states = hidden_states.masked_fill(~valid[..., None], 0)
    narrow = F.linear(hidden_states, *head.narrow).tanh()

    def split(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (head.num_attention_heads, -1)).transpose(1, 2)

    with _backend.attention_of_reference():
        attended = F.scaled_dot_product_attention(
            split(F.linear(narrow[:, :1], *head.query)),
            split(F.linear(narrow, *head.key)),
            split(F.linear(narrow, *head.value)),
            attn_mask=None if valid is None else valid[:, None, None, :],
            dropout_p=dropout_p,
        )
    pooled = F.linear(attended.transpose(1, 2).flatten(1), *head.output)
    logits = F.linear(F.linear(pooled, *head.dense).tanh(), *head.classifier)
    return logits if logits.dtype == torch.float64 else logits.float()


def _valid_tokens(tokens: int, lengths: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """[B, T] boolean, True where a token may be attended to."""
    if attention_mask is not None:
        return attention_mask != 0
    if lengths is not None:
        return torch.arange(tokens, device=lengths.device) < lengths[:, None]
    return None


def _pad(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed tokens [N, H] to [B, T, H] and lengths [B]; waits for the device to learn T."""
    lengths = cu_seqlens.diff()
    longest = max(lengths.tolist(), default=1)
    return unpack_reference([packed], cu_seqlens, longest)[0], lengths


@jit
def _tanh(x):
    decay = tl.exp(-2 * tl.abs(x))  # never overflows; NaN stays NaN
    result = (1 - decay) / (1 + decay)
    return tl.where(x < 0, -result, result)


@jit
def _vector_matrix(
    vector,  # [ROWS] float32, in global memory
    matrix,  # [ROWS, WIDTH] float32
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, WIDTH)
    total = tl.zeros([BLOCK_ROWS, WIDTH], tl.float32)
    for start in range(0, ROWS, BLOCK_ROWS):
        block = tl.load(matrix + (start + row)[:, None] * WIDTH + column[None, :])
        total += tl.load(vector + start + row)[:, None] * block
    return tl.sum(total, 0)


@jit
def _narrow_tile(
    rows,  # [BLOCK_TOKENS, 1] pointers to tokens of H features
    valid,  # [BLOCK_TOKENS]; other tokens are not read
    narrow_weight,  # [D, H]
    narrow_bias,  # [D]
    hidden,  # H
    EVEN_HIDDEN: tl.constexpr,  # H is a multiple of BLOCK_HIDDEN
    WIDEN: tl.constexpr,  # Triton's interpreter multiplies bfloat16 as if it were integers
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    column = tl.arange(0, WIDTH)
    product = tl.zeros([BLOCK_TOKENS, WIDTH], tl.float32)
    for start in range(0, hidden, BLOCK_HIDDEN):
        feature = start + tl.arange(0, BLOCK_HIDDEN)
        weights = narrow_weight + feature[:, None] + column[None, :] * hidden
        if EVEN_HIDDEN:
            x = tl.load(rows + feature[None, :], mask=valid[:, None], other=0.0)
            w = tl.load(weights)
        else:
            inside = feature < hidden
            x = tl.load(rows + feature[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
            w = tl.load(weights, mask=inside[:, None], other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        if x.dtype == tl.float32:
            # three TF32 products keep the accuracy of float32 on the tensor cores, whose own sums are truncated: what
            # has been summed before stays out of them
            product += tl.dot(x, w, input_precision="tf32x3")
        else:
            product = tl.dot(x, w, product)
    bias = tl.load(narrow_bias + column).to(tl.float32)
    return _tanh(product + bias[None, :])


@jit
def _attend(
    sequence,  # its number, int64
    split,  # the number of this program's share of its tokens
    hidden_states,  # [B, T, H], or [N_tokens, H] with cu_seqlens
    narrow_weight,  # [D, H]
    narrow_bias,  # [D]
    query_key,  # [heads, D, D] float32
    query_bias,  # [heads, D] float32
    lengths,  # [B] or None
    attention_mask,  # [B, T] or None
    cu_seqlens,  # [B + 1] or None
    scratch,  # [1 + heads, D] float32 of this program: the steps hand vectors on through it
    means,  # [heads, D] float32, out
    tokens,  # T
    hidden,  # H
    stride_batch,
    stride_token,
    stride_mask_batch,
    stride_mask_token,
    EVEN_HIDDEN: tl.constexpr,
    WIDEN: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Softmax over the tokens of one share: returns its largest score and sum of the weights e^(score - largest),
    [heads, 1] each, and leaves the weighted means of the narrow tokens. A share without a token gives -inf and 0."""
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + sequence)
        length = (tl.load(cu_seqlens + sequence + 1) - first).to(tl.int32)
        hidden_states += first.to(tl.int64) * stride_token
    else:
        length = tokens
        hidden_states += sequence * stride_batch
    if lengths is not None:
        # a length outside 1..T must not read outside the tensor
        length = tl.minimum(tl.maximum(tl.load(lengths + sequence).to(tl.int32), 1), tokens)

    # row 0 of every share is token 0, which asks the question but is answered in share 0 only
    share = tl.cdiv(length - 1, SPLITS)
    skipped = split * share
    rows = 1 + tl.minimum(share, length - 1 - skipped)
    if SPLITS > 1:
        rows = tl.where((split > 0) & (rows <= 1), 0, rows)

    column = tl.arange(0, WIDTH)
    query = scratch + WIDTH

    # all two-dimensional: Triton 3.6 fails for compute capability 10.0 on a vector reduced further
    head_index = tl.arange(0, HEADS)[:, None]
    largest = tl.full([HEADS, 1], float("-inf"), tl.float32)
    total = tl.zeros([HEADS, 1], tl.float32)
    for start in range(0, rows, BLOCK_TOKENS):
        row = start + tl.arange(0, BLOCK_TOKENS)
        token = tl.where(row == 0, 0, skipped + row)
        valid = row < rows
        if attention_mask is not None:
            flags = attention_mask + sequence * stride_mask_batch + token.to(tl.int64) * stride_mask_token
            valid &= tl.load(flags, mask=valid, other=0) != 0
        narrow = _narrow_tile(
            hidden_states + token.to(tl.int64)[:, None] * stride_token,
            valid,
            narrow_weight,
            narrow_bias,
            hidden,
            EVEN_HIDDEN,
            WIDEN,
            BLOCK_TOKENS,
            BLOCK_HIDDEN,
            WIDTH,
        )
        if start == 0:
            tl.store(scratch + column, tl.sum(tl.where((row == 0)[:, None], narrow, 0.0), 0))
            tl.debug_barrier()  # other threads of the program read what this one stored
            for head in tl.static_range(HEADS):
                folded = _vector_matrix(scratch, query_key + head * WIDTH * WIDTH, WIDTH, WIDTH, BLOCK_ROWS)
                folded += tl.load(query_bias + head * WIDTH + column)
                tl.store(query + head * WIDTH + column, folded)
            tl.debug_barrier()
        answered = valid & ((row > 0) | (split == 0))
        for head in tl.static_range(HEADS):
            is_head = head_index == head
            folded = tl.load(query + head * WIDTH + column)
            score = tl.sum(narrow * folded[None, :], 1, keep_dims=True)
            score = tl.where(answered[:, None], score, float("-inf"))
            before = tl.max(tl.where(is_head, largest, float("-inf")), 0, keep_dims=True)
            after = tl.maximum(before, tl.max(score, 0, keep_dims=True))
            # -inf where no token of the share has counted yet
            pivot = tl.where(after == float("-inf"), 0.0, after)
            weight = tl.exp(score - pivot)
            carried = tl.exp(before - pivot) * tl.sum(tl.where(is_head, total, 0.0), 0, keep_dims=True)
            summed = carried + tl.sum(weight, 0, keep_dims=True)
            mean = tl.sum(narrow * weight, 0, keep_dims=True)
            # between tiles in memory: there are no registers for it next to a tile of 128 tokens
            cell = means + head * WIDTH + column[None, :]
            if start > 0:
                tl.debug_barrier()  # every thread has stored its part of the tile before
                mean += tl.where(carried == 0, 0.0, carried * tl.load(cell))
                tl.debug_barrier()  # several threads may hold a column: all have read it before one of them writes it
            tl.store(cell, mean / summed)
            largest = tl.where(is_head, after, largest)
            total = tl.where(is_head, summed, total)

    return largest, total


@jit
def _is_last(
    ticket,  # int32, 0 before and after the launch
    programs,  # how many take it
):
    """Whether the others have all arrived; what they stored is in L2 then, to be loaded with .cg past an older L1."""
    tl.debug_barrier()  # every thread of this program has stored before one of them takes the ticket
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(ticket, 0)
    return last


@jit
def _combine_shares(
    shares,  # [2 + heads, D] float32 of each: largest score, sum of the weights, means
    stride,  # from one to the next
    means,  # [heads, D] float32, out
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Weighted means of a sequence, its shares added in their order whichever came last."""
    head = tl.arange(0, HEADS)[:, None]
    cell = head * WIDTH + tl.arange(0, WIDTH)[None, :]
    largest = tl.full([HEADS, 1], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        largest = tl.maximum(largest, tl.load(shares + split * stride + head, cache_modifier=".cg"))
    total = tl.zeros([HEADS, 1], tl.float32)
    mean = tl.zeros([HEADS, WIDTH], tl.float32)
    for split in tl.static_range(SPLITS):
        share = shares + split * stride
        weight = tl.load(share + WIDTH + head, cache_modifier=".cg")
        weight *= tl.exp(tl.load(share + head, cache_modifier=".cg") - largest)
        total += weight
        # the means of a share without a token were never written
        mean += tl.where(weight == 0, 0.0, weight * tl.load(share + 2 * WIDTH + cell, cache_modifier=".cg"))
    tl.store(means + cell, mean / total)


@jit
def _mix(
    means,  # [heads, D] float32, the c_j
    mix,  # [heads, D, D] float32
    mix_bias,  # [D] float32
    dense,  # [D] float32, out
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """tanh(sum_j M_j c_j + m)."""
    tl.debug_barrier()  # other threads of the program read what this one stored
    pooled = _vector_matrix(means, mix, HEADS * WIDTH, WIDTH, BLOCK_ROWS)
    column = tl.arange(0, WIDTH)
    tl.store(dense + column, _tanh(pooled + tl.load(mix_bias + column)))
    tl.debug_barrier()


@jit
def _classify(
    logits,  # [C] float32, out
    dense,  # [D] float32
    classifier,  # [C, D] float32
    classifier_bias,  # [C] float32
    num_labels,  # C
    WIDTH: tl.constexpr,
    BLOCK_LABELS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    for first in range(0, num_labels, BLOCK_LABELS):
        label = first + tl.arange(0, BLOCK_LABELS)
        known = label < num_labels
        total = tl.zeros([BLOCK_LABELS, BLOCK_WIDTH], tl.float32)
        for start in range(0, WIDTH, BLOCK_WIDTH):
            column = start + tl.arange(0, BLOCK_WIDTH)
            weights = tl.load(classifier + label[:, None] * WIDTH + column[None, :], mask=known[:, None], other=0.0)
            total += weights * tl.load(dense + column)[None, :]
        values = tl.sum(total, 1) + tl.load(classifier_bias + label, mask=known, other=0.0)
        tl.store(logits + label, values, mask=known)


@jit
def _list_if_last(
    stays,  # [B] int8, written by all programs
    survivors,  # [B] int32, out
    count,  # [1] int32, out
    ticket,  # int32, 0 before and after the launch
    batch,  # B, which is the number of programs that take it
    BLOCK: tl.constexpr,
):
    """The last program to arrive lists the rows that stay, in their order."""
    if _is_last(ticket, batch):
        kept = tl.zeros((), tl.int32)
        for first in range(0, batch, BLOCK):
            row = first + tl.arange(0, BLOCK)
            stay = tl.load(stays + row, mask=row < batch, other=0, cache_modifier=".cg").to(tl.int32)
            kept = list_survivors(survivors, first, stay, kept, BLOCK)
        tl.store(count, kept)


# one binary for every batch size, length, layer and n
@jit(do_not_specialize=["tokens", "batch", "capacity", "layer", "top_n"])
def _student_head_kernel(
    hidden_states,  # [B, T, H], or [N_tokens, H] with cu_seqlens
    narrow_weight,  # [D, H]
    narrow_bias,  # [D]
    query_key,  # [heads, D, D] float32
    query_bias,  # [heads, D] float32
    mix,  # [heads, D, D] float32
    mix_bias,  # [D] float32
    classifier,  # [C, D] float32
    classifier_bias,  # [C] float32
    lengths,  # [B] or None
    attention_mask,  # [B, T] or None
    cu_seqlens,  # [B + 1] or None
    scratch,  # [B, SPLITS, 4 + 3 heads, D] float32
    logits,  # [B, C] float32, out
    speeds,  # [B] float32 or None
    row_ids,  # [B] or None
    uncertainty,  # [B] float32, out
    stays,  # [B] int8, scratch
    survivors,  # [B] int32, out
    count,  # [1] int32, out
    tickets,  # int32, 0 before and after the launch: one of the batch, then one a sequence where there are splits
    exit_logits,  # [N, C] float32 or None, out, as the other three
    exit_uncertainty,  # [N] float32
    exit_layer,  # [N] int32
    history,  # [N, 2] int32
    tokens,  # T
    hidden,  # H
    num_labels,  # C
    stride_batch,
    stride_token,
    stride_mask_batch,
    stride_mask_token,
    batch,  # B
    capacity,  # N
    layer,
    speed,  # used where speeds is None
    scale,  # by what the uncertainty is divided
    top_n,
    CRITERION: tl.constexpr,  # None: only the logits are wanted
    EVEN_HIDDEN: tl.constexpr,  # H is a multiple of BLOCK_HIDDEN
    WIDEN: tl.constexpr,  # Triton's interpreter multiplies bfloat16 as if it were integers
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,  # D
    SPLITS: tl.constexpr,  # programs that share the tokens of a sequence
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LABELS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    RESIDENT: tl.constexpr,  # the gate's block holds all classes
    GATE_LABELS: tl.constexpr,
    LIST_ROWS: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1) if SPLITS > 1 else 0
    stride_split = (4 + 3 * HEADS) * WIDTH
    shares = scratch + sequence * (SPLITS * stride_split)
    share = shares + split * stride_split
    means = share + 2 * WIDTH
    own_scratch = means + HEADS * WIDTH
    dense = own_scratch + (1 + HEADS) * WIDTH
    largest, total = _attend(
        sequence,
        split,
        hidden_states,
        narrow_weight,
        narrow_bias,
        query_key,
        query_bias,
        lengths,
        attention_mask,
        cu_seqlens,
        own_scratch,
        means,
        tokens,
        hidden,
        stride_batch,
        stride_token,
        stride_mask_batch,
        stride_mask_token,
        EVEN_HIDDEN,
        WIDEN,
        HEADS,
        WIDTH,
        SPLITS,
        BLOCK_TOKENS,
        BLOCK_HIDDEN,
        BLOCK_ROWS,
    )
    if SPLITS > 1:
        head = tl.arange(0, HEADS)[:, None]
        tl.store(share + head, largest)
        tl.store(share + WIDTH + head, total)
        if not _is_last(tickets + 1 + sequence, SPLITS):
            return
        means = dense + WIDTH
        _combine_shares(shares, stride_split, means, HEADS, WIDTH, SPLITS)
    _mix(means, mix, mix_bias, dense, HEADS, WIDTH, BLOCK_ROWS)
    own_logits = logits + sequence * num_labels
    _classify(own_logits, dense, classifier, classifier_bias, num_labels, WIDTH, BLOCK_LABELS, BLOCK_WIDTH)
    if CRITERION is not None:
        tl.debug_barrier()  # the gate reads the logits back
        stay = gate_rows(
            sequence,
            logits,
            speeds,
            row_ids,
            uncertainty,
            exit_logits,
            exit_uncertainty,
            exit_layer,
            history,
            batch,
            num_labels,
            num_labels,
            1,
            capacity,
            layer,
            speed,
            scale,
            top_n,
            CRITERION,
            RESIDENT,
            1,
            GATE_LABELS,
        )
        tl.store(stays + sequence + tl.arange(0, 1), stay.to(tl.int8))
        _list_if_last(stays, survivors, count, tickets, batch, LIST_ROWS)


_launch_student_head = Launcher(_student_head_kernel)


class GpuLimits(NamedTuple):
    """What `StudentHeadConfig.choose` asks about a GPU; an H100 and an H200 have the defaults."""

    multiprocessors: int = 132
    shared_memory: int = 232_448
    """Bytes one program may have."""
    wgmma: bool = True
    """Compute capability 9: operands of matrix products stay in shared memory and their sums in registers."""

    @classmethod
    @lru_cache
    def of(cls, device: torch.device) -> GpuLimits:
        """Those of a GPU; on a CPU, where the kernel is interpreted, the defaults."""
        if device.type != "cuda":
            return cls()
        properties: Any = torch.cuda.get_device_properties(device)
        return cls(properties.multi_processor_count, properties.shared_memory_per_block_optin, properties.major == 9)


@dataclass(frozen=True)
class StudentHeadConfig(LaunchConfig):
    """Launch configuration of the CUDA kernel; `splits` programs a sequence."""

    splits: int
    block_tokens: int
    block_hidden: int
    block_rows: int  # of a folded matrix, a step
    block_labels: int
    block_width: int  # of the classifier's input, a step
    gate_labels: int
    resident: bool  # a block of the gate holds all classes
    list_rows: int  # of the batch, a step of listing the survivors
    num_warps: int
    num_stages: int

    @classmethod
    @lru_cache(maxsize=1024)  # the host is what a small batch waits for
    def choose(
        cls,
        dtype: torch.dtype,
        hidden: int,
        width: int,
        num_labels: int,
        batch: int,
        tokens: int,
        limits: GpuLimits = GpuLimits(),  # noqa: B008
    ) -> StudentHeadConfig:
        """The analytical choice for sequences of about `tokens`: up to 4 splits and two tiles, so at most six binaries.

        Every tile reads all narrow weights, so splits are worth their second ticket only where they leave a program
        fewer rows to compute, and only on multiprocessors that would be idle. A tile of 64 rows is the smallest that
        fills `wgmma`; its float32 accumulator and the reductions over it fit the registers of 8 warps up to a width of
        128, and with `wgmma` one of 128 rows too. A float32 operand takes three products and their halves in
        registers, hence its narrower step and small tile. 80 KiB in flight are one memory latency at all that L2 gives
        a multiprocessor.

        Shares are added in another order than tiles, so another batch size may move a logit by a rounding.
        """
        block_hidden = min(16 if dtype == torch.float32 else 64, max(16, next_power_of_2(hidden)))
        block_labels = min(max(next_power_of_2(num_labels), 2), 256)
        gate = ExitGateConfig.choose(1, num_labels)
        small = 64 if width <= 128 else 32
        large = 128 if limits.wgmma and dtype != torch.float32 and width <= 128 else small

        def block_and_rows(splits: int) -> tuple[int, int]:
            rows = tokens if splits == 1 else 1 + -(-(tokens - 1) // splits)
            block = small if rows <= small else large
            return block, -(-rows // block) * block

        splits = min(
            (n for n in (1, 2, 4) if n == 1 or batch * n <= limits.multiprocessors), key=lambda n: block_and_rows(n)[1]
        )
        block_tokens, _ = block_and_rows(splits)
        stage = (block_tokens + width) * block_hidden * dtype.itemsize
        stages = min(1 + -(-(80 << 10) // stage), limits.shared_memory // stage, 6)
        return cls(
            splits=splits,
            block_tokens=block_tokens,
            block_hidden=block_hidden,
            block_rows=min(width, 4096 // width),
            block_labels=block_labels,
            block_width=min(width, 4096 // block_labels),
            gate_labels=gate.block_columns,
            resident=gate.resident,
            list_rows=1024,
            num_warps=8,
            num_stages=max(stages, 2),
        )

    def constants(self) -> dict[str, int]:
        return {
            "SPLITS": self.splits,
            "BLOCK_TOKENS": self.block_tokens,
            "BLOCK_HIDDEN": self.block_hidden,
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_LABELS": self.block_labels,
            "BLOCK_WIDTH": self.block_width,
            "RESIDENT": self.resident,
            "GATE_LABELS": self.gate_labels,
            "LIST_ROWS": self.list_rows,
        }

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class _GateArguments(NamedTuple):
    """What the kernel takes for its gate; where `criterion` is None there is none."""

    criterion: str | None
    tensors: tuple[Tensor | None, ...]
    """speeds, row_ids, uncertainty, stays, survivors, count"""
    record: tuple[Tensor | None, ...]
    """exit_logits, exit_uncertainty, exit_layer, history"""
    numbers: tuple[float, ...]
    """batch, capacity, layer, speed, scale, top_n"""


_NO_GATE = _GateArguments(None, (None,) * 6, (None,) * 4, (0, 0, 0, 0.0, 1.0, 0))


def _launch(
    hidden_states: Tensor, head: StudentHeadWeights, layout: HeadLayout, logits: Tensor, gate: _GateArguments
) -> None:
    folded = fold_cache.get(head)
    batch, tokens = layout.batch_and_tokens(hidden_states)
    config = _config(hidden_states, folded, batch, tokens)
    hidden, width, num_labels = folded.sizes
    heads = folded.num_attention_heads
    counted = batch if config.splits > 1 else 0
    hidden_states = plain(hidden_states)
    if hidden_states.stride(-1) != 1:
        hidden_states = hidden_states.contiguous()
    lengths, attention_mask, cu_seqlens = layout
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = attention_mask.view(torch.uint8)
    _launch_student_head(
        (batch, config.splits),
        hidden_states,
        *folded.narrow,
        folded.query_key,
        folded.query_bias,
        folded.mix,
        folded.mix_bias,
        *folded.classifier,
        lengths,
        attention_mask,
        cu_seqlens,
        folded.mix.new_empty(batch, config.splits, 4 + 3 * heads, width),
        logits,
        *gate.tensors,
        None if gate.criterion is None and not counted else tickets.take(hidden_states, 1 + counted),
        *gate.record,
        tokens,
        hidden,
        num_labels,
        hidden_states.stride(0),
        hidden_states.stride(-2),
        *((0, 0) if attention_mask is None else attention_mask.stride()),
        *gate.numbers,
        CRITERION=gate.criterion,
        EVEN_HIDDEN=hidden % config.block_hidden == 0,
        WIDEN=_triton.interpreting and hidden_states.dtype == torch.bfloat16,
        HEADS=heads,
        WIDTH=width,
        **config.launch,
    )


def _config(hidden_states: Tensor, folded: FoldedStudentHead, batch: int, tokens: int) -> StudentHeadConfig:
    if hidden_states.dim() == 2:
        tokens = hidden_states.shape[0] // batch  # on average; asking for the longest would wait for the device
    limits = GpuLimits.of(hidden_states.device)
    return StudentHeadConfig.choose(hidden_states.dtype, *folded.sizes, batch, tokens, limits)


def _student_head_cuda(hidden_states: Tensor, head: StudentHeadWeights, layout: HeadLayout) -> Tensor:
    logits = _new_logits(hidden_states, head, layout)
    _launch(hidden_states, head, layout, logits, _NO_GATE)
    return logits


def _student_head_exit_cuda(
    hidden_states: Tensor, head: StudentHeadWeights, layout: HeadLayout, call: GateCall, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills `logits`; returns uncertainty, survivors and count."""
    batch, num_labels = logits.shape
    speed, speeds = call.split_speed()
    uncertainty, survivors, count = decision = _new_decision(logits)
    stays = survivors.new_empty(batch, dtype=torch.int8)
    gate = _GateArguments(
        criterion=call.criterion,
        tensors=(speeds, call.contiguous_row_ids(), uncertainty, stays, survivors, count),
        record=call.record_tensors(),
        numbers=(
            batch,
            batch if call.record is None else call.record.exit_layer.shape[0],
            call.layer or 0,
            speed,
            uncertainty_scale(call.criterion, num_labels, call.top_n),
            call.top_n or 0,
        ),
    )
    _launch(hidden_states, head, layout, logits, gate)
    return decision


def _student_head_cpu(hidden_states: Tensor, head: StudentHeadWeights, layout: HeadLayout) -> Tensor:
    folded = fold_cache.get(head)
    batch, tokens = layout.batch_and_tokens(hidden_states)
    rows, tail = linear_tanh(hidden_states.reshape(-1, hidden_states.shape[-1]), *folded.narrow)
    lengths, attention_mask, cu_seqlens = layout
    return torch.ops.fastkd_kernels.student_head_pool(
        rows,
        tail,
        batch,
        tokens,
        folded.num_attention_heads,
        folded.query_key,
        folded.query_bias,
        folded.mix,
        folded.mix_bias,
        *folded.classifier,
        None if lengths is None else lengths.to(torch.int64).contiguous(),
        None if attention_mask is None else (attention_mask != 0).contiguous(),
        None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous(),
    )


def _student_head(hidden_states: Tensor, head: StudentHeadWeights, layout: HeadLayout) -> Tensor:
    """`student_head` without gradients, on whatever backend."""
    _check_values(hidden_states, layout)
    name = _resolve(hidden_states, head)
    if name == "reference":
        check_head(head)
        return student_head_reference(hidden_states, head, *layout)
    if layout.batch_and_tokens(hidden_states)[0] == 0:
        return _new_logits(hidden_states, head, layout)
    run = _student_head_cuda if name == "cuda" else _student_head_cpu
    return run(hidden_states, head, layout)


def _new_logits(hidden_states: Tensor, head: StudentHeadWeights, layout: HeadLayout) -> Tensor:
    dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    batch, _ = layout.batch_and_tokens(hidden_states)
    return hidden_states.new_empty(batch, head.classifier[0].shape[0], dtype=dtype)


def _new_decision(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch = logits.shape[0]
    return (
        logits.new_empty(batch),
        logits.new_empty(batch, dtype=torch.int32),
        logits.new_empty(1, dtype=torch.int32),
    )


_backend.register_backends(
    "student_head",
    cuda=_triton.missing_reason,
    cpu=_extension.missing_kernel_reason("student_head_pool", "CPU"),
    interpretable=True,
)


def _resolve(hidden_states: Tensor, head: StudentHeadWeights) -> str:
    name = _backend.resolve("student_head", hidden_states.device)
    reason = None if name == "reference" else _unsupported(head, name)
    return name if reason is None else _backend.fall_back("student_head", name, reason)


def _unsupported(head: StudentHeadWeights, backend: str) -> str | None:
    """None where the kernel takes this head, else the sentence that says why not."""
    dtype, width, heads = head.narrow[0].dtype, head.narrow[0].shape[0], head.num_attention_heads
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernel has no {dtype}"
    if backend == "cpu":
        return None
    if not 16 <= width <= 256 or width & (width - 1):
        return f"its kernel needs a head width that is a power of two from 16 to 256, and this head is {width} wide"
    if heads > 16 or heads & (heads - 1):
        return f"its kernel needs 1, 2, 4, 8 or 16 attention heads, and this head has {heads}"
    return None


library.define(
    "student_head_pool(Tensor rows, Tensor? tail, int batch, int padded, int heads, Tensor query_key, "
    "Tensor query_bias, Tensor mix, Tensor mix_bias, Tensor classifier, Tensor classifier_bias, Tensor? lengths, "
    "Tensor? mask, Tensor? cu_seqlens) -> Tensor"
)
library.define(
    "student_head_packed(Tensor hidden_states, Tensor narrow, Tensor narrow_bias, int heads, Tensor query_key, "
    "Tensor query_bias, Tensor mix, Tensor mix_bias, Tensor classifier, Tensor classifier_bias, Tensor cu_seqlens) "
    "-> Tensor"
)
library.define(
    "student_head(Tensor hidden_states, Tensor[] weights, int heads, Tensor? lengths, Tensor? attention_mask, "
    "Tensor? cu_seqlens) -> Tensor"
)
library.define(
    "student_head_exit(Tensor hidden_states, Tensor[] weights, int heads, Tensor? lengths, Tensor? attention_mask, "
    "Tensor? cu_seqlens, float speed, Tensor? speeds, str criterion, Tensor? row_ids, int? top_n, "
    "Tensor(a!)? exit_logits, Tensor(b!)? exit_uncertainty, Tensor(c!)? exit_layer, "
    "Tensor(d!)? history, int? layer) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("fastkd_kernels::student_head_pool", lib=library)
def _student_head_pool_fake(
    rows: Tensor,
    tail: Tensor | None,
    batch: int,
    padded: int,
    heads: int,
    query_key: Tensor,
    query_bias: Tensor,
    mix: Tensor,
    mix_bias: Tensor,
    classifier: Tensor,
    classifier_bias: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    return classifier.new_empty(batch, classifier.shape[0])


@torch.library.register_fake("fastkd_kernels::student_head_packed", lib=library)
def _student_head_packed_fake(
    hidden_states: Tensor,
    narrow: Tensor,
    narrow_bias: Tensor,
    heads: int,
    query_key: Tensor,
    query_bias: Tensor,
    mix: Tensor,
    mix_bias: Tensor,
    classifier: Tensor,
    classifier_bias: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    return classifier.new_empty(cu_seqlens.shape[0] - 1, classifier.shape[0])


_student_head_packed_op: Any = torch.ops.fastkd_kernels.student_head_packed.default


@torch.library.impl(library, "student_head", "CompositeExplicitAutograd")
@as_op
def _student_head_op(
    hidden_states: Tensor,
    weights: list[Tensor],
    heads: int,
    lengths: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    return _student_head(hidden_states, _head_of(weights, heads), HeadLayout(lengths, attention_mask, cu_seqlens))


@torch.library.register_fake("fastkd_kernels::student_head", lib=library)
def _student_head_fake(
    hidden_states: Tensor,
    weights: list[Tensor],
    heads: int,
    lengths: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    return _new_logits(hidden_states, _head_of(weights, heads), HeadLayout(lengths, attention_mask, cu_seqlens))


@torch.library.impl(library, "student_head_exit", "CompositeExplicitAutograd")
@as_op
def _student_head_exit_op(
    hidden_states: Tensor,
    weights: list[Tensor],
    heads: int,
    lengths: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    speed: float,
    speeds: Tensor | None,
    criterion: str,
    row_ids: Tensor | None,
    top_n: int | None,
    exit_logits: Tensor | None,
    exit_uncertainty: Tensor | None,
    exit_layer: Tensor | None,
    history: Tensor | None,
    layer: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head, layout = _head_of(weights, heads), HeadLayout(lengths, attention_mask, cu_seqlens)
    _check_values(hidden_states, layout)
    logits = _new_logits(hidden_states, head, layout)
    record = None
    if exit_logits is not None and exit_uncertainty is not None and exit_layer is not None and history is not None:
        record = ExitRecord(exit_logits, exit_uncertainty, exit_layer, history)
    call = GateCall(speed if speeds is None else speeds, criterion, row_ids, top_n, record, layer)
    return logits, *_student_head_exit_cuda(hidden_states, head, layout, call, logits)


@torch.library.register_fake("fastkd_kernels::student_head_exit", lib=library)
def _student_head_exit_fake(
    hidden_states: Tensor,
    weights: list[Tensor],
    heads: int,
    lengths: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *gate: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = HeadLayout(lengths, attention_mask, cu_seqlens)
    logits = _new_logits(hidden_states, _head_of(weights, heads), layout)
    return logits, *_new_decision(logits)


def _head_of(weights: list[Tensor], heads: int) -> StudentHeadWeights:
    narrow, query, key, value, output, dense, classifier = zip(weights[::2], weights[1::2], strict=True)
    return StudentHeadWeights(narrow, query, key, value, output, dense, classifier, heads)


def student_head(
    hidden_states: Tensor,
    head: StudentHeadWeights,
    lengths: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
) -> Tensor:
    """Logits of FastBERT's head from token 0 of every sequence.

    With gradients or dropout wanted the unfolded head runs; otherwise the folded one, whose matrices are kept until a
    parameter changes. Writing into a parameter's `.data` goes unseen, as it does by autograd: write under
    `torch.no_grad()`.

    Args:
        hidden_states: [B, T, H] float32, bfloat16, float16 or float64, which always takes the reference; with
            `cu_seqlens` packed, [N_tokens, H].
        head: the weights; H, D and C come from them.
        lengths: [B] int32 or int64 from 1 to T, where padding is on the right only.
        attention_mask: [B, T] of any dtype, non-zero where a token counts; token 0 of every row must.
        cu_seqlens: [B + 1] int32 or int64, sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]; rows behind the last
            sequence belong to none.
        dropout_p: probability of dropping an attention weight, in training.

    Returns:
        [B, C], float32 (float64 for float64 inputs). What stands in padding, NaN included, changes nothing.

    Raises:
        ValueError: wrong shapes or devices, more than one of `lengths`, `attention_mask` and `cu_seqlens`; on CPU also
            lengths outside 1 to T, a masked token 0, and `cu_seqlens` that do not rise from 0, or rise
            beyond N_tokens.
        TypeError: dtypes of hidden states and weights that differ, masks of a wrong dtype.
    """
    layout = HeadLayout(lengths, attention_mask, cu_seqlens)
    _check(hidden_states, head, layout)
    layout = layout.in_memory()
    if dropout_p or _needs_unfolded(hidden_states, head):
        check_head(head)
        _check_values(hidden_states, layout)
        return student_head_reference(hidden_states, head, *layout, dropout_p=dropout_p)
    if (torch.compiler.is_compiling() or type(hidden_states) is not Tensor) and not transforming():
        return torch.ops.fastkd_kernels.student_head(
            hidden_states, parameters_of(head), head.num_attention_heads, *layout
        )
    # the dispatcher costs more than a small kernel
    return _student_head(hidden_states, head, layout)


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
    """`student_head` followed by `exit_gate`; arguments and errors are those of both.

    On a GPU head and gate are one launch, which may be captured in a CUDA graph after one call outside of it. The graph
    keeps the folded weights of that time: capture it again when they have changed.

    Returns:
        The gate's output with `logits` [B, C] set.
    """
    layout = HeadLayout(lengths, attention_mask, cu_seqlens)
    call = GateCall(speed, criterion, row_ids, top_n, record, layer)
    _check(hidden_states, head, layout)
    logits = _new_logits(hidden_states, head, layout)
    check_gate_call(call, logits)
    layout = layout.in_memory()
    if not _one_launch(hidden_states, head, logits.shape[0]):
        logits = student_head(hidden_states, head, *layout)
        decided = exit_gate(logits, speed, criterion, row_ids, top_n, record=record, layer=layer)
        return decided._replace(logits=logits)
    if torch.compiler.is_compiling() or type(hidden_states) is not Tensor:
        logits, uncertainty, survivors, count = torch.ops.fastkd_kernels.student_head_exit(
            hidden_states,
            parameters_of(head),
            head.num_attention_heads,
            *layout,
            *call.split_speed(),
            criterion,
            row_ids,
            top_n,
            *call.record_tensors(),
            layer,
        )
    else:
        _check_values(hidden_states, layout)
        uncertainty, survivors, count = _student_head_exit_cuda(hidden_states, head, layout, call, logits)
    if record is not None:
        mark_written(call.record_tensors())
    return ExitGateOutput(uncertainty, survivors, count, logits)


def _one_launch(hidden_states: Tensor, head: StudentHeadWeights, batch: int) -> bool:
    return not _needs_unfolded(hidden_states, head) and _resolve(hidden_states, head) == "cuda" and batch > 0


def _needs_unfolded(hidden_states: Tensor, head: StudentHeadWeights) -> bool:
    if hidden_states.dtype != head.narrow[0].dtype:
        return True  # torch.autocast is on, and it knows what to do with the products of the reference
    return wants_gradient((hidden_states, *parameters_of(head)))


def _check(hidden_states: Tensor, head: StudentHeadWeights, layout: HeadLayout) -> None:
    weight = head.narrow[0]
    matrix_shape("narrow", weight)
    lengths, attention_mask, cu_seqlens = layout
    given = {name: mask for name, mask in zip(HeadLayout._fields, layout, strict=True) if mask is not None}
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)}: got both, expected at most one of lengths, attention_mask, cu_seqlens"
        )
    if not hidden_states.is_floating_point():
        raise TypeError(f"hidden_states: got dtype {hidden_states.dtype}, expected a floating-point dtype")
    dims = 2 if cu_seqlens is not None else 3
    if hidden_states.dim() != dims or hidden_states.shape[-1] != weight.shape[-1]:
        expected = "[N_tokens, H]" if cu_seqlens is not None else "[B, T, H]"
        raise ValueError(
            f"hidden_states: got shape {tuple(hidden_states.shape)}, expected {expected} with H={weight.shape[-1]}, "
            "which is the input width of narrow"
        )
    if dims == 3 and hidden_states.shape[0] > 0 and hidden_states.shape[1] == 0:
        raise ValueError("hidden_states: got T=0 tokens, expected at least token 0, which is the query")
    if hidden_states.dtype != weight.dtype and not torch.is_autocast_enabled(hidden_states.device.type):
        raise TypeError(
            f"hidden_states: got dtype {hidden_states.dtype}, expected that of the weights, {weight.dtype}; "
            "convert one of them, or run under torch.autocast"
        )
    check_same_device("head", weight, "hidden_states", hidden_states)
    for name, mask in given.items():
        check_same_device(name, mask, "hidden_states", hidden_states)
    if lengths is not None:
        _check_integers("lengths", lengths, hidden_states.shape[0])
    if cu_seqlens is not None:
        _check_integers("cu_seqlens", cu_seqlens, None)
    if attention_mask is not None and attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, expected [B, T] = "
            f"{list(hidden_states.shape[:2])}"
        )


def _check_integers(name: str, tensor: Tensor, size: int | None) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected torch.int32 or torch.int64")
    if tensor.dim() != 1 or tensor.shape[0] == 0 < (1 if size is None else size):
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected [{'B + 1' if size is None else size}]")
    if size is not None and tensor.shape[0] != size:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected [{size}]")


def _check_values(hidden_states: Tensor, layout: HeadLayout) -> None:
    """What only the values tell, where they can be read; a compiled graph reads them when it runs without gradients."""
    if not values_are_free(hidden_states):
        return
    lengths, attention_mask, cu_seqlens = layout
    if lengths is not None and lengths.shape[0] > 0:
        shortest, longest = (int(value) for value in lengths.aminmax())
        if shortest < 1 or longest > hidden_states.shape[1]:
            raise ValueError(
                f"lengths: got values from {shortest} to {longest}, expected 1 to T={hidden_states.shape[1]}"
            )
    if attention_mask is not None and not bool(attention_mask[:, 0].all()):
        raise ValueError(
            "attention_mask: got a row whose token 0 is masked, but token 0 is the query; pad on the right"
        )
    if cu_seqlens is not None:
        tokens, ends = hidden_states.shape[0], (int(cu_seqlens[0]), int(cu_seqlens[-1]))
        if ends[0] != 0 or ends[1] > tokens or not bool((cu_seqlens.diff() > 0).all()):
            raise ValueError(
                f"cu_seqlens: got values from {ends[0]} to {ends[1]}, expected them to rise from 0 to at "
                f"most N_tokens={tokens} with at least one token a sequence"
            )


class PreparedStudentHead:
    """A head made ready, once, for packed sequences on a CPU; whoever keeps it knows when its weights change.

    `student_head` asks 14 parameters at every call, which takes longer than answering one short sequence.

    Args:
        head: whose parameters are read now, and not kept.

    Raises:
        ValueError, TypeError: as `student_head`, for weights that do not fit each other; TypeError also for float64.
    """

    def __init__(self, head: StudentHeadWeights) -> None:
        check_head(head)
        dtype = head.narrow[0].dtype
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"head: got {dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
        self.dtype = _kernel_dtype(dtype)
        """Of the rows that the kernel reads."""
        with torch.inference_mode(False), torch.no_grad():
            self.weights = packed_head(fold(head))
            """As `student_head_packed` takes them."""

    @property
    def num_labels(self) -> int:
        return int(self.weights[-1].shape[0])

    def __call__(self, hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Logits [B, C] float32, without a gradient; the same numbers whatever other rows there are.

        Args:
            hidden_states: [R, H], dense, of the dtype of the weights; rows behind the last sequence belong to none.
            cu_seqlens: [B + 1] int32, rising from 0 to at most R.
        """
        return _student_head_packed_op(hidden_states.to(self.dtype), *self.weights, cu_seqlens)


def packed_head(folded: FoldedStudentHead) -> tuple[Any, ...]:
    """The weights as `student_head_packed` takes them, none of them a parameter's own memory.

    oneDNN would prepare a primitive for every number of rows; the kernel's own product takes any.
    """
    weight, bias = folded.narrow
    instructions = encoder_layer_instructions() or INSTRUCTION_SETS[0]
    panels = panels_of(weight, product_dtype(_kernel_dtype(weight.dtype), instructions))
    return (
        panels,
        F.pad(bias.float(), (0, panels.shape[0] * PANEL - bias.shape[0])),
        folded.num_attention_heads,
        folded.query_key,
        folded.query_bias,
        folded.mix,
        folded.mix_bias,
        *(tensor.clone() for tensor in folded.classifier),
    )


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of rows and their product: float16 becomes float32."""
    return torch.float32 if dtype == torch.float16 else dtype
