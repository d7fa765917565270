"""Launches of the distillation losses, forward and backward, against the same formulas in eager PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import bench_kd
import pytest
import torch
from launches import count_launches
from torch import Tensor

import fastkd_kernels as fk
from fastkd_kernels import _triton
from fastkd_kernels.ops import distillation_loss as fused_loss_module

pytestmark = [
    pytest.mark.skipif(not _triton.interpreting, reason="bench/bench_kd.py counts on the GPU itself"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
M, N, B, C = 2, 3, 4, 5


def count(loss: Callable[..., Tensor], inputs: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    one = torch.ones(())
    wanted = [tensor for tensor in inputs if tensor.requires_grad]

    def step() -> None:
        torch.autograd.grad(loss(*inputs), wanted, one)

    return count_launches(step, monkeypatch)


@pytest.mark.parametrize(
    ("ours", "eager", "shapes", "students", "eager_at_least"),
    [
        (bench_kd.our_kd, bench_kd.eager_kd, [(B, C)] * 2, 1, 15),
        (bench_kd.our_universal, bench_kd.eager_universal, [(M, B, C), (N, B, C)], 1, 25),
        (bench_kd.our_mixture, bench_kd.eager_mixture, [(B, C), (M, B, C), (B, C), (N, B, C)], 2, 45),
    ],
)
def test_one_launch_forward_and_one_backward(
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    shapes: list[tuple[int, ...]],
    students: int,
    eager_at_least: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = [torch.randn(shape).requires_grad_(at < students) for at, shape in enumerate(shapes)]
    if ours is bench_kd.our_mixture:
        inputs.append(torch.randint(C, (B,)))
        # labels on a GPU are not looked at
        monkeypatch.setattr(fused_loss_module, "_check_labels", lambda *_: None)
    with fk.backend("cuda"):
        counts = count(ours, inputs, monkeypatch)
    assert counts.total() == 2, counts
    assert counts["_scale_kernel"] == 1
    assert count(eager, inputs, monkeypatch).total() >= eager_at_least
