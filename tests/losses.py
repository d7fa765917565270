"""What the tests of the distillation losses share: running a loss on a backend, and the bar for its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gpu_arithmetic
import pytest
import torch
from error_budget import assert_within_budget
from torch import Tensor

import fastkd_kernels as fk
from fastkd_kernels import _backend, _triton

LOW_PRECISION = (torch.bfloat16, torch.float16)


def kernel_backends(op: str) -> list[Any]:
    """Both kernels of `op`: C++ on CPU tensors, Triton on a GPU or in its interpreter."""
    needs = _backend.registered_ops()[op]
    triton_reason = needs.cuda
    if triton_reason is None and not (torch.cuda.is_available() or _triton.interpreting):
        triton_reason = "neither a GPU nor Triton's interpreter"
    return [
        pytest.param("cpu", marks=pytest.mark.skipif(needs.cpu is not None, reason=str(needs.cpu))),
        pytest.param("cuda", marks=pytest.mark.skipif(triton_reason is not None, reason=str(triton_reason))),
    ]


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "cuda" and torch.cuda.is_available() else "cpu")


def run(
    backend: str, loss: Callable[..., Tensor], tensors: tuple[Tensor, ...], wanted: tuple[bool, ...], **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients for the `wanted` tensors, from a grad_output that is different for every row."""
    inputs = [
        tensor.detach().to(device_of(backend)).requires_grad_(want)
        for tensor, want in zip(tensors, wanted, strict=True)
    ]
    with fk.backend(backend):
        value = loss(*inputs, **options)
    rows = torch.linspace(0.5, 1.5, max(value.numel(), 1), dtype=value.dtype, device=value.device)
    value.backward(rows[: value.numel()].reshape(value.shape))
    return value.detach(), [tensor.grad for tensor, want in zip(inputs, wanted, strict=True) if want]


def assert_as_accurate_as_torch(
    backend: str,
    loss: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    wanted: tuple[bool, ...],
    slack: float = 2.0,
    rounds_within: bool = False,
    divergences: float = 0.0,
    **options: Any,
) -> None:
    """Value and gradients of `backend` against float64, with plain PyTorch in the tensors' dtype as the bar.

    Every element may be off by what plain PyTorch is off, plus `slack` units in its last place, plus what float32 makes
    of the whole tensor: `slack` times the largest error of PyTorch when it is given the same numbers in float32, and
    a few units in the last place of the largest element. float16 adds its smallest step.

    `rounds_within`: both round to the tensors' dtype on the way, as between matrix products. What that does to one
    element is chance, so `slack` times PyTorch's largest error in the tensor's own dtype is allowed instead.

    `divergences`: how many times a value counts a divergence of two distributions, for kernels whose exponentials and
    logarithms are approximate (`error_of_a_divergence`).
    """
    actual, actual_gradients = run(backend, loss, tensors, wanted, **options)
    wide = tuple(tensor.double() for tensor in tensors)
    single = tuple(tensor.float() for tensor in tensors)
    truth, true_gradients = run("reference", loss, wide, wanted, **options)
    plain, plain_gradients = run("reference", loss, tensors, wanted, **options)
    fine, fine_gradients = run("reference", loss, single, wanted, **options)
    approximate = divergences * error_of_a_divergence(backend, max(tensor.shape[-1] for tensor in tensors))
    for ours, exact, torch_result, in_float32, more in zip(
        [actual, *actual_gradients],
        [truth, *true_gradients],
        [plain, *plain_gradients],
        [fine, *fine_gradients],
        [approximate] + [0.0] * len(actual_gradients),
        strict=True,
    ):
        quantum = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
        absolute = slack * _largest_error(torch_result if rounds_within else in_float32, exact) + quantum + more
        assert_within_budget(ours, exact, torch_result, slack=slack, absolute=absolute)


def error_of_a_divergence(backend: str, classes: int) -> float:
    """What the instructions of a GPU may add to sum_c p_c (ln p_c - ln q_c), by the bounds in `gpu_arithmetic`.

    ln p_c = x_c - ln sum exp x. Exponentials are off by at most 2.5 eps of themselves and so is their sum, which moves
    its logarithm by 2.5 eps; the logarithm is off by eps of itself, at most eps ln C. As sum_c p_c = 1, the divergence
    moves by as much, once for p and once for q.
    """
    if backend != "cuda" or not (torch.cuda.is_available() or gpu_arithmetic.is_on()):
        return 0.0
    return 2 * torch.finfo(torch.float32).eps * (2.5 + math.log(classes))


def _largest_error(result: Tensor, exact: Tensor) -> float:
    """At least eight float32 units in the last place of the largest element."""
    finite = exact.isfinite()
    if not finite.any():
        return 0.0
    off = (result.double() - exact)[finite].abs().max()
    return float(off + 8 * torch.finfo(torch.float32).eps * exact[finite].abs().max())


def assert_parity(
    backend: str, loss: Callable[..., Tensor], tensors: tuple[Tensor, ...], wanted: tuple[bool, ...], **options: Any
) -> None:
    """Value and gradients of `backend` are those of the reference, up to the rounding of the tensors' dtype."""
    actual, actual_gradients = run(backend, loss, tensors, wanted, **options)
    wide = tuple(tensor.double() for tensor in tensors)
    truth, true_gradients = run("reference", loss, wide, wanted, **options)
    plain, plain_gradients = run("reference", loss, tensors, wanted, **options)
    exactly = tensors[0].dtype == torch.float64
    for ours, exact, torch_result in zip(
        [actual, *actual_gradients], [truth, *true_gradients], [plain, *plain_gradients], strict=True
    ):
        largest = float(exact[exact.isfinite()].abs().max()) if exact.numel() else 0.0
        allowed = 1e-10 * largest + 1e-12 if exactly else 4 * _largest_error(torch_result, exact) + 1e-6
        torch.testing.assert_close(ours.double().cpu(), exact, rtol=0, atol=allowed)


def assert_equal_gradients_three_times(
    backend: str, loss: Callable[..., Tensor], tensors: tuple[Tensor, ...], **options: Any
) -> None:
    inputs = [tensor.to(device_of(backend)) for tensor in tensors]
    inputs[0].requires_grad_()
    with fk.backend(backend):
        value = loss(*inputs, **options)
    scale = torch.full_like(value, 3.0)
    first, second, third = (torch.autograd.grad(value, inputs[0], scale, retain_graph=True)[0] for _ in range(3))
    assert first.abs().max() > 0
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    torch.testing.assert_close(third, first, rtol=0, atol=0)
    (single,) = torch.autograd.grad(value, inputs[0], torch.ones_like(value))
    torch.testing.assert_close(first, 3 * single)


def assert_compiles_into_one_graph(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """`torch.compile` finds no break, and gives the value and the gradients of the eager loss."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    compiled, eager = torch.compile(loss, fullgraph=True)(*inputs), loss(*inputs)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, wanted), torch.autograd.grad(eager, wanted))
