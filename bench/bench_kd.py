"""Forward and backward of the distillation losses against eager PyTorch, torch.compile and, where installed, Liger.

On a GPU every provider is also captured in a CUDA graph (`timing` says which), and the first test prints how many
kernels each of them launches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import common
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd_kernels as fk

try:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from liger_kernel.transformers import LigerKLDIVLoss
except ImportError:
    LigerFusedLinearJSDLoss = LigerKLDIVLoss = None

M, N, B = 4, 12, 32
TEMPERATURE = 2.0

Loss = Callable[..., Tensor]


def widen(*logits: Tensor) -> list[Tensor]:
    return [x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in logits]


def eager_kd(student: Tensor, teacher: Tensor) -> Tensor:
    # in bfloat16 its gradients would be wrong in the second digit
    student, teacher = widen(student, teacher)
    log_q, log_p = (student / TEMPERATURE).log_softmax(-1), (teacher / TEMPERATURE).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TEMPERATURE**2


def eager_universal(student: Tensor, teacher: Tensor, attn_scale: float = 1.0) -> Tensor:
    student, teacher = widen(student, teacher)
    scores = torch.einsum("mbc,nbc->mbn", student, teacher)
    attention = (scores if attn_scale == 1 else scores * attn_scale).softmax(-1)
    mixed = torch.einsum("mbn,nbc->mbc", attention, teacher)
    log_q, log_p = (student / TEMPERATURE).log_softmax(-1), (mixed / TEMPERATURE).log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * (TEMPERATURE**2 / student.shape[1])


def eager_mixture(student: Tensor, layers: Tensor, teacher: Tensor, teachers: Tensor, labels: Tensor) -> Tensor:
    kd, univ = eager_kd(student, teacher), eager_universal(layers, teachers)
    return 0.2 * F.cross_entropy(student, labels) + 0.5 * kd + 0.3 * univ


def eager_fused(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(student, weight)
    (wide,) = widen(logits)
    return 0.5 * eager_kd(wide, F.linear(teacher, teacher_weight)) + 0.5 * F.cross_entropy(wide, labels)


def our_kd(student: Tensor, teacher: Tensor) -> Tensor:
    return fk.kd_loss(student, teacher, TEMPERATURE)


def our_universal(student: Tensor, teacher: Tensor, attn_scale: float | str = 1.0) -> Tensor:
    return fk.universal_kd_loss(student, teacher, TEMPERATURE, attn_scale=attn_scale)


def our_mixture(student: Tensor, layers: Tensor, teacher: Tensor, teachers: Tensor, labels: Tensor) -> Tensor:
    return fk.distillation_loss(
        student, teacher, labels, layers, teachers, 0.2, 0.5, 0.3,
        temperature=TEMPERATURE, universal_temperature=TEMPERATURE,
    )  # fmt: skip


def our_fused(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    return fk.fused_linear_kd_loss(
        student, weight, teacher, teacher_weight, labels, temperature=TEMPERATURE, label_weight=0.5, kd_weight=0.5
    )


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
            largest = float(exact.detach().abs().max())
            torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance * largest)

    return check


def liger_kd(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = widen(student, teacher)
    log_q, log_p = (student / TEMPERATURE).log_softmax(-1), (teacher / TEMPERATURE).log_softmax(-1)
    return LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_q, log_p) * TEMPERATURE**2


def liger_fused(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
    # its beta of 0 is KL(teacher || student); it has no tau^2
    loss = LigerFusedLinearJSDLoss(0.5, 0.5 * TEMPERATURE**2, beta=0.0, temperature=TEMPERATURE)
    return loss(student, weight, teacher, teacher_weight, labels)


def compare_losses(
    compare: Any,
    op: str,
    case: str,
    ours: Loss,
    eager: Loss,
    make_inputs: Callable[[], Sequence[Tensor]],
    moved: int,
    others: Mapping[str, Loss] | None = None,
    memory: bool = False,
) -> None:
    torch.compiler.reset()
    losses = {"fastkd": ours, "eager": eager, "torch.compile": torch.compile(eager, fullgraph=True), **(others or {})}
    providers = {name: step(loss) for name, loss in losses.items()}
    compare(op, case, providers, make_inputs, checker(eager), bytes_moved=moved, memory=memory)


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


ON_GPU = common.DEVICE.type == "cuda"
WIDE = [(2048, 32_000), (8192, 32_000), (2048, 131_072)] if ON_GPU else [(64, 32_000), (256, 32_000), (64, 131_072)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "classes"), WIDE)
def test_kd_over_a_vocabulary(compare: Any, rows: int, classes: int, dtype: torch.dtype) -> None:
    def make_inputs() -> Sequence[Tensor]:
        return randn(rows, classes, dtype=dtype, grad=True), randn(rows, classes, dtype=dtype)

    moved = dtype.itemsize * rows * classes * 3
    case = f"B={rows} C={classes} {_short(dtype)}"
    # its kernel is Triton's, for a GPU
    others = {"liger": liger_kd} if LigerKLDIVLoss and ON_GPU else {}
    compare_losses(compare, "kd_loss", case, our_kd, eager_kd, make_inputs, moved, others, memory=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "classes"), WIDE[:2])
def test_universal_kd_over_a_vocabulary(compare: Any, rows: int, classes: int, dtype: torch.dtype) -> None:
    rows //= 8

    def make_inputs() -> Sequence[Tensor]:
        return randn(1, rows, classes, dtype=dtype, grad=True), randn(4, rows, classes, dtype=dtype)

    # scores over so many classes saturate unless they are scaled
    ours = partial(our_universal, attn_scale="rsqrt_c")
    eager = partial(eager_universal, attn_scale=classes**-0.5)
    moved = dtype.itemsize * rows * classes * 6
    case = f"N=4 M=1 B={rows} C={classes} {_short(dtype)}"
    compare_losses(compare, "universal_kd_loss", case, ours, eager, make_inputs, moved, memory=True)


FUSED = [(4096, 2048, 32_000), (8192, 4096, 128_256)] if ON_GPU else [(256, 256, 32_000), (1024, 256, 32_000)]


@pytest.mark.parametrize(("tokens", "hidden", "classes"), FUSED)
def test_fused_linear(compare: Any, tokens: int, hidden: int, classes: int) -> None:
    dtype = torch.bfloat16 if ON_GPU else torch.float32

    def make_inputs() -> Sequence[Tensor]:
        student, teacher = (randn(tokens, hidden, dtype=dtype) for _ in range(2))
        heads = [randn(classes, hidden, dtype=dtype) / hidden**0.5 for _ in range(2)]
        labels = torch.randint(classes, (tokens,), device=common.DEVICE)
        return student.requires_grad_(), heads[0].requires_grad_(), teacher, heads[1], labels

    case = f"T={tokens} H={hidden} V={classes} {_short(dtype)}"
    others = {"liger": liger_fused} if LigerFusedLinearJSDLoss else {}
    moved = dtype.itemsize * 2 * (2 * tokens + 2 * classes) * hidden
    compare_losses(
        compare, "fused_linear_kd_loss", case, our_fused, eager_fused, make_inputs, moved, others, memory=True
    )


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


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
