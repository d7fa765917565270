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
from torch.utils._python_dispatch import TorchDispatchMode

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


def loss_of_top_k(teacher_logits: torch.Tensor, k: int, labels: torch.Tensor | None = None, **options: Any) -> Any:
    """A function of the student and of the K largest logits of its teacher, which are the second result."""
    values, indices = teacher_logits.topk(k)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        known = {"teacher_logits": values, "teacher_indices": indices.to(hidden.device)}
        return loss_with(labels, **known, **options)(hidden, weight, bias, None, None)

    return loss, values


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize(("direction", "teacher_classes"), [("forward", 13), ("reverse", 11), ("jsd", 15)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_accurate_as_torch(backend: str, direction: str, teacher_classes: int, dtype: torch.dtype) -> None:
    inputs = tensors(teacher_classes=teacher_classes, dtype=dtype)
    for labels, label_weight in ((None, 0.0), (some_labels(9, 13), 0.6)):
        loss = loss_with(labels, label_weight=label_weight, temperature=2.0, direction=direction, chunk_tokens=4)
        assert_as_accurate_as_torch(backend, loss, inputs, STUDENT, rounds_within=True, divergences=4.0)


SCALED: dict[str, Any] = {
    "student_logit_scale": 0.7,
    "student_softcap": 3.0,
    "teacher_logit_scale": 1.3,
    "teacher_softcap": 5.0,
}


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_capped_and_sparse_logits_are_as_accurate_as_torch(
    backend: str, direction: str, dtype: torch.dtype
) -> None:
    inputs = tensors(dtype=dtype)
    labels = some_labels(9, 13)
    options = {"label_weight": 0.6, "temperature": 2.0, "direction": direction, "chunk_tokens": 4}
    for reduction in ("batchmean", "none"):
        loss = loss_with(labels, reduction=reduction, **options, **SCALED)
        assert_as_accurate_as_torch(backend, loss, inputs, STUDENT, rounds_within=True)
        sparse, values = loss_of_top_k(inputs[3] @ inputs[4].t(), 4, labels, reduction=reduction, **options)
        assert_as_accurate_as_torch(backend, sparse, (*inputs[:3], values), STUDENT[:4], rounds_within=True)


@given(
    tokens=st.integers(0, 12),
    classes=st.integers(2, 20),
    teacher_classes=st.integers(2, 20),
    chunk_tokens=st.sampled_from([None, 1, 5]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    reduction=st.sampled_from(["batchmean", "sum", "none"]),
    counted_elsewhere=st.sampled_from([None, 0, 3, 2.5, torch.tensor(7), torch.tensor([0])]),
    t2_scale=st.booleans(),
    direction=st.sampled_from(DIRECTIONS),
    labelled=st.booleans(),
    label_weight=st.sampled_from([0.0, 0.4]),
    kd_weight=st.sampled_from([0.0, 0.7, 1.0]),
    student_softcap=st.sampled_from([None, 0.8, 20.0]),
    student_logit_scale=st.sampled_from([1.0, 0.25]),
    teacher_scaling=st.sampled_from([{}, {"teacher_softcap": 2.0}, {"teacher_logit_scale": 3.0}]),
    known=st.sampled_from([None, None, "all", 1, 3]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_means_the_same_to_kernel_and_reference(
    backend,
    tokens,
    classes,
    teacher_classes,
    labelled,
    label_weight,
    counted_elsewhere,
    teacher_scaling,
    known,
    seed,
    **options,
) -> None:
    torch.manual_seed(seed)
    *student, teacher_hidden, teacher_weight = tensors(
        tokens, classes, teacher_classes, torch.float64 if backend == "cpu" else torch.float32
    )
    labels = some_labels(tokens, classes) if labelled else None
    options |= {"label_weight": label_weight if labelled else 0.0}
    if options["reduction"] == "batchmean":
        options |= {"num_items_in_batch": counted_elsewhere}
    if known is None:
        loss = loss_with(labels, **options, **teacher_scaling)
        assert_parity(backend, loss, (*student, teacher_hidden, teacher_weight), STUDENT)
        return
    if known != "all":
        ready = teacher_hidden @ teacher_weight.t()
        loss, values = loss_of_top_k(ready[:, :classes], min(known, classes, teacher_classes), labels, **options)
        assert_parity(backend, loss, (*student, values), STUDENT[:4])
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


def test_reference_scales_and_caps_logits_before_both_terms() -> None:
    hidden, weight, bias, *teacher = tensors(dtype=torch.float64)
    labels = some_labels(9, 13)
    keep = labels != -100
    s, t = 0.7 * (hidden @ weight.t() + bias)[keep], 1.3 * (teacher[0] @ teacher[1].t())[keep]
    s, t = 3 * (s / 3).tanh(), 5 * (t / 5).tanh()
    divergence = F.kl_div((s / 2).log_softmax(-1), (t / 2).log_softmax(-1), reduction="batchmean", log_target=True)
    expected = 4 * divergence + 0.4 * F.cross_entropy(s, labels[keep])
    with fk.backend("reference"):
        value = loss_with(labels, label_weight=0.4, temperature=2.0, **SCALED)(hidden, weight, bias, *teacher)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_sparse_teacher_has_no_other_classes(backend: str, direction: str) -> None:
    hidden, weight, bias, *teacher = tensors()
    s, t = hidden @ weight.t() + bias, teacher[0] @ teacher[1].t()
    loss, values = loss_of_top_k(t, 4, direction=direction, temperature=2.0, reduction="none")
    value, gradients = run(backend, loss, (hidden, weight, bias, values), STUDENT[:4])
    indices = t.topk(4).indices
    others = torch.ones_like(t, dtype=torch.bool).scatter(1, indices, False)
    if direction == "reverse":
        s = s.masked_fill(others, -torch.inf)
    expected = fk.kd_loss(s, t.masked_fill(others, -torch.inf), 2.0, "none", direction=direction)
    torch.testing.assert_close(value.cpu(), expected)
    assert all(gradient.isfinite().all() for gradient in gradients)

    # in any order, and filled up where fewer are known
    order = torch.randperm(4)
    filled = torch.cat([values[:, order], torch.full((9, 1), -torch.inf)], 1)
    unused = others.to(torch.int64).argmax(1, keepdim=True)
    known = {"teacher_logits": filled, "teacher_indices": torch.cat([indices[:, order], unused], 1)}
    known = {name: tensor.to(device_of(backend)) for name, tensor in known.items()}

    def of_filled(hidden: Any, weight: Any, bias: Any) -> torch.Tensor:
        options = {"direction": direction, "temperature": 2.0, "reduction": "none"}
        return loss_with(**known, **options)(hidden, weight, bias, None, None)

    again, more = run(backend, of_filled, (hidden, weight, bias), STUDENT[:3])
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(more, gradients)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.0, 1.0), (0.5, 0.0)])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_both_terms_are_returned_beside_their_weighted_sum(
    backend: str, weights: tuple[float, float], reduction: str
) -> None:
    inputs = tuple(x.to(device_of(backend)).requires_grad_(w) for x, w in zip(tensors(), STUDENT, strict=True))
    labels = some_labels(9, 13)
    options = {"temperature": 2.0, "reduction": reduction, "chunk_tokens": 4}
    label_weight, kd_weight = weights
    with fk.backend(backend):
        parts = loss_with(
            labels, label_weight=label_weight, kd_weight=kd_weight, return_soft_hard_loss=True, **options
        )(*inputs)
        whole = loss_with(labels, label_weight=label_weight, kd_weight=kd_weight, **options)(*inputs)
        soft = loss_with(labels, **options)(*inputs)
        hard = loss_with(labels, label_weight=1.0, kd_weight=0.0, **options)(*inputs)
        unlabelled = loss_with(return_soft_hard_loss=True, **options)(*inputs)
    assert isinstance(parts, fk.SoftHardLoss)
    assert not parts.soft_loss.requires_grad
    assert not parts.hard_loss.requires_grad
    torch.testing.assert_close(parts, fk.SoftHardLoss(whole, soft.detach(), hard.detach()))
    torch.testing.assert_close(parts.loss, kd_weight * soft + label_weight * hard)
    assert torch.equal(parts.loss, whole)
    ours, expected = (torch.autograd.grad(loss.sum(), inputs[:3]) for loss in (parts.loss, whole))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert unlabelled.hard_loss is None
    torch.testing.assert_close(unlabelled.loss.detach(), unlabelled.soft_loss)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_losses_of_tokens_add_up_and_weigh_what_they_are_told_to(backend: str) -> None:
    inputs = tensors(tokens=10)
    labels = some_labels(10, 13)
    options: dict[str, Any] = {"label_weight": 0.5, "chunk_tokens": 4, **SCALED}
    total, gradients = run(backend, loss_with(labels, reduction="sum", **options), inputs, STUDENT)

    def weighed(*inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = loss_with(labels.reshape(2, 5), reduction="none", **options)(
            inputs[0].reshape(2, 5, 6), *inputs[1:3], inputs[3].reshape(2, 5, 8), inputs[4]
        )
        assert rows.shape == (2, 5)
        assert not rows.flatten()[::3].any()
        return (rows * weights.to(rows.device)).sum()

    value, ours = run(backend, weighed, inputs, STUDENT, weights=torch.ones(2, 5))
    torch.testing.assert_close(value, total)
    torch.testing.assert_close(ours, gradients)
    # a weight that is not a number is nobody's where the token does not count
    weights = torch.linspace(-1, 2, 10).reshape(2, 5)
    value, ours = run(backend, weighed, inputs, STUDENT, weights=weights)
    truth, exact = run("reference", weighed, tuple(x.double() for x in inputs), STUDENT, weights=weights)
    torch.testing.assert_close(value.double().cpu(), truth, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(gradient.double().cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_parts_of_a_batch_add_up_by_the_number_of_items_in_all(backend: str) -> None:
    hidden, weight, bias, teacher, teacher_weight = tensors(tokens=10)
    labels = some_labels(10, 13)
    items = int((labels != -100).sum())

    def accumulated(hidden: Any, weight: Any, bias: Any, teacher: Any, teacher_weight: Any) -> torch.Tensor:
        parts = [
            loss_with(labels[rows], label_weight=0.5, num_items_in_batch=count)(
                hidden[rows], weight, bias, teacher[rows], teacher_weight
            )
            for rows, count in ((slice(0, 3), items), (slice(3, 10), torch.tensor(items)))
        ]
        return torch.stack(parts).sum()

    inputs = (hidden, weight, bias, teacher, teacher_weight)
    value, gradients = run(backend, accumulated, inputs, STUDENT)
    whole, expected = run(backend, loss_with(labels, label_weight=0.5), inputs, STUDENT)
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(gradients, expected)


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
@pytest.mark.parametrize("extra", [{}, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_ignored_tokens_count_for_nothing_whatever_they_hold(
    backend: str, extra: dict[str, Any], label_weight: float
) -> None:
    hidden, weight, bias, teacher, teacher_weight = tensors()
    labels = some_labels(9, 13)
    keep = labels != -100
    hidden[~keep], teacher[~keep] = torch.nan, torch.inf
    options: dict[str, Any] = {"label_weight": label_weight, "temperature": 2.0, "chunk_tokens": 4, **extra}
    value, (for_hidden, for_weight, for_bias) = run(
        backend, loss_with(labels, **options), (hidden, weight, bias, teacher, teacher_weight), STUDENT
    )
    alone = (hidden[keep], weight, bias, teacher[keep], teacher_weight)
    expected, (kept_hidden, *head) = run("reference", loss_with(labels[keep], **options), alone, STUDENT)
    torch.testing.assert_close(value.cpu(), expected)
    torch.testing.assert_close(for_hidden.cpu()[keep], kept_hidden)
    assert not for_hidden.cpu()[~keep].any()
    torch.testing.assert_close([for_weight.cpu(), for_bias.cpu()], head)

    # known logits and classes of ignored tokens are not looked at either
    ready = torch.randn(9, 13)
    sparse, values = loss_of_top_k(ready, 4, labels, reduction="none", **{"chunk_tokens": 4})
    values[~keep] = torch.nan
    rows, ours = run(backend, sparse, (hidden, weight, bias, values), STUDENT[:4])
    alone, kept_values = loss_of_top_k(ready[keep], 4, labels[keep], reduction="none")
    expected_rows, _ = run("reference", alone, (hidden[keep], weight, bias, kept_values), STUDENT[:4])
    torch.testing.assert_close(rows.cpu()[keep], expected_rows)
    assert not rows.cpu()[~keep].any()
    assert all(gradient.isfinite().all() for gradient in ours)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_token_that_counts_has_the_loss_0(backend: str, tokens: int, reduction: str) -> None:
    labels = torch.full((tokens,), -1)
    loss = loss_with(labels, label_weight=0.5, reduction=reduction, ignore_index=-1)
    value, gradients = run(backend, loss, tensors(tokens), STUDENT)
    assert not value.any()
    assert value.shape == ((tokens,) if reduction == "none" else ())
    assert not any(gradient.any() for gradient in gradients)
    assert gradients[0].shape == (tokens, 6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS[:1]])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(backend: str, direction: str) -> None:
    *student, teacher, teacher_weight = tensors(5, 4, 5, torch.float64)
    inputs = [x.requires_grad_() for x in student]
    options: dict[str, Any] = {"label_weight": 0.3, "temperature": 1.7, "direction": direction, "chunk_tokens": 2}
    for more in ({}, {"reduction": "none"}, SCALED):
        loss = loss_with(some_labels(5, 4), **options, **more)
        with fk.backend(backend):
            assert torch.autograd.gradcheck(lambda *student, loss=loss: loss(*student, teacher, teacher_weight), inputs)
    sparse, values = loss_of_top_k(torch.randn(5, 4, dtype=torch.float64), 3, some_labels(5, 4), **options)
    with fk.backend(backend):
        assert torch.autograd.gradcheck(lambda *student: sparse(*student, values), inputs)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_second_and_third_backward_are_equal(backend: str) -> None:
    labels = some_labels(9, 13)
    for reduction in ("batchmean", "none"):
        assert_equal_gradients_three_times(backend, loss_with(labels, label_weight=0.5, reduction=reduction), tensors())


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


@pytest.mark.parametrize("has_fast_bfloat16", [False, True])
def test_autocast_leaves_logits_in_float32(monkeypatch: pytest.MonkeyPatch, has_fast_bfloat16: bool) -> None:
    """Also on processors where bfloat16 is multiplied as float32."""
    if has_fast_bfloat16 and not module._ONEDNN_BFLOAT16:
        pytest.skip("oneDNN has no bfloat16 here")
    seen = []
    product = module._product
    monkeypatch.setattr(module, "_has_fast_bfloat16", lambda tensor: has_fast_bfloat16)
    monkeypatch.setattr(module, "_product", lambda *factors: seen.append(product(*factors)) or seen[-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_with()(*tensors())
        rows = loss_with(reduction="none")(*(x.requires_grad_(w) for x, w in zip(tensors(), STUDENT, strict=True)))
        rows.sum().backward()
    assert len(seen) == 6
    assert {logits.dtype for logits in seen} == {torch.float32}


# what is asked for, and how many chunks of logits are in memory for it at a time
ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": SCALED,
    "tokens": {"reduction": "none"},
    "terms": {"return_soft_hard_loss": True},
    "jsd": {"direction": "jsd"},
    "sparse": {"known": 4},
    "sparse reverse": {"known": 4, "direction": "reverse"},
}


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return result


def step_of(tokens: int, classes: int, width: int, known: int | None = None, **options: Any) -> Any:
    """A training step on hidden states [tokens, width]."""
    hidden, weight = torch.randn(tokens, width).requires_grad_(), torch.randn(classes, width).requires_grad_()
    teacher: dict[str, Any] = {
        "teacher_hidden_states": torch.randn(tokens, width),
        "teacher_weight": torch.randn(classes, width),
    }
    if known is not None:
        indices = torch.rand(tokens, 64).topk(known).indices
        teacher = {"teacher_logits": torch.randn(tokens, known), "teacher_indices": indices}
    labels = some_labels(tokens, classes)

    def step() -> None:
        result = fused_linear_kd_loss(
            hidden, weight, labels=labels, label_weight=0.5, temperature=2.0, **teacher, **options
        )
        loss = result.loss if isinstance(result, fk.SoftHardLoss) else result
        torch.autograd.grad(loss.sum(), (hidden, weight))

    return step


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch, backend: str, asked: str) -> None:
    # inside a registered op nothing would be seen
    monkeypatch.setattr(module, "_forward", module._compute_on_cpu)
    step = step_of(64, 300, 4, chunk_tokens=8, **ASKED[asked])
    with fk.backend(backend), _Largest() as largest:
        step()
    assert largest.bytes == (64 if backend == "reference" else 8) * 300 * 4


@pytest.mark.slow
@pytest.mark.skipif(not _extension.has_kernel("kd_loss_forward", "CPU"), reason="fastkd_kernels._C was not compiled")
def test_logits_are_never_all_in_memory() -> None:
    tokens, classes = 1024, 4000
    logits = tokens * classes * 4
    for asked in ASKED.values():
        assert peak_bytes(step_of(tokens, classes, 32, **asked)) < logits
    with fk.backend("reference"):
        assert peak_bytes(step_of(tokens, classes, 32)) > 4 * logits


UNSCALED = (1.0, None, 1.0, None)


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
        options = (1.0, 1.0, "forward", None, 0.5, 1.0, -100, *UNSCALED, True, False, 4, True, True, False)
        assert module._forward(hidden, weight, None, *teacher, None, None, None, labels, None, *options)[0].isnan()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_class_of_a_sparse_teacher_that_the_student_lacks_never_passes_for_a_loss(direction: str) -> None:
    hidden, weight, *_ = tensors()
    logits, indices = torch.randn(9, 13).topk(3)
    for outside in (-1, 13):
        indices[4, 1] = outside
        with pytest.raises(ValueError, match="teacher_indices: got values from"):
            fused_linear_kd_loss(hidden, weight, teacher_logits=logits, teacher_indices=indices)
        known = (None, None, None, logits, indices, None, None)
        options = (1.0, 1.0, direction, None, 0.0, 1.0, -100, *UNSCALED, True, False, 4, True, True, False)
        # as a GPU finds it, where nobody has looked
        assert module._forward(hidden, weight, None, *known, *options)[0].isnan()


READY = {"teacher_hidden_states": None, "teacher_weight": None, "teacher_logits": torch.zeros(4, 13)}


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
        ({"reduction": "mean"}, ValueError, "reduction: got 'mean', expected one of batchmean, sum, none"),
        ({"reduction": "sum", "num_items_in_batch": 3}, ValueError, 'num_items_in_batch: .*reduction="sum"'),
        ({"num_items_in_batch": -1}, ValueError, "num_items_in_batch: got -1, expected 0 or more"),
        ({"num_items_in_batch": torch.ones(2)}, ValueError, r"num_items_in_batch: got shape \(2,\)"),
        ({"student_softcap": 0.0}, ValueError, "student_softcap: got 0.0, expected a finite number above 0"),
        ({"teacher_logit_scale": -1.0}, ValueError, "teacher_logit_scale: got -1.0"),
        ({**READY, "teacher_softcap": 3.0}, ValueError, "teacher_logits: got teacher_logit_scale=1.0 and teacher_so"),
        ({"teacher_indices": torch.zeros(4, 8)}, ValueError, "teacher_indices: got indices without teacher_logits"),
        ({**READY, "teacher_indices": torch.zeros(4, 13)}, TypeError, "teacher_indices: got dtype torch.float32"),
        ({**READY, "teacher_indices": torch.arange(13)}, ValueError, r"teacher_indices: got shape \(13,\)"),
        (
            {**READY, "teacher_indices": torch.zeros(4, 13, dtype=torch.int64)},
            ValueError,
            "teacher_indices: got the same class twice",
        ),
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
@pytest.mark.parametrize("scale", [None, (), (9,)])
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_opcheck(backend: str, scale: tuple[int, ...] | None, labelled: bool) -> None:
    hidden, weight, bias, *teacher = tensors(dtype=torch.bfloat16)
    labels = some_labels(9, 13) if labelled else None
    weights = None if scale is None else torch.rand(scale)
    scaling = (0.5, 3.0, 1.0, None) if labelled else UNSCALED
    options = (2.0, 4.0, "jsd", 0.3, 0.5 * labelled, 0.7, -100, *scaling, not scale, labelled, 4, True, labelled, True)
    torch.library.opcheck(
        module._forward, (hidden, weight, bias, *teacher, None, None, None, labels, weights, *options)
    )
    known = (None, None, None, *torch.randn(9, 13).topk(3))
    torch.library.opcheck(module._forward, (hidden, weight, bias, *known, labels, weights, *options))


COMPILED: list[dict[str, Any]] = [
    {},
    {"reduction": "none", **SCALED},
    {"num_items_in_batch": 5, "direction": "jsd", "beta": 0.2},
    {"num_items_in_batch": torch.tensor(5), "kd_weight": 0.5},
]


@pytest.mark.parametrize("options", COMPILED, ids=["plain", "tokens", "items", "items on the device"])
def test_compiles_into_one_graph(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    inputs = tuple(x.requires_grad_(want) for x, want in zip(tensors(), STUDENT, strict=True))
    loss = loss_with(some_labels(9, 13), label_weight=0.5, chunk_tokens=4, **options)
    assert_compiles_into_one_graph(lambda *inputs: loss(*inputs).sum(), inputs)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_terms_and_a_sparse_teacher_compile_into_one_graph(reduction: str) -> None:
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in tensors()[:3]]
    sparse, values = loss_of_top_k(
        torch.randn(9, 13), 3, some_labels(9, 13), label_weight=0.5, reduction=reduction, return_soft_hard_loss=True
    )
    eager, compiled = sparse(*inputs, values), torch.compile(sparse, fullgraph=True)(*inputs, values)
    torch.testing.assert_close(compiled, eager)
    ours, expected = (torch.autograd.grad(parts.loss.sum(), inputs) for parts in (compiled, eager))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_gradient_of_a_gradient_raises_instead_of_being_wrong(reduction: str) -> None:
    hidden, weight, bias, *teacher = tensors()
    hidden.requires_grad_()
    loss = loss_with(reduction=reduction)(hidden, weight, bias, *teacher).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r'backend\("reference"\)'):
        (gradient.square().sum() + loss).backward()
