"""Token-level distillation from hidden states: the logits of a vocabulary are made, used and dropped chunk by chunk.

For tokens t = 1..T with hidden states h_t and language-model heads W, b of student and teacher:

    s_t = cap(c (W_s h_t + b_s)),   f_t = cap'(c' (W_f g_t + b_f)),   cap(x) = k tanh(x / k), or x without a softcap k
    L = 1/n sum_t [ b tau^2 D(softmax(f_t / tau), softmax(s_t / tau)) + a CE(y_t, softmax(s_t)) ]

over the n tokens whose label is not `ignore_index` (Hinton et al., 2015; D as in `fastkd_kernels._distillation`; c and
k as in Cohere's and Gemma 2's models). The forward pass goes through the tokens in chunks: two matrix products give the
logits of a chunk, `kd_loss` turns them into losses and dL/ds, and two more products take that to the hidden states and
the head, with z = W_s h + b_s and ds/dz = c (1 - (s / k)^2):

    dL/dh_t = W_s' dL/dz_t,   dL/dW_s = sum_t dL/dz_t h_t',   dL/db_s = sum_t dL/dz_t

The backward pass scales these. Losses of single tokens (reduction="none") are weighed by what comes from behind them,
which the sum over t has to know: then the backward pass goes through the chunks once more. Logits are float32 whatever
the dtype of their factors, and so are the sums of the head's gradients: near its teacher a student's dL/ds is the
difference of two nearly equal distributions. Gradients of a float16 head stay float32 until the backward pass, whose
`GradScaler` lifts what would underflow.

Vocabularies of different sizes: the smaller one is padded with -inf, so its missing classes have probability 0. Classes
that only one side has can cost an infinite divergence, whatever the other side does; they are left out where they
would: the teacher's in KL(teacher || student), the student's in KL(student || teacher). The cross entropy is over the
student's vocabulary in any case. A teacher of whom K logits a token are known (`teacher_indices`) is one that has no
other classes: its distribution is the softmax over these K, and the student's is over its whole vocabulary, but over
the same K in KL(student || teacher).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd_kernels import _backend, _distillation, _extension, _triton
from fastkd_kernels._arguments import values_are_free
from fastkd_kernels._derivatives import differentiated_once, is_batched, wants_gradient
from fastkd_kernels._distillation import kept
from fastkd_kernels._launch import as_op
from fastkd_kernels._library import library
from fastkd_kernels.checks import check_choice, check_same_device
from fastkd_kernels.ops import kd_loss as kd

REDUCTIONS = ("batchmean", "sum", "none")


class SoftHardLoss(NamedTuple):
    """A loss and its two terms, each reduced as the loss is and without its weight; the terms have no gradient."""

    loss: Tensor
    """kd_weight soft_loss + label_weight hard_loss"""
    soft_loss: Tensor
    """The divergence from the teacher."""
    hard_loss: Tensor | None
    """The cross entropy of the labels; None without labels."""


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
    teacher_indices: Tensor | None = None,
    scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    reduce: bool = True,
    t2_scale: bool = True,
    direction: str = "forward",
    beta: float | None = None,
    label_weight: float = 0.0,
    kd_weight: float = 1.0,
    ignore_index: int = -100,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
) -> SoftHardLoss:
    """`fused_linear_kd_loss` in plain PyTorch, with all logits in memory: the oracle of the tests and the fallback.

    Of rows [T, ...]: what leads them is flattened, and `scale` is what their sum is multiplied with.
    """
    keep = None if labels is None else labels != ignore_index
    student = _wide_linear(kept(student_hidden_states, keep), student_weight, student_bias)
    student = _scaled(student, student_logit_scale, student_softcap)
    if teacher_logits is None:
        assert teacher_hidden_states is not None
        assert teacher_weight is not None
        teacher = _wide_linear(kept(teacher_hidden_states, keep), teacher_weight, teacher_bias)
        teacher = _scaled(teacher, teacher_logit_scale, teacher_softcap)
    else:
        teacher = kept(teacher_logits, keep)
    compared = _distillation.DIRECTIONS[_distillation.divergence_code(direction, "classification", beta)[0]]
    teacher, indices = _known(teacher, teacher_indices, keep, student.shape[-1])
    soft = kd.kd_loss_reference(
        *_aligned(student, teacher, indices, compared), temperature, "none", t2_scale, direction, beta=beta
    )
    hard = None
    if labels is not None:
        (wide,) = _distillation.widen(student)
        hard = F.cross_entropy(wide, labels, ignore_index=ignore_index, reduction="none")
    if keep is not None:
        soft = soft.masked_fill(~keep, 0)
    rows = _weighted(soft, hard, kd_weight, label_weight)

    def reduced(rows: Tensor) -> Tensor:
        return rows.sum() * scale if reduce else rows

    return SoftHardLoss(reduced(rows), reduced(soft.detach()), None if hard is None else reduced(hard.detach()))


def _weighted(soft: Tensor, hard: Tensor | None, kd_weight: float, label_weight: float) -> Tensor:
    """The sum of the terms that count; one of weight 0 may hold anything."""
    pairs = ((kd_weight, soft), (label_weight, hard))
    terms = [weight * term for weight, term in pairs if term is not None and weight != 0]
    if not terms:
        # nothing counts, yet the gradient is 0 and not missing
        return soft.masked_fill(torch.ones_like(soft, dtype=torch.bool), 0)
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _wide_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32 at least, whatever autocast says."""
    dtype = _distillation.accumulate_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _scaled(logits: Tensor, logit_scale: float, softcap: float | None, out: Tensor | None = None) -> Tensor:
    """cap(logit_scale logits), in the memory of `out`."""
    if logit_scale != 1:
        logits = torch.mul(logits, logit_scale, out=out)
    if softcap is None:
        return logits
    return torch.mul(torch.tanh(torch.div(logits, softcap, out=out), out=out), softcap, out=out)


