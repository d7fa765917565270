"""What the distillation losses share: their options, the divergences in plain PyTorch, and the scaling of gradients.

For tempered distributions p = softmax(t / tau) of the teacher and q = softmax(s / tau) of the student:

    forward    KL(p || q) = sum_c p_c (ln p_c - ln q_c)          the classic distillation loss (Hinton et al., 2015)
    reverse    KL(q || p)
    jsd        beta KL(p || m) + (1 - beta) KL(q || m)             Jensen-Shannon, generalised (Agarwal et al., 2024)
               with m = beta p + (1 - beta) q; beta = 0 is forward and beta = 1 reverse, as in TRL and Liger
    regression sum_c (t_c / tau - s_c / tau)^2                    for scores: a softmax over one class is constant

and the gradients with respect to t / tau and s / tau, from a_c = dD/dp_c p_c and b_c = dD/dq_c q_c up to a constant:

    forward    a = p (ln p - ln q),      dD/ds = q - p
    reverse    b = q (ln q - ln p),      dD/dt = p - q
    jsd        a = beta p (ln p - ln m),  b = (1 - beta) q (ln q - ln m)
    otherwise  dD/dt = a - p sum(a),     dD/ds = b - q sum(b)

A logit of -inf masks its class: probability 0, and 0 ln 0 = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd_kernels import _distillation_triton
from fastkd_kernels._arguments import plain
from fastkd_kernels._derivatives import differentiated_once, is_batched, wants_gradient
from fastkd_kernels.checks import check_same_device

# the position in these tuples is the code that the kernels understand
DIRECTIONS = ("forward", "reverse", "jsd")
MIXES = ("logits", "probs", "loss")
ATTENTION_SPACES = ("logits", "log_probs", "probs")

REDUCTIONS = ("batchmean", "mean", "sum", "none")
LAYER_REDUCTIONS = ("sum", "mean")
TASKS = ("classification", "regression")
SQUARED = len(DIRECTIONS)
"""The code of the squared error among the divergences."""


def check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: got {value}, expected a finite number above 0")


def check_logits(name: str, logits: Tensor, shape: str) -> None:
    """`shape` is written like "[M, B, C]"; dots stand for one dimension or more."""
    if not logits.is_floating_point():
        raise TypeError(f"{name}: got dtype {logits.dtype}, expected a floating-point dtype")
    needed = shape.count(",") + 1
    if logits.dim() < needed or (logits.dim() > needed and "..." not in shape):
        of_rows = ", at least one dimension before the last" if "..." in shape else ""
        raise ValueError(f"{name}: got shape {tuple(logits.shape)}, expected {shape}{of_rows}")


def check_classes(name: str, logits: Tensor, task: str) -> None:
    needed = 2 if task == "classification" else 1
    if logits.shape[-1] < needed:
        raise ValueError(
            f"{name}: got C={logits.shape[-1]}, {task} needs at least {needed}; a softmax over one class is constant, "
            'so scores need task="regression"'
        )


def check_teacher_gradient(name: str, teacher: Tensor, detach_teacher: bool) -> None:
    if detach_teacher and teacher.requires_grad:
        raise ValueError(
            f"{name}: got a tensor that requires grad; run the teacher under torch.no_grad(), or pass "
            "detach_teacher=False for the gradient of the loss with respect to the teacher"
        )


def check_beta(beta: float | None, direction: str) -> None:
    if beta is None:
        return
    if direction != "jsd":
        raise ValueError(
            f'beta: got {beta} with direction="{direction}", but only direction="jsd" uses '
            "it; leave it out (beta is not the weight of the term)"
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: got {beta}, expected a number from 0 (forward) to 1 (reverse)")


def divergence_code(direction: str, task: str, beta: float | None = None) -> tuple[int, float]:
    """The code of the kernels, and the teacher's share of the mixture where that is of "jsd"."""
    if task == "regression":
        return SQUARED, 0.5
    share = 0.5 if beta is None else float(beta)
    # at the ends, where the mixture is one of the two, the published definitions take the divergences it tends to
    if direction == "jsd" and share in (0.0, 1.0):
        direction = "reverse" if share else "forward"
    return DIRECTIONS.index(direction), share


def check_num_items(num_items_in_batch: float | Tensor | None, reduction: str) -> None:
    if num_items_in_batch is None:
        return
    if reduction != "batchmean":
        raise ValueError(
            f'num_items_in_batch: got a number with reduction="{reduction}", but only '
            '"batchmean" divides by it; leave it out'
        )
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                f"num_items_in_batch: got shape {tuple(num_items_in_batch.shape)}, expected a number or a tensor of one"
            )
        return
    if not num_items_in_batch >= 0:
        raise ValueError(f"num_items_in_batch: got {num_items_in_batch}, expected 0 or more")


