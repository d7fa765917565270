"""distillation_loss: the fused mixture against float64 and against the three separate losses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cubins import KernelSpec, compile_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import (
    assert_as_accurate_as_torch,
    assert_compiles_into_one_graph,
    assert_equal_gradients_three_times,
    assert_parity,
    device_of,
    kernel_backends,
    run,
)
from torch.nn import functional as F

import fastkd_kernels as fk
from fastkd_kernels import _triton
from fastkd_kernels.ops import distillation_loss as module
from fastkd_kernels.ops.distillation_loss import distillation_loss
from fastkd_kernels.ops.universal_kd_loss import UniversalKDConfig

BACKENDS = kernel_backends("distillation_loss")
# numpy, which Triton's interpreter computes with, mentions -inf - -inf even where the result is not used
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def logits(
    layers: int, teachers: int, batch: int, classes: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Student, its layers, teacher, its layers."""
    shapes = ((batch, classes), (layers, batch, classes), (batch, classes), (teachers, batch, classes))
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def loss_with(labels: torch.Tensor | None, **options: Any) -> Any:
    weights = {"label_weight": 0.7, "kd_weight": 1.3, "intermediate_weight": 0.4}

    def loss(student: torch.Tensor, layers: torch.Tensor, teacher: torch.Tensor, teachers: torch.Tensor) -> Any:
        on_device = None if labels is None else labels.to(student.device)
        return distillation_loss(student, teacher, on_device, layers, teachers, **{**weights, **options})

    return loss


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_is_the_sum_of_its_three_terms(backend: str, reduction: str) -> None:
    student, layers, teacher, teachers = logits(2, 3, 5, 4)
    labels = torch.tensor([0, 3, 1, 1, 2])
    options: dict[str, Any] = {"reduction": reduction, "direction": "jsd"}
    loss = loss_with(labels, temperature=2.0, universal_temperature=3.0, **options)
    value, gradients = run(backend, loss, (student, layers, teacher, teachers), (True, True, False, False))

    def separate(student: torch.Tensor, layers: torch.Tensor) -> torch.Tensor:
        name = "mean" if reduction == "batchmean" else reduction
        univ = fk.universal_kd_loss(layers, teachers, 3.0, **options)
        univ = univ.sum(0) if reduction == "none" else univ
        ce = F.cross_entropy(student, labels, reduction=name)
        return 0.7 * ce + 1.3 * fk.kd_loss(student, teacher, 2.0, **options) + 0.4 * univ

    expected, expected_gradients = run("reference", separate, (student, layers), (True, True))
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-6)
    for ours, exact in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours.cpu(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 20, 128])
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_accurate_as_torch(backend: str, classes: int, dtype: torch.dtype) -> None:
    tensors = logits(2, 12, 3, classes, dtype)
    loss = loss_with(torch.randint(classes, (3,)), temperature=2.0, attn_scale="rsqrt_c")
    # the label's logarithm, and the divergences of the last layer and of two others, by weight and squared temperature
    divergences = 0.7 + 4 * 1.3 + 4 * 0.4 * 2
    assert_as_accurate_as_torch(backend, loss, tensors, (True, True, False, False), divergences=divergences)


