"""kd_loss: values and gradients of every backend against float64, its options, its errors, its compiled kernels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cubins import KernelSpec, compile_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import (
    LOW_PRECISION,
    assert_as_accurate_as_torch,
    assert_compiles_into_one_graph,
    assert_equal_gradients_three_times,
    assert_parity,
    device_of,
    kernel_backends,
    run,
)
from memory import peak_bytes
from torch.nn import functional as F

import fastkd_kernels as fk
from fastkd_kernels import _extension, _triton
from fastkd_kernels.ops import kd_loss as module
from fastkd_kernels.ops.kd_loss import kd_loss, kd_loss_reference

BACKENDS = kernel_backends("kd_loss")
DIRECTIONS = ("forward", "reverse", "jsd")
KINDS = [*[("classification", direction) for direction in DIRECTIONS], ("regression", "forward")]
# numpy, which Triton's interpreter computes with, mentions -inf - -inf even where the result is not used
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def logits(batch: int, classes: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> list[torch.Tensor]:
    return [(scale * torch.randn(batch, classes)).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("classes", [2, 3, 20, 129, 1500])
@pytest.mark.parametrize(("task", "direction"), KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_accurate_as_torch(backend: str, task: str, direction: str, classes: int, dtype: torch.dtype) -> None:
    student, teacher = logits(5, classes, dtype)
    options = {"temperature": 2.0, "direction": direction, "task": task}
    for reduction, teacher_gradient in (("batchmean", False), ("none", True)):
        assert_as_accurate_as_torch(
            backend,
            kd_loss,
            (student, teacher),
            (True, teacher_gradient),
            reduction=reduction,
            detach_teacher=not teacher_gradient,
            divergences=4.0,
            **options,
        )


@given(
    batch=st.integers(0, 35),
    classes=st.integers(1, 40),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    reduction=st.sampled_from(["batchmean", "mean", "sum", "none"]),
    t2_scale=st.booleans(),
    direction=st.sampled_from(DIRECTIONS),
    task=st.sampled_from(["classification", "regression"]),
    teacher_gradient=st.booleans(),
    masked=st.booleans(),
    labelled=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_means_the_same_to_kernel_and_reference(
    backend, batch, classes, temperature, reduction, t2_scale, direction, task, teacher_gradient, masked, labelled, seed
) -> None:
    torch.manual_seed(seed)
    if task == "classification":
        classes = max(classes, 2)
    dtype = torch.float64 if backend == "cpu" else torch.float32
    student, teacher = logits(batch, classes, dtype)
    if masked and task == "classification" and classes > 2:
        student[:, 1] = teacher[:, 1] = -torch.inf
    options = {
        "temperature": temperature,
        "reduction": reduction,
        "t2_scale": t2_scale,
        "direction": direction,
        "task": task,
        "detach_teacher": not teacher_gradient,
        "labels": some_labels(batch).to(device_of(backend)) if labelled else None,
    }
    wanted = (True, teacher_gradient)
    assert_parity(backend, kd_loss, (student, teacher), wanted, **options)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_reference_is_torchs_divergence(reduction: str) -> None:
    student, teacher = logits(6, 5, torch.float64)
    log_q, log_p = (student / 3).log_softmax(-1), (teacher / 3).log_softmax(-1)
    expected = 9 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if reduction != "none":
        expected = expected.sum() / {"sum": 1, "batchmean": 6, "mean": 30}[reduction]
    torch.testing.assert_close(kd_loss_reference(student, teacher, 3.0, reduction), expected)
    without = kd_loss_reference(student, teacher, 3.0, reduction, t2_scale=False)
    torch.testing.assert_close(without, expected / 9)
    swapped = kd_loss_reference(teacher, student, 3.0, reduction, direction="reverse")
    torch.testing.assert_close(swapped, expected)


def test_reference_jensen_shannon_is_symmetric_and_at_most_ln_2() -> None:
    student, teacher = logits(6, 5, torch.float64, scale=20.0)
    value = kd_loss_reference(student, teacher, reduction="none", direction="jsd")
    torch.testing.assert_close(value, kd_loss_reference(teacher, student, reduction="none", direction="jsd"))
    assert 0 < value.min() < value.max() < torch.tensor(2.0).log()
    middle = ((student.softmax(-1) + teacher.softmax(-1)) / 2).log()
    parts = [F.kl_div(middle, z.log_softmax(-1), reduction="none", log_target=True).sum(-1) for z in (student, teacher)]
    torch.testing.assert_close(value, sum(parts) / 2)


REDUCTIONS = ("batchmean", "mean", "sum", "none")


def some_labels(*shape: int) -> torch.Tensor:
    """Every third row is ignored."""
    labels = torch.randint(9, shape)
    labels.view(-1)[::3] = -100
    return labels


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_leading_dimensions_are_rows(backend: str, reduction: str) -> None:
    student, teacher = logits(24, 5)
    value, (gradient,) = run(backend, kd_loss, (student, teacher), (True, False), reduction=reduction)
    for leading in ((4, 6), (2, 3, 4), (24, 1)):
        shaped = (student.view(*leading, 5), teacher.view(*leading, 5))
        other, (other_gradient,) = run(backend, kd_loss, shaped, (True, False), reduction=reduction)
        assert other.shape == (leading if reduction == "none" else ())
        assert torch.equal(other.flatten(), value.flatten())
        assert torch.equal(other_gradient.view(24, 5), gradient)
    empty = torch.zeros(0, 3, 5), torch.zeros(0, 3, 5)
    other, _ = run(backend, kd_loss, empty, (True, False), reduction=reduction)
    assert other.shape == ((0, 3) if reduction == "none" else ())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_ignored_rows_count_for_nothing_whatever_they_hold(
    backend: str, dtype: torch.dtype, task: str, reduction: str
) -> None:
    student, teacher = (x.view(2, 5, 7) for x in logits(10, 7, dtype))
    labels, weights = some_labels(2, 5), torch.linspace(0.5, 1.5, 10).view(2, 5)
    keep = labels != -100
    student[~keep], teacher[~keep] = torch.nan, torch.inf
    options = {"temperature": 2.0, "reduction": reduction, "task": task, "detach_teacher": False}

    def weighed(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor, **given: Any) -> torch.Tensor:
        loss = kd_loss(student, teacher, **options, **given)
        if reduction == "none" and given:
            assert not loss[~keep].any()
        return (loss * weights.to(loss.device)).sum() if reduction == "none" else loss

    given = {"labels": labels.to(device_of(backend)), "weights": weights}
    value, gradients = run(backend, weighed, (student, teacher), (True, True), **given)
    alone, kept = run(backend, weighed, (student[keep], teacher[keep]), (True, True), weights=weights[keep])
    torch.testing.assert_close(value, alone)
    for gradient, of_kept in zip(gradients, kept, strict=True):
        assert not gradient[~keep].any()
        torch.testing.assert_close(gradient[keep], of_kept)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_rows_are_divided_by_the_number_of_items_in_all(backend: str) -> None:
    student, teacher = (x.view(2, 5, 7) for x in logits(10, 7))
    labels = some_labels(2, 5)
    for labelled, items in itertools.product((None, labels), (0, 1, 7, 2.5, torch.tensor(7), torch.tensor([0]))):
        options = {"labels": None if labelled is None else labelled.to(device_of(backend))}
        total, (of_total,) = run(backend, kd_loss, (student, teacher), (True, False), reduction="sum", **options)
        value, (gradient,) = run(
            backend, kd_loss, (student, teacher), (True, False), num_items_in_batch=items, **options
        )
        by = max(float(items), 1)
        torch.testing.assert_close(value, total / by)
        torch.testing.assert_close(gradient, of_total / by)
    all_ignored = torch.full((2, 5), -1, device=device_of(backend))
    for reduction in REDUCTIONS:
        options = {"labels": all_ignored, "ignore_index": -1, "reduction": reduction}
        value, (gradient,) = run(backend, kd_loss, (student, teacher), (True, False), **options)
        assert not value.any()
        assert not gradient.any()


def test_regression_is_the_mean_squared_error() -> None:
    student, teacher = logits(6, 1, torch.float64)
    torch.testing.assert_close(kd_loss(student, teacher, 2.0, "mean", task="regression"), F.mse_loss(student, teacher))


@pytest.mark.parametrize(("task", "direction"), KINDS)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS[:1]])
def test_gradcheck(backend: str, task: str, direction: str) -> None:
    inputs = [x.requires_grad_() for x in logits(3, 4, torch.float64)]
    for reduction in ("batchmean", "none"):

        def loss(student: torch.Tensor, teacher: torch.Tensor, reduction: str = reduction) -> torch.Tensor:
            options = {"reduction": reduction, "direction": direction, "task": task, "detach_teacher": False}
            return kd_loss(student, teacher, 1.7, **options)

        with fk.backend(backend):
            assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_second_and_third_backward_are_equal(backend: str, reduction: str) -> None:
    assert_equal_gradients_three_times(backend, kd_loss, tuple(logits(4, 7)), reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_and_strided_grad_output(backend: str, dtype: torch.dtype) -> None:
    student, teacher = (x.to(device_of(backend)) for x in logits(6, 5, dtype))
    student.requires_grad_()
    with fk.backend(backend):
        value = kd_loss(student, teacher, reduction="none")
    for grad_output in (torch.tensor(2.0).expand(6), torch.arange(12.0)[::2], torch.arange(6.0).flip(0)):
        weights = grad_output.to(value.device)
        (strided,) = torch.autograd.grad(value, student, weights, retain_graph=True)
        (dense,) = torch.autograd.grad(value, student, weights.contiguous(), retain_graph=True)
        torch.testing.assert_close(strided, dense, rtol=0, atol=0)
        (expected,) = torch.autograd.grad(kd_loss_reference(student, teacher, reduction="none"), student, weights)
        torch.testing.assert_close(strided, expected)


def test_gradient_of_a_gradient_raises_instead_of_being_wrong() -> None:
    student, teacher = logits(4, 3)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match=r'backend\("reference"\)'):
        (gradient.square().sum() + student.sum()).backward()
    with fk.backend("reference"):
        (gradient,) = torch.autograd.grad(kd_loss(student, teacher), student, create_graph=True)
    (gradient**2).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("classes", [6, 1500])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_tiny_and_zero_probabilities_stay_finite(backend: str, direction: str, classes: int) -> None:
    student, teacher = logits(5, classes)
    student[0, 0], teacher[1, 0] = -200, -200
    student[2], teacher[2] = 0, 0
    student[2, 1], teacher[2, 2] = 200, 200
    student[:, 3] = teacher[:, 3] = -torch.inf
    if direction != "reverse":
        teacher[3, 4] = -torch.inf
    if direction != "forward":
        student[3, 5] = -torch.inf
    options = {"reduction": "none", "direction": direction, "detach_teacher": False}
    value, gradients = run(backend, kd_loss, (student, teacher), (True, True), **options)
    assert value.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    wide = (student.double(), teacher.double())
    expected, expected_gradients = run("reference", kd_loss, wide, (True, True), **options)
    torch.testing.assert_close(value.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double().cpu(), expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_class_that_only_the_student_masks_costs_infinity_and_keeps_its_gradient_finite(backend: str) -> None:
    student, teacher = logits(2, 4)
    student[0, 1] = -torch.inf
    value, (gradient,) = run(backend, kd_loss, (student, teacher), (True, False), reduction="none")
    assert value[0] == torch.inf
    assert value[1].isfinite()
    assert gradient[1].isfinite().all()
    if backend != "reference":
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_and_strides(backend: str) -> None:
    storage = torch.randn(2, 7, 24)
    student, teacher = storage[0, :, ::3], storage[1].t()[:8].t().to(torch.bfloat16)
    assert not student.is_contiguous()
    for wanted in ((True, False), (True, True)):
        options = {"detach_teacher": not wanted[1], "reduction": "none"}
        value, gradients = run(backend, kd_loss, (student, teacher), wanted, **options)
        expected, expected_gradients = run("reference", kd_loss, (student, teacher), wanted, **options)
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-6)
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert gradient.dtype == expected_gradient.dtype
            torch.testing.assert_close(gradient.cpu(), expected_gradient)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_an_empty_batch_has_the_loss_0(backend: str, reduction: str) -> None:
    value, (gradient,) = run(backend, kd_loss, tuple(logits(0, 4)), (True, False), reduction=reduction)
    assert value.sum() == 0
    assert value.shape == ((0,) if reduction == "none" else ())
    assert gradient.shape == (0, 4)


@pytest.mark.parametrize("classes", [3, 40, 3000])
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_threads_change_nothing(backend: str, classes: int) -> None:
    student, teacher = logits(700, classes)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(backend, kd_loss, (student, teacher), (True, False)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1][0], results[1][1][0])


@pytest.mark.skipif(not _extension.has_kernel("kd_loss_forward", "CPU"), reason="fastkd_kernels._C was not compiled")
def test_a_vocabulary_needs_the_gradient_twice_and_no_float32_copy() -> None:
    student, teacher = (torch.randn(128, 32000, dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()
    logits = student.numel() * student.element_size()
    for direction in DIRECTIONS:
        for labels in (None, some_labels(128)):
            options = {"direction": direction, "labels": labels}
            assert peak_bytes(lambda given=options: kd_loss(student, teacher, 2.0, **given).backward()) < 2.5 * logits
    with fk.backend("reference"):
        assert peak_bytes(lambda: kd_loss(student, teacher, 2.0).backward()) > 8 * logits


def test_a_teacher_that_requires_grad_raises_unless_it_is_wanted() -> None:
    student, teacher = logits(4, 3)
    teacher.requires_grad_()
    with pytest.raises(ValueError, match="detach_teacher=False"):
        kd_loss(student, teacher)
    kd_loss(student, teacher, detach_teacher=False).backward()
    assert teacher.grad is not None


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    student, teacher = logits(4, 3)
    assert not kd_loss(student, teacher).requires_grad
    student.requires_grad_()
    with torch.no_grad():
        assert not kd_loss(student, teacher).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_logits": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "student_logits: got dtype torch.int64"),
        ({"student_logits": torch.zeros(4)}, ValueError, r"student_logits: got shape \(4,\), expected \[..., C\]"),
        ({"teacher_logits": torch.zeros(4, 2)}, ValueError, r"teacher_logits: got shape \(4, 2\)"),
        ({"teacher_logits": torch.zeros(4, 3, device="meta")}, ValueError, "teacher_logits: got device meta"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0"),
        ({"temperature": float("nan")}, ValueError, "temperature: got nan"),
        ({"reduction": "avg"}, ValueError, "reduction: got 'avg', expected one of batchmean"),
        ({"direction": "backward"}, ValueError, "direction: got 'backward'"),
        ({"task": "ranking"}, ValueError, "task: got 'ranking'"),
        ({"labels": torch.zeros(4)}, TypeError, "labels: got dtype torch.float32"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels: got shape \(3,\), expected \[4\]"),
        ({"labels": torch.zeros(4, device="meta").long()}, ValueError, "labels: got device meta"),
        ({"reduction": "none", "num_items_in_batch": 3}, ValueError, 'num_items_in_batch: .*reduction="none"'),
        ({"num_items_in_batch": float("nan")}, ValueError, "num_items_in_batch: got nan, expected 0 or more"),
        ({"num_items_in_batch": torch.ones(2)}, ValueError, r"num_items_in_batch: got shape \(2,\)"),
        (
            {"student_logits": torch.zeros(4, 1), "teacher_logits": torch.zeros(4, 1)},
            ValueError,
            'got C=1, .*task="regression"',
        ),
    ],
)
def test_bad_input_raises(change, error, message) -> None:
    arguments = {"student_logits": torch.zeros(4, 3), "teacher_logits": torch.zeros(4, 3), **change}
    with pytest.raises(error, match=message):
        kd_loss(**arguments)


def test_float64_on_the_triton_backend_is_refused_by_name() -> None:
    if not _triton.interpreting:
        pytest.skip("needs Triton's interpreter")
    with fk.backend("cuda"), pytest.raises(fk.BackendUnavailableError, match="no float64"):
        kd_loss(torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [(True, True, False), (False, True, True), (True, False, False)])
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_opcheck(backend: str, flags: tuple[bool, bool, bool], dtype: torch.dtype) -> None:
    student, teacher = logits(5, 4, dtype)
    torch.library.opcheck(module.forward, (student, teacher.T.contiguous().T, 2.0, 4.0, 0, 0.5, 0.2, *flags))


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_compiles_into_one_graph(reduction: str, labelled: bool) -> None:
    torch._dynamo.reset()
    student, teacher = logits(5, 4)
    student.requires_grad_()
    labels = some_labels(5) if labelled else None

    def step(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kd_loss(student * 2, teacher, 2.0, reduction, labels=labels).sum()

    assert_compiles_into_one_graph(step, (student, teacher))


@pytest.mark.skipif(not _triton.available, reason=str(_triton.missing_reason))
def test_cubins_of_every_architecture_have_no_spills() -> None:
    specs = []
    dtypes, widths = itertools.cycle(("fp32", "bf16", "fp16")), itertools.cycle((3, 129, 1024))
    for divergence, streamed in itertools.product(range(4), (False, True)):
        config = module.KDLossConfig.choose(64, 50000 if streamed else next(widths))
        specs.append(_spec(next(dtypes), divergence, config, teacher_gradient=divergence % 2 == 1))
    specs += [_scale_spec(dtype, per_row) for dtype, per_row in (("bf16", True), ("fp32", False))]
    for cubin in compile_kernels(specs):
        cubin.assert_no_spills()
        cubin.assert_arithmetic_is_imitated()


def _spec(dtype: str, divergence: int, config: module.KDLossConfig, teacher_gradient: bool) -> KernelSpec:
    pointers = dict.fromkeys(("student", "teacher", "student_gradient", "teacher_gradient"), f"*{dtype}:16")
    arguments = {
        **pointers,
        **dict.fromkeys(("losses", "loss"), "*fp32:16"),
        "arrived": "*i32:16",
        **dict.fromkeys(("B", "C", "student_stride", "teacher_stride"), "i32"),
        **dict.fromkeys(("inverse_temperature", "loss_scale", "gradient_scale", "beta", "factor"), "fp32"),
        "DIVERGENCE": divergence,
        "REDUCE": True,
        "STUDENT_GRADIENT": True,
        "TEACHER_GRADIENT": teacher_gradient,
        "BLOCK_C": config.block_c,
    }
    name = "_kd_stream_kernel"
    if not config.streamed:
        name, arguments["BLOCK_B"] = "_kd_rows_kernel", config.block_b
    return KernelSpec(f"fastkd_kernels.ops.kd_loss:{name}", arguments, {"num_warps": config.num_warps})


def _scale_spec(dtype: str, per_row: bool) -> KernelSpec:
    arguments = {
        **dict.fromkeys(("gradient", "out", "second", "second_out"), f"*{dtype}:16"),
        "grad_output": "*fp32:16",
        **dict.fromkeys(("size", "blocks", "second_size", "C", "inner_rows", "outer_stride", "inner_stride"), "i32"),
        "factor": "fp32",
        "PER_ROW": per_row,
        "BLOCK": 1024,
    }
    return KernelSpec("fastkd_kernels._distillation_triton:_scale_kernel", arguments)
