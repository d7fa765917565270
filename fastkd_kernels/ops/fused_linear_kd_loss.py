"""Token-level distillation from hidden states: the logits of a vocabulary are made, used and dropped chunk by chunk.

For tokens t = 1..T with hidden states h_t and language-model heads W, b of student and teacher:

    s_t = W_s h_t + b_s,   f_t = W_f g_t + b_f
    L = 1/n sum_t [ b tau^2 D(softmax(f_t / tau), softmax(s_t / tau)) + a CE(y_t, softmax(s_t)) ]

over the n tokens whose label is not `ignore_index` (Hinton et al., 2015; D as in `fastkd_kernels._distillation`). The
forward pass goes through the tokens in chunks: two matrix products give the logits of a chunk, `kd_loss` turns them
into losses and dL/ds, and two more products take that to the hidden states and the head:

    dL/dh_t = W_s' dL/ds_t,   dL/dW_s = sum_t dL/ds_t h_t',   dL/db_s = sum_t dL/ds_t

The backward pass scales these. Logits are float32 whatever the dtype of their factors, and so are the sums of the
head's gradients: near its teacher a student's dL/ds is the difference of two nearly equal distributions.

Vocabularies of different sizes: the smaller one is padded with -inf, so its missing classes have probability 0. Classes
that only one side has can cost an infinite divergence, whatever the other side does; they are left out where they
would: the teacher's in KL(teacher || student), the student's in KL(student || teacher). The cross entropy is over the
student's vocabulary in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd_kernels import _backend, _distillation, _extension, _triton
from fastkd_kernels._arguments import values_are_free
from fastkd_kernels._launch import as_op
from fastkd_kernels._library import library
from fastkd_kernels.checks import check_choice, check_same_device
from fastkd_kernels.ops import kd_loss as kd

REDUCTIONS = ("batchmean", "sum")


def fused_linear_kd_loss_reference(
    student_hidden_states: Tensor,
    student_weight: Tensor,
    teacher_hidden_states: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    t2_scale: bool = True,
    direction: str = "forward",
    beta: float | None = None,
    label_weight: float = 0.0,
    kd_weight: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """`fused_linear_kd_loss` in plain PyTorch, with all logits in memory: the oracle of the tests and the fallback."""
    keep = None if labels is None else labels != ignore_index
    student = _wide_linear(_kept(student_hidden_states, keep), student_weight, student_bias)
    if teacher_logits is None:
        assert teacher_hidden_states is not None
        assert teacher_weight is not None
        teacher = _wide_linear(_kept(teacher_hidden_states, keep), teacher_weight, teacher_bias)
    else:
        teacher = _kept(teacher_logits, keep)
    compared = _distillation.DIRECTIONS[_distillation.divergence_code(direction, "classification", beta)[0]]
    width = _divergence_width(compared, student.shape[-1], teacher.shape[-1])
    rows = kd_weight * kd.kd_loss_reference(
        _resized(student, width), _resized(teacher, width), temperature, "none", t2_scale, direction, beta=beta
    )
    if labels is None or keep is None:
        return rows.sum() / (max(len(rows), 1) if reduction == "batchmean" else 1)
    (wide,) = _distillation.widen(student)
    rows = rows.masked_fill(~keep, 0) + label_weight * F.cross_entropy(
        wide, labels, ignore_index=ignore_index, reduction="none"
    )
    return rows.sum() / (keep.sum().clamp(min=1) if reduction == "batchmean" else 1)


def _wide_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32 at least, whatever autocast says."""
    dtype = _distillation.accumulate_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _kept(rows: Tensor, keep: Tensor | None) -> Tensor:
    """Zeros in the place of ignored tokens, whose hidden states may be anything."""
    return rows if keep is None else rows.masked_fill(~keep[:, None], 0)


def _divergence_width(direction: str, student: int, teacher: int) -> int:
    """How many classes are compared, for vocabularies of these sizes."""
    return {"forward": student, "reverse": teacher, "jsd": max(student, teacher)}[direction]