def check_token_labels(labels: Tensor, leading: torch.Size, name: str, other: Tensor) -> None:
    """`name` and `other` are the tensor whose leading dimensions the labels share."""
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got dtype {labels.dtype}, expected torch.int64")
    if labels.shape != leading:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected {list(leading)}")
    check_same_device("labels", labels, name, other)


def loss_scale(temperature: float, t2_scale: bool) -> float:
    return temperature**2 if t2_scale else 1.0


def reduction_factor(reduction: str, batch: int, classes: int) -> float:
    """What the sum over all rows is multiplied with; an empty batch has the loss 0."""
    if reduction == "batchmean":
        return 1 / max(batch, 1)
    return 1 / max(batch * classes, 1) if reduction == "mean" else 1.0


def reduction_scale(
    reduction: str, rows: Tensor, classes: int, keep: Tensor | None, num_items_in_batch: float | Tensor | None
) -> float | Tensor:
    """`reduction_factor` where only the rows of `keep` count, or where somebody else has counted them.

    Args:
        rows: [B, ...], of the losses' dtype; its length and device are asked for.
        keep: [B] bool; None keeps all.

    Returns:
        A number, or a scalar tensor where the count is on the device: waiting for it would stop the host.
    """
    if reduction in ("sum", "none"):
        return 1.0
    if num_items_in_batch is None:
        if keep is None:
            return reduction_factor(reduction, len(rows), classes)
        count = keep.sum().clamp(min=1).to(accumulate_dtype(rows))
        return (count * classes if reduction == "mean" else count).reciprocal()
    if isinstance(num_items_in_batch, Tensor):
        count = num_items_in_batch.detach().reshape(()).to(rows.device, accumulate_dtype(rows))
        return count.clamp(min=1).reciprocal()
    return 1 / max(num_items_in_batch, 1)


def kept(rows: Tensor, keep: Tensor | None) -> Tensor:
    """Zeros in the place of ignored rows, which may hold anything."""
    return rows if keep is None else rows.masked_fill(~keep[:, None], 0)


def widen(*tensors: Tensor) -> list[Tensor]:
    """All in the dtype in which losses are computed: float64 where one of them is, else float32."""
    dtype = accumulate_dtype(*tensors)
    return [tensor.to(dtype) for tensor in tensors]


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def log_distribution(logits: Tensor, temperature: float, divergence: int) -> Tensor:
    """What `divergence_reference` compares: log-probabilities, or the scaled scores of a regression."""
    scaled = logits / temperature
    return scaled if divergence == SQUARED else scaled.log_softmax(-1)


def divergence_reference(log_p: Tensor, log_q: Tensor, divergence: int, beta: float = 0.5) -> Tensor:
    """D(p, q) over the last dimension, from `log_distribution` of teacher and student."""
    if divergence == SQUARED:
        return (log_p - log_q).square().sum(-1)
    direction = DIRECTIONS[divergence]
    if direction == "forward":
        return _expected_log_ratio(log_p, log_q)
    if direction == "reverse":
        return _expected_log_ratio(log_q, log_p)
    # both masked: any finite value serves, its probability is 0
    masked = (log_p == -math.inf) & (log_q == -math.inf)
    shares = log_p.masked_fill(masked, 0) + math.log(beta), log_q.masked_fill(masked, 0) + math.log1p(-beta)
    log_mixture = torch.logaddexp(*shares)
    return beta * _expected_log_ratio(log_p, log_mixture) + (1 - beta) * _expected_log_ratio(log_q, log_mixture)


def _expected_log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)


def dense_rows(logits: Tensor) -> Tensor:
    """Logits whose neighbouring classes are neighbours in memory; copied only where they are not."""
    logits = plain(logits)
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a gradient for `dtype` waits for its backward pass.

    In float16 it would underflow before a `GradScaler` can lift it: its scale arrives in the backward pass only.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def gradient_like(logits: Tensor, wanted: bool) -> Tensor:
    """Room for a contiguous gradient; without elements where it is not wanted."""
    return logits.new_empty(logits.shape if wanted else (0,), dtype=gradient_dtype(logits.dtype))


def scaled_gradient(gradient: Tensor, dtype: torch.dtype, grad_output: Tensor, factor: float) -> Tensor:
    """gradient * grad_output * factor in a new tensor, rounded to `dtype` once.

    Args:
        gradient: [..., C] of the sum of all rows. Never written to, as a second backward pass reads it again.
        dtype: of what the gradient is for.
        grad_output: a scalar, or one value a row, broadcast from the left; any strides.
        factor: of the reduction.
    """
    scale = grad_output if factor == 1 else grad_output * factor
    if not scale.dim():
        # a scalar is multiplied with at its own precision, and without a copy of the gradient at that precision
        return (gradient * scale).to(dtype)
    scale = scale.unsqueeze(-1)
    if gradient.dtype in (torch.float32, torch.float64):
        return (gradient * scale).to(dtype)
    return (gradient.float() * scale).to(dtype)


