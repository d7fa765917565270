"""What the tests of the distillation losses share: running a loss on a backend, and the bar for its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    triton_reason = needs.cuda()
    if triton_reason is None and not (torch.cuda.is_available() or _triton.interpreting):
        triton_reason = "neither a GPU nor Triton's interpreter"
    return [
        pytest.param("cpu", marks=pytest.mark.skipif(needs.cpu() is not None, reason=str(needs.cpu()))),
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
    **options: Any,
) -> None:
    """Value and gradients of `backend` against float64, with plain PyTorch in the tensors' dtype as the bar.

    `slack` units in the last place are on top, relative to the element, and for float32 sums relative to the largest
    element too: what a small element loses is decided by the size of the terms that cancelled in it.
    """
    actual, actual_gradients = run(backend, loss, tensors, wanted, **options)
    wide = tuple(tensor.double() for tensor in tensors)
    truth, true_gradients = run("reference", loss, wide, wanted, **options)
    plain, plain_gradients = run("reference", loss, tensors, wanted, **options)
    eps = torch.finfo(actual.dtype).eps
    pairs = zip([actual, *actual_gradients], [truth, *true_gradients], [plain, *plain_gradients], strict=True)
    for ours, exact, torch_result in pairs:
        quantum = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
        largest = float(exact[exact.isfinite()].abs().max()) if exact.isfinite().any() else 0.0
        assert_within_budget(ours, exact, torch_result, slack=slack, absolute=8 * slack * eps * largest + quantum)


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
