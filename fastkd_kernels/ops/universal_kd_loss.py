"""Universal-KD: student layers against an attention-weighted mixture of teacher layers, in the space of the logits.

For the logits f_i of the pseudo-classifier on teacher layer i (i = 1..N) and s_j of that on student layer j (j = 1..M),
each [C] for one sample (Wu et al., EMNLP 2021):

    a_i = c <f_i, s_j>,   lambda = softmax_i(a),   F = sum_i lambda_i f_i
    l_j = tau^2 D(softmax(F / tau), softmax(s_j / tau))

with D = KL(teacher || student) by default, and the other divergences of `fastkd_kernels._distillation`. What the paper
leaves open is an argument: how scores compare two layers (`attn`, `attn_space`, `attn_scale`, `attn_temperature`), and
what is mixed (`mix`):

    logits   F as above
    probs    p = sum_i lambda_i softmax(f_i / tau) in the place of softmax(F / tau)
    loss     l_j = tau^2 sum_i lambda_i D(softmax(f_i / tau), softmax(s_j / tau))

Gradients, computed in the forward pass: with g = dl/dF = tau dD/d(F / tau) and w_i = lambda_i <f_i - F, g> = dl/da_i,

    dl/ds_j = tau dD/d(s_j / tau) + c sum_i w_i f_i,        dl/df_i = lambda_i g + c w_i s_j

`detach_attention` drops the w terms. Mixing losses has w_i = lambda_i (l_ij - l_j); mixing probabilities shares
a_c = p_c dD/dp_c out by r_ic = lambda_i p_ic / p_c:  dl/df_i = tau (r_i a - p_i <r_i, a>),  w_i = tau^2 (<r_i, a> -
lambda_i sum_k <r_k, a>). A class with a logit of -inf is masked: it adds nothing to a score, and a class masked in one
teacher layer is masked in F.

N <= 32 and C <= 128: one program a sample and student layer, everything in registers. Beyond that, for mix="logits"
and attn_space="logits" and up to 64 teacher layers, rows are streamed over the classes in passes (scores; mixture and
loss; gradient of the attention; gradients); the mixture is never written to memory. Other wide calls take the
reference, which says so once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd_kernels import _backend, _distillation, _extension, _triton
from fastkd_kernels import _distillation_triton as kernels
from fastkd_kernels._launch import Launcher, as_op, next_power_of_2
from fastkd_kernels._library import library
from fastkd_kernels._triton import jit, tl
from fastkd_kernels.checks import check_choice, check_same_device

ATTENTIONS = ("dot", "neg_sqdist", "uniform")


def universal_kd_loss_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    layer_reduction: str = "sum",
    mix: str = "logits",
    attn_space: str = "logits",
    attn_scale: float | str = 1.0,
    direction: str = "forward",
    detach_attention: bool = False,
    task: str = "classification",
    *,
    attn: str | None = None,
    attn_temperature: float = 1.0,
    t2_scale: bool = True,
    beta: float | None = None,
) -> Tensor:
    """`universal_kd_loss` in plain PyTorch, differentiable in both logits: the oracle of the tests and the fallback."""
    student, teacher = _distillation.widen(student_logits, teacher_logits)
    divergence = _distillation.divergence_code(direction, task, beta)
    attn, scale = attention_of(attn, attn_scale, attn_temperature, task, student.shape[-1])
    log_weights = (scale * _scores_reference(student, teacher, attn, attn_space)).log_softmax(1)
    if detach_attention:
        log_weights = log_weights.detach()
    log_q = _distillation.log_distribution(student, temperature, divergence[0])
    rows = _mixed_divergence_reference(teacher, log_q, log_weights, temperature, divergence, mix)
    rows = rows * _distillation.loss_scale(temperature, t2_scale)
    if reduction == "none":
        return rows
    return rows.sum() * _factor(reduction, layer_reduction, student)


def _scores_reference(student: Tensor, teacher: Tensor, attn: str, attn_space: str) -> Tensor:
    """[M, N, B]"""
    s_masked, f_masked = student == -math.inf, teacher == -math.inf
    s, f = _features_reference(student, s_masked, attn_space), _features_reference(teacher, f_masked, attn_space)
    if attn == "neg_sqdist":
        masked = s_masked[:, None] | f_masked[None]
        return -(f[None] - s[:, None]).masked_fill(masked, 0).square().sum(-1)
    return _einsum("mbc,nbc->mnb", s, f)


def _features_reference(logits: Tensor, masked: Tensor, space: str) -> Tensor:
    if space == "probs":
        return logits.softmax(-1)
    return (logits if space == "logits" else logits.log_softmax(-1)).masked_fill(masked, 0)


def _mixed_divergence_reference(
    teacher: Tensor, log_q: Tensor, log_weights: Tensor, temperature: float, divergence: tuple[int, float], mix: str
) -> Tensor:
    """[M, B]"""
    kind, beta = divergence
    if mix == "logits":
        masked = teacher == -math.inf
        mixed = _einsum("mnb,nbc->mbc", log_weights.exp(), teacher.masked_fill(masked, 0))
        mixed = mixed.masked_fill(masked.any(0), -math.inf)
        return _distillation.divergence_reference(
            _distillation.log_distribution(mixed, temperature, kind), log_q, kind, beta
        )
    log_p = _distillation.log_distribution(teacher, temperature, kind)
    if mix == "loss":
        losses = _distillation.divergence_reference(log_p[None], log_q[:, None], kind, beta)
        return (log_weights.exp() * losses).sum(1)
    # a class that every teacher layer masks has no finite log-sum-exp to differentiate
    masked = (log_p == -math.inf).all(0)
    mixed = (log_weights[..., None] + log_p.masked_fill(masked, 0)[None]).logsumexp(1).masked_fill(masked, -math.inf)
    return _distillation.divergence_reference(mixed, log_q, kind, beta)


def _einsum(equation: str, *operands: Tensor) -> Tensor:
    """In the precision of the operands, also under autocast, as the kernels compute."""
    with torch.autocast(operands[0].device.type, enabled=False):
        return torch.einsum(equation, *operands)


def attention_of(
    attn: str | None, attn_scale: float | str, attn_temperature: float, task: str, classes: int
) -> tuple[str, float]:
    """The kind of score and its factor c; uniform attention is a factor of 0."""
    kind = attn or ("neg_sqdist" if task == "regression" else "dot")
    scale = classes**-0.5 if attn_scale == "rsqrt_c" else float(attn_scale)
    return kind, 0.0 if kind == "uniform" else scale / attn_temperature


def _factor(reduction: str, layer_reduction: str, student: Tensor) -> float:
    layers, batch, classes = student.shape
    factor = _distillation.reduction_factor(reduction, batch, classes)
    return factor / max(layers, 1) if layer_reduction == "mean" else factor


@jit
def features_of(
    logits,  # [K, C]
    SPACE: tl.constexpr,
):
    """What attention compares; a masked class adds nothing."""
    if SPACE == 0:
        features = kernels.finite_or_zero(logits)
    else:
        log_probs = kernels.log_softmax_rows(logits)
        features = kernels.finite_or_zero(log_probs) if SPACE == 1 else tl.exp(log_probs)
    return features


@jit
def features_gradient(
    logits,  # [K, C]
    features,  # [K, C]
    gradient,  # [K, C]
    SPACE: tl.constexpr,
):
    """The gradient of <features(logits), gradient> with respect to the logits."""
    if SPACE == 2:
        result = features * (gradient - tl.sum(features * gradient, 1)[:, None])
    else:
        unmasked = logits != float("-inf")
        result = tl.where(unmasked, gradient, 0.0)
        if SPACE == 1:
            total = tl.sum(result, 1)[:, None]
            result -= tl.where(unmasked, tl.exp(features), 0.0) * total
    return result


@jit
def attention(
    f,  # [N, C]
    s,  # [1, C]
    f_features,  # [N, C]
    s_features,  # [1, C]
    is_layer,  # [N]
    scale,
    DISTANCE: tl.constexpr,
):
    """log lambda [N, 1], lambda [N, 1], and what a score's gradient is multiplied with for f [N, C]."""
    if DISTANCE:
        masked = (f == float("-inf")) | (s == float("-inf"))
        slope = tl.where(masked, 0.0, f_features - s_features)
        scores = -scale * tl.sum(slope * slope, 1)
        slope = -2.0 * scale * slope
    else:
        slope = scale * s_features + tl.zeros_like(f_features)
        scores = scale * tl.sum(f_features * s_features, 1)
    scores = tl.where(is_layer, scores, float("-inf"))
    shifted = scores - tl.max(scores, 0)
    log_weights = (shifted - tl.log(tl.sum(tl.exp(shifted), 0)))[:, None]
    return log_weights, tl.exp(log_weights), slope