@given(
    layers=st.integers(0, 3),
    batch=st.integers(0, 18),
    classes=st.integers(1, 9),
    task=st.sampled_from(["classification", "regression"]),
    direction=st.sampled_from(["forward", "reverse", "jsd"]),
    reduction=st.sampled_from(["batchmean", "mean", "sum", "none"]),
    layer_reduction=st.sampled_from(["sum", "mean"]),
    mix=st.sampled_from(["logits", "probs", "loss"]),
    attn_space=st.sampled_from(["logits", "log_probs", "probs"]),
    attn=st.sampled_from([None, "dot", "neg_sqdist", "uniform"]),
    detach_attention=st.booleans(),
    t2_scale=st.booleans(),
    labelled=st.booleans(),
    teacher_gradient=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_means_the_same_to_kernel_and_reference(
    backend, layers, batch, classes, task, mix, attn_space, labelled, teacher_gradient, seed, **options
) -> None:
    torch.manual_seed(seed)
    if task == "classification":
        classes = max(classes, 2)
    else:
        mix, attn_space = "loss" if mix == "loss" else "logits", "logits"
    batch = min(batch, 4) if backend == "cuda" else batch
    dtype = torch.float64 if backend == "cpu" else torch.float32
    tensors = logits(layers, 4, batch, classes, dtype)
    scores = torch.randn(batch, classes, dtype=torch.float64)
    labels = torch.randint(classes, (batch,)) if task == "classification" else scores
    loss = loss_with(
        labels if labelled else None, temperature=2.0, universal_temperature=1.5, task=task, mix=mix,
        attn_space=attn_space, detach_teacher=not teacher_gradient, **options,
    )  # fmt: skip
    wanted = (True, True, teacher_gradient, teacher_gradient)
    assert_parity(backend, loss, tensors, wanted)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_second_and_third_backward_are_equal(backend: str) -> None:
    loss = loss_with(torch.tensor([0, 1, 2, 0]))
    assert_equal_gradients_three_times(backend, loss, logits(2, 3, 4, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_grad_output(backend: str) -> None:
    student, layers, teacher, teachers = (x.to(device_of(backend)) for x in logits(2, 3, 4, 5))
    inputs = (student.requires_grad_(), layers.requires_grad_())
    loss = loss_with(torch.tensor([0, 1, 2, 0]), reduction="none")
    weights = torch.arange(8.0, device=student.device)[::2]
    with fk.backend(backend):
        ours = torch.autograd.grad(loss(student, layers, teacher, teachers), inputs, weights)
    with fk.backend("reference"):
        exact = torch.autograd.grad(loss(student, layers, teacher, teachers), inputs, weights)
    torch.testing.assert_close(ours, exact)


def test_wide_calls_are_the_sum_of_the_separate_ops() -> None:
    if not _triton.interpreting:
        pytest.skip("needs Triton's interpreter")
    tensors = logits(2, 3, 2, 140)
    loss = loss_with(torch.tensor([0, 139]), attn_scale="rsqrt_c")
    wanted = (True, True, False, False)
    value, gradients = run("cuda", loss, tensors, wanted)
    expected, expected_gradients = run("reference", loss, tensors, wanted)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", [-1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_that_no_class_has_never_passes_for_a_loss(backend: str, label: int) -> None:
    student, layers, teacher, teachers = logits(1, 2, 3, 5)
    labels = torch.tensor([0, label, 1])
    with pytest.raises(ValueError, match="labels: got values from"):
        distillation_loss(student, teacher, labels, layers, teachers, 1.0, 1.0, 1.0)
    options = (1.0,) * 6 + (0, 0.5, 0, 0, False, True, 1.0, True, True, True)
    arguments = (student, layers, teacher, teachers, labels, *options)
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=r"labels\[1\]"):
            module._forward(*arguments)
    else:
        on_device = [a.to(device_of(backend)) if isinstance(a, torch.Tensor) else a for a in arguments]
        assert module._launch(*on_device)[0].isnan()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.zeros(4)}, TypeError, "labels: got dtype torch.float32, expected torch.int64"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels: got shape \(3,\), expected \[4\]"),
        ({"student_logits": torch.zeros(4, 2)}, ValueError, r"student_logits: got shape \(4, 2\), expected \[4, 3\]"),
        ({"teacher_logits": torch.zeros(3, 3)}, ValueError, r"teacher_logits: got shape \(3, 3\)"),
        ({"universal_temperature": 0.0}, ValueError, "temperature: got 0.0"),
        ({"mix": "hidden"}, ValueError, "mix: got 'hidden'"),
        ({"task": "regression"}, TypeError, "labels: got dtype torch.int64, a regression"),
        ({"teacher_layer_logits": torch.zeros(2, 4, 3, requires_grad=True)}, ValueError, "detach_teacher=False"),
    ],
)
def test_bad_input_raises(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "student_logits": torch.zeros(4, 3),
        "teacher_logits": torch.zeros(4, 3),
        "labels": torch.zeros(4, dtype=torch.int64),
        "student_layer_logits": torch.zeros(1, 4, 3),
        "teacher_layer_logits": torch.zeros(2, 4, 3),
        **change,
    }
    with pytest.raises(error, match=message):
        distillation_loss(**arguments, label_weight=1.0, kd_weight=1.0, intermediate_weight=1.0)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_opcheck(backend: str, labelled: bool) -> None:
    tensors = logits(2, 3, 4, 5)
    labels = torch.tensor([0, 1, 2, 0]) if labelled else None
    options = (0.5, 2.0, 1.5, 2.0, 1.5, 1.0, 0, 0.5, 0, 0, False, True, 0.25, labelled, True, True)
    torch.library.opcheck(module._forward, (*tensors, labels, *options))


