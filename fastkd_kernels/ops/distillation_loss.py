"""The whole loss of a Universal-KD training step in one launch: labels, last layer, inner layers.

    L = a CE(y, s) + b KD(t, s) + c Univ(f_1..N, s_1..M)                                (Wu et al., EMNLP 2021)

with the logits of the last layers s and t [B, C], KD as in `kd_loss` and Univ as in `universal_kd_loss`. (The paper
calls the weights alpha, beta and gamma; here `beta` is the interpolation of the Jensen-Shannon divergence.) For a
regression the first two are squared errors too. The forward pass also computes the gradients for s and for s_1..M; the
backward pass scales them.

N <= 32 and C <= 128: one program a sample and student layer, and one a sample for labels and last layer. Anything
wider on a GPU, and a teacher that wants a gradient, is the sum of the three separate ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd_kernels import _backend, _distillation, _extension, _triton
from fastkd_kernels import _distillation_triton as kernels
from fastkd_kernels._arguments import dense, values_are_free
from fastkd_kernels._launch import Launcher, as_op
from fastkd_kernels._library import library
from fastkd_kernels._triton import jit, tl
from fastkd_kernels.checks import check_same_device
from fastkd_kernels.ops import universal_kd_loss as universal
from fastkd_kernels.ops.kd_loss import kd_loss, kd_loss_reference
from fastkd_kernels.ops.universal_kd_loss import (
    load_layers,
    universal_kd_loss,
    universal_kd_loss_reference,
    universal_row,
)


def distillation_loss_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    student_layer_logits: Tensor,
    teacher_layer_logits: Tensor,
    label_weight: float,
    kd_weight: float,
    intermediate_weight: float,
    *,
    temperature: float = 1.0,
    universal_temperature: float = 1.0,
    reduction: str = "batchmean",
    layer_reduction: str = "sum",
    t2_scale: bool = True,
    direction: str = "forward",
    task: str = "classification",
    beta: float | None = None,
    **universal_options: Any,
) -> Tensor:
    """`distillation_loss` in plain PyTorch: the oracle of the tests and the fallback."""
    kd = kd_loss_reference(student_logits, teacher_logits, temperature, reduction, t2_scale, direction, task, beta=beta)
    univ = universal_kd_loss_reference(
        student_layer_logits,
        teacher_layer_logits,
        universal_temperature,
        reduction,
        layer_reduction,
        direction=direction,
        task=task,
        t2_scale=t2_scale,
        beta=beta,
        **universal_options,
    )
    weights = (label_weight, kd_weight, intermediate_weight)
    return _weighted_sum(student_logits, labels, kd, univ, weights, reduction, layer_reduction, task)


def _weighted_sum(
    student: Tensor,
    labels: Tensor | None,
    kd: Tensor,
    univ: Tensor,
    weights: tuple[float, float, float],
    reduction: str,
    layer_reduction: str,
    task: str,
) -> Tensor:
    label_weight, kd_weight, intermediate_weight = weights
    if reduction == "none":
        univ = univ.sum(0) / (max(univ.shape[0], 1) if layer_reduction == "mean" else 1)
    total = kd_weight * kd + intermediate_weight * univ
    if labels is None:
        return total
    return total + label_weight * _label_loss_reference(student, labels, reduction, task)


def _label_loss_reference(student: Tensor, labels: Tensor, reduction: str, task: str) -> Tensor:
    (logits,) = _distillation.widen(student)
    batch, classes = logits.shape
    if task == "regression":
        rows = (logits - labels.reshape(batch, classes)).square().sum(-1)
        factor = _distillation.reduction_factor(reduction, batch, classes)
    else:
        rows = F.cross_entropy(logits, labels, reduction="none")
        # a mean cross entropy is one over samples, whatever the number of classes
        factor = _distillation.reduction_factor(reduction, batch, 1)
    return rows if reduction == "none" else rows.sum() * factor


@jit
def label_row(
    s,  # [1, C]
    labels,  # [B] int64, or [B, C] of a regression
    sample,
    column,  # [1, C]
    C,
    REGRESSION: tl.constexpr,
):
    """Cross entropy or squared error [1, 1], and its gradient [1, C]."""
    if REGRESSION:
        y = tl.load(labels + sample * C + column, mask=column < C, other=float("-inf")).to(tl.float32)
        difference = tl.where(s == y, 0.0, s - y)
        value = tl.sum(difference * difference, 1)[:, None]
        gradient = 2.0 * difference
    else:
        label = tl.load(labels + sample)
        log_q = kernels.log_softmax_rows(s)
        hit = column == label
        value = -tl.sum(tl.where(hit, log_q, 0.0), 1)[:, None]
        # a label that no class has must not pass for a loss of 0
        value = tl.where((label >= 0) & (label < C), value, float("nan"))
        gradient = tl.exp(log_q) - tl.where(hit, 1.0, 0.0)
    return value, gradient


@jit
def _distillation_kernel(
    student,  # [B, C]
    student_layers,  # [M, B, C]
    teacher,  # [B, C]
    teacher_layers,  # [N, B, C]
    labels,  # [B] int64, or [B, C] of a regression
    losses,  # [M + 1, B]
    loss,  # [1]
    arrived,  # [1]
    student_gradient,  # [B, C]
    layers_gradient,  # [M, B, C]
    M,
    N,
    B,
    C,
    student_stride,
    student_layer_stride,
    student_layers_stride,
    teacher_stride,
    teacher_layer_stride,
    teacher_layers_stride,
    ce_scale,
    kd_scale,
    kd_gradient_scale,
    universal_scale,
    universal_gradient_scale,
    attn_scale,
    inverse_temperature,
    inverse_universal_temperature,
    beta,
    factor,
    DIVERGENCE: tl.constexpr,
    MIX: tl.constexpr,
    SPACE: tl.constexpr,
    DISTANCE: tl.constexpr,
    ATTENTION_GRADIENT: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    REDUCE: tl.constexpr,
    STUDENT_GRADIENT: tl.constexpr,
    LAYERS_GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // (M + 1)
    layer = program % (M + 1)
    column = tl.arange(0, BLOCK_C)[None, :]
    inside = column < C
    row = layer * B + sample
    if layer == M:
        s = tl.load(student + sample * student_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher + sample * teacher_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
        log_p = kernels.log_distribution(t, inverse_temperature, DIVERGENCE)
        log_q = kernels.log_distribution(s, inverse_temperature, DIVERGENCE)
        # no name may have another shape in the other branch
        value, _t_gradient, gradient, _t_terms = kernels.divergence_rows(log_p, log_q, beta, DIVERGENCE)
        value = value * kd_scale
        gradient = gradient * kd_gradient_scale
        if HAS_LABELS:
            label_value, label_gradient = label_row(s, labels, sample, column, C, DIVERGENCE == 3)
            value += ce_scale * label_value
            gradient += ce_scale * label_gradient
        tl.store(losses + row + tl.zeros([1, 1], tl.int32), value)
        if STUDENT_GRADIENT:
            tl.store(
                student_gradient + sample * C + column, gradient.to(student_gradient.dtype.element_ty), mask=inside
            )
    else:
        offset = layer * student_layer_stride + sample * student_layers_stride
        s = tl.load(student_layers + offset + column, mask=inside, other=float("-inf")).to(tl.float32)
        f = load_layers(teacher_layers + sample * teacher_layers_stride, N, C, teacher_layer_stride, BLOCK_N, BLOCK_C)
        value, gradient, _f_gradient = universal_row(
            f,
            s,
            tl.arange(0, BLOCK_N) < N,
            attn_scale,
            inverse_universal_temperature,
            universal_scale,
            universal_gradient_scale,
            beta,
            DIVERGENCE,
            MIX,
            SPACE,
            DISTANCE,
            ATTENTION_GRADIENT,
        )
        tl.store(losses + row + tl.zeros([1, 1], tl.int32), value)
        if LAYERS_GRADIENT:
            tl.store(layers_gradient + row * C + column, gradient.to(layers_gradient.dtype.element_ty), mask=inside)
    if REDUCE:
        kernels.sum_in_last_program(losses, loss, arrived, (M + 1) * B, factor, 1024)


_launch_distillation = Launcher(_distillation_kernel)


library.define(
    "distillation_loss_forward(Tensor student, Tensor student_layers, Tensor teacher, Tensor teacher_layers, "
    "Tensor? labels, float ce_scale, float kd_scale, float universal_scale, float temperature, "
    "float universal_temperature, float attn_scale, int divergence, float beta, int mix, int attn_space, "
    "bool distance, bool attention_grad, float factor, bool reduce, bool student_gradient, bool layers_gradient) "
    "-> (Tensor, Tensor, Tensor)"
)


def _allocate(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], reduce: bool, student_gradient: bool, layers_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the loss and the two gradients; an unwanted gradient has no elements."""
    student, student_layers, _, _ = tensors
    loss = student.new_empty(() if reduce else student.shape[:1], dtype=_distillation.accumulate_dtype(*tensors))
    for_student = _distillation.gradient_like(student, student_gradient)
    return loss, for_student, _distillation.gradient_like(student_layers, layers_gradient)


