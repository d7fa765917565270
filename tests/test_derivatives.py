"""Derivatives of every op beyond a plain backward pass: right, or an error that says what to use; never zero."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from every_op import OPS, Op, Tensors
from torch import Tensor
from torch.autograd import forward_ad

import fastkd_kernels as fk
from fastkd_kernels import _backend, _triton

DIFFERENTIABLE = [(op, name) for op in OPS if op.differentiable for name in op.differentiable[:1]]
every_op = pytest.mark.parametrize(("op", "argument"), DIFFERENTIABLE, ids=[op.name for op, _ in DIFFERENTIABLE])


def scalar_of(op: Op, tensors: Tensors, argument: str) -> Callable[[Tensor], Tensor]:
    """A number that depends on all results of the op, as a function of one of its arguments."""

    def function(value: Tensor) -> Tensor:
        results = [r for r in op.call({**tensors, argument: value}) if r.is_floating_point()]
        weights = [torch.linspace(0.5, 2.0, r.numel()).view(r.shape).to(r.dtype) for r in results]
        return torch.stack([(weight * result).sum() for weight, result in zip(weights, results, strict=True)]).sum()

    return function


def gradient_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


def prepared(op: Op, argument: str) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    tensors = op.make()
    return scalar_of(op, tensors, argument), tensors[argument], torch.randn_like(tensors[argument])


@every_op
def test_forward_mode_agrees_with_the_gradient(op: Op, argument: str) -> None:
    function, at, direction = prepared(op, argument)
    expected = (gradient_of(function, at) * direction).sum()
    assert expected != 0
    _, tangent = torch.func.jvp(function, (at,), (direction,))
    # forward mode makes float64 of a scalar of float32 times a Python number
    torch.testing.assert_close(tangent, expected, rtol=1e-3, atol=1e-4, check_dtype=False)
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(at, direction))
        tangent = forward_ad.unpack_dual(dual).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, expected, rtol=1e-3, atol=1e-4, check_dtype=False)


@every_op
def test_jacobians_are_the_gradient(op: Op, argument: str) -> None:
    function, at, _ = prepared(op, argument)
    expected = gradient_of(function, at)
    for jacobian in (torch.func.jacfwd, torch.func.jacrev, torch.func.grad):
        torch.testing.assert_close(jacobian(function)(at), expected, rtol=1e-3, atol=1e-4, check_dtype=False)


@every_op
def test_gradients_of_a_batch_are_those_one_by_one(op: Op, argument: str) -> None:
    function, at, _ = prepared(op, argument)
    batch = torch.stack([at, 0.5 * at, -at])
    expected = torch.stack([gradient_of(function, one) for one in batch])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(function))(batch), expected, rtol=1e-3, atol=1e-4)


@every_op
def test_the_hessian_is_the_slope_of_the_gradient(op: Op, argument: str) -> None:
    function, at, direction = prepared(op, argument)
    step = 1e-2
    slope = (gradient_of(function, at + step * direction) - gradient_of(function, at - step * direction)) / (2 * step)
    hessian = torch.func.hessian(function)(at).reshape(at.numel(), at.numel())
    product = (hessian @ direction.flatten()).view_as(at)
    torch.testing.assert_close(product, slope, rtol=0.02, atol=0.02 * float(slope.abs().max()) + 1e-3)


@every_op
@pytest.mark.parametrize("backend", [None, "cuda"])
def test_gradients_of_many_outputs_at_once(op: Op, argument: str, backend: str | None) -> None:
    """`is_grads_batched`, and a vmap over a backward pass: no kernel can read such a tensor."""
    if backend is not None and not (_backend.registered_ops()[op.backends].interpretable and _triton.interpreting):
        pytest.skip("needs Triton's interpreter")
    function, at, _ = prepared(op, argument)
    expected = gradient_of(function, at)
    scales = torch.tensor([1.0, -2.0])
    with fk.backend(backend) if backend else nullcontext():
        leaf = at.detach().clone().requires_grad_()
        loss = function(leaf)
        (batched,) = torch.autograd.grad(loss, leaf, scales, retain_graph=True, is_grads_batched=True)
        mapped = torch.func.vmap(lambda scale: torch.autograd.grad(loss, leaf, scale, retain_graph=True)[0])(scales)
    for result in (batched, mapped):
        torch.testing.assert_close(result, torch.stack([expected, -2 * expected]), rtol=1e-3, atol=1e-4)


@every_op
@pytest.mark.parametrize("inner", ["leaf", "inner"])
def test_a_penalty_on_the_gradient_counts_or_raises(op: Op, argument: str, inner: str) -> None:
    """Through a leaf, and through a tensor that only the graph holds."""
    function, at, _ = prepared(op, argument)

    def penalised() -> Tensor:
        leaf = at.detach().clone().requires_grad_()
        given = leaf if inner == "leaf" else leaf * 1.5
        loss = function(given)
        (gradient,) = torch.autograd.grad(loss, given, create_graph=True)
        return torch.autograd.grad(loss + 10 * gradient.square().sum(), leaf)[0]

    with fk.backend("reference"):
        expected = penalised()
    if op.second_derivative is not None:
        with pytest.raises(RuntimeError, match=op.second_derivative):
            penalised()
        return
    result = penalised()
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@every_op
def test_a_forced_kernel_refuses_what_it_cannot_differentiate(op: Op, argument: str) -> None:
    if fk.missing_kernels([op.backends], "cpu") is not None:
        pytest.skip("needs the extension")
    function, at, direction = prepared(op, argument)
    with fk.backend("cpu"), pytest.raises(fk.BackendUnavailableError, match=r"torch\.func"):
        torch.func.jvp(function, (at,), (direction,))


def test_a_recorded_backward_pass_that_nobody_differentiates_is_allowed() -> None:
    student = torch.randn(4, 3, requires_grad=True)
    (plain,) = torch.autograd.grad(fk.kd_loss(student, torch.randn(4, 3)), student, create_graph=False)
    torch.manual_seed(0)
    student.grad = None
    fk.kd_loss(student, torch.randn(4, 3)).backward(create_graph=True)
    assert student.grad is not None
    assert student.grad.shape == plain.shape


def test_a_loss_may_be_added_to_in_place() -> None:
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    loss = fk.kd_loss(student, teacher)
    loss += 1
    loss.backward()
    assert student.grad is not None


def test_the_loss_keeps_no_input_alive() -> None:
    """Only the gradient is saved, not the logits that made it."""
    saved: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    student = torch.randn(40, 30, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fk.kd_loss(student, torch.randn(40, 30))
    assert sum(shape.numel() for shape in saved) == 40 * 30
