"""Gradients in bfloat16 against float64, by a bar of their own: at most 1 % of the whole gradient, near and far.

The error budget of other tests asks for what plain PyTorch reaches, and cannot see a mistake that both make.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from every_op import OPS, Op, Tensors
from losses import device_of, kernel_backends
from torch import Tensor

import fastkd_kernels as fk
from fastkd_kernels.ops.fused_linear_kd_loss import _product

LARGEST_ERROR = 1e-2

# a student's argument, and the teacher's that it comes near to
TEACHERS = {
    "student_logits": "teacher_logits",
    "student_layer_logits": "teacher_layer_logits",
    "student_hidden_states": "teacher_hidden_states",
    "student_weight": "teacher_weight",
    "student_bias": "teacher_bias",
}


def brought_near(tensors: Tensors, distance: float | None) -> Tensors:
    """The student `distance` away from its teacher; None leaves it where it is."""
    if distance is None:
        return tensors
    near = dict(tensors)
    for student, teacher in TEACHERS.items():
        if student not in tensors or teacher not in tensors:
            continue
        target = tensors[teacher]
        # of layers the student has fewer
        target = target[: len(tensors[student])] if student == "student_layer_logits" else target
        near[student] = target if distance == 0 else target + distance * torch.randn_like(target)
    return near


def gradients(op: Op, tensors: Tensors, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
    dtypes = dict.fromkeys(op.precise, torch.promote_types(dtype, torch.float32))
    given = {
        name: tensor.to(dtypes.get(name, dtype)).requires_grad_(name in op.differentiable)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }
    with fk.backend(backend or "reference"):
        results = [result for result in op.call(given) if result.is_floating_point()]
    weights = [torch.linspace(0.5, 2.0, result.numel(), dtype=dtype).view(result.shape) for result in results]
    total = torch.stack([(w.double() * r.double()).sum() for w, r in zip(weights, results, strict=True)]).sum()
    return list(torch.autograd.grad(total, [given[name] for name in op.differentiable]))


def in_bfloat16(tensors: Tensors) -> Tensors:
    return {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.double().flatten() for tensor in tensors]).norm())


def error(ours: list[Tensor], exact: list[Tensor]) -> float:
    return norm([one.double() - other.double() for one, other in zip(ours, exact, strict=True)])


LOSSES = [op for op in OPS if op.differentiable and "student" in op.differentiable[0] and "scores" not in op.name]
OTHERS = [op for op in OPS if op.differentiable and op not in LOSSES]


def _mixed(tensors: Tensors) -> list[Tensor]:
    weights = {"label_weight": 0.0, "kd_weight": 0.3, "intermediate_weight": 0.5}
    return [fk.distillation_loss(**tensors, labels=None, **weights, temperature=2.0)]


def _linear(tensors: Tensors, **options: Any) -> list[Tensor]:
    return [fk.fused_linear_kd_loss(**tensors, chunk_tokens=4, **options)]


UNLABELLED: dict[str, Callable[[Tensors], list[Tensor]]] = {
    "distillation_loss": _mixed,
    "fused_linear_kd_loss": _linear,
    # one softcap for both, without which equal hidden states would not have equal logits
    "fused_linear_kd_loss tokens": partial(
        _linear,
        reduction="none",
        student_softcap=2.0,
        teacher_softcap=2.0,
        student_logit_scale=0.5,
        teacher_logit_scale=0.5,
    ),
    "fused_linear_kd_loss known": _linear,
}


@pytest.mark.parametrize("distance", [None, 0.05, 0.0], ids=["far", "near", "equal"])
@pytest.mark.parametrize("op", LOSSES, ids=lambda op: op.name)
def test_gradients_of_a_loss_in_bfloat16(op: Op, distance: float | None) -> None:
    far = op.make()
    if "teacher_hidden_states" in far:
        # both as wide, so that they can be equal
        far["teacher_hidden_states"], far["teacher_weight"] = torch.randn(6, 8), torch.randn(11, 8)
    if "labels" in far and op.name in UNLABELLED:
        # the labels' gradient would hide that of the divergence
        op = replace(op, call=UNLABELLED[op.name])
        del far["labels"]
    tensors = in_bfloat16(brought_near(far, distance))
    exact = gradients(op, tensors, torch.float64, None)
    scale = norm(gradients(op, in_bfloat16(far), torch.float64, None))
    for backend in ["reference", *(name for name in ("cpu",) if fk.missing_kernels([op.backends], name) is None)]:
        ours = gradients(op, tensors, torch.bfloat16, backend)
        # where both are equal the gradient is zero but for float32's own rounding
        assert error(ours, exact) <= LARGEST_ERROR * norm(exact) + 1e-5 * scale, f"{op.name}, {backend}"


@pytest.mark.parametrize("op", OTHERS, ids=lambda op: op.name)
def test_gradients_of_other_ops_in_bfloat16(op: Op) -> None:
    tensors = in_bfloat16(op.make())
    exact = gradients(op, tensors, torch.float64, None)
    ours = gradients(op, tensors, torch.bfloat16, None)
    assert error(ours, exact) <= LARGEST_ERROR * norm(exact)


CAPPED = {"student_softcap": 3.0, "teacher_softcap": 3.0, "student_logit_scale": 1.5, "teacher_logit_scale": 1.5}


@pytest.mark.parametrize("distance", [1.0, 0.02, 0.0], ids=["far", "near", "equal"])
@pytest.mark.parametrize("options", [{}, CAPPED, {"reduction": "none"}, {"known": 50}], ids=str)
@pytest.mark.parametrize("backend", ["reference", *kernel_backends("fused_linear_kd_loss")])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_a_language_model_near_its_teacher(
    backend: str, direction: str, options: dict[str, Any], distance: float
) -> None:
    """Logits rounded to bfloat16 would make 2 to 12 % of the gradient noise."""
    options, device = dict(options), device_of(backend)
    teacher = (torch.randn(32, 128).bfloat16(), (torch.randn(1000, 128) / 128**0.5).bfloat16())
    noise = torch.randn(32, 128), torch.randn(1000, 128) / 128**0.5
    student = tuple((t + distance * n).bfloat16() for t, n in zip(teacher, noise, strict=True))
    known = options.pop("known", None)
    values, indices = (teacher[0].float() @ teacher[1].float().t()).topk(known or 1)

    def computed(backend: str, dtype: torch.dtype, distant: bool = False) -> list[Tensor]:
        leaves = [one.to(device, dtype).requires_grad_() for one in (noise if distant else student)]
        if known is None:
            given: dict[str, Any] = dict(
                zip(
                    ("teacher_hidden_states", "teacher_weight"), (one.to(device, dtype) for one in teacher), strict=True
                )
            )
        else:
            given = {"teacher_logits": values.to(device), "teacher_indices": indices.to(device)}
        with fk.backend(backend):
            loss = fk.fused_linear_kd_loss(*leaves, **given, direction=direction, **options)
        weights = torch.linspace(0.5, 2, loss.numel(), device=device).view(loss.shape)
        return list(torch.autograd.grad((weights * loss).sum(), leaves))

    exact, scale = computed("reference", torch.float64), norm(computed("reference", torch.float64, distant=True))
    ours = computed(backend, torch.bfloat16)
    # where both are equal the gradient is zero but for float32's own rounding
    assert error(ours, exact) <= 3e-3 * norm(exact) + 1e-5 * scale


def float16_losses() -> dict[str, tuple[tuple[Tensor, ...], int, Callable[..., Tensor]]]:
    """Students near their teachers: tensors, how many of them are the student's, and the loss."""
    hidden, weight = torch.randn(256, 32), torch.randn(300, 32) / 6
    layers, logits = torch.randn(3, 4, 900), torch.randn(4, 2000)
    head = hidden + 0.02 * torch.randn_like(hidden), weight + 0.003 * torch.randn_like(weight), hidden, weight
    student = layers[:2] + 0.02 * torch.randn(2, 4, 900)
    last = layers[2] + 0.02 * torch.randn(4, 900)

    # hot and unscaled, so that gradients are as small as those of a large vocabulary
    hot: dict[str, Any] = {"temperature": 8.0, "t2_scale": False}

    def mixed(student: Tensor, student_layers: Tensor, teacher: Tensor, teacher_layers: Tensor) -> Tensor:
        return fk.distillation_loss(student, teacher, None, student_layers, teacher_layers, 0.0, 1.0, 1.0, **hot)

    return {
        "kd_loss": ((logits + 0.02 * torch.randn_like(logits), logits), 1, partial(fk.kd_loss, **hot)),
        "universal_kd_loss": ((student[:1], layers[:1]), 1, partial(fk.universal_kd_loss, **hot)),
        "distillation_loss": ((last, student, layers[2], layers), 2, mixed),
        "fused_linear_kd_loss": (head, 2, fk.fused_linear_kd_loss),
        "fused_linear_kd_loss tokens": (head, 2, lambda *t: fk.fused_linear_kd_loss(*t, reduction="none").mean()),
    }


