"""Every distillation loss is its paper's formula, value and gradient, and pins what papers leave open."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastkd
import fastkd_kernels as fk
from fastkd import losses
from fastkd.kd.catalogue import CATALOGUE
from fastkd.losses import (
    KD_PRESETS,
    ALPKDLoss,
    AnnealingKDLoss,
    DIHLoss,
    DistilBertLoss,
    KDLoss,
    MHKDLoss,
    PKDLoss,
    RAILKDLoss,
    UniversalKDLoss,
    UniversalKDMixtureLoss,
    VanillaKDLoss,
    inner_layer_map,
    label_loss,
)
from fastkd.losses.alp_kd import visible_layers
from fastkd.losses.catalogue import LOSSES

ROOT = Path(__file__).parents[1]

M, N, B, C, H = 3, 6, 5, 4, 7


def double(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def labels_for(classes: int) -> Tensor:
    return torch.randint(classes, (B,)) if classes > 1 else double(B)


def divergence(student: Tensor, teacher: Tensor, tau: float = 1.0) -> Tensor:
    """tau^2 KL(teacher || student) of one sample, written out; for one class the squared error."""
    if len(student) == 1:
        return (student - teacher).square().sum()
    p = (teacher / tau).exp() / (teacher / tau).exp().sum()
    q = (student / tau).exp() / (student / tau).exp().sum()
    return tau**2 * sum(p[c] * torch.log(p[c] / q[c]) for c in range(len(p)))


def on_labels(student: Tensor, label: Tensor) -> Tensor:
    """Cross entropy or squared error of one sample."""
    if len(student) == 1:
        return (student[0] - label).square()
    return -torch.log(student[label].exp() / student.exp().sum())


def batch_mean(loss: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return sum(loss(*rows) for rows in zip(*tensors, strict=True)) / len(tensors[0])


def assert_equal_with_gradients(
    loss: Callable[..., Tensor], formula: Callable[..., Tensor], wanted: list[Tensor], fixed: tuple[Any, ...] = ()
) -> None:
    """Same value and same gradient for every tensor of `wanted`, the first arguments of both."""
    results = []
    for function in (loss, formula):
        tensors = [tensor.detach().clone().requires_grad_() for tensor in wanted]
        value = function(*tensors, *fixed)
        gradients = torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True)
        results.append((value, *gradients))
    assert results[0][1].abs().max() > 0, "a gradient of zero would compare nothing"
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


# Logits of the last layer


@pytest.mark.parametrize("classes", [1, 2, C])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_kd(classes: int, tau: float) -> None:
    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        return batch_mean(lambda s, t: divergence(s, t, tau), student, teacher)

    assert_equal_with_gradients(KDLoss(tau), formula, [double(B, classes)], (double(B, classes),))


def test_kd_of_scores_is_the_mean_squared_error() -> None:
    student, teacher = double(B, 1), double(B, 1)
    expected = (student - teacher).square().mean()
    torch.testing.assert_close(KDLoss(4.0)(student, teacher), expected)
    torch.testing.assert_close(KDLoss(4.0, t2_scale=False)(student, teacher), expected / 16)


@pytest.mark.parametrize(
    ("name", "temperature", "reduction", "t2_scale"),
    [
        ("hinton", 1.0, "batchmean", True),
        ("pkd", 10.0, "mean", True),
        ("takd", 1.0, "mean", True),
        ("mhkd", 4.0, "batchmean", True),
        ("dih", 5.0, "batchmean", True),
        ("distilbert", 2.0, "batchmean", True),
        ("continuation-kd", 1.0, "batchmean", False),
    ],
)
def test_presets_of_published_codes(name: str, temperature: float, reduction: str, t2_scale: bool) -> None:
    student, teacher = double(B, C), double(B, C)
    divisor = {"batchmean": B, "mean": B * C}[reduction]
    pairs = zip(student, teacher, strict=True)
    expected = sum(divergence(s, t, temperature) for s, t in pairs) / divisor
    loss = KDLoss.from_preset(name)(student, teacher)
    torch.testing.assert_close(loss, expected if t2_scale else expected / temperature**2)
    hot = sum(divergence(s, t, 3.0) for s, t in zip(student, teacher, strict=True)) / divisor
    assert_t2 = KDLoss.from_preset(name, temperature=3.0)(student, teacher)
    torch.testing.assert_close(assert_t2, hot if t2_scale else hot / 9)


def test_every_preset_is_tested_and_an_unknown_one_is_named() -> None:
    assert set(KD_PRESETS) == {"hinton", "pkd", "takd", "mhkd", "dih", "distilbert", "continuation-kd"}
    with pytest.raises(ValueError, match="preset: got 'kd', expected one of hinton, pkd"):
        KDLoss.from_preset("kd")


@pytest.mark.parametrize("classes", [1, C])
@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_vanilla_kd(classes: int, reduction: str) -> None:
    labels = labels_for(classes)

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        soft = batch_mean(lambda s, t: divergence(s, t, 2.0), student, teacher)
        return 0.3 * batch_mean(on_labels, student, labels) + 0.7 * (soft / classes if reduction == "mean" else soft)

    loss = VanillaKDLoss(0.7, 2.0, reduction)
    teacher = double(B, classes)
    assert_equal_with_gradients(lambda s, t: loss(s, t, labels), formula, [double(B, classes)], (teacher,))


@pytest.mark.parametrize("classes", [1, C])
def test_label_loss_adds_up_layers(classes: int) -> None:
    labels = labels_for(classes)

    def formula(layers: Tensor) -> Tensor:
        return sum(batch_mean(on_labels, logits, labels) for logits in layers)

    assert_equal_with_gradients(lambda z: label_loss(z, labels), formula, [double(M, B, classes)])
    assert_equal_with_gradients(lambda z: label_loss(z[0], labels), lambda z: formula(z[:1]), [double(M, B, classes)])


def test_directions_are_those_of_the_op() -> None:
    student, teacher = double(B, C), double(B, C)
    reverse = KDLoss(direction="reverse")(student, teacher)
    torch.testing.assert_close(reverse, KDLoss()(teacher, student))
    assert abs(reverse - KDLoss()(student, teacher)) > 1e-3
    none = KDLoss(2.0, reduction="none")(student, teacher)
    torch.testing.assert_close(none.mean(), KDLoss(2.0)(student, teacher))


# Universal-KD


def universal_formula(student: Tensor, teacher: Tensor, tau: float = 1.0, constant_attention: bool = False) -> Tensor:
    """The paper's equations for [M, B, C] and [N, B, C], sample by sample and layer by layer."""
    total = student.new_zeros(())
    for j in range(len(student)):
        for b in range(student.shape[1]):
            f, s = teacher[:, b], student[j, b]
            a = -(f - s).square().sum(-1) if len(s) == 1 else f @ s
            weights = a.exp() / a.exp().sum()
            weights = weights.detach() if constant_attention else weights
            mixture = sum(weights[i] * f[i] for i in range(len(f)))
            total = total + divergence(s, mixture, tau)
    return total / student.shape[1]


