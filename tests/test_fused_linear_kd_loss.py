"""fused_linear_kd_loss: values and gradients against float64, ignored tokens, vocabularies, memory, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
from fastkd_kernels.ops import fused_linear_kd_loss as module
from fastkd_kernels.ops.fused_linear_kd_loss import FusedLinearConfig, fused_linear_kd_loss

BACKENDS = kernel_backends("fused_linear_kd_loss")
DIRECTIONS = ("forward", "reverse", "jsd")
STUDENT = (True, True, True, False, False)  # which of the `tensors` get a gradient
# numpy, which Triton's interpreter computes with, mentions -inf - -inf even where the result is not used
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def tensors(
    tokens: int = 9, classes: int = 13, teacher_classes: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight and bias of the student; hidden states and weight of the teacher."""
    shapes = ((tokens, 6), (classes, 6), (classes,), (tokens, 8), (teacher_classes or classes, 8))
    return tuple((0.7 * torch.randn(shape)).to(dtype) for shape in shapes)


def some_labels(tokens: int, classes: int) -> torch.Tensor:
    """Every third token is ignored."""
    labels = torch.randint(classes, (tokens,))
    labels[::3] = -100
    return labels


def loss_with(labels: torch.Tensor | None = None, **options: Any) -> Any:
    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *teacher: torch.Tensor) -> torch.Tensor:
        on_device = None if labels is None else labels.to(hidden.device)
        return fused_linear_kd_loss(hidden, weight, *teacher, on_device, student_bias=bias, **options)

    return loss


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize(("direction", "teacher_classes"), [("forward", 13), ("reverse", 11), ("jsd", 15)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_accurate_as_torch(backend: str, direction: str, teacher_classes: int, dtype: torch.dtype) -> None:
    inputs = tensors(teacher_classes=teacher_classes, dtype=dtype)
    for labels, label_weight in ((None, 0.0), (some_labels(9, 13), 0.6)):
        loss = loss_with(labels, label_weight=label_weight, temperature=2.0, direction=direction, chunk_tokens=4)
        assert_as_accurate_as_torch(backend, loss, inputs, STUDENT, rounds_within=True)


@given(
    tokens=st.integers(0, 12),
    classes=st.integers(2, 20),
    teacher_classes=st.integers(2, 20),
    chunk_tokens=st.sampled_from([None, 1, 5]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    reduction=st.sampled_from(["batchmean", "sum"]),
    t2_scale=st.booleans(),
    direction=st.sampled_from(DIRECTIONS),
    labelled=st.booleans(),
    label_weight=st.sampled_from([0.0, 0.4]),
    kd_weight=st.sampled_from([0.0, 0.7, 1.0]),
    ready_logits=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_means_the_same_to_kernel_and_reference(
    backend, tokens, classes, teacher_classes, labelled, label_weight, ready_logits, seed, **options
) -> None:
    torch.manual_seed(seed)
    *student, teacher_hidden, teacher_weight = tensors(
        tokens, classes, teacher_classes, torch.float64 if backend == "cpu" else torch.float32
    )
    labels = some_labels(tokens, classes) if labelled else None
    options |= {"label_weight": label_weight if labelled else 0.0}
    if not ready_logits:
        loss = loss_with(labels, **options)
        assert_parity(backend, loss, (*student, teacher_hidden, teacher_weight), STUDENT)
        return

    def from_logits(hidden: Any, weight: Any, bias: Any, logits: Any) -> torch.Tensor:
        return loss_with(labels, teacher_logits=logits, **options)(hidden, weight, bias, None, None)

    assert_parity(backend, from_logits, (*student, teacher_hidden @ teacher_weight.t()), STUDENT[:4])


def test_reference_is_torchs_own_losses() -> None:
    hidden, weight, bias, *teacher = tensors(dtype=torch.float64)
    labels = some_labels(9, 13)
    keep = labels != -100
    s, t = (hidden @ weight.t() + bias)[keep], (teacher[0] @ teacher[1].t())[keep]
    divergence = F.kl_div((s / 3).log_softmax(-1), (t / 3).log_softmax(-1), reduction="batchmean", log_target=True)
    expected = 0.6 * 9 * divergence + 0.4 * F.cross_entropy(s, labels[keep])
    with fk.backend("reference"):
        value = loss_with(labels, label_weight=0.4, kd_weight=0.6, temperature=3.0)(hidden, weight, bias, *teacher)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_smaller_vocabulary_is_padded_with_minus_infinity(backend: str) -> None:
    for direction, classes, teacher_classes in (("forward", 13, 11), ("reverse", 11, 13), ("jsd", 11, 13)):
        hidden, weight, bias, *teacher = tensors(classes=classes, teacher_classes=teacher_classes)
        value, _ = run(backend, loss_with(direction=direction), (hidden, weight, bias, *teacher), STUDENT)
        s, t = hidden @ weight.t() + bias, teacher[0] @ teacher[1].t()
        s, t = (F.pad(logits, (0, 13 - logits.shape[1]), value=-torch.inf) for logits in (s, t))
        torch.testing.assert_close(value.cpu(), fk.kd_loss(s, t, direction=direction))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize(("direction", "classes", "teacher_classes"), [("forward", 11, 13), ("reverse", 13, 11)])
def test_classes_that_would_cost_infinity_are_left_out(
    backend: str, direction: str, classes: int, teacher_classes: int
) -> None:
    hidden, weight, bias, *teacher = tensors(classes=classes, teacher_classes=teacher_classes)
    value, gradients = run(backend, loss_with(direction=direction), (hidden, weight, bias, *teacher), STUDENT)
    s, t = (hidden @ weight.t() + bias)[:, :11], (teacher[0] @ teacher[1].t())[:, :11]
    torch.testing.assert_close(value.cpu(), fk.kd_loss(s, t, direction=direction))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][11:].any()


@pytest.mark.parametrize("label_weight", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_ignored_tokens_count_for_nothing_whatever_they_hold(backend: str, label_weight: float) -> None:
    hidden, weight, bias, teacher, teacher_weight = tensors()
    labels = some_labels(9, 13)
    keep = labels != -100
    hidden[~keep], teacher[~keep] = torch.nan, torch.inf
    options: dict[str, Any] = {"label_weight": label_weight, "temperature": 2.0, "chunk_tokens": 4}
    value, (for_hidden, for_weight, for_bias) = run(
        backend, loss_with(labels, **options), (hidden, weight, bias, teacher, teacher_weight), STUDENT
    )
    alone = (hidden[keep], weight, bias, teacher[keep], teacher_weight)
    expected, (kept_hidden, *head) = run("reference", loss_with(labels[keep], **options), alone, STUDENT)
    torch.testing.assert_close(value.cpu(), expected)
    torch.testing.assert_close(for_hidden.cpu()[keep], kept_hidden)
    assert not for_hidden.cpu()[~keep].any()
    torch.testing.assert_close([for_weight.cpu(), for_bias.cpu()], head)


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_token_that_counts_has_the_loss_0(backend: str, tokens: int, reduction: str) -> None:
    labels = torch.full((tokens,), -1)
    loss = loss_with(labels, label_weight=0.5, reduction=reduction, ignore_index=-1)
    value, gradients = run(backend, loss, tensors(tokens), STUDENT)
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)
    assert gradients[0].shape == (tokens, 6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS[:1]])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(backend: str, direction: str) -> None:
    *student, teacher, teacher_weight = tensors(5, 4, 5, torch.float64)
    inputs = [x.requires_grad_() for x in student]
    loss = loss_with(some_labels(5, 4), label_weight=0.3, temperature=1.7, direction=direction, chunk_tokens=2)
    with fk.backend(backend):
        assert torch.autograd.gradcheck(lambda *student: loss(*student, teacher, teacher_weight), inputs)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_second_and_third_backward_are_equal(backend: str) -> None:
    assert_equal_gradients_three_times(backend, loss_with(some_labels(9, 13), label_weight=0.5), tensors())


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_wanted(backend: str) -> None:
    _, everything = run(backend, loss_with(), tensors(), STUDENT)
    torch.manual_seed(0)
    inputs = tensors()
    _, everything = run(backend, loss_with(), inputs, STUDENT)
    for position in range(3):
        wanted = tuple(at == position for at in range(5))
        _, (gradient,) = run(backend, loss_with(), inputs, wanted)
        torch.testing.assert_close(gradient, everything[position])
    with fk.backend(backend), torch.no_grad():
        inputs = tuple(x.to(device_of(backend)) for x in inputs)
        assert not loss_with()(*inputs).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_change_nothing(backend: str) -> None:
    inputs = tensors(tokens=20)
    loss, gradients = run(backend, loss_with(chunk_tokens=20), inputs, STUDENT)
    for chunk_tokens in (1, 7, 100):
        other, other_gradients = run(backend, loss_with(chunk_tokens=chunk_tokens), inputs, STUDENT)
        torch.testing.assert_close(other, loss)
        torch.testing.assert_close(other_gradients, gradients)


def test_leading_dimensions_are_tokens() -> None:
    hidden, weight, bias, *teacher = tensors(tokens=10)
    labels = some_labels(10, 13)
    flat = loss_with(labels, label_weight=0.5)(hidden, weight, bias, *teacher)
    shaped = loss_with(labels.reshape(2, 5), label_weight=0.5)(
        hidden.reshape(2, 5, 6), weight, bias, teacher[0].reshape(2, 5, 8), teacher[1]
    )
    assert torch.equal(flat, shaped)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_that_of_the_parameters(backend: str) -> None:
    inputs = tensors()
    device = device_of(backend).type

    def under_autocast(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return loss_with()(*inputs)

    value, gradients = run(backend, under_autocast, inputs, STUDENT)
    low, low_gradients = run(backend, loss_with(), tuple(x.bfloat16() for x in inputs), STUDENT)
    assert value == low
    for gradient, expected in zip(gradients, low_gradients, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected.float(), rtol=0, atol=0)


@pytest.mark.skipif(not _extension.has_kernel("kd_loss_forward", "CPU"), reason="fastkd_kernels._C was not compiled")
def test_logits_are_never_all_in_memory() -> None:
    tokens, classes = 2048, 8000
    hidden, weight = torch.randn(tokens, 32).requires_grad_(), torch.randn(classes, 32).requires_grad_()
    teacher, teacher_weight = torch.randn(tokens, 32), torch.randn(classes, 32)
    labels = some_labels(tokens, classes)

    def step() -> None:
        loss = fused_linear_kd_loss(hidden, weight, teacher, teacher_weight, labels, label_weight=0.5, temperature=2.0)
        torch.autograd.grad(loss, (hidden, weight))

    logits = tokens * classes * 4
    assert peak_bytes(step) < logits
    with fk.backend("reference"):
        assert peak_bytes(step) > 4 * logits


def test_the_configuration_bounds_the_logits_in_memory() -> None:
    for tokens, vocabulary in ((1, 10), (100, 50_000), (8192, 32_000), (8192, 128_256), (10**6, 128_256)):
        chunk = FusedLinearConfig.choose(tokens, vocabulary).chunk_tokens
        assert 1 <= chunk <= tokens
        assert chunk * vocabulary <= 2**27
        assert chunk <= max(tokens // 8, 128)


def test_a_label_that_no_class_has_never_passes_for_a_loss() -> None:
    hidden, weight, _, *teacher = tensors()
    labels = some_labels(9, 13)
    labels[1] = 13
    with pytest.raises(ValueError, match="labels: got values from"):
        fused_linear_kd_loss(hidden, weight, *teacher, labels, label_weight=0.5)
    for labels[1] in (-1, 13):
        options = (1.0, 1.0, "forward", None, 0.5, 1.0, -100, True, 4, True, True, False)
        assert module._forward(hidden, weight, None, *teacher, None, None, labels, *options)[0].isnan()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student_hidden_states": torch.zeros(6)}, ValueError, r"student_hidden_states: got shape \(6,\)"),
        ({"student_hidden_states": torch.zeros(4, 6).int()}, TypeError, "student_hidden_states: got dtype torch.int32"),
        ({"student_weight": torch.zeros(13, 5)}, ValueError, r"student_weight: got shape \(13, 5\), expected \[V, 6\]"),
        ({"student_weight": torch.zeros(13, 6).half()}, TypeError, "student_weight: got dtype torch.float16"),
        ({"student_bias": torch.zeros(12)}, ValueError, r"student_bias: got shape \(12,\), expected \[13\]"),
        ({"teacher_hidden_states": torch.zeros(3, 8)}, ValueError, r"teacher_hidden_states: got shape \(3, 8\)"),
        ({"teacher_weight": torch.zeros(13, 7)}, ValueError, r"teacher_weight: got shape \(13, 7\)"),
        ({"teacher_weight": None}, ValueError, "teacher: got teacher_hidden_states, expected either"),
        ({"teacher_logits": torch.zeros(4, 13)}, ValueError, "teacher: got .*teacher_logits, expected either"),
        (
            {"teacher_hidden_states": None, "teacher_weight": None, "teacher_logits": torch.zeros(3, 13)},
            ValueError,
            r"teacher_logits: got shape \(3, 13\)",
        ),
        ({"teacher_weight": torch.zeros(13, 8, requires_grad=True)}, ValueError, "teacher_weight: got a tensor that"),
        ({"student_weight": torch.zeros(13, 6, device="meta")}, ValueError, "student_weight: got device meta"),
        ({"labels": torch.zeros(4)}, TypeError, "labels: got dtype torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels: got shape \(3,\), expected \[4\]"),
        ({"label_weight": 0.5}, ValueError, "label_weight: got 0.5 without labels"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0"),
        ({"reduction": "none"}, ValueError, "reduction: got 'none', expected one of batchmean, sum"),
        ({"direction": "up"}, ValueError, "direction: got 'up'"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens: got 0"),
    ],
)
def test_bad_input_raises(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "student_hidden_states": torch.zeros(4, 6),
        "student_weight": torch.zeros(13, 6),
        "teacher_hidden_states": torch.zeros(4, 8),
        "teacher_weight": torch.zeros(13, 8),
        **change,
    }
    with pytest.raises(error, match=message):
        fused_linear_kd_loss(**arguments)


def test_float64_on_the_triton_backend_is_refused_by_name() -> None:
    if not _triton.interpreting:
        pytest.skip("needs Triton's interpreter")
    with fk.backend("cuda"), pytest.raises(fk.BackendUnavailableError, match="no float64"):
        loss_with()(*tensors(dtype=torch.float64))


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_opcheck(backend: str, labelled: bool) -> None:
    hidden, weight, bias, *teacher = tensors(dtype=torch.bfloat16)
    labels = some_labels(9, 13) if labelled else None
    options = (2.0, 4.0, "jsd", 0.3, 0.5 * labelled, 0.7, -100, True, 4, True, labelled, True)
    torch.library.opcheck(module._forward, (hidden, weight, bias, *teacher, None, None, labels, *options))


def test_compiles_into_one_graph() -> None:
    inputs = tuple(x.requires_grad_(want) for x, want in zip(tensors(), STUDENT, strict=True))
    loss = loss_with(some_labels(9, 13), label_weight=0.5, chunk_tokens=4)
    assert_compiles_into_one_graph(loss, inputs)
