"""universal_kd_loss: values and gradients of every backend against float64 over the product of its options."""

from __future__ import annotations

import itertools
from dataclasses import replace
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
from fastkd_kernels.ops import universal_kd_loss as module
from fastkd_kernels.ops.universal_kd_loss import universal_kd_loss, universal_kd_loss_reference

BACKENDS = kernel_backends("universal_kd_loss")
DIRECTIONS = ("forward", "reverse", "jsd")
SPACES = ("logits", "log_probs", "probs")
# numpy, which Triton's interpreter computes with, mentions -inf - -inf even where the result is not used
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def logits(
    layers: int, teachers: int, batch: int, classes: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(count, batch, classes).to(dtype) for count in (layers, teachers))  # type: ignore[return-value]


def by_hand(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """[M, B] of the defaults, from the paper's formulas, one sample and layer at a time."""
    rows = torch.empty(student.shape[:2], dtype=student.dtype)
    for j, b in itertools.product(range(student.shape[0]), range(student.shape[1])):
        attention = torch.stack([teacher[i, b] @ student[j, b] for i in range(teacher.shape[0])]).softmax(0)
        mixed = sum(attention[i] * teacher[i, b] for i in range(teacher.shape[0]))
        rows[j, b] = F.kl_div(student[j, b].log_softmax(0), mixed.log_softmax(0), reduction="sum", log_target=True)
    return rows


def test_defaults_are_the_papers_formulas() -> None:
    student, teacher = logits(3, 4, 5, 6, torch.float64)
    rows = by_hand(student, teacher)
    torch.testing.assert_close(universal_kd_loss_reference(student, teacher, reduction="none"), rows)
    torch.testing.assert_close(universal_kd_loss_reference(student, teacher), rows.sum() / 5)
    torch.testing.assert_close(universal_kd_loss_reference(student, teacher, reduction="mean"), rows.sum() / 30)
    mean = universal_kd_loss_reference(student, teacher, reduction="sum", layer_reduction="mean")
    torch.testing.assert_close(mean, rows.sum() / 3)


def test_one_teacher_layer_is_vanilla_distillation() -> None:
    student, teacher = logits(2, 1, 5, 6, torch.float64)
    for mix in ("logits", "probs", "loss"):
        for direction in DIRECTIONS:
            value = universal_kd_loss_reference(student, teacher, 2.0, mix=mix, direction=direction)
            expected = sum(fk.kd_loss(layer, teacher[0], 2.0, direction=direction) for layer in student)
            torch.testing.assert_close(value, expected)


def test_uniform_attention_is_the_mean_of_the_teacher_layers() -> None:
    student, teacher = logits(1, 4, 5, 6, torch.float64)
    options: dict[str, Any] = {"attn": "uniform"}
    mean = fk.kd_loss(student[0], teacher.mean(0))
    torch.testing.assert_close(universal_kd_loss(student, teacher, **options), mean)
    probs = fk.kd_loss(student[0], teacher.softmax(-1).mean(0).log())
    torch.testing.assert_close(universal_kd_loss(student, teacher, mix="probs", **options), probs)
    losses = sum(fk.kd_loss(student[0], layer) for layer in teacher) / 4
    torch.testing.assert_close(universal_kd_loss(student, teacher, mix="loss", **options), losses)


def test_regression_attends_to_the_nearest_layer_and_takes_the_squared_error() -> None:
    student, teacher = logits(2, 3, 5, 1, torch.float64)
    attention = (-((teacher[None] - student[:, None]) ** 2).squeeze(-1)).softmax(1)
    mixed = (attention[..., None] * teacher[None]).sum(1)
    value = universal_kd_loss(student, teacher, 3.0, task="regression")
    torch.testing.assert_close(value, ((mixed - student) ** 2).sum() / 5)


def test_attention_scale_and_temperature() -> None:
    student, teacher = logits(2, 3, 4, 9, torch.float64)
    named = universal_kd_loss(student, teacher, attn_scale="rsqrt_c")
    torch.testing.assert_close(named, universal_kd_loss(student, teacher, attn_scale=1 / 3))
    torch.testing.assert_close(named, universal_kd_loss(student, teacher, attn_temperature=3.0))
    assert abs(named - universal_kd_loss(student, teacher)) > 1e-3


def test_closed_form_gradient() -> None:
    student, teacher = logits(1, 5, 1, 4, torch.float64)
    _, (s_gradient, f_gradient) = run(
        "reference", universal_kd_loss, (student, teacher), (True, True), temperature=2.0, attn_scale=0.7,
        reduction="sum", detach_teacher=False,
    )  # fmt: skip
    s, f, tau, c = student[0, 0], teacher[:, 0], 2.0, 0.7
    weights = (c * f @ s).softmax(0)
    mixed = weights @ f
    p, q = (mixed / tau).softmax(0), (s / tau).softmax(0)
    ratio = p.log() - q.log()
    g = tau * p * (ratio - p @ ratio)
    w = weights * ((f - mixed) @ g)
    scale = 0.5  # grad_output of `run`
    torch.testing.assert_close(s_gradient[0, 0], scale * (tau * (q - p) + c * w @ f))
    torch.testing.assert_close(f_gradient[:, 0], scale * (weights[:, None] * g + c * w[:, None] * s))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("classes", [2, 20, 128, 300])
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_accurate_as_torch(backend: str, classes: int, dtype: torch.dtype) -> None:
    student, teacher = logits(3, 12, 3, classes, dtype)
    for direction, task, reduction, teacher_gradient in (
        ("forward", "classification", "batchmean", False),
        ("forward", "classification", "none", True),
        ("reverse", "classification", "none", True),
        ("jsd", "classification", "batchmean", True),
        ("forward", "regression", "mean", True),
    ):
        assert_as_accurate_as_torch(
            backend,
            universal_kd_loss,
            (student, teacher),
            (True, teacher_gradient),
            divergences=4.0 if reduction == "none" else 4.0 * 3,
            temperature=2.0,
            attn_scale="rsqrt_c",
            direction=direction,
            task=task,
            reduction=reduction,
            detach_teacher=not teacher_gradient,
        )


def assert_options_parity(backend: str, student: torch.Tensor, teacher: torch.Tensor, options: dict[str, Any]) -> None:
    assert_parity(backend, universal_kd_loss, (student, teacher), (True, not options["detach_teacher"]), **options)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    task = draw(st.sampled_from(["classification", "classification", "regression"]))
    regression = task == "regression"
    return {
        "temperature": draw(st.sampled_from([0.5, 1.0, 4.0])),
        "reduction": draw(st.sampled_from(["batchmean", "mean", "sum", "none"])),
        "layer_reduction": draw(st.sampled_from(["sum", "mean"])),
        "mix": draw(st.sampled_from(["logits", "loss"] if regression else ["logits", "probs", "loss"])),
        "attn_space": "logits" if regression else draw(st.sampled_from(SPACES)),
        "attn_scale": draw(st.sampled_from([1.0, 0.3, "rsqrt_c"])),
        "direction": draw(st.sampled_from(DIRECTIONS)),
        "detach_attention": draw(st.booleans()),
        "task": task,
        "attn": draw(st.sampled_from([None, *module.ATTENTIONS])),
        "attn_temperature": draw(st.sampled_from([1.0, 2.0])),
        "t2_scale": draw(st.booleans()),
        "detach_teacher": draw(st.booleans()),
    }


@given(
    layers=st.integers(1, 4),
    teachers=st.integers(1, 13),
    batch=st.integers(0, 19),
    classes=st.integers(1, 24),
    options=calls(),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_means_the_same_to_kernel_and_reference(
    backend: str, layers: int, teachers: int, batch: int, classes: int, options: dict, masked: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    if options["task"] == "classification":
        classes = max(classes, 2)
    student, teacher = logits(
        layers, teachers, min(batch, 3) if backend == "cuda" else batch, classes,
        torch.float64 if backend == "cpu" else torch.float32,
    )  # fmt: skip
    if masked and options["task"] == "classification" and classes > 2:
        student[..., 1] = teacher[..., 1] = -torch.inf
        if options["direction"] == "forward":
            teacher[0, :, 2] = -torch.inf
    assert_options_parity(backend, student, teacher, options)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_both_kernels_of_a_backend_agree_with_the_reference_in_float32(backend: str, direction: str) -> None:
    """On CPU 16 samples at once or one, on CUDA registers or streams, depending on the number of classes."""
    for classes, teachers, masked in ((7, 3, True), (7, 40, False), (200, 3, True), (200, 3, False)):
        student, teacher = logits(2, teachers, 18 if backend == "cpu" else 2, classes)
        if masked:
            student[..., 1] = teacher[..., 1] = -torch.inf
        for task, attn, detach in (
            ("classification", "dot", False),
            ("classification", "neg_sqdist", False),
            ("classification", "dot", True),
            ("regression", None, False),
        ):
            if masked and task == "regression":
                continue
            options = {"direction": direction, "task": task, "attn": attn, "detach_attention": detach}
            options |= {"reduction": "none" if masked else "batchmean", "attn_scale": 1 / classes}
            assert_options_parity(backend, student, teacher, {**options, "detach_teacher": False})


@pytest.mark.parametrize("mix", ["logits", "probs", "loss"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS[:1]])
def test_gradcheck(backend: str, space: str, mix: str) -> None:
    inputs = [x.requires_grad_() for x in logits(2, 3, 2, 4, torch.float64)]
    for direction, attn in itertools.product(DIRECTIONS, ("dot", "neg_sqdist")):

        def loss(student: torch.Tensor, teacher: torch.Tensor, direction: str = direction, attn: str = attn) -> Any:
            options: dict[str, Any] = {"mix": mix, "attn_space": space, "direction": direction, "attn": attn}
            return universal_kd_loss(student, teacher, 1.7, "none", **options, detach_teacher=False)

        with fk.backend(backend):
            assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS[:1]])
def test_gradcheck_of_a_regression(backend: str) -> None:
    inputs = [x.requires_grad_() for x in logits(2, 3, 2, 1, torch.float64)]
    for mix in ("logits", "loss"):

        def loss(student: torch.Tensor, teacher: torch.Tensor, mix: str = mix) -> torch.Tensor:
            return universal_kd_loss(student, teacher, mix=mix, task="regression", detach_teacher=False)

        with fk.backend(backend):
            assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_second_and_third_backward_are_equal(backend: str, reduction: str) -> None:
    assert_equal_gradients_three_times(backend, universal_kd_loss, logits(2, 3, 4, 5), reduction=reduction)


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_rows_of_no_and_of_one_student_layer_reach_every_teacher_layer(backend: str, layers: int) -> None:
    tensors = logits(layers, 3, 4, 5)
    options: dict[str, Any] = {"reduction": "none", "detach_teacher": False}
    _, (_, gradient) = run(backend, universal_kd_loss, tensors, (True, True), **options)
    _, (_, expected) = run("reference", universal_kd_loss, tensors, (True, True), **options)
    torch.testing.assert_close(gradient.cpu(), expected)
    assert bool(gradient.any()) == bool(layers)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_autocast_costs_no_precision(backend: str) -> None:
    student, teacher = (tensor.to(device_of(backend)) for tensor in logits(2, 3, 4, 5))
    values, gradients = [], []
    for enabled in (False, True):
        leaf = student.clone().requires_grad_()
        with fk.backend(backend), torch.autocast(leaf.device.type, dtype=torch.bfloat16, enabled=enabled):
            value = universal_kd_loss(leaf, teacher)
        value.backward()
        values.append(value.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_and_strided_grad_output(backend: str, dtype: torch.dtype) -> None:
    student, teacher = (x.to(device_of(backend)).requires_grad_() for x in logits(2, 3, 4, 5, dtype))
    options: dict[str, Any] = {"reduction": "none", "detach_teacher": False}
    with fk.backend(backend):
        value = universal_kd_loss(student, teacher, **options)
    expected = universal_kd_loss_reference(student, teacher, reduction="none")
    for weights in (
        torch.tensor(2.0).expand(2, 4),
        torch.arange(4.0).expand(2, 4),
        torch.arange(2.0)[:, None].expand(2, 4),
        torch.arange(16.0).reshape(4, 4)[::2],
        torch.arange(8.0).reshape(4, 2).t(),
    ):
        weights = weights.to(value.device)
        ours = torch.autograd.grad(value, (student, teacher), weights, retain_graph=True)
        exact = torch.autograd.grad(expected, (student, teacher), weights, retain_graph=True)
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("classes", [6, 200])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_extreme_logits_stay_finite(backend: str, direction: str, classes: int) -> None:
    student, teacher = logits(2, 3, 4, classes)
    student[0, 0, 0], teacher[1, 1, 0] = -200, -200
    student[:, 2, 1] = teacher[:, 2, 2] = 200  # attention saturates
    student[..., 3] = teacher[..., 3] = -torch.inf
    if direction != "reverse":
        teacher[1, 3, 4] = -torch.inf
    options = {"reduction": "none", "direction": direction, "detach_teacher": False}
    value, gradients = run(backend, universal_kd_loss, (student, teacher), (True, True), **options)
    assert value.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_an_empty_batch_has_the_loss_0(backend: str, reduction: str) -> None:
    options = {"reduction": reduction, "detach_teacher": False}
    value, gradients = run(backend, universal_kd_loss, logits(2, 3, 0, 4), (True, True), **options)
    assert value.sum() == 0
    assert [gradient.shape for gradient in gradients] == [(2, 0, 4), (3, 0, 4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_and_strides(backend: str) -> None:
    student = torch.randn(6, 4, 10)[::2, :, ::2]
    teacher = torch.randn(5, 4, 3).permute(2, 1, 0).to(torch.bfloat16)
    options = {"reduction": "none", "detach_teacher": False}
    value, gradients = run(backend, universal_kd_loss, (student, teacher), (True, True), **options)
    expected, expected_gradients = run("reference", universal_kd_loss, (student, teacher), (True, True), **options)
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == expected_gradient.dtype
        torch.testing.assert_close(gradient.cpu(), expected_gradient)


@pytest.mark.parametrize("classes", [3, 300])
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_threads_change_nothing(backend: str, classes: int) -> None:
    tensors = logits(3, 12, 100, classes)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(backend, universal_kd_loss, tensors, (True, False)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1][0], results[1][1][0])


@pytest.mark.skipif(
    not _extension.has_kernel("universal_kd_loss_forward", "CPU"), reason="fastkd_kernels._C was not compiled"
)
def test_a_vocabulary_needs_the_gradient_twice_and_no_float32_copy() -> None:
    student, teacher = (0.05 * torch.randn(layers, 128, 16000).bfloat16() for layers in (1, 4))
    student.requires_grad_()
    logits = student.numel() * student.element_size()
    scratch = torch.get_num_threads() * 40 * 16000 * 4  # a few rows in float32 for every thread
    assert peak_bytes(lambda: universal_kd_loss(student, teacher, 2.0).backward()) < 2.5 * logits + scratch
    with fk.backend("reference"):
        assert peak_bytes(lambda: universal_kd_loss(student, teacher, 2.0).backward()) > 16 * logits


def test_a_teacher_that_requires_grad_raises_unless_it_is_wanted() -> None:
    student, teacher = logits(2, 3, 4, 5)
    teacher.requires_grad_()
    with pytest.raises(ValueError, match="detach_teacher=False"):
        universal_kd_loss(student, teacher)
    universal_kd_loss(student, teacher, detach_teacher=False).backward()
    assert teacher.grad is not None


@pytest.mark.parametrize(
    ("shape", "options", "served"),
    [
        ((32, 128), {"mix": "probs", "attn_space": "probs"}, True),
        ((33, 128), {}, True),
        ((12, 129), {"attn": "neg_sqdist", "direction": "jsd"}, True),
        ((33, 128), {"mix": "loss"}, False),
        ((12, 129), {"attn_space": "log_probs"}, False),
        ((65, 129), {}, False),
    ],
)
def test_what_the_triton_kernels_take_and_what_goes_to_the_reference(shape, options, served) -> None:
    if not _triton.interpreting:
        pytest.skip("needs Triton's interpreter")
    teachers, classes = shape
    student, teacher = logits(1, teachers, 1, classes)
    if served:
        assert_options_parity("cuda", student, teacher, {"detach_teacher": True, "attn_scale": 1 / classes, **options})
        return
    with fk.backend("cuda"), pytest.raises(fk.BackendUnavailableError, match="universal_kd_loss: backend 'cuda'"):
        universal_kd_loss(student, teacher, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_logits": torch.zeros(2, 4, 3).int()}, TypeError, "student_logits: got dtype torch.int32"),
        ({"student_logits": torch.zeros(4, 3)}, ValueError, r"student_logits: got shape .*, expected \[M, B, C\]"),
        ({"teacher_logits": torch.zeros(3, 4, 2)}, ValueError, r"teacher_logits: got shape .* expected \[N, 4, 3\]"),
        ({"teacher_logits": torch.zeros(0, 4, 3)}, ValueError, "teacher_logits: got N=0"),
        ({"temperature": -1.0}, ValueError, "temperature: got -1.0"),
        ({"attn_temperature": 0.0}, ValueError, "attn_temperature: got 0.0"),
        ({"attn_scale": "sqrt"}, ValueError, "attn_scale: got 'sqrt'"),
        ({"reduction": "avg"}, ValueError, "reduction: got 'avg'"),
        ({"layer_reduction": "none"}, ValueError, "layer_reduction: got 'none'"),
        ({"mix": "hidden"}, ValueError, "mix: got 'hidden'"),
        ({"attn_space": "hidden"}, ValueError, "attn_space: got 'hidden'"),
        ({"attn": "cosine"}, ValueError, "attn: got 'cosine'"),
        ({"direction": "up"}, ValueError, "direction: got 'up'"),
        ({"task": "regression", "mix": "probs"}, ValueError, 'mix: got "probs"'),
        ({"task": "regression", "attn_space": "probs"}, ValueError, 'attn_space: got "probs"'),
        (
            {"student_logits": torch.zeros(2, 4, 1), "teacher_logits": torch.zeros(3, 4, 1)},
            ValueError,
            'got C=1, .*task="regression"',
        ),
    ],
)
def test_bad_input_raises(change, error, message) -> None:
    arguments = {"student_logits": torch.zeros(2, 4, 3), "teacher_logits": torch.zeros(3, 4, 3), **change}
    with pytest.raises(error, match=message):
        universal_kd_loss(**arguments)


@pytest.mark.parametrize("flags", [(True, True, False, False), (False, True, True, True), (True, False, True, False)])
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_opcheck(backend: str, flags: tuple[bool, ...]) -> None:
    student, teacher = logits(2, 3, 4, 5)
    torch.library.opcheck(module._forward, (student, teacher, 2.0, 4.0, 1.0, 0, 0.5, 0, 0, False, True, 0.2, *flags))


def test_compiles_into_one_graph() -> None:
    student, teacher = logits(2, 3, 4, 5)
    student.requires_grad_()

    def step(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return universal_kd_loss(student * 2, teacher, 2.0, mix="loss")

    assert_compiles_into_one_graph(step, (student, teacher))


@pytest.mark.skipif(not _triton.available, reason=str(_triton.missing_reason))
def test_cubins_of_every_architecture_have_no_spills() -> None:
    """Every value of every flag, at the largest tile in registers, which is the one that could spill."""
    dtypes = itertools.cycle(("fp32", "bf16", "fp16"))
    specs = [
        _spec(next(dtypes), (32, 128), DIVERGENCE=d, MIX=m, SPACE=s, DISTANCE=distance, TEACHER_GRADIENT=teacher)
        for d, m, s, distance, teacher in (
            (0, 0, 0, False, False),
            (1, 1, 1, True, True),
            (2, 2, 2, False, True),
            (2, 1, 2, True, True),
            (3, 0, 0, True, True),
        )
    ]
    specs.append(_spec(next(dtypes), (12, 2), DIVERGENCE=0, MIX=0, SPACE=0, DISTANCE=False, TEACHER_GRADIENT=False))
    # the launcher makes a constant of every 1
    specs.append(replace(specs[-1], arguments={**specs[-1].arguments, "M": 1, "N": 1, "B": 1, "teacher_stride": 1}))
    specs += [_spec(next(dtypes), (12, 32000), DIVERGENCE=d, DISTANCE=d == 2, TEACHER_GRADIENT=d > 0) for d in (0, 2)]
    for cubin in compile_kernels(specs):
        cubin.assert_no_spills()
        cubin.assert_arithmetic_is_imitated()


def _spec(dtype: str, shape: tuple[int, int], **flags: Any) -> KernelSpec:
    config = module.UniversalKDConfig.choose(*shape)
    logits_pointers = ("student", "teacher", "student_gradient", "teacher_gradient")
    strides = ("student_layer_stride", "student_stride", "teacher_layer_stride", "teacher_stride")
    scales = ("attn_scale", "inverse_temperature", "loss_scale", "gradient_scale", "beta", "factor")
    arguments: dict[str, Any] = {
        **dict.fromkeys(logits_pointers, f"*{dtype}:16"),
        **dict.fromkeys(("losses", "loss"), "*fp32:16"),
        "arrived": "*i32:16",
        **dict.fromkeys(("M", "N", "B", "C", *strides), "i32"),
        **dict.fromkeys(scales, "fp32"),
        **dict.fromkeys(("ATTENTION_GRADIENT", "REDUCE", "STUDENT_GRADIENT"), True),
        "BLOCK_N": config.block_n,
        "BLOCK_C": config.block_c,
        **flags,
    }
    name = "_universal_stream_kernel"
    if not config.streamed:
        name, arguments["PER_LAYER"] = "_universal_rows_kernel", False
    return KernelSpec(f"fastkd_kernels.ops.universal_kd_loss:{name}", arguments, {"num_warps": config.num_warps})