@pytest.mark.parametrize("classes", [1, 2, C])
@pytest.mark.parametrize(
    ("preset", "chosen"),
    [("intermediate_layer", slice(0, 2)), ("capacity_gap", slice(2, 3)), ("cross_architecture", slice(0, 2))],
)
def test_universal_kd_presets(preset: str, chosen: slice, classes: int) -> None:
    loss = getattr(UniversalKDLoss, preset)()
    pinned = (loss.temperature, loss.reduction, loss.layer_reduction, loss.t2_scale, loss.mix, loss.direction)
    assert pinned == (1.0, "batchmean", "sum", True, "logits", "forward")
    assert (loss.attn_space, loss.attn_scale, loss.detach_attention, loss.teacher_layers) == (
        "logits",
        1.0,
        False,
        "all",
    )
    teacher = double(N, B, classes)
    assert_equal_with_gradients(loss, lambda s, t: universal_formula(s[chosen], t), [double(M, B, classes)], (teacher,))


def test_universal_kd_options_reach_the_op() -> None:
    student, teacher = double(M, B, C), double(N, B, C)
    for options in (
        {"temperature": 2.0},
        {"reduction": "mean"},
        {"layer_reduction": "mean"},
        {"mix": "loss"},
        {"mix": "probs"},
        {"attn_space": "probs"},
        {"attn_scale": "rsqrt_c"},
        {"direction": "reverse"},
        {"attn": "uniform"},
        {"attn_temperature": 3.0},
        {"temperature": 2.0, "t2_scale": False},
    ):
        expected = fk.universal_kd_loss(student[:2], teacher, **options)
        torch.testing.assert_close(UniversalKDLoss(**options)(student, teacher), expected)
        assert abs(expected - UniversalKDLoss()(student, teacher)) > 1e-4, f"{options} changes nothing"
    none = UniversalKDLoss(reduction="none")(student, teacher)
    torch.testing.assert_close(none, fk.universal_kd_loss(student[:2], teacher, reduction="none"))


ATTENTIONS: list[dict[str, Any]] = [
    {},
    {"attn_scale": "rsqrt_c", "student_layers": "all"},
    {"attn": "neg_sqdist", "attn_temperature": 2.0, "teacher_layers": [1, 4, 5]},
    {"attn": "dot", "attn_scale": 0.3},
    {"attn": "uniform"},
]
SPACES: list[dict[str, Any]] = [
    {"attn_space": "probs", "attn_scale": 5.0},
    {"attn_space": "log_probs", "attn_scale": 0.2},
    {"attn_space": "centred"},
]


@pytest.mark.parametrize(
    ("options", "classes"), [*itertools.product(ATTENTIONS, [1, C]), *[(space, C) for space in SPACES]]
)
def test_universal_kd_attention_is_that_of_the_op(options: dict[str, Any], classes: int) -> None:
    student, teacher = double(M, B, classes), double(N, B, classes)
    loss = UniversalKDLoss(mix="loss", reduction="none", **options)
    attention = loss.attention(student, teacher)
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    # what mixes losses is the attention
    students, teachers = loss.chosen(student, teacher)
    pairs = torch.stack([torch.stack([KDLoss(reduction="none")(s, t) for t in teachers], -1) for s in students])
    torch.testing.assert_close((attention * pairs).sum(-1), loss(student, teacher))