@jit
def universal_row(
    f,  # [N, C]
    s,  # [1, C]
    is_layer,  # [N]
    attn_scale,
    inverse_temperature,
    loss_scale,
    gradient_scale,
    beta,
    DIVERGENCE: tl.constexpr,
    MIX: tl.constexpr,
    SPACE: tl.constexpr,
    DISTANCE: tl.constexpr,
    ATTENTION_GRADIENT: tl.constexpr,
):
    """Loss [1, 1] and gradients [1, C] and [N, C] of one sample in one student layer."""
    f_features = features_of(f, SPACE)
    s_features = features_of(s, SPACE)
    log_weights, weights, slope = attention(f, s, f_features, s_features, is_layer, attn_scale, DISTANCE)
    log_q = kernels.log_distribution(s, inverse_temperature, DIVERGENCE)
    if MIX == 0:
        masked = tl.max(tl.where((f == float("-inf")) & is_layer[:, None], 1, 0), 0)[None, :] > 0
        mixed = tl.sum(weights * kernels.finite_or_zero(f), 0)[None, :]
        mixed = tl.where(masked, float("-inf"), mixed)
        log_p = kernels.log_distribution(mixed, inverse_temperature, DIVERGENCE)
        value, p_gradient, s_gradient, _ = kernels.divergence_rows(log_p, log_q, beta, DIVERGENCE)
        f_gradient = weights * p_gradient
        centred = tl.where(masked, 0.0, f - mixed)
        score_gradient = gradient_scale * tl.sum(centred * f_gradient, 1)[:, None]
    elif MIX == 1:
        log_p = kernels.log_softmax_rows(f * inverse_temperature)
        joint = log_weights + log_p
        top = kernels.finite_or_zero(tl.max(joint, 0))[None, :]
        log_mixed = top + tl.log(tl.sum(tl.exp(joint - top), 0))[None, :]
        value, p_gradient, s_gradient, p_terms = kernels.divergence_rows(log_mixed, log_q, beta, DIVERGENCE)
        # lambda_i p_i / p, at most 1, shares each class's slope out between the layers
        shared = tl.where(joint == float("-inf"), 0.0, tl.exp(joint - log_mixed) * p_terms)
        layer_sum = tl.sum(shared, 1)[:, None]
        f_gradient = shared - tl.exp(log_p) * layer_sum
        score_gradient = loss_scale * (layer_sum - weights * tl.sum(layer_sum, 0)[None, :])
    else:
        log_p = kernels.log_distribution(f, inverse_temperature, DIVERGENCE)
        values, p_gradient, q_gradient, _ = kernels.divergence_rows(log_p, log_q + tl.zeros_like(f), beta, DIVERGENCE)
        values = tl.where(is_layer[:, None], values, 0.0)
        value = tl.sum(weights * values, 0)[None, :]
        f_gradient = weights * p_gradient
        s_gradient = tl.sum(weights * q_gradient, 0)[None, :]
        score_gradient = loss_scale * weights * (values - value)
    f_gradient = gradient_scale * f_gradient
    s_gradient = gradient_scale * s_gradient
    if ATTENTION_GRADIENT:
        f_slope = score_gradient * slope
        if DISTANCE:
            s_slope = -tl.sum(f_slope, 0)[None, :]
        else:
            s_slope = attn_scale * tl.sum(score_gradient * f_features, 0)[None, :]
        f_gradient += features_gradient(f, f_features, f_slope, SPACE)
        s_gradient += features_gradient(s, s_features, s_slope, SPACE)
    return value * loss_scale, s_gradient, f_gradient


