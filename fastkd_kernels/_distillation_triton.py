"""Device functions that the Triton kernels of the distillation losses share, and the scaling of gradients.

Tiles are [K, C] in float32, one distribution a row; -inf marks masked classes and the columns beyond C. The integer
codes of divergence, mix and attention space are the positions in the tuples of `fastkd_kernels._distillation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from fastkd_kernels._launch import Launcher, current_stream, may_keep
from fastkd_kernels._triton import jit, tl, triton


@jit
def finite_or_zero(x):
    """Replaces masked logits, so that they add nothing to a sum."""
    return tl.where(x == float("-inf"), 0.0, x)


@jit
def log_softmax_rows(x):  # [K, C]
    top = finite_or_zero(tl.max(x, 1))[:, None]
    shifted = x - top
    return shifted - tl.log(tl.sum(tl.exp(shifted), 1))[:, None]


@jit
def online_sum(
    top,  # [C], the largest value of every lane so far
    total,  # [C], the sum of exp(x - top) of every lane so far
    x,  # [C]
):
    larger = tl.maximum(top, x)
    # nothing but -inf so far: any finite shift leaves the sum at 0
    shift = finite_or_zero(larger)
    return larger, total * tl.exp(top - shift) + tl.exp(x - shift)


@jit
def log_sum_exp(
    top,  # [C]
    total,  # [C], of `online_sum`
):
    largest = finite_or_zero(tl.max(top, 0))
    return largest + tl.log(tl.sum(total * tl.exp(top - largest), 0))


@jit
def log_distribution(
    logits,  # [K, C]
    inverse_temperature,
    DIVERGENCE: tl.constexpr,
):
    scaled = logits * inverse_temperature
    return scaled if DIVERGENCE == 3 else log_softmax_rows(scaled)


@jit
def expected_log_ratio(p, log_p, log_q):
    """p (ln p - ln q), where a probability of 0 contributes 0."""
    return tl.where(p == 0.0, 0.0, p * (log_p - log_q))


@jit
def log_mixture(log_p, log_q, beta):
    """ln(beta p + (1 - beta) q)"""
    log_p += tl.log(beta)
    log_q += tl.log(1.0 - beta)
    high = tl.maximum(log_p, log_q)
    low = tl.minimum(log_p, log_q)
    gap = tl.where(low == float("-inf"), float("-inf"), low - high)
    return high + tl.log(1.0 + tl.exp(gap))


@jit
def divergence_terms(log_p, log_q, beta, DIVERGENCE: tl.constexpr):
    """p, q and the two parts of D, class by class: those that p and those that q weighs.

    Of a squared error: its gradients, the error, and 0.
    """
    # one return: older Triton compilers go on behind a return inside a branch
    if DIVERGENCE == 3:
        # columns beyond C are -inf in both
        difference = tl.where(log_p == log_q, 0.0, log_p - log_q)
        p = 2.0 * difference
        q = -p
        p_terms = difference * difference
        q_terms = tl.zeros_like(difference)
    else:
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        p_terms = tl.zeros_like(p)
        q_terms = tl.zeros_like(q)
        if DIVERGENCE == 0:
            p_terms = expected_log_ratio(p, log_p, log_q)
        elif DIVERGENCE == 1:
            q_terms = expected_log_ratio(q, log_q, log_p)
        else:
            mixture = log_mixture(log_p, log_q, beta)
            p_terms = beta * expected_log_ratio(p, log_p, mixture)
            q_terms = (1.0 - beta) * expected_log_ratio(q, log_q, mixture)
    return p, q, p_terms, q_terms


@jit
def divergence_gradients(p, q, p_terms, q_terms, p_total, q_total, DIVERGENCE: tl.constexpr):
    """Gradients of D with respect to the tempered logits of p and of q, from the sums of the terms over the classes."""
    p_gradient = p
    q_gradient = q
    if DIVERGENCE == 0:
        p_gradient = p_terms - p * p_total
        q_gradient = q - p
    elif DIVERGENCE == 1:
        p_gradient = p - q
        q_gradient = q_terms - q * q_total
    elif DIVERGENCE == 2:
        p_gradient = p_terms - p * p_total
        q_gradient = q_terms - q * q_total
    return p_gradient, q_gradient


@jit
def divergence_rows(
    log_p,  # [K, C]
    log_q,  # [K, C]
    beta,
    DIVERGENCE: tl.constexpr,
):
    """D [K, 1], its two gradients [K, C], and dD/dp p [K, C], which mixing probabilities needs."""
    p, q, p_terms, q_terms = divergence_terms(log_p, log_q, beta, DIVERGENCE)
    p_total = tl.sum(p_terms, 1)[:, None]
    q_total = tl.sum(q_terms, 1)[:, None]
    p_gradient, q_gradient = divergence_gradients(p, q, p_terms, q_terms, p_total, q_total, DIVERGENCE)
    if DIVERGENCE == 1:
        p_terms = -q
    return p_total + q_total, p_gradient, q_gradient, p_terms


@jit
def sum_in_last_program(
    losses,  # [rows], every program has stored its own
    total,  # [1]
    arrived,  # [1], 0 before the launch and after it
    rows,
    factor,
    BLOCK: tl.constexpr,
):
    """The program that finishes last adds up what all have stored, always in the same order."""
    # every thread of this program has stored before one of them reports it
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            # .cg: the first-level cache does not see the stores of other programs
            sums += tl.load(losses + row, mask=row < rows, other=0.0, cache_modifier=".cg")
        tl.store(total, tl.sum(sums, 0) * factor)
        tl.store(arrived, 0)


_counters: dict[tuple[int, int], Tensor] = {}


def arrival_counter(tensor: Tensor) -> Tensor:
    """The [1] int32 zero on the device of `tensor` that `sum_in_last_program` counts in and leaves at zero.

    Launches in one stream follow each other, so they share one. A CUDA graph may be replayed in any stream at any time,
    so it gets its own, zeroed inside the graph.
    """
    if not tensor.is_cuda or not may_keep(tensor):
        return tensor.new_zeros(1, dtype=torch.int32)
    key = (tensor.get_device(), current_stream(tensor.get_device()))
    if key not in _counters:
        _counters[key] = tensor.new_zeros(1, dtype=torch.int32)
    return _counters[key]


@jit
def _scale_block(
    gradient,  # [rows, C]
    out,  # [rows, C]
    size,  # rows * C
    block,
    grad_output,
    C,
    inner_rows,
    outer_stride,
    inner_stride,
    factor,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    if PER_ROW:
        row = index // C
        offset = row // inner_rows * outer_stride + row % inner_rows * inner_stride
        scale = tl.load(grad_output + offset, mask=inside, other=0.0)
    else:
        scale = tl.load(grad_output)
    value = tl.load(gradient + index, mask=inside, other=0.0).to(tl.float32) * (scale.to(tl.float32) * factor)
    tl.store(out + index, value.to(out.dtype.element_ty), mask=inside)


@jit
def _scale_kernel(
    gradient,  # [rows, C]
    out,  # [rows, C]
    size,  # rows * C
    blocks,  # of `gradient`; the programs beyond are those of the second one
    second,  # [other rows, C]
    second_out,  # [other rows, C]
    second_size,
    grad_output,  # one value a row, or a scalar
    C,
    inner_rows,
    outer_stride,
    inner_stride,
    factor,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if program < blocks:
        _scale_block(
            gradient, out, size, program,
            grad_output, C, inner_rows, outer_stride, inner_stride, factor, PER_ROW, BLOCK,
        )  # fmt: skip
    else:
        _scale_block(
            second, second_out, second_size, program - blocks,
            grad_output, C, inner_rows, outer_stride, inner_stride, factor, PER_ROW, BLOCK,
        )  # fmt: skip


_launch_scale = Launcher(_scale_kernel)


def scaled_gradients(
    gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype], grad_output: Tensor, factor: float
) -> list[Tensor]:
    """`_distillation.scaled_gradients`, two contiguous gradients a launch."""
    results = [torch.empty_like(gradient, dtype=dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)]
    pairs = [(gradient, out) for gradient, out in zip(gradients, results, strict=True) if out.numel()]
    for first, second in zip_longest(pairs[::2], pairs[1::2]):
        _scale(first, second, grad_output, factor)
    return results


def _scale(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor] | None, grad_output: Tensor, factor: float
) -> None:
    gradient, out = first
    # one student layer's values serve all teacher layers
    outer_stride = grad_output.stride(0) if grad_output.dim() == 2 and grad_output.shape[0] > 1 else 0
    inner_stride, inner_rows = (grad_output.stride(-1), grad_output.shape[-1]) if grad_output.dim() else (0, 1)
    block = 1024
    blocks = triton.cdiv(gradient.numel(), block)
    second_size = 0 if second is None else second[0].numel()
    _launch_scale(
        (blocks + triton.cdiv(second_size, block),),
        gradient,
        out,
        gradient.numel(),
        blocks,
        *(second or first),
        second_size,
        grad_output,
        gradient.shape[-1],
        inner_rows,
        outer_stride,
        inner_stride,
        factor,
        PER_ROW=grad_output.dim() > 0,
        BLOCK=block,
    )