@pytest.mark.parametrize("mixture", [False, True])
def test_universal_kd_centred_attention_does_not_see_what_no_softmax_sees(mixture: bool) -> None:
    student, teacher, labels = double(M, B, C), double(N, B, C), labels_for(C)
    offsets = 5 * double(M, B, 1), 5 * double(N, B, 1)

    def loss_of(space: str) -> Callable[[Tensor, Tensor], Tensor]:
        loss = UniversalKDLoss(attn_space=space)
        whole = UniversalKDMixtureLoss(loss)
        return (lambda s, t: whole(s, t, labels)) if mixture else loss

    centred, raw = loss_of("centred"), loss_of("logits")
    moved = student + offsets[0], teacher + offsets[1]
    torch.testing.assert_close(centred(*moved), centred(student, teacher))
    assert abs(raw(*moved) - raw(student, teacher)) > 1e-2

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        return raw(student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True))

    assert_equal_with_gradients(centred, formula, [student], (teacher,))
    scores = double(M, B, 1), double(N, B, 1)
    torch.testing.assert_close(UniversalKDLoss(attn_space="centred")(*scores), UniversalKDLoss()(*scores))


def test_universal_kd_effective_layers() -> None:
    student, teacher = double(M, B, C), double(N, B, C)
    assert UniversalKDLoss(attn="uniform").effective_layers(student, teacher).item() == pytest.approx(N)
    assert UniversalKDLoss(attn_scale=1e4).effective_layers(student, teacher).item() == pytest.approx(1, abs=1e-3)
    between = UniversalKDLoss().effective_layers(student, teacher)
    assert 1.1 < between < N - 0.1
    assert UniversalKDLoss(attn_temperature=4.0).effective_layers(student, teacher) > between


def test_universal_kd_without_gradient_through_the_attention() -> None:
    teacher = double(N, B, C)
    loss = UniversalKDLoss(detach_attention=True, temperature=2.0)
    assert_equal_with_gradients(
        loss, lambda s, t: universal_formula(s[:2], t, 2.0, constant_attention=True), [double(M, B, C)], (teacher,)
    )


def test_universal_kd_layers_are_numbered_from_1() -> None:
    student, teacher = double(M, B, C), double(N, B, C)
    loss = UniversalKDLoss(student_layers=[1, 3], teacher_layers=[2, 6])
    assert_equal_with_gradients(loss, lambda s, t: universal_formula(s[[0, 2]], t[[1, 5]]), [student], (teacher,))
    both = UniversalKDLoss(student_layers="all")
    assert_equal_with_gradients(both, universal_formula, [student], (teacher,))


def test_universal_kd_heads_can_learn_from_labels() -> None:
    student, teacher, labels = double(M, B, C), double(N, B, C), labels_for(C)
    loss = UniversalKDLoss(student_head_ce=0.3, teacher_head_ce=0.5)

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        heads = 0.3 * sum(batch_mean(on_labels, z, labels) for z in student[:2])
        heads = heads + 0.5 * sum(batch_mean(on_labels, z, labels) for z in teacher)
        # the distillation itself does not reach the teacher
        return heads + universal_formula(student[:2], teacher.detach())

    assert_equal_with_gradients(lambda s, t: loss(s, t, labels), formula, [student, teacher])
    with pytest.raises(ValueError, match="labels: got None"):
        loss(student, teacher)


@pytest.mark.parametrize("classes", [1, C])
def test_universal_kd_mixture(classes: int) -> None:
    labels = labels_for(classes)
    loss = UniversalKDMixtureLoss(UniversalKDLoss(temperature=1.5, student_head_ce=0.1), 0.2, 0.3, 0.5, temperature=4.0)

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        hard = batch_mean(on_labels, student[-1], labels)
        soft = batch_mean(lambda s, t: divergence(s, t, 4.0), student[-1], teacher[-1])
        heads = 0.1 * sum(batch_mean(on_labels, z, labels) for z in student[:2])
        return 0.2 * hard + 0.3 * soft + 0.5 * (universal_formula(student[:2], teacher, 1.5) + heads)

    teacher = double(N, B, classes)
    assert_equal_with_gradients(lambda s, t: loss(s, t, labels), formula, [double(M, B, classes)], (teacher,))


def test_universal_kd_mixture_in_the_capacity_gap_reaches_one_classifier_twice() -> None:
    labels, teacher = labels_for(C), double(N, B, C)
    loss = UniversalKDMixtureLoss(UniversalKDLoss.capacity_gap(), 0.2, 0.3, 0.5)

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        hard = batch_mean(on_labels, student[-1], labels)
        soft = batch_mean(divergence, student[-1], teacher[-1])
        return 0.2 * hard + 0.3 * soft + 0.5 * universal_formula(student[-1:], teacher)

    # a student without pseudo-classifiers shows its own logits only
    assert_equal_with_gradients(lambda s, t: loss(s, t, labels), formula, [double(1, B, C)], (teacher,))
    assert_equal_with_gradients(lambda s, t: loss(s, t, labels), formula, [double(M, B, C)], (teacher,))


# Hidden states


def unit(vector: Tensor) -> Tensor:
    return vector / vector.square().sum().sqrt()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("layer_map", "pairs"), [("skip", (2, 4)), ("last", (4, 5)), ([6, 1], (6, 1))])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_pkd(layer_map: str | list[int], pairs: tuple[int, int], normalize: bool, reduction: str) -> None:
    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        total = student.new_zeros(())
        for j, i in enumerate(pairs, start=1):
            for s, t in zip(student[j - 1], teacher[i - 1], strict=True):
                total = total + ((unit(s) - unit(t)) if normalize else (s - t)).square().sum()
        return total / {"mean": B * (M - 1) * H, "batchmean": B, "sum": 1}[reduction]

    loss = PKDLoss(layer_map, normalize, reduction)
    assert_equal_with_gradients(loss, formula, [double(M, B, H)], (double(N, B, H),))


