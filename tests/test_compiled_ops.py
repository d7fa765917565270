"""Every op under torch.compile(fullgraph=True) and torch.export, with gradients, masks and unusual strides."""

from __future__ import annotations

import pytest
import torch
from every_op import OPS, Op, Tensors
from tiny_models import early_exit_model
from torch import Tensor, nn

import fastkd_kernels as fk

ONE_RESULT = [op for op in OPS if op.differentiable and op.backends not in ("packed", "compact")]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


def total(op: Op, tensors: Tensors) -> Tensor:
    return torch.stack([result.sum() for result in op.call(tensors) if result.is_floating_point()]).sum()


@pytest.mark.parametrize(
    "op", [op for op in ONE_RESULT if "packed" not in op.name and "varlen" not in op.name], ids=lambda op: op.name
)
def test_one_graph_with_a_gradient(op: Op) -> None:
    tensors = op.make()
    for name in op.differentiable:
        tensors[name].requires_grad_()
    wanted = [tensors[name] for name in op.differentiable]
    compiled = torch.compile(lambda given: total(op, given), fullgraph=True, backend="aot_eager")(tensors)
    eager = total(op, tensors)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, wanted), torch.autograd.grad(eager, wanted))


@pytest.mark.parametrize("op", [op for op in OPS if op.differentiable], ids=lambda op: op.name)
def test_transforms_inside_a_compiled_function(op: Op) -> None:
    """Dynamo enters the transforms that it traces, and kernels have no tangents there either."""
    tensors, name = op.make(), op.differentiable[0]
    at, direction = tensors[name], torch.randn_like(tensors[name])

    def function(value: Tensor) -> Tensor:
        return total(op, {**tensors, name: value})

    leaf = at.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    # compiled, PyTorch's own jvp of layer_norm raises
    if op.backends != "layer_norm":
        tangent = torch.compile(lambda x: torch.func.jvp(function, (x,), (direction,))[1], backend="eager")(at)
        torch.testing.assert_close(tangent, (expected * direction).sum(), rtol=1e-3, atol=1e-4, check_dtype=False)
    if op.backends in ("packed", "compact") or "packed" in op.name:
        return  # looking at values ends a graph, which a compiled gradient cannot
    gradient = torch.compile(torch.func.grad(function), backend="eager")(at)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def test_one_compiled_function_with_and_without_a_transform() -> None:
    student, teacher, direction = (torch.randn(4, 3) for _ in range(3))
    compiled = torch.compile(lambda logits: fk.kd_loss(logits, teacher), backend="eager")
    torch.testing.assert_close(compiled(student), fk.kd_loss(student, teacher))
    expected = torch.func.grad(lambda logits: fk.kd_loss(logits, teacher))(student)
    torch.testing.assert_close(torch.func.grad(compiled)(student), expected)
    tangent = torch.func.jvp(compiled, (student,), (direction,))[1]
    torch.testing.assert_close(tangent, (expected * direction).sum(), check_dtype=False)


def test_a_column_major_head_of_a_language_model() -> None:
    weight = torch.randn(16, 40).t().detach().requires_grad_()
    hidden, teacher = torch.randn(9, 16), (torch.randn(9, 16), torch.randn(40, 16))
    compiled = torch.compile(fk.fused_linear_kd_loss, fullgraph=True)(hidden, weight, *teacher)
    eager = fk.fused_linear_kd_loss(hidden, weight, *teacher)
    torch.testing.assert_close(torch.autograd.grad(compiled, weight), torch.autograd.grad(eager, weight))


class _Head(nn.Module):
    def __init__(self, op: Op, tensors: Tensors, masks: list[str]) -> None:
        super().__init__()
        self.op, self.masks = op, masks
        self.names = [name for name in tensors if "." in name]
        for name in self.names:
            self.register_buffer(name.replace(".", "_"), tensors[name])

    def forward(self, hidden_states: Tensor, *masks: Tensor) -> Tensor:
        weights = {name: getattr(self, name.replace(".", "_")) for name in self.names}
        given = dict(zip(self.masks, masks, strict=True))
        return self.op.call({"hidden_states": hidden_states, **given, **weights})[0]


@pytest.mark.parametrize("name", ["student_head", "student_head lengths", "student_head mask"])
def test_a_head_can_be_exported_with_its_mask(name: str) -> None:
    op = next(op for op in OPS if op.name == name)
    tensors = op.make()
    masks = [name for name in ("lengths", "attention_mask") if name in tensors]
    head = _Head(op, tensors, masks)
    inputs = (tensors["hidden_states"], *(tensors[name] for name in masks))
    with torch.no_grad():
        exported = torch.export.export(head, inputs).module()
        torch.testing.assert_close(exported(*inputs), head(*inputs))


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = early_exit_model()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask, speed=0.0).logits


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_a_model_is_one_graph_and_can_be_exported_with_its_mask(wants_gradient: bool) -> None:
    classifier = _Classifier().eval()
    input_ids, mask = torch.randint(5, 20, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    with torch.set_grad_enabled(wants_gradient):
        expected = classifier(input_ids, mask)
        compiled = torch.compile(classifier, fullgraph=True, backend="aot_eager")(input_ids, mask)
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
        if wants_gradient:
            compiled.sum().backward()
            return
        exported = torch.export.export(classifier, (input_ids, mask)).module()
        torch.testing.assert_close(exported(input_ids, mask), expected, rtol=1e-4, atol=1e-5)