@torch.library.register_fake("fastkd_kernels::distillation_loss_forward", lib=library)
def _fake(
    student: Tensor,
    student_layers: Tensor,
    teacher: Tensor,
    teacher_layers: Tensor,
    labels: Tensor | None,
    ce_scale: float,
    kd_scale: float,
    universal_scale: float,
    temperature: float,
    universal_temperature: float,
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
    layers_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (student, student_layers, teacher, teacher_layers)
    return _allocate(tensors, reduce, student_gradient, layers_gradient)


MOST_REGISTERS = 160
"""A thread; unasked, the assembler of CUDA 12.8 spills two values so that two programs fit a multiprocessor."""


def _launch(
    student: Tensor,
    student_layers: Tensor,
    teacher: Tensor,
    teacher_layers: Tensor,
    labels: Tensor | None,
    ce_scale: float,
    kd_scale: float,
    universal_scale: float,
    temperature: float,
    universal_temperature: float,
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
    layers_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton kernel: one launch, and one more to add up the rows where they are not reduced."""
    tensors = tuple(map(_distillation.dense_rows, (student, student_layers, teacher, teacher_layers)))
    student, student_layers, teacher, teacher_layers = tensors
    (layers, batch, classes), teachers = student_layers.shape, teacher_layers.shape[0]
    loss, for_student, for_layers = _allocate(
        (student, student_layers, teacher, teacher_layers), reduce, student_gradient, layers_gradient
    )
    if batch == 0:
        return loss.zero_(), for_student, for_layers
    losses = student.new_empty((layers + 1, batch), dtype=torch.float32)
    config = universal.UniversalKDConfig.choose(teachers, classes)
    _launch_distillation(
        ((layers + 1) * batch,),
        student,
        student_layers,
        teacher,
        teacher_layers,
        student if labels is None else labels,
        losses,
        loss,
        kernels.arrival_counter(student),
        for_student,
        for_layers,
        layers,
        teachers,
        batch,
        classes,
        student.stride(0),
        student_layers.stride(0),
        student_layers.stride(1),
        teacher.stride(0),
        teacher_layers.stride(0),
        teacher_layers.stride(1),
        ce_scale,
        kd_scale,
        kd_scale / temperature,
        universal_scale,
        universal_scale / universal_temperature,
        attn_scale,
        1 / temperature,
        1 / universal_temperature,
        beta,
        factor,
        DIVERGENCE=divergence,
        MIX=mix,
        SPACE=attn_space,
        DISTANCE=distance,
        ATTENTION_GRADIENT=attention_grad and layers_gradient,
        HAS_LABELS=labels is not None,
        REDUCE=reduce,
        STUDENT_GRADIENT=student_gradient,
        LAYERS_GRADIENT=layers_gradient,
        BLOCK_N=config.block_n,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
        maxnreg=MOST_REGISTERS,
    )
    return loss if reduce else losses.sum(0), for_student, for_layers


if _triton.available:
    library.impl("distillation_loss_forward", as_op(_launch), "CUDA")

_backend.register_backends(
    "distillation_loss",
    cuda=_triton.missing_reason,
    cpu=_extension.missing_kernel_reason("distillation_loss_forward", "CPU"),
    interpretable=True,
)

_forward = torch.ops.fastkd_kernels.distillation_loss_forward.default


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None,
    student_layer_logits: Tensor,
    teacher_layer_logits: Tensor,
    label_weight: float,
    kd_weight: float,
    intermediate_weight: float,
    *,
    temperature: float = 1.0,
    universal_temperature: float = 1.0,
    reduction: str = "batchmean",
    layer_reduction: str = "sum",
    t2_scale: bool = True,
    direction: str = "forward",
    task: str = "classification",
    mix: str = "logits",
    attn_space: str = "logits",
    attn_scale: float | str = 1.0,
    detach_attention: bool = False,
    attn: str | None = None,
    attn_temperature: float = 1.0,
    detach_teacher: bool = True,
    beta: float | None = None,
) -> Tensor:
    """a CE + b KD + c Univ, in one launch on a GPU; backward is one more.

    Args:
        student_logits, teacher_logits: [B, C], of the last layers.
        labels: [B] int64 classes, for a regression [B] or [B, C] scores; None leaves the first term out. On a GPU a
            label outside 0..C-1 makes the loss NaN.
        student_layer_logits: [M, B, C], of the inner layers; M may be 0.
        teacher_layer_logits: [N, B, C].
        label_weight, kd_weight, intermediate_weight: a, b and c; alpha, beta and gamma in the paper.
        temperature: tau of the second term.
        universal_temperature: tau of the third.
        reduction: over samples, as in `kd_loss`; the cross entropy of "mean" divides by B only. "none" gives [B].
        task: "regression" takes squared errors in all three terms.
        t2_scale, direction, beta: of the second and third term, as in `kd_loss`.
        layer_reduction, mix, attn_space, attn_scale, detach_attention, attn, attn_temperature: as in
            `universal_kd_loss`.
        detach_teacher: False gives both teacher tensors their gradient too.

    Returns:
        A scalar, or [B] for reduction="none"; float32, or float64 if one of the logits is.

    Raises:
        ValueError: as `kd_loss` and `universal_kd_loss`, and on CPU for a label outside 0..C-1.
        TypeError: logits that are not floating-point, labels of a wrong dtype.
    """
    logits = (student_logits, student_layer_logits, teacher_logits, teacher_layer_logits)
    universal_options: dict[str, Any] = {
        "mix": mix,
        "attn_space": attn_space,
        "attn_scale": attn_scale,
        "detach_attention": detach_attention,
        "attn": attn,
        "attn_temperature": attn_temperature,
    }
    universal.check_options(
        student_layer_logits,
        teacher_layer_logits,
        universal_temperature,
        reduction,
        layer_reduction,
        direction,
        task,
        beta=beta,
        **universal_options,
    )
    _check(student_logits, teacher_logits, labels, student_layer_logits, temperature, task)
    _distillation.check_teacher_gradient("teacher_logits", teacher_logits, detach_teacher)
    _distillation.check_teacher_gradient("teacher_layer_logits", teacher_layer_logits, detach_teacher)
    name = _backend.resolve("distillation_loss", student_logits.device)
    if name == "reference":
        return distillation_loss_reference(
            student_logits,
            teacher_logits,
            labels,
            student_layer_logits,
            teacher_layer_logits,
            label_weight,
            kd_weight,
            intermediate_weight,
            temperature=temperature,
            universal_temperature=universal_temperature,
            reduction=reduction,
            layer_reduction=layer_reduction,
            t2_scale=t2_scale,
            direction=direction,
            task=task,
            beta=beta,
            **universal_options,
        )
    gradients = torch.is_grad_enabled()
    if _needs_separate_ops(name, logits, gradients):
        kd = kd_loss(
            student_logits,
            teacher_logits,
            temperature,
            reduction,
            t2_scale,
            direction,
            task=task,
            detach_teacher=detach_teacher,
            beta=beta,
        )
        univ = universal_kd_loss(
            student_layer_logits,
            teacher_layer_logits,
            universal_temperature,
            reduction,
            layer_reduction,
            direction=direction,
            task=task,
            t2_scale=t2_scale,
            detach_teacher=detach_teacher,
            beta=beta,
            **universal_options,
        )
        weights = (label_weight, kd_weight, intermediate_weight)
        return _weighted_sum(student_logits, labels, kd, univ, weights, reduction, layer_reduction, task)

    layers, batch, classes = student_layer_logits.shape
    per_class = 1 / classes if reduction == "mean" else 1.0
    per_layer = 1 / max(layers, 1) if layer_reduction == "mean" else 1.0
    attention, scale = universal.attention_of(attn, attn_scale, attn_temperature, task, classes)
    factor = 1 / max(batch, 1) if reduction in ("batchmean", "mean") else 1.0
    if labels is not None:
        labels = dense(labels.reshape(batch, classes) if task == "regression" else labels)
    options = (
        label_weight * (per_class if task == "regression" else 1.0),
        kd_weight * per_class * _distillation.loss_scale(temperature, t2_scale),
        intermediate_weight * per_class * per_layer * _distillation.loss_scale(universal_temperature, t2_scale),
        temperature,
        universal_temperature,
        scale,
        *_distillation.divergence_code(direction, task, beta),
        _distillation.MIXES.index(mix),
        _distillation.ATTENTION_SPACES.index(attn_space),
        attention == "neg_sqdist",
        not detach_attention and scale != 0,
        factor,
        reduction != "none",
        gradients and student_logits.requires_grad,
        gradients and student_layer_logits.requires_grad,
    )
    return _distillation.fused_loss(name, _forward, _launch, factor, options, (*logits, labels))


def _needs_separate_ops(name: str, logits: tuple[Tensor, Tensor, Tensor, Tensor], gradients: bool) -> bool:
    _, _, teacher, teacher_layers = logits
    if gradients and (teacher.requires_grad or teacher_layers.requires_grad):
        return True
    wide = not universal.fits_registers(teacher_layers.shape[0], teacher_layers.shape[2])
    return name == "cuda" and (wide or any(tensor.dtype == torch.float64 for tensor in logits))


def _check(
    student: Tensor, teacher: Tensor, labels: Tensor | None, layers: Tensor, temperature: float, task: str
) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        _distillation.check_logits(name, logits, "[B, C]")
        if logits.shape != layers.shape[1:]:
            raise ValueError(
                f"{name}: got shape {tuple(logits.shape)}, expected {list(layers.shape[1:])} for student_layer_logits "
                f"of shape {tuple(layers.shape)}"
            )
        check_same_device(name, logits, "student_layer_logits", layers)
    _distillation.check_positive("temperature", temperature)
    if labels is not None:
        _check_labels(labels, student, task)


def _check_labels(labels: Tensor, student: Tensor, task: str) -> None:
    check_same_device("labels", labels, "student_logits", student)
    batch, classes = student.shape
    if task == "regression":
        if not labels.is_floating_point():
            raise TypeError(f"labels: got dtype {labels.dtype}, a regression expects floating-point scores")
        if labels.numel() != batch * classes or labels.shape[:1] != (batch,):
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected [{batch}, {classes}]")
        return
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got dtype {labels.dtype}, expected torch.int64")
    if labels.shape != (batch,):
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected [{batch}]")
    if values_are_free(labels) and batch:
        lowest, highest = (int(value) for value in labels.aminmax())
        if lowest < 0 or highest >= classes:
            raise ValueError(f"labels: got values from {lowest} to {highest}, expected 0 to {classes - 1}")