def test_pkd_pins_the_released_code() -> None:
    loss = PKDLoss()
    assert (loss.layer_map, loss.normalize, loss.reduction) == ("skip", True, "mean")
    student, teacher = double(M, B, H), double(N, B, H)
    normal = [hidden / hidden.norm(dim=-1, keepdim=True) for hidden in (student[:-1], teacher[[1, 3]])]
    torch.testing.assert_close(loss(student, teacher), nn.functional.mse_loss(*normal))
    torch.testing.assert_close(PKDLoss(reduction="none")(student, teacher).shape, torch.Size([M - 1, B]))


BUCKETS = {
    "ALP": [range(6), range(6), range(6)],
    "NO": [range(0, 2), range(2, 4), range(4, 6)],
    "PO": [range(0, 3), range(1, 5), range(3, 6)],
}


def alp_formula(student: Tensor, teacher: Tensor, buckets: list[range], scale: float) -> Tensor:
    """The sum over layers of the mean over samples and features."""
    total = student.new_zeros(())
    for j, bucket in enumerate(buckets):
        for b in range(student.shape[1]):
            keys = teacher[list(bucket), b]
            scores = scale * keys @ student[j, b]
            weights = scores.exp() / scores.exp().sum()
            total = total + (student[j, b] - weights @ keys).square().mean()
    return total / student.shape[1]


@pytest.mark.parametrize("variant", ["ALP", "NO", "PO"])
def test_alp_kd(variant: str) -> None:
    student, teacher = double(M, B, H), double(N, B, H)

    def reproduction(student: Tensor, teacher: Tensor) -> Tensor:
        return alp_formula(student, teacher, BUCKETS[variant], 1 / math.sqrt(H)) / M

    assert_equal_with_gradients(ALPKDLoss(variant), reproduction, [student], (teacher,))

    def paper(student: Tensor, teacher: Tensor) -> Tensor:
        return alp_formula(student, teacher, BUCKETS[variant], 1.0)

    assert_equal_with_gradients(ALPKDLoss.paper(variant), paper, [student], (teacher,))


@pytest.mark.parametrize("layer_reduction", ["mean", "sum"])
@pytest.mark.parametrize(("reduction", "factor"), [("mean", 1), ("batchmean", H), ("sum", B * H)])
def test_alp_kd_reductions(layer_reduction: str, reduction: str, factor: int) -> None:
    student, teacher = double(M, B, H), double(N, B, H)
    loss = ALPKDLoss(layer_reduction=layer_reduction, reduction=reduction)(student, teacher)
    layers = M if layer_reduction == "sum" else 1
    torch.testing.assert_close(loss, ALPKDLoss()(student, teacher) * factor * layers)
    rows = ALPKDLoss(reduction="none")(student, teacher)
    torch.testing.assert_close(rows.sum() / (B * M * H), ALPKDLoss()(student, teacher))


def test_alp_kd_without_gradient_through_the_attention() -> None:
    student, teacher = double(M, B, H), double(N, B, H)
    attention = ALPKDLoss().attention(student, teacher)

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - torch.einsum("mbn,nbh->mbh", attention, teacher)).square().mean()

    assert_equal_with_gradients(ALPKDLoss(detach_attention=True), formula, [student], (teacher,))


def test_alp_kd_buckets_cover_every_teacher_layer() -> None:
    for variant in ("NO", "PO"):
        for student_layers, teacher_layers in ((4, 12), (6, 12), (5, 12), (3, 6), (6, 24), (2, 3)):
            seen = visible_layers(variant, student_layers, teacher_layers)
            assert seen.any(0).all()
            assert seen.any(1).all()
            assert (seen.sum(0) == 1).all() == (variant == "NO")
    assert visible_layers("NO", 4, 12).int().argmax(1).tolist() == [0, 3, 6, 9]
    assert visible_layers("NO", 4, 10).sum(1).tolist() == [3, 3, 2, 2]


def test_alp_kd_of_huge_hidden_states_is_finite() -> None:
    student = (1e3 * double(M, B, H)).float().requires_grad_()
    ALPKDLoss.paper()(student, (1e3 * double(N, B, H)).float()).backward()
    assert student.grad.isfinite().all()


def test_projection_bridges_widths() -> None:
    student, teacher = double(M, B, H), double(N, B, H + 2)
    projection = nn.Linear(H, H + 2).double()
    for loss in (PKDLoss(projection=projection), ALPKDLoss(projection=projection)):
        projection.zero_grad()
        loss(student, teacher).backward()
        assert projection.weight.grad.abs().max() > 0
        without = type(loss)()(projection(student), teacher)
        torch.testing.assert_close(loss(student, teacher), without)
        assert list(loss.parameters()), "an optimizer has to find the projection"


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_label_loss_sums_half_precision_in_float32(dtype: torch.dtype, classes: int) -> None:
    logits = (3 * torch.randn(2, 1000, classes)).to(dtype)
    labels = torch.randint(3, (1000,)) if classes > 1 else torch.randn(1000)
    loss = label_loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), label_loss(logits.double(), labels), rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", ["layerwise", "concatenated"])