def _divergence_width(direction: str, student: int, teacher: int) -> int:
    """How many classes are compared, for vocabularies of these sizes."""
    return {"forward": student, "reverse": teacher, "jsd": max(student, teacher)}[direction]


def _resized(rows: Tensor, width: int, fill: float = -torch.inf) -> Tensor:
    """[T, width], cut off or filled up."""
    if rows.shape[-1] >= width:
        return rows[:, :width]
    return F.pad(rows, (0, width - rows.shape[-1]), value=fill)


def _known(teacher: Tensor, indices: Tensor | None, keep: Tensor | None, classes: int) -> tuple[Tensor, Tensor | None]:
    """Logits [T, K] and the classes that they are of, NaN where there is no such class; None stands for all classes."""
    if indices is None:
        return teacher, None
    indices = kept(indices, keep)
    inside = indices.clamp(0, classes - 1)
    return teacher.masked_fill(inside != indices, torch.nan), inside


def _aligned(student: Tensor, teacher: Tensor, indices: Tensor | None, compared: str) -> tuple[Tensor, Tensor]:
    """Student and teacher on the classes that are compared."""
    if indices is None:
        width = _divergence_width(compared, student.shape[-1], teacher.shape[-1])
        return _resized(student, width), _resized(teacher, width)
    if compared == "reverse":
        # one that fills up is no class of the teacher's
        return student.gather(1, indices).masked_fill(teacher == -torch.inf, -torch.inf), teacher
    return student, torch.full_like(student, -torch.inf, dtype=teacher.dtype).scatter(1, indices, teacher)


def _of_all_classes(slope: Tensor, indices: Tensor | None, compared: str, classes: int) -> Tensor:
    """The gradient for the student's logits from that for what `_aligned` has made of them."""
    if indices is None or compared != "reverse":
        return _resized(slope, classes, fill=0.0)
    return slope.new_zeros(len(slope), classes).scatter_(1, indices, slope)


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
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_logits, Tensor? teacher_indices, Tensor? labels, "
    "Tensor? scale, float temperature, float loss_scale, str direction, float? beta, float label_weight, "
    "float kd_weight, int ignore_index, float student_logit_scale, float? student_softcap, float teacher_logit_scale, "
    "float? teacher_softcap, bool reduce, bool report, int chunk_tokens, bool hidden_gradient, bool weight_gradient, "
    "bool bias_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
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
    teacher_indices: Tensor | None,
    labels: Tensor | None,
    scale: Tensor | None,
    temperature: float,
    loss_scale: float,
    direction: str,
    beta: float | None,
    label_weight: float,
    kd_weight: float,
    ignore_index: int,
    student_logit_scale: float,
    student_softcap: float | None,
    teacher_logit_scale: float,
    teacher_softcap: float | None,
    reduce: bool,
    report: bool,
    chunk_tokens: int,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = () if reduce else hidden.shape[:1]

    def losses(wanted: bool) -> Tensor:
        return hidden.new_empty(shape if wanted else (0,), dtype=_distillation.accumulate_dtype(hidden))

    return (
        losses(True),
        losses(report),
        losses(report and labels is not None),
        _distillation.gradient_like(hidden, hidden_gradient),
        _distillation.gradient_like(weight, weight_gradient),
        weight.new_empty(weight.shape[:1] if bias_gradient else (0,), dtype=_distillation.gradient_dtype(weight.dtype)),
    )


