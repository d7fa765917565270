"""Forward and backward of the distillation losses against eager PyTorch and torch.compile.

On a GPU every provider is also captured in a CUDA graph (`timing` says which), and the first test prints how many
kernels each of them launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import common
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd_kernels as fk

M, N, B = 4, 12, 32
TEMPERATURE = 2.0

Loss = Callable[..., Tensor]


def eager_kd(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = (student / TEMPERATURE).log_softmax(-1), (teacher / TEMPERATURE).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TEMPERATURE**2


def eager_universal(student: Tensor, teacher: Tensor) -> Tensor:
    attention = torch.einsum("mbc,nbc->mbn", student, teacher).softmax(-1)
    mixed = torch.einsum("mbn,nbc->mbc", attention, teacher)
    log_q, log_p = (student / TEMPERATURE).log_softmax(-1), (mixed / TEMPERATURE).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * (TEMPERATURE**2 / student.shape[1])


def eager_mixture(student: Tensor, layers: Tensor, teacher: Tensor, teachers: Tensor, labels: Tensor) -> Tensor:
    kd, univ = eager_kd(student, teacher), eager_universal(layers, teachers)
    return 0.2 * F.cross_entropy(student, labels) + 0.5 * kd + 0.3 * univ


def our_kd(student: Tensor, teacher: Tensor) -> Tensor:
    return fk.kd_loss(student, teacher, TEMPERATURE)


def our_universal(student: Tensor, teacher: Tensor) -> Tensor:
    return fk.universal_kd_loss(student, teacher, TEMPERATURE)


def our_mixture(student: Tensor, layers: Tensor, teacher: Tensor, teachers: Tensor, labels: Tensor) -> Tensor:
    return fk.distillation_loss(
        student, teacher, labels, layers, teachers, 0.2, 0.5, 0.3,
        temperature=TEMPERATURE, universal_temperature=TEMPERATURE,
    )  # fmt: skip


def step(loss: Loss) -> Callable[..., tuple[Tensor, ...]]:
    """Loss and gradients of the inputs that require them."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        value = loss(*inputs)
        return (value, *torch.autograd.grad(value, [x for x in inputs if x.requires_grad]))

    return run


def checker(eager: Loss) -> Callable[..., None]:
    """Every provider against eager PyTorch in float64."""

    def check(result: Sequence[Tensor], *inputs: Tensor) -> None:
        wide = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
        tolerance = 1e-4 if inputs[0].dtype == torch.float32 else 2e-2
        for ours, exact in zip(result, step(eager)(*wide), strict=True):
            largest = float(exact.abs().max())
            torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance * largest)

    return check


def compare_losses(
    compare: Any, op: str, case: str, ours: Loss, eager: Loss, make_inputs: Callable[[], Sequence[Tensor]], moved: int
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(eager, fullgraph=True)
    providers = {"fastkd": step(ours), "eager": step(eager), "torch.compile": step(compiled)}
    compare(op, case, providers, make_inputs, checker(eager), bytes_moved=moved)


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=common.DEVICE).to(dtype).requires_grad_(grad)


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_universal_kd(compare: Any, classes: int) -> None:
    def make_inputs() -> Sequence[Tensor]:
        return randn(M, B, classes, grad=True), randn(N, B, classes)

    case = f"N={N} M={M} B={B} C={classes} fp32"
    moved = 4 * B * classes * (N + 2 * M)
    compare_losses(compare, "universal_kd_loss", case, our_universal, eager_universal, make_inputs, moved)


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_kd(compare: Any, classes: int) -> None:
    def make_inputs() -> Sequence[Tensor]:
        return randn(B, classes, grad=True), randn(B, classes)

    moved = 4 * B * classes * 3
    compare_losses(compare, "kd_loss", f"B={B} C={classes} fp32", our_kd, eager_kd, make_inputs, moved)


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_mixture(compare: Any, classes: int) -> None:
    def make_inputs() -> Sequence[Tensor]:
        labels = torch.randint(classes, (B,), device=common.DEVICE)
        student, layers = randn(B, classes, grad=True), randn(M, B, classes, grad=True)
        return student, layers, randn(B, classes), randn(N, B, classes), labels

    case = f"N={N} M={M} B={B} C={classes} fp32"
    moved = 4 * B * classes * (N + 2 * M + 3)
    compare_losses(compare, "distillation_loss", case, our_mixture, eager_mixture, make_inputs, moved)


WIDE = [(2048, 32_000), (2048, 131_072)] if common.DEVICE.type == "cuda" else [(64, 32_000)]
WIDE_DTYPE = torch.bfloat16 if common.DEVICE.type == "cuda" else torch.float32


@pytest.mark.parametrize(("rows", "classes"), WIDE)
def test_kd_over_a_vocabulary(compare: Any, rows: int, classes: int) -> None:
    def make_inputs() -> Sequence[Tensor]:
        return randn(rows, classes, dtype=WIDE_DTYPE, grad=True), randn(rows, classes, dtype=WIDE_DTYPE)

    moved = WIDE_DTYPE.itemsize * rows * classes * 3
    case = f"B={rows} C={classes} {WIDE_DTYPE}"
    compare_losses(compare, "kd_loss", case, our_kd, eager_kd, make_inputs, moved)


@pytest.mark.parametrize(("rows", "classes"), WIDE)
def test_universal_kd_over_a_vocabulary(compare: Any, rows: int, classes: int) -> None:
    rows //= 8

    def make_inputs() -> Sequence[Tensor]:
        # small logits: scores over so many classes saturate otherwise
        student = randn(1, rows, classes, dtype=WIDE_DTYPE, grad=True)
        with torch.no_grad():
            student *= 0.05
        return student, randn(4, rows, classes, dtype=WIDE_DTYPE) * 0.05

    moved = WIDE_DTYPE.itemsize * rows * classes * 6
    case = f"N=4 M=1 B={rows} C={classes} {WIDE_DTYPE}"
    compare_losses(compare, "universal_kd_loss", case, our_universal, eager_universal, make_inputs, moved)


@pytest.mark.skipif(common.DEVICE.type != "cuda", reason="launches are counted on a GPU")
@pytest.mark.parametrize(("ours", "eager"), [(our_kd, eager_kd), (our_universal, eager_universal)])
def test_launches(ours: Loss, eager: Loss, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = [(B, 3), (B, 3)] if ours is our_kd else [(M, B, 3), (N, B, 3)]
    inputs = randn(*shapes[0], grad=True), randn(*shapes[1])
    counts = {}
    for name, loss in (("fastkd", ours), ("eager", eager)):
        run = step(loss)
        run(*inputs)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run(*inputs)
        counts[name] = sum(event.count for event in profile.key_averages() if "Memcpy" not in event.key)
    with capsys.disabled():
        print(f"\n{ours.__name__}: kernels launched, forward and backward: {counts}")
    assert counts["fastkd"] < counts["eager"]
