"""Knowledge distillation on logits: both log-softmaxes, the temperature, the loss and its gradients in one launch.

For student logits s and teacher logits t, both [..., C] (Hinton, Vinyals and Dean, 2015), row by row:

    l = tau^2 D(softmax(t / tau), softmax(s / tau)),        D = KL(teacher || student) by default

with the divergences and gradients of `fastkd_kernels._distillation`; tau^2 is left out by `t2_scale=False`. The forward
pass also computes dl/ds (and dl/dt where it is wanted); the backward pass multiplies it with `grad_output`.

Rows of up to 1024 classes stay in registers. Wider rows are streamed: one pass for both log-sum-exps, one for the loss
and the gradient, and one more where the gradient needs the finished loss (reverse, jsd, or a teacher's gradient).
Nothing but the logits' own dtype is ever written in their size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd_kernels import _backend, _distillation, _extension, _triton
from fastkd_kernels import _distillation_triton as kernels
from fastkd_kernels._launch import Launcher, as_op, next_power_of_2
from fastkd_kernels._library import library
from fastkd_kernels._triton import jit, tl, triton
from fastkd_kernels.checks import check_choice, check_same_device


def kd_loss_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    t2_scale: bool = True,
    direction: str = "forward",
    task: str = "classification",
    *,
    beta: float | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """`kd_loss` in plain PyTorch, differentiable in both logits: the oracle of the tests and the fallback."""
    student, teacher, keep = _flat(student_logits, teacher_logits, labels, ignore_index)
    student, teacher = _distillation.widen(_distillation.kept(student, keep), _distillation.kept(teacher, keep))
    divergence, share = _distillation.divergence_code(direction, task, beta)
    log_q = _distillation.log_distribution(student, temperature, divergence)
    log_p = _distillation.log_distribution(teacher, temperature, divergence)
    rows = _distillation.divergence_reference(log_p, log_q, divergence, share)
    rows = rows * _distillation.loss_scale(temperature, t2_scale)
    if keep is not None:
        rows = rows.masked_fill(~keep, 0)
    if reduction == "none":
        return rows.reshape(student_logits.shape[:-1])
    return rows.sum() * _distillation.reduction_scale(reduction, student, student.shape[-1], keep, num_items_in_batch)


def _flat(
    student: Tensor, teacher: Tensor, labels: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits [B, C], and which of these rows count."""
    keep = None if labels is None else labels.reshape(-1) != ignore_index
    return student.flatten(0, -2), teacher.flatten(0, -2), keep