def test_rail_kd(variant: str) -> None:
    student, teacher = double(M, B, H), double(N, B, H + 1)
    loss = RAILKDLoss(M, H, H + 1, 4, variant, train_teacher_projection=True, seed=3).double()
    loss.resample(2)
    layers = loss.layers(N)
    w_s, w_t = loss.student_projection.weight.detach(), loss.teacher_projection.weight.detach()

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        total = student.new_zeros(())
        for b in range(B):
            s = [student[j, b] for j in range(M - 1)]
            t = [teacher[i - 1, b] for i in layers]
            if variant == "concatenated":
                s, t = [torch.cat(s)], [torch.cat(t)]
            total = total + sum((unit(w_s @ x) - unit(w_t @ y)).square().sum() for x, y in zip(s, t, strict=True))
        return total / B

    assert_equal_with_gradients(loss, formula, [student], (teacher,))
    loss(student, teacher).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in loss.parameters())


def test_rail_kd_cannot_be_closed_without_the_student() -> None:
    teacher = torch.randn(4, 64, 32)
    unrelated = torch.randn(3, 64, 32)

    def distance_of_a_student_that_never_moves(**options: bool) -> float:
        loss = RAILKDLoss(3, 32, 32, 16, **options)
        optimizer = torch.optim.Adam((weight for weight in loss.parameters() if weight.requires_grad), lr=0.02)
        for _ in range(300):
            optimizer.zero_grad()
            value = loss(unrelated, teacher)
            value.backward()
            optimizer.step()
        return value.item()

    trained = distance_of_a_student_that_never_moves(train_teacher_projection=True)
    assert distance_of_a_student_that_never_moves() > 2 * trained


def test_rail_kd_keeps_the_teachers_projection() -> None:
    loss = RAILKDLoss(M, H, H, 4)
    assert [name for name, weight in loss.named_parameters() if weight.requires_grad] == ["student_projection.weight"]
    torch.testing.assert_close(loss.teacher_projection.weight @ loss.teacher_projection.weight.T, torch.eye(4))


def test_rail_kd_draws_are_a_function_of_seed_and_epoch() -> None:
    first, second, other = RAILKDLoss(4, H, H, None), RAILKDLoss(4, H, H, None), RAILKDLoss(4, H, H, None, seed=1)
    draws, others = [], []
    for epoch in range(30):
        first.resample(epoch)
        other.resample(epoch)
        torch.rand(epoch)  # the global generator plays no part
        draws.append(first.layers(12))
        others.append(other.layers(12))
    for epoch in reversed(range(30)):
        second.resample(epoch)
        assert second.layers(12) == draws[epoch]
    assert draws != others
    assert set().union(*draws) == set(range(1, 12)), "all inner teacher layers get their turn, the last one never"
    assert all(len(set(draw)) == 3 and list(draw) == sorted(draw) for draw in draws)


# Labels and logits of all layers


@pytest.mark.parametrize("classes", [1, C])
@pytest.mark.parametrize("detach_teacher", [True, False])
def test_mhkd(classes: int, detach_teacher: bool) -> None:
    labels = labels_for(classes)

    def kd(student: Tensor, teacher: Tensor) -> Tensor:
        return 0.9 * batch_mean(on_labels, student, labels) + 0.1 * batch_mean(
            lambda s, t: divergence(s, t, 4.0), student, teacher
        )

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        total = kd(student[-1], teacher[-1].detach())
        for j, i in ((1, 2), (2, 4)):
            target = teacher[i - 1].detach() if detach_teacher else teacher[i - 1]
            total = total + 0.5 * kd(student[j - 1], target) + batch_mean(on_labels, teacher[i - 1], labels)
        return total

    loss = MHKDLoss(detach_teacher=detach_teacher)
    assert_equal_with_gradients(
        lambda s, t: loss(s, t, labels), formula, [double(M, B, classes), double(N, B, classes)]
    )


def test_mhkd_with_heads_trained_beforehand() -> None:
    student, teacher, labels = double(M, B, C), double(N, B, C), labels_for(C)
    with_heads = MHKDLoss()(student, teacher, labels)
    without = MHKDLoss(teacher_head_ce=0.0)(student, teacher, labels)
    torch.testing.assert_close(with_heads - without, label_loss(teacher[[1, 3]], labels))
    pinned = MHKDLoss()
    assert (pinned.kd.kd_weight, pinned.kd.temperature, pinned.kd.reduction, pinned.kd.t2_scale) == (
        0.1,
        4.0,
        "batchmean",
        True,
    )
    assert (pinned.intermediate_weight, pinned.layer_map, pinned.detach_teacher) == (0.5, "skip", True)


@pytest.mark.parametrize("classes", [1, C])
@pytest.mark.parametrize("head_reduction", ["sum", "mean"])
@pytest.mark.parametrize("temperature", [5.0, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)])
def test_dih(classes: int, head_reduction: str, temperature: float | tuple[float, ...]) -> None:
    labels, teacher = labels_for(classes), double(N, B, classes)
    taus = [temperature] * N if isinstance(temperature, float) else temperature

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        total = student.new_zeros(())
        for tau, target in zip(taus, teacher, strict=True):
            soft = sum(divergence(s, t, tau) for s, t in zip(student, target, strict=True)) / B
            total = total + 0.9 * batch_mean(on_labels, student, labels) + 0.1 * soft
        return total if head_reduction == "sum" else total / N

    loss = DIHLoss(temperature, head_reduction=head_reduction)
    assert_equal_with_gradients(lambda s, t: loss(s, t, labels), formula, [double(B, classes)], (teacher,))