def _resized(rows: Tensor, width: int, fill: float = -torch.inf) -> Tensor:
    """[T, width], cut off or filled up."""
    if rows.shape[-1] >= width:
        return rows[:, :width]
    return F.pad(rows, (0, width - rows.shape[-1]), value=fill)


@dataclass(frozen=True)
class FusedLinearConfig:
    """How many tokens have their logits in memory at a time."""

    chunk_tokens: int

    @classmethod
    def choose(cls, tokens: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> FusedLinearConfig:
        """An eighth of the tokens, at least 128 for the matrix products' sake, and at most 2^27 logits.

        Half of that for a `dtype` of two bytes, whose logits take four: what a chunk may occupy is a share of what all
        logits would.
        """
        halves = 1 if dtype.itemsize >= 4 else 2
        at_most = max(2**27 // halves // max(vocabulary, 1), 16)
        return cls(max(min(max(tokens // (8 * halves), 128), at_most, tokens), 1))


library.define(
    "fused_linear_kd_loss_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_logits, Tensor? labels, float temperature, "
    "float loss_scale, str direction, float? beta, float label_weight, float kd_weight, int ignore_index, bool mean, "
    "int chunk_tokens, "
    "bool hidden_gradient, bool weight_gradient, bool bias_gradient) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("fastkd_kernels::fused_linear_kd_loss_forward", lib=library)
def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    loss_scale: float,
    direction: str,
    beta: float | None,
    label_weight: float,
    kd_weight: float,
    ignore_index: int,
    mean: bool,
    chunk_tokens: int,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=_distillation.accumulate_dtype(hidden))
    for_weight = _distillation.gradient_like(weight, weight_gradient)
    for_bias = weight.new_empty(weight.shape[:1] if bias_gradient else (0,))
    return loss, _distillation.gradient_like(hidden, hidden_gradient), for_weight, for_bias


@dataclass
class _HeadGradient:
    """Sums what the chunks contribute to the gradients of the head."""

    weight: Tensor | None
    bias: Tensor | None

    def add_bias(self, slope: Tensor) -> None:
        if self.bias is not None:
            self.bias += slope.sum(0)

    def add_weight(self, slope: Tensor, hidden: Tensor) -> None:
        if self.weight is not None:
            _add_product(self.weight, slope.t(), hidden)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed and returned in float32 at least, whatever the dtype of the factors.

    Two nearly equal distributions are subtracted later, so rounding their logits to bfloat16 would leave noise.
    """
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    if not _has_fast_bfloat16(left):
        return left.float() @ right.float()
    # the product rounded, and what rounding took away: two fast products are faster than one of float32
    rounded = left @ right
    return rounded.float().add_(torch.addmm(rounded, left, right, beta=-1))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without rounding the product to the dtype of its factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        # `_product` is slower here: the tokens of a chunk are too few for oneDNN's bfloat16
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


# asked once, because it is the processor's
_ONEDNN_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _has_fast_bfloat16(tensor: Tensor) -> bool:
    return bool(_ONEDNN_BFLOAT16 and tensor.dtype == torch.bfloat16 and torch.backends.mkldnn.enabled)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = _product(hidden, weight.t())
    return logits if bias is None else logits.add_(bias)


def _compute(
    kd_forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    loss_scale: float,
    direction: str,
    beta: float | None,
    label_weight: float,
    kd_weight: float,
    ignore_index: int,
    mean: bool,
    chunk_tokens: int,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients; `kd_forward` is the forward pass of `kd_loss` on these tensors' backend."""
    tokens, classes = len(hidden), len(weight)
    accumulate = _distillation.accumulate_dtype(hidden)
    losses = hidden.new_empty(tokens, dtype=accumulate)
    for_hidden = _distillation.gradient_like(hidden, hidden_gradient)
    head = _HeadGradient(
        weight.new_zeros(weight.shape, dtype=accumulate) if weight_gradient else None,
        weight.new_zeros(classes, dtype=accumulate) if bias_gradient else None,
    )
    divergence, share = _distillation.divergence_code(direction, "classification", beta)
    compared = _distillation.DIRECTIONS[divergence]
    gradients = hidden_gradient or weight_gradient or bias_gradient
    keeps = None if labels is None else labels != ignore_index
    for rows in _chunks(tokens, chunk_tokens):
        keep = None if keeps is None else keeps[rows]
        h = _kept(hidden[rows], keep)
        logits = _logits(h, weight, bias)
        if teacher_logits is None:
            assert teacher_hidden is not None
            assert teacher_weight is not None
            width = _divergence_width(compared, classes, len(teacher_weight))
            # classes that are not compared need no logits
            cut_bias = None if teacher_bias is None else teacher_bias[:width]
            teacher = _logits(_kept(teacher_hidden[rows], keep), teacher_weight[:width], cut_bias)
        else:
            width = _divergence_width(compared, classes, teacher_logits.shape[1])
            teacher = _kept(teacher_logits[rows], keep)
        chunk_losses, slope, _ = kd_forward(
            _resized(logits, width),
            _resized(teacher, width),
            temperature,
            kd_weight * loss_scale,
            divergence,
            share,
            1.0,
            False,
            gradients,
            False,
        )
        del teacher
        if gradients:
            slope = _resized(slope, classes, fill=0.0)
        if labels is not None and label_weight:
            chunk_losses += label_weight * _add_cross_entropy(
                logits, labels[rows], label_weight, slope if gradients else None
            )
        del logits
        losses[rows] = chunk_losses if keep is None else chunk_losses.masked_fill(~keep, 0)
        if not gradients:
            continue
        if keep is not None:
            slope.masked_fill_(~keep[:, None], 0)
        head.add_bias(slope)
        slope = slope.to(weight.dtype)
        if hidden_gradient:
            torch.mm(slope, weight, out=for_hidden[rows])
        head.add_weight(slope, h)

    factor: float | Tensor = 1.0
    if mean:
        # on the device, because waiting for the count would stop the host
        factor = 1 / max(tokens, 1) if keeps is None else keeps.sum().clamp(min=1).to(accumulate).reciprocal()
    return (
        losses.sum() * factor,
        for_hidden.mul_(factor),
        hidden.new_empty(0) if head.weight is None else head.weight.mul_(factor).to(weight.dtype),
        hidden.new_empty(0) if head.bias is None else head.bias.mul_(factor).to(weight.dtype),
    )


def _chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, tokens))


def _add_cross_entropy(logits: Tensor, labels: Tensor, weight: float, slope: Tensor | None) -> Tensor:
    """[T] cross entropies, NaN for labels that no class has; adds `weight` times their gradient to `slope`."""
    log_probs = logits.log_softmax(-1, dtype=_distillation.accumulate_dtype(logits))
    targets = labels.clamp(0, logits.shape[1] - 1)[:, None]
    rows = -log_probs.gather(1, targets)[:, 0].masked_fill(labels != targets[:, 0], torch.nan)
    if slope is not None:
        gradient = log_probs.exp_()
        gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, -1.0))
        slope.add_(gradient, alpha=weight)
    return rows


_launch = partial(_compute, kd.launch)
_compute_on_cpu = partial(_compute, kd.forward)

library.impl("fused_linear_kd_loss_forward", _compute_on_cpu, "CPU")
if _triton.available:
    library.impl("fused_linear_kd_loss_forward", as_op(_launch), "CUDA")

_backend.register_backends(
    "fused_linear_kd_loss",
    cuda=_triton.missing_reason,
    cpu=_extension.missing_kernel_reason("kd_loss_forward", "CPU"),
    interpretable=True,
)

_forward = torch.ops.fastkd_kernels.fused_linear_kd_loss_forward.default


def fused_linear_kd_loss(
    student_hidden_states: Tensor,
    student_weight: Tensor,
    teacher_hidden_states: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    t2_scale: bool = True,
    direction: str = "forward",
    beta: float | None = None,
    label_weight: float = 0.0,
    kd_weight: float = 1.0,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> Tensor:
    """b KD + a CE over the tokens of a language model, from hidden states; the logits are never all in memory.

    Args:
        student_hidden_states: [..., H] float32, bfloat16, float16 or float64, before the language-model head.
        student_weight: [V, H], the head; of the same dtype, or of any under autocast.
        teacher_hidden_states, teacher_weight: [..., H'] and [V', H'] of one dtype, likewise; or `teacher_logits`.
        labels: [...] int64 classes, already shifted to the token they belong to. Tokens labelled `ignore_index` count
            for nothing, in neither term. None counts every token.
        student_bias, teacher_bias: [V] and [V'] of the heads.
        teacher_logits: [..., V'], in the place of the teacher's hidden states and head.
        temperature: tau of the divergence, above 0; the cross entropy has none.
        reduction: "batchmean" divides by the number of tokens that count (0 where none does), "sum" does not.
        t2_scale, direction, beta: as in `kd_loss`; `beta` is the interpolation of direction="jsd" and no weight.
        label_weight, kd_weight: a, of the cross entropy, which needs labels, and b, of the divergence.
        chunk_tokens: how many tokens have their logits in memory at a time; None chooses.

    Returns:
        A scalar; float32, or float64 if the student's hidden states are. It has gradients for the student's hidden
        states, weight and bias, which the forward pass computes and the backward pass scales.

    Raises:
        ValueError: shapes that do not fit, an unknown option, a label_weight without labels, labels outside the
            vocabulary (on CPU), a teacher that requires grad, or not exactly one of teacher_hidden_states and
            teacher_logits.
        TypeError: tensors that are not floating-point; a head and hidden states of different dtypes without autocast.

    The vocabularies V and V' may differ: see the module's docstring. On a GPU a label outside the vocabulary makes the
    loss NaN, and float64 is computed by the reference, which has all logits in memory.
    """
    student = (student_hidden_states, student_weight, student_bias)
    teacher = (teacher_hidden_states, teacher_weight, teacher_bias, teacher_logits)
    student, teacher = _autocast(student), _autocast(teacher)
    _check(student, teacher, labels, temperature, reduction, direction, beta, label_weight, ignore_index, chunk_tokens)
    hidden, weight, bias = _flat(student[0]), student[1], student[2]
    assert hidden is not None
    assert weight is not None
    teacher = (_flat(teacher[0]), teacher[1], teacher[2], _flat(teacher[3]))
    labels = None if labels is None else labels.reshape(-1)
    name = _resolve(hidden, teacher)
    if name == "reference":
        return fused_linear_kd_loss_reference(
            hidden,
            weight,
            teacher[0],
            teacher[1],
            labels,
            student_bias=bias,
            teacher_bias=teacher[2],
            teacher_logits=teacher[3],
            temperature=temperature,
            reduction=reduction,
            t2_scale=t2_scale,
            direction=direction,
            beta=beta,
            label_weight=label_weight,
            kd_weight=kd_weight,
            ignore_index=ignore_index,
        )
    gradients = torch.is_grad_enabled()
    options = (
        temperature,
        _distillation.loss_scale(temperature, t2_scale),
        direction,
        beta,
        label_weight,
        kd_weight,
        ignore_index,
        reduction == "batchmean",
        chunk_tokens or FusedLinearConfig.choose(len(hidden), len(weight), hidden.dtype).chunk_tokens,
        gradients and hidden.requires_grad,
        gradients and weight.requires_grad,
        gradients and bias is not None and bias.requires_grad,
    )
    return _distillation.fused_loss(name, _forward, _launch, 1.0, options, (hidden, weight, bias, *teacher, labels))


Tensors = tuple[Tensor | None, ...]


def _autocast(tensors: Tensors) -> Any:
    """What autocast makes of the operands of a linear layer, once for all chunks."""
    device = next((tensor.device.type for tensor in tensors if tensor is not None), "cpu")
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def _flat(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows.reshape(-1, rows.shape[-1])


def _resolve(hidden: Tensor, teacher: Tensors) -> str:
    name = _backend.resolve("fused_linear_kd_loss", hidden.device)
    tensors = (hidden, *teacher)
    if name == "cuda" and any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        return _backend.fall_back("fused_linear_kd_loss", name, "its kernel computes in float32 and has no float64")
    return name


def _check(
    student: Tensors,
    teacher: Tensors,
    labels: Tensor | None,
    temperature: float,
    reduction: str,
    direction: str,
    beta: float | None,
    label_weight: float,
    ignore_index: int,
    chunk_tokens: int | None,
) -> None:
    hidden, weight, bias = student
    assert hidden is not None
    assert weight is not None
    leading = hidden.shape[:-1]
    _check_head("student", hidden, weight, bias, leading)
    _check_teacher(teacher, hidden, leading)
    _distillation.check_positive("temperature", temperature)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("direction", direction, _distillation.DIRECTIONS)
    _distillation.check_beta(beta, direction)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: got {chunk_tokens}, expected at least 1, or None")
    if labels is not None:
        _check_labels(labels, leading, hidden, len(weight), ignore_index)
    elif label_weight:
        raise ValueError(
            f"label_weight: got {label_weight} without labels, which the cross entropy needs; pass labels or "
            "label_weight=0"
        )


def _check_head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, leading: torch.Size) -> None:
    if not hidden.is_floating_point():
        raise TypeError(f"{side}_hidden_states: got dtype {hidden.dtype}, expected a floating-point dtype")
    for name, tensor in ((f"{side}_weight", weight), (f"{side}_bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: got dtype {tensor.dtype}, expected that of {side}_hidden_states, {hidden.dtype}; cast one of "
                "them, or call under torch.autocast"
            )
    if hidden.dim() < 2 or hidden.shape[:-1] != leading:
        expected = "[..., H]" if hidden.dim() < 2 else f"{[*leading, 'H']}"
        raise ValueError(f"{side}_hidden_states: got shape {tuple(hidden.shape)}, expected {expected}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or len(weight) < 2:
        raise ValueError(
            f"{side}_weight: got shape {tuple(weight.shape)}, expected [V, {hidden.shape[-1]}], V at least 2, for "
            f"{side}_hidden_states of shape {tuple(hidden.shape)}"
        )
    check_same_device(f"{side}_weight", weight, f"{side}_hidden_states", hidden)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{side}_bias: got shape {tuple(bias.shape)}, expected {list(weight.shape[:1])}")
        check_same_device(f"{side}_bias", bias, f"{side}_weight", weight)


def _check_teacher(teacher: Tensors, student: Tensor, leading: torch.Size) -> None:
    hidden, weight, bias, logits = teacher
    names = ("teacher_hidden_states", "teacher_weight", "teacher_bias", "teacher_logits")
    if (
        (logits is None) == (hidden is None)
        or (hidden is None) != (weight is None)
        or (logits is not None and bias is not None)
    ):
        given = ", ".join(name for name, tensor in zip(names, teacher, strict=True) if tensor is not None) or "nothing"
        raise ValueError(
            f"teacher: got {given}, expected either teacher_hidden_states with teacher_weight, or teacher_logits"
        )
    for name, tensor in zip(names, teacher, strict=True):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: got a tensor that requires grad, and the teacher gets none; run it under torch.no_grad() and "
                "freeze its head with requires_grad_(False), or pass detach()"
            )
    if hidden is not None and weight is not None:
        _check_head("teacher", hidden, weight, bias, leading)
        check_same_device("teacher_hidden_states", hidden, "student_hidden_states", student)
    if logits is not None:
        if not logits.is_floating_point():
            raise TypeError(f"teacher_logits: got dtype {logits.dtype}, expected a floating-point dtype")
        if logits.dim() < 2 or logits.shape[:-1] != leading or logits.shape[-1] < 2:
            raise ValueError(f"teacher_logits: got shape {tuple(logits.shape)}, expected {[*leading, 'V']}")
        check_same_device("teacher_logits", logits, "student_hidden_states", student)


def _check_labels(labels: Tensor, leading: torch.Size, hidden: Tensor, classes: int, ignore_index: int) -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got dtype {labels.dtype}, expected torch.int64")
    if labels.shape != leading:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected {list(leading)}")
    check_same_device("labels", labels, "student_hidden_states", hidden)
    if values_are_free(labels):
        kept = labels[labels != ignore_index]
        if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= classes):
            raise ValueError(
                f"labels: got values from {int(kept.min())} to {int(kept.max())}, expected 0 to {classes - 1}, or "
                f"ignore_index={ignore_index}"
            )
