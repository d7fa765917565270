"""direction="jsd": `beta` is the interpolation of the published definitions, and weights have names of their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from losses import device_of, kernel_backends
from torch import Tensor
from torch.nn import functional as F

import fastkd_kernels as fk

BACKENDS = ["reference", *kernel_backends("kd_loss")]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def as_in_trl(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """`GKDTrainer.generalized_jsd_loss` of TRL with reduction "batchmean": the sum divided by B."""
    log_q, log_p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    if beta == 0:
        jsd = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    elif beta == 1:
        jsd = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    else:
        mixture = torch.logsumexp(torch.stack([log_q + math.log1p(-beta), log_p + math.log(beta)]), dim=0)
        of_teacher = F.kl_div(mixture, log_p, reduction="none", log_target=True)
        of_student = F.kl_div(mixture, log_q, reduction="none", log_target=True)
        jsd = beta * of_teacher + (1 - beta) * of_student
    return jsd.sum() / len(student)


def as_in_liger(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """JSD(beta)(P || Q) = beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q, P being the teacher."""
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    mixture = beta * p + (1 - beta) * q
    rows = beta * (p * (p / mixture).log()).sum(-1) + (1 - beta) * (q * (q / mixture).log()).sum(-1)
    return rows.mean()


def assert_same(loss: Tensor, leaf: Tensor, expected: Tensor, expected_leaf: Tensor) -> None:
    torch.testing.assert_close(loss.detach().double().cpu(), expected.detach(), rtol=1e-4, atol=1e-6)
    (gradient,), (truth,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, expected_leaf)
    torch.testing.assert_close(gradient.double().cpu(), truth, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("classes", [3, 40, 1500])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kd_loss_is_the_published_divergence(backend: str, beta: float, classes: int) -> None:
    student, teacher = torch.randn(4, classes), torch.randn(4, classes)
    device = device_of(backend)
    leaf, wide = student.to(device).requires_grad_(), student.double().requires_grad_()
    with fk.backend(backend):
        loss = fk.kd_loss(leaf, teacher.to(device), 2.0, t2_scale=False, direction="jsd", beta=beta)
    assert_same(loss, leaf, as_in_trl(wide, teacher.double(), beta, 2.0), wide)
    if 0 < beta < 1:
        torch.testing.assert_close(
            as_in_liger(wide, teacher.double(), beta, 2.0), as_in_trl(wide, teacher.double(), beta, 2.0)
        )


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_loss_takes_the_same_interpolation(backend: str, beta: float) -> None:
    device = device_of(backend)
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    options: dict[str, Any] = {"t2_scale": False, "direction": "jsd", "beta": beta}
    wide = student.double().requires_grad_()
    expected = as_in_trl(wide, teacher.double(), beta, 1.0)

    leaf = student.to(device).requires_grad_()
    with fk.backend(backend):
        # one teacher layer has all the attention
        loss = fk.universal_kd_loss(leaf[None], teacher[None].to(device), **options)
    assert_same(loss, leaf, expected, wide)

    wide = student.double().requires_grad_()
    expected = 3 * as_in_trl(wide, teacher.double(), beta, 1.0)
    leaf = student.to(device).requires_grad_()
    layers = leaf.detach()[None], teacher[None].to(device)
    with fk.backend(backend):
        loss = fk.distillation_loss(leaf, layers[1][0], None, *layers, 0.0, 3.0, 0.0, **options)
    assert_same(loss, leaf, expected, wide)

    wide = student.double().requires_grad_()
    expected = 0.7 * as_in_trl(wide, teacher.double(), beta, 1.0)
    leaf = student.to(device).requires_grad_()
    eye = torch.eye(5, device=device)
    with fk.backend(backend):
        loss = fk.fused_linear_kd_loss(leaf, eye, teacher.to(device), eye, kd_weight=0.7, chunk_tokens=3, **options)
    assert_same(loss, leaf, expected, wide)


def test_the_default_is_one_half() -> None:
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    plain = fk.kd_loss(student, teacher, direction="jsd")
    torch.testing.assert_close(plain, fk.kd_loss(student, teacher, direction="jsd", beta=0.5))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_beta_that_would_change_nothing_is_an_error(direction: str) -> None:
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    with pytest.raises(ValueError, match=rf'beta: got 0\.3 with direction="{direction}"'):
        fk.kd_loss(student, teacher, direction=direction, beta=0.3)
    with pytest.raises(ValueError, match=r"beta: got 1\.5, expected a number from 0"):
        fk.kd_loss(student, teacher, direction="jsd", beta=1.5)
    with pytest.raises(ValueError, match=r"beta: got 0\.3"):
        fk.fused_linear_kd_loss(student, torch.randn(9, 5), student, torch.randn(9, 5), direction=direction, beta=0.3)
    with pytest.raises(ValueError, match=r"beta: got 0\.3"):
        fk.universal_kd_loss(student[None], teacher[None], direction=direction, beta=0.3)
    with pytest.raises(ValueError, match=r"beta: got 0\.3"):
        fk.distillation_loss(
            student, teacher, None, student[None], teacher[None], 1.0, 1.0, 1.0, direction=direction, beta=0.3
        )