def test_dih_pins_the_released_code() -> None:
    loss = DIHLoss()
    (kd,) = loss.kd
    assert (kd.kd_weight, kd.temperature, kd.reduction, kd.t2_scale) == (0.1, 5.0, "batchmean", True)
    assert loss.head_reduction == "sum"
    with pytest.raises(ValueError, match="temperature: got 2 values, expected 6"):
        DIHLoss([1.0, 2.0])(double(B, C), double(N, B, C), labels_for(C))


@pytest.mark.parametrize("classes", [1, C])
@pytest.mark.parametrize(("temperature", "phi"), [(10, 0.1), (4, 0.7), (1, 1.0)])
def test_annealing_kd(classes: int, temperature: int, phi: float) -> None:
    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        return (student - phi * teacher).square().sum() / (B * classes)

    loss = AnnealingKDLoss()
    assert (loss.max_temperature, loss.reduction) == (10, "mean")
    teacher = double(B, classes)
    assert_equal_with_gradients(lambda s, t: loss(s, t, temperature), formula, [double(B, classes)], (teacher,))


def test_annealing_kd_reductions() -> None:
    student, teacher = double(B, C), double(B, C)
    mean = AnnealingKDLoss()(student, teacher, 3)
    torch.testing.assert_close(AnnealingKDLoss(reduction="batchmean")(student, teacher, 3), mean * C)
    torch.testing.assert_close(AnnealingKDLoss(reduction="sum")(student, teacher, 3), mean * B * C)
    torch.testing.assert_close(AnnealingKDLoss(reduction="none")(student, teacher, 3).sum(), mean * B * C)


def test_annealing_kd_schedule() -> None:
    loss = AnnealingKDLoss(4)
    assert [loss.temperature_at(epoch, 8) for epoch in range(8)] == [4, 4, 3, 3, 2, 2, 1, 1]
    # what does not divide is spent at the full teacher
    assert [loss.temperature_at(epoch, 6) for epoch in range(6)] == [4, 3, 2, 1, 1, 1]
    with pytest.raises(ValueError, match="epochs: got 3, stage 1 needs at least 4"):
        loss.temperature_at(0, 3)
    with pytest.raises(ValueError, match="temperature: got 5, expected 1 to 4"):
        loss(double(B, C), double(B, C), 5)


@pytest.mark.parametrize("classes", [1, C])
def test_distilbert(classes: int) -> None:
    labels, teacher = labels_for(classes), double(B, classes)
    hidden = double(B, 3, H)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]])

    def formula(student: Tensor, student_hidden: Tensor) -> Tensor:
        soft = batch_mean(lambda s, t: divergence(s, t, 2.0), student, teacher)
        cosines = [unit(student_hidden[b, t]) @ unit(hidden[b, t]) for b in range(B) for t in range(3) if mask[b, t]]
        return 5 * soft + 2 * batch_mean(on_labels, student, labels) + (1 - torch.stack(cosines)).mean()

    loss = DistilBertLoss()
    assert_equal_with_gradients(
        lambda s, h: loss(s, teacher, labels, h, hidden, mask), formula, [double(B, classes), double(B, 3, H)]
    )
    kd = loss.kd
    assert (kd.temperature, kd.reduction, kd.t2_scale) == (2.0, "batchmean", True)


def test_distilbert_ignores_padding_and_takes_pooled_states() -> None:
    student, teacher = double(B, 3, H), double(B, 3, H)
    mask = torch.tensor([[1, 1, 0]] * B)
    loss = DistilBertLoss()
    value = loss.cosine(student, teacher, mask)
    for states in (student, teacher):
        states[:, 2] = 1e3
    torch.testing.assert_close(loss.cosine(student, teacher, mask), value)
    torch.testing.assert_close(loss.cosine(student[:, :2], teacher[:, :2]), value)
    pooled = loss.cosine(student[:, 0], teacher[:, 0])
    torch.testing.assert_close(pooled, loss.cosine(student[:, :1], teacher[:, :1]))


# Layer maps


@pytest.mark.parametrize(
    ("layer_map", "student_layers", "teacher_layers", "expected"),
    [
        ("skip", 6, 12, (2, 4, 6, 8, 10)),
        ("last", 6, 12, (7, 8, 9, 10, 11)),
        ("skip", 4, 12, (3, 6, 9)),
        ("last", 4, 12, (9, 10, 11)),
        ("skip", 3, 12, (4, 8)),
        ("last", 3, 12, (10, 11)),
        ("skip", 6, 24, (4, 8, 12, 16, 20)),
        ("skip", 3, 6, (2, 4)),
        ("skip", 6, 6, (1, 2, 3, 4, 5)),
        ("skip", 5, 12, (2, 4, 7, 9)),
        ("reverse", 6, 12, (10, 8, 6, 4, 2)),
        ([3, 3, 12], 4, 12, (3, 3, 12)),
    ],
)
def test_layer_maps(
    layer_map: str | list[int], student_layers: int, teacher_layers: int, expected: tuple[int, ...]
) -> None:
    assert inner_layer_map(layer_map, student_layers, teacher_layers) == expected


