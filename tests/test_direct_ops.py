"""The ops of `torch.ops.fastkd_kernels` without their Python functions: strides of fakes, and bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_op import OPS, Op
from test_arguments import KINDS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd_kernels as fk
from fastkd_kernels import _backend, _extension

needs_extension = pytest.mark.skipif(_extension.extension is None, reason=str(_extension.missing_reason))
ops = torch.ops.fastkd_kernels


class Recorder(TorchDispatchMode):
    """Keeps the calls of this package's ops with copies of what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastkd_kernels":
            self.calls.append((func, torch.utils._pytree.tree_map(_kept, args), kwargs))
        return func(*args, **kwargs)


def _kept(value: Any) -> Any:
    """The same strides in memory of its own."""
    if not isinstance(value, Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return copy.copy_(value) if not any(stride == 0 for stride in value.stride()) else value.clone()


@needs_extension
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_strides_are_those_that_the_fake_promises(op: Op) -> None:
    """Of every op that a call reaches on CPU, for tensors that are sliced, stepped through and transposed."""
    if _backend.registered_ops()[op.backends].cpu is not None:
        pytest.skip("no C++ kernel")
    checked = 0
    for kind in ("sliced", "every other row", "transposed"):
        torch.manual_seed(0)
        tensors = op.make()
        for name in op.varied or tensors:
            variant = KINDS[kind](tensors[name])
            if variant is not None and name not in op.written:
                tensors[name] = variant.requires_grad_(name in op.differentiable)
        with fk.backend("cpu"), Recorder() as recorder:
            op.call(tensors)
        for function, arguments, options in recorder.calls:
            torch.library.opcheck(function, arguments, options, test_utils=("test_schema", "test_faketensor"))
            checked += 1
    differentiated_by_reference = op.differentiable and op.backends in ("packed", "layer_norm", "varlen_attention")
    assert checked or differentiated_by_reference or op.backends == "student_head"


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


ROWS, BOUNDS, KEPT = torch.randn(4, 3), int32(0, 1, 4), int32(1, 0)
HEAD = [
    torch.zeros(2, 4, 4),
    torch.zeros(2, 4),
    torch.zeros(2, 4, 4),
    torch.zeros(4),
    torch.zeros(3, 4),
    torch.zeros(3),
]
NARROW = [torch.zeros(1, 16, 16, 1), torch.zeros(16)]


@needs_extension
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pack_", ([], int32(1), [], int32(0, 0))),
        (
            "pack_",
            ([torch.randn(2, 3), torch.randn(3, 2)], int32(3, 3), [torch.empty(6), torch.empty(6)], int32(0, 0, 0)),
        ),
        ("unpack_", ([], BOUNDS, [torch.empty(2, 3, 3)])),
        ("unpack_", ([], int32(0), [])),
        ("unpack_", ([ROWS], torch.empty(0, dtype=torch.int32), [torch.empty(0, 3, 3)])),
        ("unpack_", ([ROWS], int32(0, 9), [torch.empty(1, 9, 3)])),
        ("compact_packed_", ([], BOUNDS, KEPT, None, [], int32(0, 0, 0))),
        ("compact_packed_", ([ROWS], BOUNDS, KEPT, int32(), [torch.empty(4, 3)], int32(0, 0, 0))),
        ("compact_packed_", ([ROWS], BOUNDS, KEPT, int32(1, 1), [torch.empty(4, 3)], int32(0, 0, 0))),
        ("compact_packed_", ([ROWS], BOUNDS, KEPT, None, [ROWS], int32(0, 0, 0))),
        ("compact", ([], KEPT, None)),
        ("compact", ([ROWS], KEPT, int32())),
        ("compact_out", ([ROWS, ROWS], KEPT, None, [torch.empty(2, 3)])),
        ("add_layer_norm_", (ROWS, None, torch.ones(2), torch.zeros(3), 1e-5, torch.empty(4, 3), None)),
        ("embed_layer_norm_", ([], [], torch.ones(3), torch.zeros(3), 1e-5, torch.empty(4, 3))),
        ("varlen_attention_", (*[torch.randn(4, 1, 8)] * 3, int32(), 1.0, None, None, None, torch.empty(4, 1, 8))),
        ("varlen_attention_", (*[torch.randn(4, 1, 8)] * 3, int32(0, 9), 1.0, None, None, None, torch.empty(4, 1, 8))),
        ("encoder_layers_", (ROWS, BOUNDS, [], [], torch.empty(4, 3))),
        ("encoder_layers_", (ROWS, BOUNDS, [torch.zeros(900, dtype=torch.uint8)], [], torch.empty(4, 3))),
        ("encoder_layers_", (ROWS, BOUNDS, [torch.zeros(3)], [], torch.empty(4, 3))),
        ("student_head_pool", (torch.randn(4, 4), None, 2, 2, 2, *HEAD, torch.tensor([9, 9]), None, None)),
        ("student_head_pool", (torch.randn(4, 4), None, 2, 2, 2, *HEAD, None, None, torch.tensor([0, 9, 4]))),
        ("student_head_pool", (torch.randn(4, 4), None, 2, 0, 2, *HEAD, None, None, None)),
        ("student_head_pool", (torch.randn(4, 4), None, 2**40, 2**40, 2, *HEAD, None, None, None)),
        (
            "student_head_pool",
            (torch.randn(4, 4), None, 2, 2, 2, *HEAD, None, torch.ones(1, 1, dtype=torch.bool), None),
        ),
        ("student_head_pool", (torch.randn(4, 4), None, 2, 2, 2, *HEAD, int32(1, 1), None, None)),
        ("student_head_packed", (torch.randn(4, 6), *NARROW, 2, *HEAD, int32(0, 9))),
        ("student_head_packed", (torch.randn(4, 6), *NARROW, 2, *HEAD, int32(0, 3, 2))),
        ("student_head_packed", (torch.randn(4, 6), *NARROW, 2, *HEAD, int32())),
        ("student_head_packed", (torch.randn(4, 17), *NARROW, 2, *HEAD, BOUNDS)),
        ("student_head_packed", (torch.randn(4, 6).double(), *NARROW, 2, *HEAD, BOUNDS)),
        ("student_head_packed", (torch.randn(4, 6), NARROW[0][:, :8], NARROW[1], 2, *HEAD, BOUNDS)),
        ("student_head_packed", (torch.randn(4, 6), NARROW[0].bfloat16(), NARROW[1], 2, *HEAD, BOUNDS)),
        ("student_head_packed", (torch.randn(4, 6), NARROW[0], NARROW[1][:4], 2, *HEAD, BOUNDS)),
        ("student_head_packed", (torch.randn(4, 6), NARROW[0].repeat(2, 1, 1, 1), torch.zeros(32), 2, *HEAD, BOUNDS)),
        ("student_head_packed", (torch.randn(4, 6), *NARROW, 0, *HEAD, BOUNDS)),
    ],
)
def test_bad_arguments_raise_instead_of_reading_elsewhere(name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(RuntimeError) as caught:
        getattr(ops, name)(*arguments)
    assert "/site-packages/" not in str(caught.value).split("\n")[0]


@needs_extension
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("width", [0, 2])
def test_sizes_of_zero(rows: int, width: int) -> None:
    padded, lengths = torch.randn(1, rows, width), int32(rows)
    (packed,), bounds = fk.pack([padded], lengths)
    assert bounds.tolist() == [0, rows]
    torch.testing.assert_close(fk.unpack([packed], bounds, rows)[0], padded)
    (kept,), _ = fk.compact_packed([packed], bounds, int32(0))
    torch.testing.assert_close(kept, packed)
    attended = fk.varlen_attention(*[torch.randn(rows, 2, width)] * 3, bounds, rows)
    assert attended.shape == (rows, 2, width)


@needs_extension
def test_messages_and_binary_name_no_folder_of_the_build() -> None:
    assert _extension.extension is not None
    assert _extension.extension.__file__ is not None
    with open(_extension.extension.__file__, "rb") as binary:
        contents = binary.read()
    assert b"/csrc/packed_cpu.cpp" not in contents
    with pytest.raises(ValueError, match=r"^lengths\[0\]: got 9, expected 0 to T = 3$"):
        fk.pack([torch.randn(1, 3)], int32(9))


@pytest.mark.parametrize("lacking", ["interface", "exit_gate", "enable_eager_tensors", "remember_triton"])
def test_an_extension_of_another_version_says_rebuild_it(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    stale = ModuleType("fastkd_kernels._C")
    for name in ("interface", *_extension._BINDINGS):
        if name != lacking:
            setattr(stale, name, _extension.INTERFACE)
    monkeypatch.setitem(sys.modules, "fastkd_kernels._C", stale)
    monkeypatch.setattr(fk, "_C", stale, raising=False)
    loaded, reason = _extension._load()
    assert loaded is None
    assert reason is not None
    assert "rebuild it with: pip install" in reason
    monkeypatch.setattr(_extension, "missing_reason", reason)
    assert _extension.missing_kernel_reason("kd_loss_forward", "CPU") == reason