@jit
def load_layers(
    logits,  # [N, B, C], at the row of one sample
    N,
    C,
    layer_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[N, C]; -inf beyond C, and 0 in rows beyond N, which stay finite and get no weight."""
    layer = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_C)
    inside = (layer < N)[:, None] & (column < C)[None, :]
    offsets = layer[:, None].to(tl.int64) * layer_stride + column[None, :]
    values = tl.load(logits + offsets, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where((layer >= N)[:, None] & (column < C)[None, :], 0.0, values)


@jit
def _universal_rows_kernel(
    student,  # [M, B, C]
    teacher,  # [N, B, C]
    losses,  # [M, B]
    loss,  # [1]
    arrived,  # [1]
    student_gradient,  # [M, B, C]
    teacher_gradient,  # [N, B, C], or [M, N, B, C] where PER_LAYER
    M,
    N,
    B,
    C,
    student_layer_stride,
    student_stride,
    teacher_layer_stride,
    teacher_stride,
    attn_scale,
    inverse_temperature,
    loss_scale,
    gradient_scale,
    beta,
    factor,
    DIVERGENCE: tl.constexpr,
    MIX: tl.constexpr,
    SPACE: tl.constexpr,
    DISTANCE: tl.constexpr,
    ATTENTION_GRADIENT: tl.constexpr,
    REDUCE: tl.constexpr,
    STUDENT_GRADIENT: tl.constexpr,
    TEACHER_GRADIENT: tl.constexpr,
    PER_LAYER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # a teacher gradient summed over the student layers needs them all in one program
    LOOP: tl.constexpr = TEACHER_GRADIENT and not PER_LAYER
    program = tl.program_id(0).to(tl.int64)
    if LOOP:
        sample = program
        first_layer = 0
        last_layer = M
    else:
        sample = program // M
        first_layer = (program % M).to(tl.int32)
        last_layer = first_layer + 1
    is_layer = tl.arange(0, BLOCK_N) < N
    column = tl.arange(0, BLOCK_C)
    inside = (column < C)[None, :]
    f = load_layers(teacher + sample * teacher_stride, N, C, teacher_layer_stride, BLOCK_N, BLOCK_C)
    f_total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for layer in range(first_layer, last_layer):
        row = layer * student_layer_stride + sample * student_stride
        s = tl.load(student + row + column[None, :], mask=inside, other=float("-inf")).to(tl.float32)
        value, s_gradient, f_gradient = universal_row(
            f,
            s,
            is_layer,
            attn_scale,
            inverse_temperature,
            loss_scale,
            gradient_scale,
            beta,
            DIVERGENCE,
            MIX,
            SPACE,
            DISTANCE,
            ATTENTION_GRADIENT,
        )
        row = layer * B + sample
        tl.store(losses + row + tl.zeros([1, 1], tl.int32), value)
        if STUDENT_GRADIENT:
            tl.store(
                student_gradient + row * C + column[None, :],
                s_gradient.to(student_gradient.dtype.element_ty),
                mask=inside,
            )
        f_total += f_gradient
    if TEACHER_GRADIENT:
        layer = tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
        if PER_LAYER:
            layer += program % M * N
        tl.store(
            teacher_gradient + (layer * B + sample) * C + column[None, :],
            f_total.to(teacher_gradient.dtype.element_ty),
            mask=is_layer[:, None] & inside,
        )
    if REDUCE:
        kernels.sum_in_last_program(losses, loss, arrived, M * B, factor, 1024)


@jit
def load_tile(
    teacher,  # [N, B, C], at the row of one sample
    student,  # [M, B, C], at the row of one sample
    start,
    N,
    C,
    teacher_layer_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """f [N, C], s [1, C] and the class numbers [1, C] from `start` on."""
    f = load_layers(teacher + start, N, C - start, teacher_layer_stride, BLOCK_N, BLOCK_C)
    column = start + tl.arange(0, BLOCK_C)[None, :]
    s = tl.load(student + column, mask=column < C, other=float("-inf")).to(tl.float32)
    return f, s, column


@jit
def mixed_logits(
    f,  # [N, C]
    weights,  # [N, 1]
):
    """F [1, C]; rows of f without weight are finite."""
    masked = tl.min(f, 0)[None, :] == float("-inf")
    mixed = tl.sum(weights * kernels.finite_or_zero(f), 0)[None, :]
    return tl.where(masked, float("-inf"), mixed), masked


@jit
def _universal_stream_kernel(
    student,  # [M, B, C]
    teacher,  # [N, B, C]
    losses,  # [M, B]
    loss,  # [1]
    arrived,  # [1]
    student_gradient,  # [M, B, C]
    teacher_gradient,  # [M, N, B, C]
    M,
    N,
    B,
    C,
    student_layer_stride,
    student_stride,
    teacher_layer_stride,
    teacher_stride,
    attn_scale,
    inverse_temperature,
    loss_scale,
    gradient_scale,
    beta,
    factor,
    DIVERGENCE: tl.constexpr,
    DISTANCE: tl.constexpr,
    ATTENTION_GRADIENT: tl.constexpr,
    REDUCE: tl.constexpr,
    STUDENT_GRADIENT: tl.constexpr,
    TEACHER_GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # student layers of one sample are neighbours, so that they find its teacher layers in the L2 cache
    sample = tl.program_id(0).to(tl.int64) // M
    student_layer = tl.program_id(0).to(tl.int64) % M
    s_row = student + student_layer * student_layer_stride + sample * student_stride
    f_row = teacher + sample * teacher_stride
    is_layer = tl.arange(0, BLOCK_N) < N
    lanes = tl.zeros([1, BLOCK_C], tl.float32)

    scores = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    s_top = lanes + float("-inf")
    s_sum = lanes
    for start in range(0, C, BLOCK_C):
        f, s, column = load_tile(f_row, s_row, start, N, C, teacher_layer_stride, BLOCK_N, BLOCK_C)
        if DISTANCE:
            masked = (f == float("-inf")) | (s == float("-inf"))
            difference = tl.where(masked, 0.0, f - s)
            scores -= difference * difference
        else:
            scores += kernels.finite_or_zero(f) * kernels.finite_or_zero(s)
        s_top, s_sum = kernels.online_sum(s_top, s_sum, s * inverse_temperature)
    scores = tl.where(is_layer, attn_scale * tl.sum(scores, 1), float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 0))
    weights = (weights / tl.sum(weights, 0))[:, None]

    s_lse = 0.0
    f_lse = 0.0
    if DIVERGENCE != 3:
        s_lse = kernels.log_sum_exp(tl.reshape(s_top, [BLOCK_C]), tl.reshape(s_sum, [BLOCK_C]))
        top = lanes + float("-inf")
        total = lanes
        for start in range(0, C, BLOCK_C):
            f, s, column = load_tile(f_row, s_row, start, N, C, teacher_layer_stride, BLOCK_N, BLOCK_C)
            mixed, masked = mixed_logits(f, weights)
            top, total = kernels.online_sum(top, total, mixed * inverse_temperature)
        f_lse = kernels.log_sum_exp(tl.reshape(top, [BLOCK_C]), tl.reshape(total, [BLOCK_C]))

    p_total = lanes
    q_total = lanes
    for start in range(0, C, BLOCK_C):
        f, s, column = load_tile(f_row, s_row, start, N, C, teacher_layer_stride, BLOCK_N, BLOCK_C)
        mixed, masked = mixed_logits(f, weights)
        log_p = mixed * inverse_temperature - f_lse
        log_q = s * inverse_temperature - s_lse
        p, q, p_terms, q_terms = kernels.divergence_terms(log_p, log_q, beta, DIVERGENCE)
        p_total += p_terms
        q_total += q_terms
    p_sum = tl.sum(p_total)
    q_sum = tl.sum(q_total)
    tl.store(losses + student_layer * B + sample, (p_sum + q_sum) * loss_scale)

    score_gradient = tl.zeros([BLOCK_N, 1], tl.float32)
    if ATTENTION_GRADIENT:
        products = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for start in range(0, C, BLOCK_C):
            f, s, column = load_tile(f_row, s_row, start, N, C, teacher_layer_stride, BLOCK_N, BLOCK_C)
            mixed, masked = mixed_logits(f, weights)
            log_p = mixed * inverse_temperature - f_lse
            log_q = s * inverse_temperature - s_lse
            p, q, p_terms, q_terms = kernels.divergence_terms(log_p, log_q, beta, DIVERGENCE)
            p_gradient, q_gradient = kernels.divergence_gradients(p, q, p_terms, q_terms, p_sum, q_sum, DIVERGENCE)
            products += tl.where(masked, 0.0, f - mixed) * p_gradient
        score_gradient = gradient_scale * weights * tl.sum(products, 1)[:, None]

    if STUDENT_GRADIENT or TEACHER_GRADIENT:
        for start in range(0, C, BLOCK_C):
            f, s, column = load_tile(f_row, s_row, start, N, C, teacher_layer_stride, BLOCK_N, BLOCK_C)
            mixed, masked = mixed_logits(f, weights)
            log_p = mixed * inverse_temperature - f_lse
            log_q = s * inverse_temperature - s_lse
            p, q, p_terms, q_terms = kernels.divergence_terms(log_p, log_q, beta, DIVERGENCE)
            p_gradient, q_gradient = kernels.divergence_gradients(p, q, p_terms, q_terms, p_sum, q_sum, DIVERGENCE)
            s_gradient = gradient_scale * q_gradient
            f_gradient = gradient_scale * weights * p_gradient
            if ATTENTION_GRADIENT:
                f_masked = f == float("-inf")
                s_masked = s == float("-inf")
                if DISTANCE:
                    difference = tl.where(f_masked | s_masked, 0.0, f - s)
                    f_slope = -2.0 * attn_scale * score_gradient * difference
                    s_slope = -tl.sum(f_slope, 0)[None, :]
                else:
                    f_slope = attn_scale * score_gradient * kernels.finite_or_zero(s)
                    s_slope = attn_scale * tl.sum(score_gradient * kernels.finite_or_zero(f), 0)[None, :]
                f_gradient += tl.where(f_masked, 0.0, f_slope)
                s_gradient += tl.where(s_masked, 0.0, s_slope)
            if STUDENT_GRADIENT:
                tl.store(
                    student_gradient + (student_layer * B + sample) * C + column,
                    s_gradient.to(student_gradient.dtype.element_ty),
                    mask=column < C,
                )
            if TEACHER_GRADIENT:
                layer = student_layer * N + tl.arange(0, BLOCK_N)[:, None]
                tl.store(
                    teacher_gradient + (layer * B + sample) * C + column,
                    f_gradient.to(teacher_gradient.dtype.element_ty),
                    mask=is_layer[:, None] & (column < C),
                )
    if REDUCE:
        kernels.sum_in_last_program(losses, loss, arrived, M * B, factor, 1024)


_launch_rows = Launcher(_universal_rows_kernel)
_launch_stream = Launcher(_universal_stream_kernel)


MAX_LAYERS_IN_REGISTERS = 32
MAX_CLASSES_IN_REGISTERS = 128
MAX_STREAMED_LAYERS = 64


@dataclass(frozen=True)
class UniversalKDConfig:
    """Launch configuration of the Triton kernel.

    Attributes:
        block_n, block_c: the tile of teacher logits that a program holds.
        streamed: whether a row is wider than the tile.
    """

    block_n: int
    block_c: int
    streamed: bool
    num_warps: int

    @classmethod
    def choose(cls, teachers: int, classes: int) -> UniversalKDConfig:
        """16 logits a thread in registers, 32 where the tile's classes are streamed and fewer values stay alive."""
        block_n = next_power_of_2(teachers)
        if fits_registers(teachers, classes):
            block_c = next_power_of_2(classes)
            return cls(block_n, block_c, streamed=False, num_warps=min(8, max(1, block_n * block_c // 512)))
        block_c = max(32, min(1024, 4096 // block_n))
        return cls(block_n, block_c, streamed=True, num_warps=8 if block_n * block_c >= 4096 else 4)


def fits_registers(teachers: int, classes: int) -> bool:
    return teachers <= MAX_LAYERS_IN_REGISTERS and classes <= MAX_CLASSES_IN_REGISTERS


library.define(
    "universal_kd_loss_forward(Tensor student, Tensor teacher, float temperature, float loss_scale, float attn_scale, "
    "int divergence, float beta, int mix, int attn_space, bool distance, bool attention_grad, float factor, "
    "bool reduce, bool student_gradient, bool teacher_gradient, bool per_layer) -> (Tensor, Tensor, Tensor)"
)


def _allocate(
    student: Tensor, teacher: Tensor, reduce: bool, student_gradient: bool, teacher_gradient: bool, per_layer: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the loss and the two gradients; an unwanted gradient has no elements."""
    dtype = _distillation.accumulate_dtype(student, teacher)
    loss = student.new_empty(() if reduce else student.shape[:2], dtype=dtype)
    if teacher_gradient and per_layer:
        # they cancel when they are added up, so they keep the precision in which they were computed
        for_teacher = teacher.new_empty((student.shape[0], *teacher.shape), dtype=dtype)
    else:
        for_teacher = _distillation.gradient_like(teacher, teacher_gradient)
    return loss, _distillation.gradient_like(student, student_gradient), for_teacher


@torch.library.register_fake("fastkd_kernels::universal_kd_loss_forward", lib=library)
def _fake(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    loss_scale: float,
    attn_scale: float,
    divergence: int,
    beta: float,
    mix: int,
    attn_space: int,
    distance: bool,
    attention_grad: bool,
    factor: float,
    reduce: bool,
    student_gradient: bool,
    teacher_gradient: bool,
    per_layer: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(student, teacher, reduce, student_gradient, teacher_gradient, per_layer)


def _launch(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    loss_scale: float,
    attn_scale: float,
    divergence: int,
    beta: float,
    mix: int,
    attn_space: int,
    distance: bool,
    attention_grad: bool,
    factor: float,
    reduce: bool,
    student_gradient: bool,
    teacher_gradient: bool,
    per_layer: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton kernel, in one launch."""
    student, teacher = _distillation.dense_rows(student), _distillation.dense_rows(teacher)
    (layers, batch, classes), teachers = student.shape, teacher.shape[0]
    results = _allocate(student, teacher, reduce, student_gradient, teacher_gradient, per_layer)
    if layers * batch == 0:
        results[0].zero_()
        results[2].zero_()
        return results
    losses = student.new_empty((layers, batch), dtype=torch.float32) if reduce else results[0]
    config = UniversalKDConfig.choose(teachers, classes)
    arguments = (
        student,
        teacher,
        losses,
        results[0],
        kernels.arrival_counter(student),
        results[1],
        results[2],
        layers,
        teachers,
        batch,
        classes,
        student.stride(0),
        student.stride(1),
        teacher.stride(0),
        teacher.stride(1),
        attn_scale,
        1 / temperature,
        loss_scale,
        loss_scale / temperature,
        beta,
        factor,
    )
    flags: dict[str, Any] = {
        "DIVERGENCE": divergence,
        "DISTANCE": distance,
        "ATTENTION_GRADIENT": attention_grad and (student_gradient or teacher_gradient),
        "REDUCE": reduce,
        "STUDENT_GRADIENT": student_gradient,
        "TEACHER_GRADIENT": teacher_gradient,
        "BLOCK_N": config.block_n,
        "BLOCK_C": config.block_c,
        "num_warps": config.num_warps,
    }
    if config.streamed:
        _launch_stream((layers * batch,), *arguments, **flags)
    else:
        programs = batch if teacher_gradient and not per_layer else layers * batch
        _launch_rows((programs,), *arguments, **flags, MIX=mix, SPACE=attn_space, PER_LAYER=per_layer)
    return results


if _triton.available:
    library.impl("universal_kd_loss_forward", as_op(_launch), "CUDA")

_backend.register_backends(
    "universal_kd_loss",
    cuda=_triton.missing_reason,
    cpu=_extension.missing_kernel_reason("universal_kd_loss_forward", "CPU"),
    interpretable=True,
)

_forward = torch.ops.fastkd_kernels.universal_kd_loss_forward.default


def universal_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    layer_reduction: str = "sum",
    mix: str = "logits",
    attn_space: str = "logits",
    attn_scale: float | str = 1.0,
    direction: str = "forward",
    detach_attention: bool = False,
    task: str = "classification",
    *,
    attn: str | None = None,
    attn_temperature: float = 1.0,
    t2_scale: bool = True,
    detach_teacher: bool = True,
    beta: float | None = None,
) -> Tensor:
    """Universal-KD loss of M student layers against N teacher layers, in one launch on a GPU; backward is one more.

    Which layers take part is what is passed: the paper's intermediate-layer setting leaves the student's last layer
    out, its capacity-gap setting passes nothing else; the teacher's last classifier belongs in. The defaults are the
    paper's formulas where it gives them.

    Args:
        student_logits: [M, B, C] float32, bfloat16, float16 or float64, any strides; -inf masks a class.
        teacher_logits: [N, B, C], of any of these dtypes.
        temperature: tau of the divergence, above 0; the paper names none, hence 1.
        reduction: over samples: "batchmean" divides by B, "mean" by B * C, "sum" does not, "none" gives [M, B] whatever
            `layer_reduction` is. An empty batch has the loss 0.
        layer_reduction: over student layers, "sum" or "mean".
        mix: what attention weighs: "logits", "probs" or "loss" (the paper's table 6 compares the first and the last).
        attn_space: what scores compare: "logits", "log_probs" or "probs", at temperature 1.
        attn_scale: factor c of the scores, or "rsqrt_c" for 1 / sqrt(C). Unscaled scores saturate: with logits beyond
            3, nearly all weight is on one layer.
        direction, beta: as in `kd_loss`.
        detach_attention: take the attention weights as constants; by default the gradient flows through them.
        task: "regression", for scores (STS-B, C = 1), takes the squared error between F and s, and attention on
            -|f_i - s|^2; `direction` then changes nothing.
        attn: "dot", "neg_sqdist" or "uniform"; default "dot", for a regression "neg_sqdist".
        attn_temperature: the scores are divided by it.
        t2_scale: multiply with tau^2.
        detach_teacher: False gives the teacher's logits their gradient too; backward then adds up the student layers in
            two more launches where reduction="none" or the rows are streamed.

    Returns:
        A scalar, or [M, B] for reduction="none"; float32, or float64 if one of the inputs is.

    Raises:
        ValueError: wrong shapes, an unknown option, C = 1 in a classification, mix="probs" or a space other than
            "logits" in a regression, or a teacher that requires grad while detach_teacher is True.
        TypeError: logits that are not floating-point.

    On a GPU float64 is computed by the reference, and so are calls wider than the module's docstring allows; anywhere
    forward-mode AD and the transforms of `torch.func` are. Gradients of gradients are not available from the kernels
    and raise; `backend("reference")` has them.
    """
    check_options(
        student_logits,
        teacher_logits,
        temperature,
        reduction,
        layer_reduction,
        direction,
        task,
        mix=mix,
        attn_space=attn_space,
        attn_scale=attn_scale,
        detach_attention=detach_attention,
        attn=attn,
        attn_temperature=attn_temperature,
        beta=beta,
    )
    _distillation.check_teacher_gradient("teacher_logits", teacher_logits, detach_teacher)
    name = _resolve(student_logits, teacher_logits, mix, attn_space)
    if name == "reference":
        return universal_kd_loss_reference(
            student_logits,
            teacher_logits,
            temperature,
            reduction,
            layer_reduction,
            mix,
            attn_space,
            attn_scale,
            direction,
            detach_attention,
            task,
            attn=attn,
            attn_temperature=attn_temperature,
            t2_scale=t2_scale,
            beta=beta,
        )
    layers, _, classes = student_logits.shape
    attn, scale = attention_of(attn, attn_scale, attn_temperature, task, classes)
    factor = 1.0 if reduction == "none" else _factor(reduction, layer_reduction, student_logits)
    gradients = torch.is_grad_enabled()
    streamed = name == "cuda" and not fits_registers(teacher_logits.shape[0], classes)
    options = (
        temperature,
        _distillation.loss_scale(temperature, t2_scale),
        scale,
        *_distillation.divergence_code(direction, task, beta),
        _distillation.MIXES.index(mix),
        _distillation.ATTENTION_SPACES.index(attn_space),
        attn == "neg_sqdist",
        not detach_attention and scale != 0,
        factor,
        reduction != "none",
        gradients and student_logits.requires_grad,
        gradients and teacher_logits.requires_grad,
        layers != 1 and (reduction == "none" or streamed),
    )
    return _distillation.fused_loss(name, _forward, _launch, factor, options, (student_logits, teacher_logits))


def _resolve(student: Tensor, teacher: Tensor, mix: str, attn_space: str) -> str:
    name = _backend.resolve("universal_kd_loss", student.device)
    if name != "cuda":
        return name
    reason = _unsupported(student, teacher, mix, attn_space)
    return name if reason is None else _backend.fall_back("universal_kd_loss", name, reason)


def _unsupported(student: Tensor, teacher: Tensor, mix: str, attn_space: str) -> str | None:
    """None where the Triton kernels take this call, else the sentence that says why not."""
    if torch.float64 in (student.dtype, teacher.dtype):
        return "its kernel computes in float32 and has no float64"
    teachers, classes = teacher.shape[0], teacher.shape[2]
    if fits_registers(teachers, classes):
        return None
    if teachers > MAX_STREAMED_LAYERS:
        return f"its kernel takes up to {MAX_STREAMED_LAYERS} teacher layers, and these are {teachers}"
    if mix != "logits" or attn_space != "logits":
        return (
            f"beyond {MAX_LAYERS_IN_REGISTERS} teacher layers or {MAX_CLASSES_IN_REGISTERS} classes its kernel mixes "
            f'and compares logits only (mix="logits", attn_space="logits"), and these are mix="{mix}", '
            f'attn_space="{attn_space}"'
        )
    return None


def check_options(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    reduction: str,
    layer_reduction: str,
    direction: str,
    task: str,
    *,
    mix: str,
    attn_space: str,
    attn_scale: float | str,
    detach_attention: bool,
    attn: str | None,
    attn_temperature: float,
    beta: float | None,
) -> None:
    """The checks of `universal_kd_loss`; every value of `detach_attention` is right."""
    _distillation.check_logits("student_logits", student, "[M, B, C]")
    _distillation.check_logits("teacher_logits", teacher, "[N, B, C]")
    if student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            f"teacher_logits: got shape {tuple(teacher.shape)}, expected [N, {student.shape[1]}, {student.shape[2]}] "
            f"for student_logits of shape {tuple(student.shape)}"
        )
    if teacher.shape[0] == 0:
        raise ValueError("teacher_logits: got N=0 teacher layers, expected at least 1")
    check_same_device("teacher_logits", teacher, "student_logits", student)
    _distillation.check_positive("temperature", temperature)
    check_choice("reduction", reduction, _distillation.REDUCTIONS)
    check_choice("layer_reduction", layer_reduction, _distillation.LAYER_REDUCTIONS)
    check_choice("mix", mix, _distillation.MIXES)
    check_choice("attn_space", attn_space, _distillation.ATTENTION_SPACES)
    check_choice("direction", direction, _distillation.DIRECTIONS)
    _distillation.check_beta(beta, direction)
    check_choice("task", task, _distillation.TASKS)
    _distillation.check_classes("student_logits", student, task)
    if task == "regression" and mix == "probs":
        raise ValueError('mix: got "probs", but a regression has scores, not probabilities; use "logits" or "loss"')
    if task == "regression" and attn_space != "logits":
        raise ValueError(f'attn_space: got "{attn_space}", a regression has scores only; use "logits"')
    if attn is not None:
        check_choice("attn", attn, ATTENTIONS)
    if attn_scale != "rsqrt_c" and (isinstance(attn_scale, str) or not math.isfinite(attn_scale)):
        raise ValueError(f'attn_scale: got {attn_scale!r}, expected a finite number or "rsqrt_c"')
    _distillation.check_positive("attn_temperature", attn_temperature)