def scaled_gradients(
    gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype], grad_output: Tensor, factor: float
) -> list[Tensor]:
    """`scaled_gradient` of gradients that share their number of classes, or a scalar `grad_output`."""
    pairs = zip(gradients, dtypes, strict=True)
    return [scaled_gradient(gradient, dtype, grad_output, factor) for gradient, dtype in pairs]


def summed_over_layers(gradient: Tensor, grad_output: Tensor, factor: float) -> Tensor:
    """The teacher's gradient [N, B, C] from [M, N, B, C], which keeps the M student layers apart."""
    if grad_output.dim():
        grad_output = grad_output[:, None, :, None]
    return (gradient * (grad_output * factor)).sum(0)


class FusedLoss(torch.autograd.Function):
    """A loss whose forward pass also computes the gradients of the sum of its rows; backward scales them.

    An autograd.Function around the op costs less a call than `torch.library.register_autograd` on the op, which
    matters where the kernel takes a few microseconds.
    """

    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[..., tuple[Tensor, ...]],
        scale: Callable[[Sequence[Tensor], Sequence[torch.dtype], Tensor, float], list[Tensor]],
        factor: float,
        reported: int,
        options: tuple[Any, ...],
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        """compute(*tensors, *options) returns the loss, what is `reported` without a gradient, and the gradients.

        Gradients are those of the first tensors, in their order. The last result has no elements: it links what the
        backward pass makes to the inputs without keeping them.
        """
        loss, *others = compute(*tensors, *options)
        reports, gradients = others[:reported], others[reported:]
        link = loss.new_empty(0)
        ctx.save_for_backward(link, *gradients)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.factor = scale, factor
        differentiable = tensors[: len(gradients)]
        ctx.differentiable = [None if tensor is None else (tensor.dim(), tensor.dtype) for tensor in differentiable]
        ctx.inputs = len(tensors)
        if reports:
            ctx.mark_non_differentiable(*reports)
        return loss, *reports, link

    @staticmethod
    def backward(ctx: Any, grad_of_loss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        results: list[Tensor | None] = [None] * ctx.inputs
        if grad_of_loss is None:
            return None, None, None, None, None, *results
        link, *gradients = ctx.saved_tensors
        # a batch of gradients at a time is a tensor that no kernel can read
        scale = scaled_gradients if is_batched(grad_of_loss) else ctx.scale
        whole: list[tuple[int, torch.dtype, Tensor]] = []
        # batched tensors cannot be detached
        with torch.no_grad():
            for position, gradient in enumerate(gradients):
                if not ctx.needs_input_grad[5 + position]:
                    continue
                dims, dtype = ctx.differentiable[position]
                if gradient.dim() == dims:
                    whole.append((position, dtype, gradient))
                else:
                    results[position] = summed_over_layers(gradient, grad_of_loss, ctx.factor).to(dtype)
            positions, dtypes, kept = zip(*whole, strict=True) if whole else ((), (), ())
            scaled = scale(kept, dtypes, grad_of_loss, ctx.factor)
        for position, result in zip(positions, scaled, strict=True):
            results[position] = result
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            results = differentiated_once(results, (link, grad_of_loss))
        return None, None, None, None, None, *results


def fused_losses(
    backend: str,
    op: Callable[..., tuple[Tensor, ...]],
    launch: Callable[..., tuple[Tensor, ...]],
    factor: float,
    options: tuple[Any, ...],
    tensors: tuple[Tensor | None, ...],
    reported: int = 0,
) -> tuple[Tensor, ...]:
    """compute(*tensors, *options)[: 1 + reported], the first differentiable in those tensors that require grad.

    Args:
        backend: "cuda" or "cpu".
        op: the registered op.
        launch: the Triton kernel behind it, which eager mode calls without the cost of the dispatcher, and the
            interpreter for tensors that are not on a GPU.
        reported: how many results without a gradient come behind the loss.
    """
    compute = compute_of(backend, op, launch)
    scale = _distillation_triton.scaled_gradients if compute is launch else scaled_gradients
    if wants_gradient(tensors):
        return FusedLoss.apply(compute, scale, factor, reported, options, *tensors)[: 1 + reported]
    return compute(*tensors, *options)[: 1 + reported]


def compute_of(
    backend: str, op: Callable[..., tuple[Tensor, ...]], launch: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., tuple[Tensor, ...]]:
    """Which of the two runs, see `fused_losses`."""
    return launch if backend == "cuda" and not torch.compiler.is_compiling() else op


def fused_loss(*arguments: Any) -> Tensor:
    """The loss alone of `fused_losses`, whose arguments it has."""
    return fused_losses(*arguments)[0]