@jit
def _kd_rows_kernel(
    student,  # [B, C]
    teacher,  # [B, C]
    losses,  # [B]
    loss,  # [1]
    arrived,  # [1]
    student_gradient,  # [B, C]
    teacher_gradient,  # [B, C]
    B,
    C,
    student_stride,
    teacher_stride,
    inverse_temperature,
    loss_scale,
    gradient_scale,
    beta,
    factor,
    DIVERGENCE: tl.constexpr,
    REDUCE: tl.constexpr,
    STUDENT_GRADIENT: tl.constexpr,
    TEACHER_GRADIENT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tl.arange(0, BLOCK_C)
    inside = (row < B)[:, None] & (column < C)[None, :]
    offsets = row[:, None] * student_stride + column[None, :]
    s = tl.load(student + offsets, mask=inside, other=float("-inf")).to(tl.float32)
    offsets = row[:, None] * teacher_stride + column[None, :]
    t = tl.load(teacher + offsets, mask=inside, other=float("-inf")).to(tl.float32)

    log_p = kernels.log_distribution(t, inverse_temperature, DIVERGENCE)
    log_q = kernels.log_distribution(s, inverse_temperature, DIVERGENCE)
    value, p_gradient, q_gradient, _ = kernels.divergence_rows(log_p, log_q, beta, DIVERGENCE)
    tl.store(losses + row[:, None], value * loss_scale, mask=(row < B)[:, None])

    offsets = row[:, None] * C + column[None, :]
    if STUDENT_GRADIENT:
        gradient = (q_gradient * gradient_scale).to(student_gradient.dtype.element_ty)
        tl.store(student_gradient + offsets, gradient, mask=inside)
    if TEACHER_GRADIENT:
        gradient = (p_gradient * gradient_scale).to(teacher_gradient.dtype.element_ty)
        tl.store(teacher_gradient + offsets, gradient, mask=inside)
    if REDUCE:
        kernels.sum_in_last_program(losses, loss, arrived, B, factor, 1024)


@jit
def _kd_stream_kernel(
    student,  # [B, C]
    teacher,  # [B, C]
    losses,  # [B]
    loss,  # [1]
    arrived,  # [1]
    student_gradient,  # [B, C]
    teacher_gradient,  # [B, C]
    B,
    C,
    student_stride,
    teacher_stride,
    inverse_temperature,
    loss_scale,
    gradient_scale,
    beta,
    factor,
    DIVERGENCE: tl.constexpr,
    REDUCE: tl.constexpr,
    STUDENT_GRADIENT: tl.constexpr,
    TEACHER_GRADIENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_row = student + row * student_stride
    t_row = teacher + row * teacher_stride
    lanes = tl.arange(0, BLOCK_C)

    s_lse = 0.0
    t_lse = 0.0
    if DIVERGENCE != 3:
        s_top = tl.full([BLOCK_C], float("-inf"), tl.float32)
        t_top = tl.full([BLOCK_C], float("-inf"), tl.float32)
        s_sum = tl.zeros([BLOCK_C], tl.float32)
        t_sum = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, C, BLOCK_C):
            column = start + lanes
            s = tl.load(s_row + column, mask=column < C, other=float("-inf")).to(tl.float32)
            t = tl.load(t_row + column, mask=column < C, other=float("-inf")).to(tl.float32)
            s_top, s_sum = kernels.online_sum(s_top, s_sum, s * inverse_temperature)
            t_top, t_sum = kernels.online_sum(t_top, t_sum, t * inverse_temperature)
        s_lse = kernels.log_sum_exp(s_top, s_sum)
        t_lse = kernels.log_sum_exp(t_top, t_sum)

    # the forward divergence's gradient to the student and a squared error need no sum over the classes
    LATE: tl.constexpr = (DIVERGENCE == 1 or DIVERGENCE == 2) or (TEACHER_GRADIENT and DIVERGENCE == 0)
    p_sums = tl.zeros([BLOCK_C], tl.float32)
    q_sums = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        column = start + lanes
        inside = column < C
        s = tl.load(s_row + column, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + column, mask=inside, other=float("-inf")).to(tl.float32)
        log_q = s * inverse_temperature - s_lse
        log_p = t * inverse_temperature - t_lse
        p, q, p_terms, q_terms = kernels.divergence_terms(log_p, log_q, beta, DIVERGENCE)
        p_sums += p_terms
        q_sums += q_terms
        if not LATE:
            p_gradient, q_gradient = kernels.divergence_gradients(p, q, p_terms, q_terms, 0.0, 0.0, DIVERGENCE)
            if STUDENT_GRADIENT:
                gradient = (q_gradient * gradient_scale).to(student_gradient.dtype.element_ty)
                tl.store(student_gradient + row * C + column, gradient, mask=inside)
            if TEACHER_GRADIENT:
                gradient = (p_gradient * gradient_scale).to(teacher_gradient.dtype.element_ty)
                tl.store(teacher_gradient + row * C + column, gradient, mask=inside)
    p_total = tl.sum(p_sums, 0)
    q_total = tl.sum(q_sums, 0)
    tl.store(losses + row, (p_total + q_total) * loss_scale)

    if LATE and (STUDENT_GRADIENT or TEACHER_GRADIENT):
        for start in range(0, C, BLOCK_C):
            column = start + lanes
            inside = column < C
            s = tl.load(s_row + column, mask=inside, other=float("-inf")).to(tl.float32)
            t = tl.load(t_row + column, mask=inside, other=float("-inf")).to(tl.float32)
            log_q = s * inverse_temperature - s_lse
            log_p = t * inverse_temperature - t_lse
            p, q, p_terms, q_terms = kernels.divergence_terms(log_p, log_q, beta, DIVERGENCE)
            p_gradient, q_gradient = kernels.divergence_gradients(p, q, p_terms, q_terms, p_total, q_total, DIVERGENCE)
            if STUDENT_GRADIENT:
                gradient = (q_gradient * gradient_scale).to(student_gradient.dtype.element_ty)
                tl.store(student_gradient + row * C + column, gradient, mask=inside)
            if TEACHER_GRADIENT:
                gradient = (p_gradient * gradient_scale).to(teacher_gradient.dtype.element_ty)
                tl.store(teacher_gradient + row * C + column, gradient, mask=inside)
    if REDUCE:
        kernels.sum_in_last_program(losses, loss, arrived, B, factor, 1024)


_launch_rows = Launcher(_kd_rows_kernel)
_launch_stream = Launcher(_kd_stream_kernel)


MAX_CLASSES_IN_REGISTERS = 1024


@dataclass(frozen=True)
class KDLossConfig:
    """Launch configuration of the Triton kernel."""

    block_b: int  # rows of one program; 1 where a row is streamed
    block_c: int
    streamed: bool
    num_warps: int

    @classmethod
    def choose(cls, batch: int, classes: int) -> KDLossConfig:
        """Small rows share a program of 32 to 128 threads; wide ones get a program each, 16 logits a thread."""
        if classes > MAX_CLASSES_IN_REGISTERS:
            return cls(block_b=1, block_c=4096, streamed=True, num_warps=8)
        block_c = next_power_of_2(classes)
        block_b = max(1, min(next_power_of_2(batch), 256 // block_c))
        return cls(block_b, block_c, streamed=False, num_warps=max(1, min(4, block_b * block_c // 256)))


library.define(
    "kd_loss_forward(Tensor student, Tensor teacher, float temperature, float loss_scale, int divergence, "
    "float beta, float factor, bool reduce, bool student_gradient, bool teacher_gradient) -> (Tensor, Tensor, Tensor)"
)


def _allocate(
    student: Tensor, teacher: Tensor, reduce: bool, student_gradient: bool, teacher_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the loss and the two gradients; an unwanted gradient has no elements."""
    dtype = _distillation.accumulate_dtype(student, teacher)
    loss = student.new_empty(() if reduce else student.shape[:1], dtype=dtype)
    for_student = _distillation.gradient_like(student, student_gradient)
    return loss, for_student, _distillation.gradient_like(teacher, teacher_gradient)


@torch.library.register_fake("fastkd_kernels::kd_loss_forward", lib=library)
def _fake(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    loss_scale: float,
    divergence: int,
    beta: float,
    factor: float,
    reduce: bool,
    student_gradient: bool,
    teacher_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(student, teacher, reduce, student_gradient, teacher_gradient)


def launch(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    loss_scale: float,
    divergence: int,
    beta: float,
    factor: float,
    reduce: bool,
    student_gradient: bool,
    teacher_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton kernel, in one launch."""
    batch, classes = student.shape
    student, teacher = _distillation.dense_rows(student), _distillation.dense_rows(teacher)
    results = _allocate(student, teacher, reduce, student_gradient, teacher_gradient)
    if batch == 0:
        results[0].zero_()
        return results
    losses = student.new_empty(batch, dtype=torch.float32) if reduce else results[0]
    config = KDLossConfig.choose(batch, classes)
    arguments = (
        student,
        teacher,
        losses,
        results[0],
        kernels.arrival_counter(student),
        results[1],
        results[2],
        batch,
        classes,
        student.stride(0),
        teacher.stride(0),
        1 / temperature,
        loss_scale,
        loss_scale / temperature,
        beta,
        factor,
    )
    flags: dict[str, Any] = {
        "DIVERGENCE": divergence,
        "REDUCE": reduce,
        "STUDENT_GRADIENT": student_gradient,
        "TEACHER_GRADIENT": teacher_gradient,
        "BLOCK_C": config.block_c,
        "num_warps": config.num_warps,
    }
    if config.streamed:
        _launch_stream((batch,), *arguments, **flags)
    else:
        _launch_rows((triton.cdiv(batch, config.block_b),), *arguments, **flags, BLOCK_B=config.block_b)
    return results


if _triton.available:
    library.impl("kd_loss_forward", as_op(launch), "CUDA")

_backend.register_backends(
    "kd_loss",
    cuda=_triton.missing_reason,
    cpu=_extension.missing_kernel_reason("kd_loss_forward", "CPU"),
    interpretable=True,
)

forward: Any = torch.ops.fastkd_kernels.kd_loss_forward.default


def _of_kept(
    compute: Callable[..., tuple[Tensor, Tensor, Tensor]],
    student: Tensor,
    teacher: Tensor,
    keep: Tensor,
    options: tuple[Any, ...],
    reduce: bool,
    gradients: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """What `compute` makes of the rows that count; the others may hold anything, and no copy of the logits is made."""
    rows, for_student, for_teacher = compute(student, teacher, *options, 1.0, False, *gradients)
    rows = rows.masked_fill_(~keep, 0)
    for gradient in (for_student, for_teacher):
        if gradient.numel():
            gradient.masked_fill_(~keep[:, None], 0)
    return rows.sum() if reduce else rows, for_student, for_teacher


def _forward_of_kept(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _of_kept(forward, *arguments)


def _launch_of_kept(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _of_kept(launch, *arguments)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    t2_scale: bool = True,
    direction: str = "forward",
    *,
    task: str = "classification",
    detach_teacher: bool = True,
    beta: float | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """Distillation loss between the logits of a student and of a teacher, in one launch on a GPU; backward is one more.

    Args:
        student_logits: [..., C] float32, bfloat16, float16 or float64, any strides; -inf masks a class. Samples [B, C],
            or tokens [B, T, C]; B is below the number of rows in either case.
        teacher_logits: [..., C], of any of these dtypes.
        temperature: tau, above 0.
        reduction: "batchmean" divides the sum by B, "mean" by B * C (what `KLDivLoss()` and several distillation
            codes do, C times smaller), "sum" does not, "none" gives [...]. An empty batch has the loss 0.
        t2_scale: multiply with tau^2, so that gradients keep their size when tau changes.
        direction: "forward" KL(teacher || student), "reverse" KL(student || teacher), or "jsd", the Jensen-Shannon
            divergence beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student.
        task: "regression" takes the squared error sum_c (s - t)^2 instead of a divergence, for scores such as those of
            STS-B (C = 1); `direction` then changes nothing.
        detach_teacher: False gives the teacher's logits their gradient too.
        beta: of direction="jsd" alone, from 0 (then it is "forward") to 1 ("reverse"), as in GKD (Agarwal et al.,
            2024), TRL and Liger; default 0.5.
        labels: [...] int64, already shifted to the token they belong to. Rows labelled `ignore_index` count for
            nothing, whatever they hold, and what else labels say is not looked at. B is then the number of rows that
            count. On a GPU this takes a few launches more.
        num_items_in_batch: what "batchmean" divides by instead of B, as the Trainer of transformers passes it where
            gradients of several batches are added up; a number, or a tensor of one. Below 1 counts as 1.

    Returns:
        A scalar, or [...] for reduction="none"; float32, or float64 if one of the inputs is.

    Raises:
        ValueError: wrong shapes, an unknown option, C = 1 in a classification, or a teacher that requires grad while
            detach_teacher is True.
        TypeError: logits that are not floating-point, or labels that are not int64.

    On a GPU float64 is computed by the reference; anywhere forward-mode AD and the transforms of `torch.func` are.
    Gradients of gradients are not available from the kernels and raise; `backend("reference")` has them.
    """
    _check(student_logits, teacher_logits, temperature, reduction, direction, task, detach_teacher, beta)
    _distillation.check_num_items(num_items_in_batch, reduction)
    if labels is not None:
        _distillation.check_token_labels(labels, student_logits.shape[:-1], "student_logits", student_logits)
    name = _resolve(student_logits, teacher_logits)
    if name == "reference":
        return kd_loss_reference(
            student_logits,
            teacher_logits,
            temperature,
            reduction,
            t2_scale,
            direction,
            task,
            beta=beta,
            labels=labels,
            ignore_index=ignore_index,
            num_items_in_batch=num_items_in_batch,
        )
    student, teacher, keep = _flat(student_logits, teacher_logits, labels, ignore_index)
    scale = _distillation.reduction_scale(reduction, student, student.shape[-1], keep, num_items_in_batch)
    options = (
        temperature,
        _distillation.loss_scale(temperature, t2_scale),
        *_distillation.divergence_code(direction, task, beta),
    )
    reduce = reduction != "none"
    enabled = torch.is_grad_enabled()
    gradients = (enabled and student_logits.requires_grad, enabled and teacher_logits.requires_grad)
    if keep is None:
        factor = scale if isinstance(scale, float) else 1.0
        loss = _distillation.fused_loss(
            name, forward, launch, factor, (*options, factor, reduce, *gradients), (student, teacher)
        )
    else:
        factor = 1.0
        loss = _distillation.fused_loss(
            name, _forward_of_kept, _launch_of_kept, factor, (options, reduce, gradients), (student, teacher, keep)
        )
    if not reduce:
        return loss.reshape(student_logits.shape[:-1])
    # a count on the device, or one of other batches
    return loss if isinstance(scale, float) and scale == factor else loss * scale


def _resolve(student: Tensor, teacher: Tensor) -> str:
    name = _backend.resolve("kd_loss", student.device)
    if name == "cuda" and torch.float64 in (student.dtype, teacher.dtype):
        return _backend.fall_back("kd_loss", name, "its kernel computes in float32 and has no float64")
    return name


def _check(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    reduction: str,
    direction: str,
    task: str,
    detach_teacher: bool,
    beta: float | None,
) -> None:
    _distillation.check_logits("student_logits", student, "[..., C]")
    _distillation.check_logits("teacher_logits", teacher, "[..., C]")
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher_logits: got shape {tuple(teacher.shape)}, expected that of student_logits, {tuple(student.shape)}"
        )
    check_same_device("teacher_logits", teacher, "student_logits", student)
    _distillation.check_positive("temperature", temperature)
    check_choice("reduction", reduction, _distillation.REDUCTIONS)
    check_choice("direction", direction, _distillation.DIRECTIONS)
    _distillation.check_beta(beta, direction)
    check_choice("task", task, _distillation.TASKS)
    _distillation.check_classes("student_logits", student, task)
    _distillation.check_teacher_gradient("teacher_logits", teacher, detach_teacher)
