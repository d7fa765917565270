"""Error budgets of the kernels in the arithmetic of a GPU, as far as the interpreter can show it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import test_distillation_loss as distillation
import test_exit_gate as gate
import test_fused_linear_kd_loss as linear
import test_kd_loss as kd
import test_layer_norm as layer_norm
import test_student_head as head
import test_universal_kd_loss as universal
import torch
from gpu_arithmetic import gpu_arithmetic, tensor_core

from fastkd_kernels import _triton

pytestmark = [
    pytest.mark.skipif(not _triton.interpreting or torch.cuda.is_available(), reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=range(3), autouse=True)
def _as_on_a_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(request.param)
    with gpu_arithmetic(request.param):
        yield


@pytest.mark.parametrize("criterion", gate.STATELESS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exit_gate(criterion: str, dtype: torch.dtype) -> None:
    gate.test_uncertainty_is_within_the_error_budget("cuda", criterion, dtype)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm(dtype: torch.dtype, has_bias: bool) -> None:
    layer_norm.test_add_layer_norm("cuda", dtype, 3, 384, True, has_bias)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embed_layer_norm(dtype: torch.dtype, has_bias: bool) -> None:
    layer_norm.test_embed_layer_norm("cuda", dtype, 3, has_bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 20, 1500])
@pytest.mark.parametrize(("task", "direction"), kd.KINDS)
def test_kd_loss(task: str, direction: str, classes: int, dtype: torch.dtype) -> None:
    kd.test_as_accurate_as_torch("cuda", task, direction, classes, dtype)


@pytest.mark.parametrize(("classes", "dtype"), [(2, torch.float32), (2, torch.bfloat16), (300, torch.float32)])
def test_universal_kd_loss(classes: int, dtype: torch.dtype) -> None:
    universal.test_as_accurate_as_torch("cuda", classes, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 20])
def test_distillation_loss(classes: int, dtype: torch.dtype) -> None:
    distillation.test_as_accurate_as_torch("cuda", classes, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("direction", "teacher_classes"), [("forward", 13), ("reverse", 11), ("jsd", 15)])
def test_fused_linear_kd_loss(direction: str, teacher_classes: int, dtype: torch.dtype) -> None:
    linear.test_as_accurate_as_torch("cuda", direction, teacher_classes, dtype)


@pytest.mark.parametrize(("hidden", "width", "labels", "heads"), [(768, 128, 2, 2), (384, 128, 40, 2), (100, 32, 3, 1)])
def test_student_head(hidden: int, width: int, labels: int, heads: int) -> None:
    head.test_error_budget_of_sizes("cuda", hidden, width, labels, heads)


def test_sums_of_a_tensor_core_are_worse_than_those_outside() -> None:
    """Why the head adds its steps up itself; were it not so, this mode would prove nothing."""
    generator = np.random.default_rng(0)
    left, right = (generator.random(shape).astype(np.float32) for shape in ((16, 768), (768, 16)))
    inside = outside = np.zeros((16, 16), dtype=np.float32)
    for start in range(0, 768, 16):
        step = left[:, start : start + 16], right[start : start + 16]
        outside = outside + tensor_core(*step, np.zeros_like(outside))
    for start in range(0, 768, 8):
        inside = tensor_core(left[:, start : start + 8], right[start : start + 8], inside)
    truth = left.astype(np.float64) @ right.astype(np.float64)
    assert np.abs(inside - truth).max() > 4 * np.abs(outside - truth).max()