class _Slope(NamedTuple):
    """dL/ds of a chunk in the dtype of the head."""

    values: Tensor
    unit: Tensor | None
    """A scalar on the device, by which `values` are to be multiplied; None where it is 1."""

    @classmethod
    def rounded(cls, slope: Tensor, dtype: torch.dtype) -> _Slope:
        """Float16 counts in units of a power of two, in which the largest value is near the end of its range."""
        if dtype != torch.float16:
            return cls(slope.to(dtype), None)
        exponent = torch.frexp(slope.abs().amax()).exponent - 15
        return cls(torch.ldexp(slope, -exponent).to(dtype), torch.ldexp(slope.new_ones(()), exponent))

    def write_product(self, weight: Tensor, out: Tensor) -> None:
        """out = dL/ds @ weight"""
        if self.unit is None:
            torch.mm(self.values, weight, out=out)
        else:
            torch.mul(_product(self.values, weight), self.unit, out=out)


@dataclass
class _HeadGradient:
    """Sums what the chunks contribute to the gradients of the head."""

    weight: Tensor | None
    bias: Tensor | None

    def add_bias(self, slope: Tensor) -> None:
        if self.bias is not None:
            self.bias += slope.sum(0)

    def add_weight(self, slope: _Slope, hidden: Tensor) -> None:
        if self.weight is None:
            return
        if slope.unit is None:
            _add_product(self.weight, slope.values.t(), hidden)
        else:
            self.weight.addcmul_(_product(slope.values.t(), hidden), slope.unit)


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


@dataclass(frozen=True)
class _Head:
    """Logits of hidden states, a chunk of which is written into again and again."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def logits(self, hidden: Tensor, width: int | None = None) -> Tensor:
        """Of the first `width` classes; a new tensor."""
        logits = _product(hidden, self.weight[:width].t())
        if self.bias is not None:
            logits.add_(self.bias[:width])
        return _scaled(logits, self.logit_scale, self.softcap, out=logits)

    def undo_scaling(self, slope: Tensor, logits: Tensor) -> None:
        """Turns the gradient for `logits` into that for W h + b, in place; of `logits` nothing is left."""
        if self.softcap is not None:
            slope.mul_(logits.div_(self.softcap).square_().neg_().add_(1))
        if self.logit_scale != 1:
            slope.mul_(self.logit_scale)


@dataclass(frozen=True)
class _Teacher:
    """Where the teacher's logits come from: hidden states and a head, or ready ones, of all classes or of some."""

    hidden: Tensor | None
    head: _Head | None
    logits: Tensor | None
    indices: Tensor | None

    def of(self, rows: slice, keep: Tensor | None, classes: int, compared: str) -> tuple[Tensor, Tensor | None]:
        """Logits of a chunk, and the classes that they are of, as `_known` gives them."""
        if self.logits is not None:
            indices = None if self.indices is None else self.indices[rows]
            return _known(kept(self.logits[rows], keep), indices, keep, classes)
        assert self.hidden is not None
        assert self.head is not None
        # classes that are not compared need no logits
        width = _divergence_width(compared, classes, len(self.head.weight))
        return self.head.logits(kept(self.hidden[rows], keep), width), None