@pytest.mark.parametrize("name", list(float16_losses()))
def test_the_scale_of_a_grad_scaler_lifts_what_float16_would_lose(name: str) -> None:
    """It arrives in the backward pass, when kernels have computed their gradients already."""
    tensors, students, loss = float16_losses()[name]
    tensors = tuple(tensor.half() for tensor in tensors)
    scale = 2.0**16

    def scaled(backend: str, dtype: torch.dtype) -> list[Tensor]:
        device = device_of(backend)
        given = [tensor.to(device, dtype).requires_grad_(i < students) for i, tensor in enumerate(tensors)]
        with fk.backend(backend):
            value = loss(*given) * scale
        return [gradient.cpu().double() / scale for gradient in torch.autograd.grad(value, given[:students])]

    exact = scaled("reference", torch.float64)
    for backend in ["reference", "cpu", "cuda"]:
        try:
            gradients = scaled(backend, torch.float16)
        except fk.BackendUnavailableError:
            continue
        for ours, truth in zip(gradients, exact, strict=True):
            assert error([ours], [truth]) <= 3e-3 * norm([truth]), f"{name}, {backend}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_is_summed_and_returned_in_float32(dtype: torch.dtype) -> None:
    left, right = torch.randn(33, 70).to(dtype), torch.randn(70, 130).to(dtype)
    product = _product(left, right)
    assert product.dtype == torch.float32
    exact = left.double() @ right.double()
    assert (product - exact).abs().max() <= 2e-5 * exact.abs().max()