def test_random_layer_map_depends_on_the_seed_alone() -> None:
    drawn = [inner_layer_map("random", 4, 12, seed) for seed in range(20)]
    torch.rand(3)
    assert drawn == [inner_layer_map("random", 4, 12, seed) for seed in range(20)]
    assert len(set(drawn)) > 10
    assert all(len(set(layers)) == 3 and min(layers) >= 1 and max(layers) <= 11 for layers in drawn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("skip", 1, 12), "student_layers: got 1, a loss on inner layers needs at least 2"),
        (("skip", 6, 4), "layer_map: 'skip' maps 6 student layers .* got 4; give a list"),
        (("middle", 6, 12), "layer_map: got 'middle', expected one of skip, last, reverse, random"),
        (([1, 2], 4, 12), "layer_map: got 2 teacher layers, expected 3"),
        (([0, 2, 4], 4, 12), "layer_map: got teacher layer 0, expected 1 to 12"),
        (([2, 4, 13], 4, 12), "layer_map: got teacher layer 13, expected 1 to 12"),
    ],
)
def test_layer_map_errors(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inner_layer_map(*arguments)


# What all of them promise


def every_loss(dtype: torch.dtype, classes: int = C) -> list[tuple[nn.Module, Tensor, tuple[Any, ...]]]:
    """(loss, the student's tensor, the other arguments)."""
    layer, layers = double(B, classes).to(dtype), double(N, B, classes).to(dtype)
    hidden, labels = double(N, B, H).to(dtype), labels_for(classes)
    student, students = double(B, classes).to(dtype), double(M, B, classes).to(dtype)
    student_hidden = double(M, B, H).to(dtype)
    rail = RAILKDLoss(M, H, H, None)
    return [
        (KDLoss(2.0), student, (layer,)),
        (VanillaKDLoss(), student, (layer, labels)),
        (UniversalKDLoss(), students, (layers,)),
        (UniversalKDMixtureLoss(), students, (layers, labels)),
        (MHKDLoss(), students, (layers, labels)),
        (DIHLoss(), student, (layers, labels)),
        (AnnealingKDLoss(), student, (layer, 3)),
        (DistilBertLoss(), student, (layer, labels, student_hidden[-1], hidden[-1])),
        (PKDLoss(), student_hidden, (hidden,)),
        (ALPKDLoss(), student_hidden, (hidden,)),
        (rail, student_hidden, (hidden,)),
    ]


NAMES = [type(loss).__name__ for loss, _, _ in every_loss(torch.float32)]


def test_every_public_loss_is_tested() -> None:
    assert set(NAMES) == set(LOSSES)
    for name in NAMES:
        assert getattr(fastkd, name) is getattr(fastkd.losses, name)


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_bfloat16_is_computed_in_float32(index: int) -> None:
    loss, student, rest = every_loss(torch.bfloat16)[index]
    student.requires_grad_()
    value = loss(student, *rest)
    value.backward()
    assert value.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16
    wide = [
        argument.float() if isinstance(argument, Tensor) and argument.is_floating_point() else argument
        for argument in rest
    ]
    torch.testing.assert_close(value, loss(student.detach().float(), *wide), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_autocast_costs_no_precision(index: int) -> None:
    loss, student, rest = every_loss(torch.float32)[index]
    expected = loss(student, *rest)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(student, *rest), expected)


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_a_teacher_that_requires_grad_is_an_error_or_gets_none(index: int) -> None:
    loss, student, (teacher, *rest) = every_loss(torch.float64)[index]
    teacher.requires_grad_()
    if isinstance(loss, MHKDLoss):
        loss(student.requires_grad_(), teacher, *rest).backward()
        assert teacher.grad[-1].abs().max() == 0
        return
    with pytest.raises(ValueError, match=r"got a tensor that requires grad; run the teacher under torch.no_grad\(\)"):
        loss(student, teacher, *rest)


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_samples_do_not_depend_on_their_batch(index: int) -> None:
    """The gradient of one sample, times B, is that of a batch of one."""
    loss, student, rest = every_loss(torch.float64)[index]
    student.requires_grad_()
    loss(student, *rest).backward()

    def row(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        return argument[2:3] if argument.shape[0] == B else argument[:, 2:3]

    alone = row(student).detach().requires_grad_()
    loss(alone, *[row(argument) for argument in rest]).backward()
    torch.testing.assert_close(alone.grad, row(student.grad) * B, rtol=1e-9, atol=1e-12)


def test_fused_ops_compute_them() -> None:
    """Where there is an op, the module calls it: once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "fastkd_kernels":
                called.append(function._schema.name.split("::")[1])
            return function(*args, **(kwargs or {}))

    if fk._backend.registered_ops()["kd_loss"].cpu is not None:
        pytest.skip("the C++ extension is not built, so that the reference computes")
    expected = {
        "KDLoss": ["kd_loss_forward"],
        "VanillaKDLoss": ["distillation_loss_forward"],
        "UniversalKDLoss": ["universal_kd_loss_forward"],
        "UniversalKDMixtureLoss": ["distillation_loss_forward"],
        "DIHLoss": ["distillation_loss_forward"],
        "MHKDLoss": ["distillation_loss_forward"] * 2,
        "DistilBertLoss": ["kd_loss_forward"],
    }
    for loss, student, rest in every_loss(torch.float32):
        called.clear()
        with Calls():
            loss(student, *rest)
        assert called == expected.get(type(loss).__name__, []), type(loss).__name__


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniversalKDLoss(student_layers="top"), "student_layers: got 'top', expected one of inner, last, all"),
        (lambda: UniversalKDLoss(teacher_layers="inner"), "teacher_layers: got 'inner', expected \"all\""),
        (lambda: UniversalKDLoss(reduction="none", student_head_ce=1.0), 'reduction: got "none"'),
        (lambda: PKDLoss("middle"), "layer_map: got 'middle'"),
        (lambda: PKDLoss(reduction="avg"), "reduction: got 'avg', expected one of mean, batchmean, sum, none"),
        (lambda: ALPKDLoss("all"), "variant: got 'all', expected one of ALP, NO, PO"),
        (lambda: ALPKDLoss(scale="sqrt"), "scale: got 'sqrt', expected a finite number or \"rsqrt_h\""),
        (lambda: ALPKDLoss(layer_reduction="none"), "layer_reduction: got 'none'"),
        (lambda: MHKDLoss(reduction="none"), "reduction: got 'none', expected one of batchmean, mean"),
        (lambda: DIHLoss(head_reduction="max"), "head_reduction: got 'max', expected one of sum, mean"),
        (lambda: AnnealingKDLoss(0), "max_temperature: got 0"),
        (lambda: AnnealingKDLoss(reduction="all"), "reduction: got 'all'"),
        (lambda: DistilBertLoss(reduction="none"), "reduction: got 'none'"),
        (lambda: RAILKDLoss(1, H, H), "student_layers: got 1"),
        (lambda: RAILKDLoss(M, H, H, variant="joined"), "variant: got 'joined', expected one of layerwise"),
    ],
)
def test_options_are_checked_when_the_loss_is_made(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_errors_name_what_came() -> None:
    labels = labels_for(C)
    with pytest.raises(ValueError, match="student_hidden: got width 7, expected the teacher's, 9; give a projection"):
        PKDLoss()(double(M, B, H), double(N, B, 9))
    with pytest.raises(ValueError, match=r"student_hidden: got shape \(3, 7\), expected \[layers, B, H\]"):
        ALPKDLoss()(double(M, H), double(N, B, H))
    with pytest.raises(ValueError, match="teacher_hidden: got 4 samples, expected 5"):
        PKDLoss()(double(M, B, H), double(N, 4, H))
    with pytest.raises(ValueError, match='variant: "NO" puts 2 teacher layers into 3 buckets'):
        ALPKDLoss("NO")(double(M, B, H), double(2, B, H))
    with pytest.raises(ValueError, match='"inner" leaves no layer in a student of depth 1'):
        UniversalKDLoss()(double(1, B, C), double(N, B, C))
    with pytest.raises(ValueError, match=r"teacher_layers: got \[7\], expected layer numbers from 1 to 6"):
        UniversalKDLoss(teacher_layers=[7])(double(M, B, C), double(N, B, C))
    with pytest.raises(ValueError, match="student_hidden: got 2 layers, expected 3"):
        RAILKDLoss(M, H, H)(double(2, B, H), double(N, B, H))
    with pytest.raises(ValueError, match="teacher_hidden: got 2 layers, expected more than the student's 2"):
        RAILKDLoss(M, H, H)(double(M, B, H), double(2, B, H))
    with pytest.raises(ValueError, match=r"teacher_hidden: got shape \(5, 2, 7\), expected \[5, 3\]"):
        DistilBertLoss()(double(B, C), double(B, C), labels, double(B, 3, H), double(B, 2, H))
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(5, 2\), expected \(5, 3\)"):
        DistilBertLoss().cosine(double(B, 3, H), double(B, 3, H), torch.ones(B, 2))
    with pytest.raises(ValueError, match=r"teacher_logits: got shape \(5, 3\), expected \[B, C\]"):
        AnnealingKDLoss()(double(B, C), double(B, 3), 1)
    with pytest.raises(ValueError, match=r'reduction: got "sum", a sum over layers expects'):
        VanillaKDLoss(reduction="sum").layers(double(M, B, C), double(M, B, C), labels)


def test_losses_live_in_saved_models_and_move_with_them() -> None:
    rail = RAILKDLoss(M, H, H + 1, 4)
    other = RAILKDLoss(M, H, H + 1, 4)
    other.load_state_dict(rail.state_dict())
    student, teacher = double(M, B, H).float(), double(N, B, H + 1).float()
    torch.testing.assert_close(rail(student, teacher), other(student, teacher))
    assert rail.double().student_projection.weight.dtype == torch.float64


def test_catalogue_package_and_docs_name_the_same_losses() -> None:
    for name, entry in LOSSES.items():
        assert getattr(fastkd, name) is getattr(losses, name), name
        assert getattr(losses, name).__module__ == f"fastkd.losses.{entry.module}", name
    written = {name for name in losses.__all__ if isinstance(getattr(losses, name), type)}
    assert written == set(LOSSES) <= set(fastkd.__all__)
    defined = {
        name
        for path in (ROOT / "python" / "fastkd" / "losses").glob("*.py")
        for name in re.findall(r"^class (\w+)\(nn\.Module\)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert defined == set(LOSSES)
    page = (ROOT / "docs" / "api" / "distillation.md").read_text(encoding="utf-8")
    assert re.findall(r"^        - (\w+)$", page, re.MULTILINE) == list(LOSSES)
    with pytest.raises(AttributeError, match="has no attribute 'PKDLos'"):
        _ = losses.PKDLos


def test_the_catalogues_need_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
sys.argv = ["fastkd"]
from fastkd.kd.catalogue import CATALOGUE
from fastkd.losses.catalogue import LOSSES
print(len(CATALOGUE), len(LOSSES))
"""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, sys.path)])
    child = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert child.stdout.split() == [str(len(CATALOGUE)), str(len(LOSSES))], child.stderr