def _compute(
    kd_forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_indices: Tensor | None,
    labels: Tensor | None,
    scale: Tensor | None,
    temperature: float,
    loss_scale: float,
    direction: str,
    beta: float | None,
    label_weight: float,
    kd_weight: float,
    ignore_index: int,
    student_logit_scale: float,
    student_softcap: float | None,
    teacher_logit_scale: float,
    teacher_softcap: float | None,
    reduce: bool,
    report: bool,
    chunk_tokens: int,
    hidden_gradient: bool,
    weight_gradient: bool,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, its terms and gradients; `kd_forward` is the forward pass of `kd_loss` on these tensors' backend.

    Args:
        scale: what a token counts for, one number or one a token; None is 1.
        reduce: add up the tokens' losses.
        report: give the terms too, without their weights.
    """
    student = _Head(weight, bias, student_logit_scale, student_softcap)
    teacher_head = None
    if teacher_weight is not None:
        teacher_head = _Head(teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
    teacher = _Teacher(teacher_hidden, teacher_head, teacher_logits, teacher_indices)
    tokens, classes = len(hidden), len(weight)
    accumulate = _distillation.accumulate_dtype(hidden)
    soft = hidden.new_zeros(tokens, dtype=accumulate)
    hard = None if labels is None else torch.zeros_like(soft)
    for_hidden = _distillation.gradient_like(hidden, hidden_gradient)
    head = _HeadGradient(
        weight.new_zeros(weight.shape, dtype=accumulate) if weight_gradient else None,
        weight.new_zeros(classes, dtype=accumulate) if bias_gradient else None,
    )
    divergence, share = _distillation.divergence_code(direction, "classification", beta)
    compared = _distillation.DIRECTIONS[divergence]
    gradients = hidden_gradient or weight_gradient or bias_gradient
    keeps = None if labels is None else labels != ignore_index
    by_token = scale is not None and scale.dim() > 0
    # autocast has been taken into account, and would round the float32 of `_product`
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(tokens, chunk_tokens):
            keep = None if keeps is None else keeps[rows]
            h = kept(hidden[rows], keep)
            logits = student.logits(h)
            slope = torch.zeros_like(logits) if gradients and kd_weight == 0 else None
            if kd_weight != 0 or report:
                teacher_rows, indices = teacher.of(rows, keep, classes, compared)
                soft[rows], student_slope, _ = kd_forward(
                    *_aligned(logits, teacher_rows, indices, compared),
                    temperature,
                    # the gradient comes with its weight, the loss is freed of it below
                    (kd_weight or 1.0) * loss_scale,
                    divergence,
                    share,
                    1.0,
                    False,
                    gradients and kd_weight != 0,
                    False,
                )
                del teacher_rows
                if gradients and kd_weight != 0:
                    slope = _of_all_classes(student_slope, indices, compared, classes)
            if labels is not None and hard is not None and (label_weight != 0 or report):
                hard[rows] = _add_cross_entropy(logits, labels[rows], label_weight, slope)
            if slope is None:
                continue
            student.undo_scaling(slope, logits)
            del logits
            if by_token:
                assert scale is not None
                slope.mul_(scale[rows, None])
            if keep is not None:
                slope.masked_fill_(~keep[:, None], 0)
            head.add_bias(slope)
            rounded = _Slope.rounded(slope, weight.dtype)
            if hidden_gradient:
                rounded.write_product(weight, for_hidden[rows])
            head.add_weight(rounded, h)

    if kd_weight not in (0, 1):
        soft.div_(kd_weight)
    if keeps is not None and hard is not None:
        soft.masked_fill_(~keeps, 0)
        hard.masked_fill_(~keeps, 0)

    def reduced(rows: Tensor) -> Tensor:
        rows = rows if scale is None else rows * scale
        return rows.sum() if reduce else rows

    factor: float | Tensor = 1.0 if scale is None or by_token else scale
    dtype = _distillation.gradient_dtype(weight.dtype)
    for_weight, for_bias = (
        weight.new_empty(0, dtype=dtype) if gradient is None else gradient.mul_(factor).to(dtype)
        for gradient in (head.weight, head.bias)
    )
    return (
        reduced(_weighted(soft, hard, kd_weight, label_weight)),
        reduced(soft) if report else soft.new_empty(0),
        reduced(hard) if report and hard is not None else soft.new_empty(0),
        for_hidden.mul_(factor),
        for_weight,
        for_bias,
    )


def _chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, tokens))


def _add_cross_entropy(logits: Tensor, labels: Tensor, weight: float, slope: Tensor | None) -> Tensor:
    """[T] cross entropies, NaN for labels that no class has; adds `weight` times their gradient to `slope`."""
    log_probs = logits.log_softmax(-1, dtype=_distillation.accumulate_dtype(logits))
    targets = labels.clamp(0, logits.shape[1] - 1)[:, None]
    rows = -log_probs.gather(1, targets)[:, 0].masked_fill(labels != targets[:, 0], torch.nan)
    if slope is not None and weight != 0:
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


class _TokenLosses(torch.autograd.Function):
    """Losses of single tokens: the backward pass goes through the chunks again, with what each counts for."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., tuple[Tensor, ...]], options: tuple[Any, ...], *tensors: Any) -> Any:
        """compute(*tensors, scale, *options, three flags) as the op; the last result links as that of `FusedLoss`."""
        loss, soft, hard, *_ = compute(*tensors, None, *options, False, False, False)
        link = loss.new_empty(0)
        ctx.save_for_backward(link, *tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(soft, hard)
        ctx.compute, ctx.options = compute, options
        return loss, soft, hard, link

    @staticmethod
    def backward(ctx: Any, grad_of_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        link, *tensors = ctx.saved_tensors
        results: list[Tensor | None] = [None] * len(tensors)
        if grad_of_loss is None:
            return None, None, *results
        wanted = ctx.needs_input_grad[2:5]
        # the dispatcher takes a batch of gradients apart, and batched tensors cannot be detached
        compute = _forward if is_batched(grad_of_loss) else ctx.compute
        with torch.no_grad():
            _, _, _, *gradients = compute(*tensors, grad_of_loss, *ctx.options, *wanted)
        for position, gradient in enumerate(gradients):
            if wanted[position]:
                results[position] = gradient.to(tensors[position].dtype)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            results = differentiated_once(results, (link, grad_of_loss))
        return None, None, *results


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
    teacher_indices: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    t2_scale: bool = True,
    direction: str = "forward",
    beta: float | None = None,
    label_weight: float = 0.0,
    kd_weight: float = 1.0,
    ignore_index: int = -100,
    num_items_in_batch: float | Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    chunk_tokens: int | None = None,
    return_soft_hard_loss: bool = False,
) -> Any:
    """b KD + a CE over the tokens of a language model, from hidden states; the logits are never all in memory.

    Args:
        student_hidden_states: [..., H] float32, bfloat16, float16 or float64, before the language-model head.
        student_weight: [V, H], the head; of the same dtype, or of any under autocast.
        teacher_hidden_states, teacher_weight: [..., H'] and [V', H'] of one dtype, likewise; or `teacher_logits`.
        labels: [...] int64 classes, already shifted to the token they belong to. Tokens labelled `ignore_index` count
            for nothing, in neither term. None counts every token.
        student_bias, teacher_bias: [V] and [V'] of the heads.
        teacher_logits: [..., V'], in the place of the teacher's hidden states and head.
        teacher_indices: [..., K] int64, the classes of which `teacher_logits` [..., K] are, all different in a token,
            as `torch.topk` or an inference server gives them; log-probabilities serve as well. -inf fills up a token of
            which fewer are known.
        temperature: tau of the divergence, above 0; the cross entropy has none.
        reduction: "batchmean" divides by the number of tokens that count (0 where none does), "sum" does not, "none"
            gives the loss of each token, and 0 for one that does not count.
        t2_scale, direction, beta: as in `kd_loss`; `beta` is the interpolation of direction="jsd" and no weight.
        label_weight, kd_weight: a, of the cross entropy, which needs labels, and b, of the divergence. A term of weight
            0 is left out.
        num_items_in_batch: what "batchmean" divides by instead, as in `kd_loss`.
        student_logit_scale, teacher_logit_scale: what logits are multiplied with, above 0: Cohere's `logit_scale`, and
            1 / `logits_scaling` of Granite.
        student_softcap, teacher_softcap: k of k tanh(logits / k), above 0, after that scale: `final_logit_softcapping`
            of Gemma 2. Ready `teacher_logits` are taken as they are.
        chunk_tokens: how many tokens have their logits in memory at a time; None chooses.
        return_soft_hard_loss: return the two terms too.

    Returns:
        A scalar, or [...] for reduction="none"; float32, or float64 if the student's hidden states are. It has
        gradients for the student's hidden states, weight and bias, which the forward pass computes and the backward
        pass scales; for "none" the backward pass computes them. With `return_soft_hard_loss` a `SoftHardLoss` of three.

    Raises:
        ValueError: shapes that do not fit, an unknown option, a label_weight without labels, labels or indices outside
            the vocabulary (on CPU), a teacher that requires grad, or not exactly one of teacher_hidden_states and
            teacher_logits.
        TypeError: tensors that are not floating-point; a head and hidden states of different dtypes without autocast.

    The vocabularies V and V' may differ: see the module's docstring. On a GPU a label or an index outside the
    vocabulary makes the loss NaN, and float64 is computed by the reference, which has all logits in memory.
    """
    student = (student_hidden_states, student_weight, student_bias)
    teacher = (teacher_hidden_states, teacher_weight, teacher_bias, teacher_logits)
    student, teacher = _autocast(student), _autocast(teacher)
    sparse = teacher_indices is not None
    _check(student, teacher, sparse, labels, temperature, direction, beta, label_weight, ignore_index, chunk_tokens)
    check_choice("reduction", reduction, REDUCTIONS)
    _distillation.check_num_items(num_items_in_batch, reduction)
    _check_scaling(
        student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap, teacher_logits is not None
    )
    keep = None if labels is None else labels != ignore_index
    if teacher_indices is not None:
        _check_indices(teacher_indices, teacher_logits, len(student[1]), keep)
    hidden, weight, bias = _flat(student[0]), student[1], student[2]
    assert hidden is not None
    assert weight is not None
    tensors = (
        hidden,
        weight,
        bias,
        *(_flat(teacher[0]), teacher[1], teacher[2], _flat(teacher[3])),
        _flat(teacher_indices),
        None if labels is None else labels.reshape(-1),
    )
    keep = None if keep is None else keep.reshape(-1)
    scale = _distillation.reduction_scale(reduction, hidden, 1, keep, num_items_in_batch)
    reduce = reduction != "none"
    name = _resolve(hidden, teacher)
    if name == "reference":
        losses = fused_linear_kd_loss_reference(
            hidden,
            weight,
            tensors[3],
            tensors[4],
            tensors[8],
            student_bias=bias,
            teacher_bias=tensors[5],
            teacher_logits=tensors[6],
            teacher_indices=tensors[7],
            scale=scale,
            temperature=temperature,
            reduce=reduce,
            t2_scale=t2_scale,
            direction=direction,
            beta=beta,
            label_weight=label_weight,
            kd_weight=kd_weight,
            ignore_index=ignore_index,
            student_logit_scale=student_logit_scale,
            student_softcap=student_softcap,
            teacher_logit_scale=teacher_logit_scale,
            teacher_softcap=teacher_softcap,
        )
    else:
        options = (
            temperature,
            _distillation.loss_scale(temperature, t2_scale),
            direction,
            beta,
            label_weight,
            kd_weight,
            ignore_index,
            student_logit_scale,
            student_softcap,
            teacher_logit_scale,
            teacher_softcap,
            reduce,
            return_soft_hard_loss,
            chunk_tokens or FusedLinearConfig.choose(len(hidden), len(weight), hidden.dtype).chunk_tokens,
        )
        losses = _chunked(name, tensors, scale, options, reduce)
    shape = student_hidden_states.shape[:-1] if not reduce else torch.Size()
    loss = losses.loss.reshape(shape)
    if not return_soft_hard_loss:
        return loss
    hard = None if labels is None or losses.hard_loss is None else losses.hard_loss.reshape(shape)
    return SoftHardLoss(loss, losses.soft_loss.reshape(shape), hard)


def _chunked(
    name: str, tensors: tuple[Any, ...], scale: float | Tensor, options: tuple[Any, ...], reduce: bool
) -> SoftHardLoss:
    """By the kernels of backend `name`."""
    hidden, weight, bias, *_ = tensors
    if not reduce and wants_gradient(tensors):
        compute = _distillation.compute_of(name, _forward, _launch)
        loss, soft, hard, _ = _TokenLosses.apply(compute, options, *tensors)
        return SoftHardLoss(loss, soft, hard)
    gradients = torch.is_grad_enabled()
    flags = (
        gradients and hidden.requires_grad,
        gradients and weight.requires_grad,
        gradients and bias is not None and bias.requires_grad,
    )
    if isinstance(scale, float):
        scaled = None if scale == 1 else hidden.new_full((), scale, dtype=_distillation.accumulate_dtype(hidden))
    else:
        scaled = scale
    return SoftHardLoss(
        *_distillation.fused_losses(name, _forward, _launch, 1.0, (*options, *flags), (*tensors, scaled), reported=2)
    )


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
    sparse: bool,
    labels: Tensor | None,
    temperature: float,
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
    _check_teacher(teacher, hidden, leading, sparse)
    _distillation.check_positive("temperature", temperature)
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


def _check_teacher(teacher: Tensors, student: Tensor, leading: torch.Size, sparse: bool) -> None:
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
                f"{name}: got a tensor that requires grad, but the teacher gets no gradient; run it under "
                "torch.no_grad() and freeze its head with requires_grad_(False), or pass detach()"
            )
    if hidden is not None and weight is not None:
        _check_head("teacher", hidden, weight, bias, leading)
        check_same_device("teacher_hidden_states", hidden, "student_hidden_states", student)
    if logits is not None:
        if not logits.is_floating_point():
            raise TypeError(f"teacher_logits: got dtype {logits.dtype}, expected a floating-point dtype")
        if logits.dim() < 2 or logits.shape[:-1] != leading or logits.shape[-1] < (1 if sparse else 2):
            raise ValueError(f"teacher_logits: got shape {tuple(logits.shape)}, expected {[*leading, 'V']}")
        check_same_device("teacher_logits", logits, "student_hidden_states", student)


def _check_labels(labels: Tensor, leading: torch.Size, hidden: Tensor, classes: int, ignore_index: int) -> None:
    _distillation.check_token_labels(labels, leading, "student_hidden_states", hidden)
    if values_are_free(labels):
        counted = labels[labels != ignore_index]
        if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= classes):
            raise ValueError(
                f"labels: got values from {int(counted.min())} to {int(counted.max())}, expected 0 to {classes - 1}, "
                f"or ignore_index={ignore_index}"
            )