def test_compiles_into_one_graph() -> None:
    student, layers, teacher, teachers = logits(2, 3, 4, 5)
    for tensor in (student, layers):
        tensor.requires_grad_()
    loss = loss_with(torch.tensor([0, 1, 2, 0]))
    assert_compiles_into_one_graph(loss, (student, layers, teacher, teachers))


@pytest.mark.skipif(not _triton.available, reason=str(_triton.missing_reason))
def test_cubins_of_every_architecture_have_no_spills() -> None:
    dtypes = itertools.cycle(("fp32", "bf16", "fp16"))
    specs = [
        _spec(next(dtypes), shape, DIVERGENCE=divergence, MIX=mix, SPACE=space, DISTANCE=distance)
        for shape, divergence, mix, space, distance in (
            ((12, 3), 0, 0, 0, False),
            ((32, 128), 2, 1, 2, True),
            ((32, 128), 1, 2, 1, False),
            ((32, 128), 3, 0, 0, True),
        )
    ]
    for cubin in compile_kernels(specs):
        cubin.assert_no_spills()
        cubin.assert_arithmetic_is_imitated()


def _spec(dtype: str, shape: tuple[int, int], **flags: Any) -> KernelSpec:
    config = UniversalKDConfig.choose(*shape)
    logits_pointers = (
        "student", "student_layers", "teacher", "teacher_layers", "student_gradient", "layers_gradient",
    )  # fmt: skip
    strides = (
        "student_stride", "student_layer_stride", "student_layers_stride", "teacher_stride", "teacher_layer_stride",
        "teacher_layers_stride",
    )  # fmt: skip
    scales = (
        "ce_scale", "kd_scale", "kd_gradient_scale", "universal_scale", "universal_gradient_scale", "attn_scale",
        "inverse_temperature", "inverse_universal_temperature", "beta", "factor",
    )  # fmt: skip
    arguments: dict[str, Any] = {
        **dict.fromkeys(logits_pointers, f"*{dtype}:16"),
        "labels": "*fp32:16" if flags["DIVERGENCE"] == 3 else "*i64:16",
        **dict.fromkeys(("losses", "loss"), "*fp32:16"),
        "arrived": "*i32:16",
        **dict.fromkeys(("M", "N", "B", "C", *strides), "i32"),
        **dict.fromkeys(scales, "fp32"),
        **dict.fromkeys(("ATTENTION_GRADIENT", "HAS_LABELS", "REDUCE", "STUDENT_GRADIENT", "LAYERS_GRADIENT"), True),
        "BLOCK_N": config.block_n,
        "BLOCK_C": config.block_c,
        **flags,
    }
    name = "fastkd_kernels.ops.distillation_loss:_distillation_kernel"
    return KernelSpec(name, arguments, {"num_warps": config.num_warps, "maxnreg": module.MOST_REGISTERS})
