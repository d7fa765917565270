"""The losses of TRL and Liger, as formulas: `beta` is their interpolation, and weights have names of their own."""

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


def as_in_trl(
    student: Tensor, teacher: Tensor, beta: float, temperature: float, labels: Tensor | None = None
) -> Tensor:
    """`GKDTrainer.generalized_jsd_loss` of TRL with "batchmean": the sum divided by the labels that count, or by B."""
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
    if labels is None:
        return jsd.sum() / len(student)
    counted = labels != -100
    return jsd[counted].sum() / counted.sum()


def as_in_liger(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """JSD(beta)(P || Q) = beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q, P being the teacher."""
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    mixture = beta * p + (1 - beta) * q
    rows = beta * (p * (p / mixture).log()).sum(-1) + (1 - beta) * (q * (q / mixture).log()).sum(-1)
    return rows.mean()


def as_in_minillm(student: Tensor, teacher: Tensor, temperature: float, labels: Tensor) -> Tensor:
    """The single-step term of TRL's `MiniLLMTrainer` (Gu et al., 2024): KL(student || teacher) by label."""
    log_q, log_p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    counted = labels != -100
    return (log_q.exp() * (log_q - log_p)).sum(-1)[counted].sum() / counted.sum()


def as_fused_in_liger(
    hidden: tuple[Tensor, Tensor],
    heads: tuple[Tensor, Tensor],
    labels: Tensor,
    weights: tuple[float, float],
    beta: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`LigerFusedLinearJSDLoss`: w_hard CE + w_soft JSD per label that counts, and both terms without their weights."""
    counted = labels != -100
    student, teacher = ((h @ head.t())[counted] for h, head in zip(hidden, heads, strict=True))
    hard = F.cross_entropy(student, labels[counted])
    soft = as_in_trl(student, teacher, beta, temperature)
    return weights[0] * hard + weights[1] * soft, soft, hard


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


def a_batch_of_tokens() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head of the student, those of the teacher, and labels of which some do not count."""
    labels = torch.randint(9, (2, 5))
    labels[0, 3:], labels[1, 0] = -100, -100
    return torch.randn(2, 5, 4), torch.randn(9, 4), torch.randn(2, 5, 6), torch.randn(9, 6), labels


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_as_in_trl(backend: str, beta: float) -> None:
    hidden, head, teacher_hidden, teacher_head, labels = a_batch_of_tokens()
    student, teacher = hidden @ head.t(), teacher_hidden @ teacher_head.t()
    device = device_of(backend)
    options: dict[str, Any] = {"t2_scale": False, "direction": "jsd", "beta": beta}
    wide = student.double().requires_grad_()
    expected = as_in_trl(wide, teacher.double(), beta, 2.0, labels)
    leaf = student.to(device).requires_grad_()
    with fk.backend(backend):
        loss = fk.kd_loss(leaf, teacher.to(device), 2.0, labels=labels.to(device), **options)
    assert_same(loss, leaf, expected, wide)

    wide = student.double().requires_grad_()
    expected = as_in_trl(wide, teacher.double(), beta, 2.0)
    with fk.backend(backend):
        # without labels TRL divides by the sequences, and `kd_loss` by the tokens
        loss = 5 * fk.kd_loss(leaf, teacher.to(device), 2.0, **options)
    assert_same(loss, leaf, expected, wide)

    wide = hidden.double().requires_grad_()
    expected = as_in_trl(wide @ head.double().t(), teacher.double(), beta, 2.0, labels)
    leaf = hidden.to(device).requires_grad_()
    given = [x.to(device) for x in (head, teacher_hidden, teacher_head, labels)]
    with fk.backend(backend):
        loss = fk.fused_linear_kd_loss(leaf, *given, temperature=2.0, chunk_tokens=3, **options)
    assert_same(loss, leaf, expected, wide)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_as_in_minillm(backend: str) -> None:
    hidden, head, teacher_hidden, teacher_head, labels = a_batch_of_tokens()
    device = device_of(backend)
    wide = hidden.double().requires_grad_()
    teacher = (teacher_hidden @ teacher_head.t()).double()
    expected = as_in_minillm(wide @ head.double().t(), teacher, 2.0, labels)
    leaf = hidden.to(device).requires_grad_()
    given = [x.to(device) for x in (head, teacher_hidden, teacher_head, labels)]
    with fk.backend(backend):
        loss = fk.fused_linear_kd_loss(leaf, *given, temperature=2.0, t2_scale=False, direction="reverse")
    assert_same(loss, leaf, expected, wide)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_as_in_liger(backend: str, beta: float, weights: tuple[float, float]) -> None:
    hidden, head, teacher_hidden, teacher_head, labels = a_batch_of_tokens()
    device = device_of(backend)
    wide = hidden.double().requires_grad_()
    expected, *terms = as_fused_in_liger(
        (wide, teacher_hidden.double()), (head.double(), teacher_head.double()), labels, weights, beta, 2.0
    )
    leaf = hidden.to(device).requires_grad_()
    given = [x.to(device) for x in (head, teacher_hidden, teacher_head, labels)]
    with fk.backend(backend):
        loss, *ours = fk.fused_linear_kd_loss(
            leaf,
            *given,
            label_weight=weights[0],
            kd_weight=weights[1],
            direction="jsd",
            beta=beta,
            temperature=2.0,
            t2_scale=False,
            chunk_tokens=3,
            return_soft_hard_loss=True,
        )
    assert_same(loss, leaf, expected, wide)
    for one, other in zip(ours, terms, strict=True):
        torch.testing.assert_close(one.double().cpu(), other.detach(), rtol=1e-4, atol=1e-6)


def test_only_the_soft_term_of_the_default_is_t2_times_that_of_trl_and_liger() -> None:
    hidden, head, teacher_hidden, teacher_head, labels = a_batch_of_tokens()
    given = (hidden, head, teacher_hidden, teacher_head, labels)
    options: dict[str, Any] = {"temperature": 3.0, "label_weight": 0.5, "return_soft_hard_loss": True}
    ours, theirs = (
        fk.fused_linear_kd_loss(*given, **options),
        fk.fused_linear_kd_loss(*given, t2_scale=False, **options),
    )
    torch.testing.assert_close(ours.soft_loss, 9 * theirs.soft_loss)
    torch.testing.assert_close(ours.hard_loss, theirs.hard_loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sparse_teacher_as_published(backend: str) -> None:
    """KL(p || q) = sum of p (ln p - ln q) over the K classes of the teacher, q over all (forward, as in axolotl and
    DistillKit); both over the K (reverse, as in TRL's top-k)."""
    hidden, head, teacher_hidden, teacher_head, _ = a_batch_of_tokens()
    device = device_of(backend)
    values, indices = (teacher_hidden @ teacher_head.t()).topk(3)
    known = {"teacher_logits": values.to(device), "teacher_indices": indices.to(device)}
    for direction in ("forward", "reverse"):
        wide = hidden.double().requires_grad_()
        student = wide @ head.double().t() / 2
        log_p = (values.double() / 2).log_softmax(-1)
        if direction == "forward":
            log_q = student.log_softmax(-1).gather(-1, indices)
            expected = (log_p.exp() * (log_p - log_q)).sum() / 10
        else:
            log_q = student.gather(-1, indices).log_softmax(-1)
            expected = (log_q.exp() * (log_q - log_p)).sum() / 10
        leaf = hidden.to(device).requires_grad_()
        with fk.backend(backend):
            loss = fk.fused_linear_kd_loss(
                leaf, head.to(device), temperature=2.0, t2_scale=False, direction=direction, **known
            )
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