def _check_scaling(
    student_logit_scale: float,
    student_softcap: float | None,
    teacher_logit_scale: float,
    teacher_softcap: float | None,
    ready: bool,
) -> None:
    sides = {"student": (student_logit_scale, student_softcap), "teacher": (teacher_logit_scale, teacher_softcap)}
    for side, (logit_scale, softcap) in sides.items():
        _distillation.check_positive(f"{side}_logit_scale", logit_scale)
        if softcap is not None:
            _distillation.check_positive(f"{side}_softcap", softcap)
    if ready and sides["teacher"] != (1, None):
        raise ValueError(
            f"teacher_logits: got teacher_logit_scale={teacher_logit_scale} and teacher_softcap={teacher_softcap} "
            "with them, but teacher_logits are used unchanged; scale them yourself and leave both out"
        )


def _check_indices(indices: Tensor, logits: Tensor | None, classes: int, keep: Tensor | None) -> None:
    if logits is None:
        raise ValueError("teacher_indices: got indices without teacher_logits, whose classes they name; pass both")
    if indices.dtype != torch.int64:
        raise TypeError(f"teacher_indices: got dtype {indices.dtype}, expected torch.int64")
    if indices.shape != logits.shape:
        raise ValueError(
            f"teacher_indices: got shape {tuple(indices.shape)}, expected that of teacher_logits, {tuple(logits.shape)}"
        )
    check_same_device("teacher_indices", indices, "teacher_logits", logits)
    if not values_are_free(indices):
        return
    counted = (indices if keep is None else indices[keep]).sort(-1).values
    if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= classes):
        raise ValueError(
            f"teacher_indices: got values from {int(counted.min())} to {int(counted.max())}, expected 0 to "
            f"{classes - 1}, classes of the student"
        )
    if (counted.diff() == 0).any():
        raise ValueError("teacher_indices: got the same class twice for one token, expected K different ones")
