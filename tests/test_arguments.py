"""What every op makes of tensors of an unusual kind: what the reference makes of plain ones, or a clear error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from every_op import OPS, Op, Tensors
from torch import Tensor

import fastkd_kernels as fk
from fastkd_kernels import _arguments, _backend, _triton

BACKENDS = ("reference", "cpu", "cuda")
REFUSALS = (ValueError, TypeError, IndexError, fk.BackendUnavailableError)


def available(op: Op) -> list[str]:
    """Backends that take CPU tensors here: Triton by its interpreter."""
    needs = _backend.registered_ops()[op.backends]
    found = ["reference"]
    if needs.cpu is None:
        found.append("cpu")
    if needs.interpretable and needs.cuda is None and _triton.interpreting:
        found.append("cuda")
    return found


def sliced(plain: Tensor) -> Tensor:
    wide = torch.full((*plain.shape[:-1], 2 * plain.shape[-1] + 3), 77, dtype=plain.dtype)
    view = wide[..., 2 : 2 + 2 * plain.shape[-1] : 2]
    return view.copy_(plain)


def every_other_row(plain: Tensor) -> Tensor:
    rows = torch.full((2 * plain.shape[0] + 1, *plain.shape[1:]), 77, dtype=plain.dtype)
    return rows[1::2].copy_(plain)


def transposed(plain: Tensor) -> Tensor | None:
    return None if plain.dim() < 2 else plain.transpose(0, -1).contiguous().transpose(0, -1)


def expanded(plain: Tensor) -> Tensor | None:
    return plain[:1].clone().expand_as(plain) if plain.shape[0] > 1 else None


def overlapping(plain: Tensor) -> Tensor | None:
    """A sliding window: rows that share all elements but one."""
    if plain.dim() < 2 or plain.numel() < 2:
        return None
    inner = plain[0].contiguous().stride()
    buffer = plain.flatten()[: plain[0].numel() + plain.shape[0]].clone()
    return buffer.as_strided(plain.shape, (1, *inner))


def negative(plain: Tensor) -> Tensor:
    view = torch.complex(torch.zeros_like(plain), -plain).conj().imag if plain.dtype == torch.float32 else None
    return torch._neg_view(-plain) if view is None else view


def elsewhere(plain: Tensor) -> Tensor:
    return plain.to("meta")


KINDS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "sliced": sliced,
    "every other row": every_other_row,
    "transposed": transposed,
    "expanded": expanded,
    "overlapping": overlapping,
    "negative view": negative,
    "other device": elsewhere,
}


def run(op: Op, backend: str, tensors: Tensors) -> list[Tensor] | Exception:
    try:
        with fk.backend(backend):
            return [result.detach() for result in op.call(tensors)]
    except REFUSALS as error:
        return error


def copied(tensors: Tensors, wanted: tuple[str, ...] = ()) -> Tensors:
    return {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in tensors.items()}


def assert_refusal_is_clear(refusal: Exception, name: str) -> None:
    """It names an argument and says what came."""
    message = str(refusal)
    assert ": " in message, message
    assert ".cpp" not in message, message


def assert_equal(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("wants_gradient", [False, True], ids=["", "with gradient"])
def test_a_tensor_of_any_kind_is_read_right_or_refused(op: Op, wants_gradient: bool) -> None:
    if wants_gradient and not op.differentiable:
        pytest.skip("has no gradient")
    counts: Counter[str] = Counter()
    for argument in op.varied or op.make():
        for kind, make in KINDS.items():
            if kind == "expanded" and argument in op.distinct:
                continue
            if kind == "other device" and len(op.make()) == 1:
                continue
            # the kernels are the same: what a gradient may switch off is the checks before them
            if wants_gradient and kind in ("every other row", "transposed", "overlapping"):
                continue
            torch.manual_seed(0)
            tensors = op.make()
            variant = make(tensors[argument])
            if variant is None:
                continue
            wanted = op.differentiable if wants_gradient else ()
            expected = None
            if kind != "other device":
                tensors[argument] = variant.clone()
                expected = run(op, "reference", copied(tensors))
            for backend in available(op):
                given = copied(tensors, tuple(name for name in wanted if name != argument))
                given[argument] = (
                    make(tensors[argument]) if kind == "other device" else variant_again(op, argument, kind)
                )
                if argument in wanted:
                    given[argument].requires_grad_()
                result = run(op, backend, given)
                label = f"{op.name}, {argument} {kind}, {backend}"
                if isinstance(result, Exception):
                    assert_refusal_is_clear(result, argument)
                    counts["refused"] += 1
                    continue
                assert isinstance(expected, list), f"{label}: accepted, but the reference says {expected!r}"
                try:
                    assert_equal(result, expected)
                except AssertionError as error:
                    raise AssertionError(f"{label}: {error}") from None
                counts["equal"] += 1
    assert counts["equal"] >= len(op.varied or op.make()), f"{op.name}: {dict(counts)}"
    print(f"{op.name}: {dict(counts)}")


def variant_again(op: Op, argument: str, kind: str) -> Tensor:
    torch.manual_seed(0)
    variant = KINDS[kind](op.make()[argument])
    assert variant is not None
    return variant


WRITERS = [op for op in OPS if op.written]


@pytest.mark.parametrize("op", WRITERS, ids=lambda op: op.name)
def test_what_is_written_overlaps_nothing_that_is_read(op: Op) -> None:
    """Memory of an input, of another output, or an element twice: refused, or the values are right all the same."""
    refused = 0
    for argument in op.written:
        for other in op.make():
            if other == argument:
                continue
            for backend in available(op):
                torch.manual_seed(0)
                tensors = op.make()
                bytes_needed = max(t.numel() * t.element_size() for t in (tensors[argument], tensors[other]))
                memory = torch.zeros(bytes_needed, dtype=torch.uint8)

                def view(of: Tensor, memory: Tensor = memory) -> Tensor:
                    return memory[: of.numel() * of.element_size()].view(of.dtype).view(of.shape)

                target, read = view(tensors[argument]), view(tensors[other])
                target.copy_(tensors[argument])
                read.copy_(tensors[other])
                result = run(op, backend, {**tensors, argument: target, other: read})
                label = f"{op.name}: {argument} in the memory of {other}, {backend}"
                if isinstance(result, Exception):
                    assert "overlap" in str(result), f"{label}: {result!r}"
                    refused += 1
                    continue
                assert other in ("x", "residual"), f"{label}: accepted"
                expected = run(op, "reference", tensors)
                assert isinstance(expected, list)
                assert_equal(result, expected)
    assert refused


@pytest.mark.parametrize("op", WRITERS, ids=lambda op: op.name)
def test_what_is_written_raises_its_version(op: Op) -> None:
    for backend in available(op):
        tensors = op.make()
        before = {name: tensors[name]._version for name in op.written}
        assert not isinstance(run(op, backend, tensors), Exception)
        unseen = [name for name, version in before.items() if tensors[name]._version == version]
        assert not unseen, f"{op.name}, {backend}"


@pytest.mark.parametrize("op", [op for op in WRITERS if "record.logits" not in op.written], ids=lambda op: op.name)
def test_nothing_is_written_where_a_gradient_is_wanted(op: Op) -> None:
    for backend in available(op):
        tensors = op.make()
        name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
        refusal = run(op, backend, {**tensors, name: tensors[name].requires_grad_()})
        assert isinstance(refusal, ValueError)
        assert "gradient" in str(refusal)


def test_columns_of_one_matrix_do_not_overlap() -> None:
    matrix = torch.randn(4, 12)
    left, right = matrix[:, :6], matrix[:, 6:]
    expected = fk.add_layer_norm(left.clone(), None, torch.ones(6), torch.zeros(6))
    torch.testing.assert_close(fk.add_layer_norm(left, None, torch.ones(6), torch.zeros(6), out=right), expected)
    with pytest.raises(ValueError, match="out: overlaps x"):
        fk.add_layer_norm(left, None, torch.ones(6), torch.zeros(6), out=matrix[:, 5:11])


@pytest.mark.parametrize(
    ("shape", "strides", "repeats"),
    [
        ((3, 4), (4, 1), False),
        ((3, 4), (1, 3), False),
        ((3, 4), (1, 2), True),
        ((3, 4), (0, 1), True),
        ((1, 4), (0, 1), False),
        ((2, 3, 4), (4, 8, 1), False),
        ((2, 3, 4), (4, 7, 1), True),
    ],
)
def test_which_strides_hold_an_element_twice(shape: tuple[int, ...], strides: tuple[int, ...], repeats: bool) -> None:
    view = torch.zeros(100).as_strided(shape, strides)
    assert _arguments._repeats_elements(view) is repeats
