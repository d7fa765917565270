"""Layer normalisation of sums against float64."""

from __future__ import annotations

import pytest
import torch
from cubins import KernelSpec, compile_kernels
from error_budget import assert_within_budget
from torch import Tensor
from torch.nn import functional as F

import fastkd_kernels as fk
from fastkd_kernels import _extension, _triton
from fastkd_kernels.ops.layer_norm import add_layer_norm_reference, embed_layer_norm_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter truncates where it stores bfloat16, a GPU rounds
INTERPRETED = ["cuda"] if _triton.available else []
BACKENDS = [*INTERPRETED, *([] if DEVICE.type == "cuda" else ["cpu"])]


def tensors(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual = torch.randn(2, rows, width, device=DEVICE, dtype=torch.float64).to(dtype)
    weight, bias = torch.randn(2, width, device=DEVICE, dtype=torch.float64).to(dtype)
    return x * 3 + 1, residual, weight, bias


def budget(backend: str, dtype: torch.dtype) -> float:
    return 2.0 if backend == "cuda" and dtype == torch.bfloat16 and DEVICE.type == "cpu" else 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(5, 37), (3, 384), (1, 8), (0, 16), (2, 768)])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_add_layer_norm(
    backend: str, dtype: torch.dtype, rows: int, width: int, has_residual: bool, has_bias: bool
) -> None:
    x, residual, weight, bias = tensors(rows, width, dtype)
    added = residual if has_residual else None
    bias = bias if has_bias else None
    with fk.backend(backend):
        result = fk.add_layer_norm(x, added, weight, bias, 1e-5)
        out = torch.zeros_like(x)
        assert fk.add_layer_norm(x, added, weight, bias, 1e-5, out).equal(result)
        in_place = x.clone()
        assert fk.add_layer_norm(in_place, added, weight, bias, 1e-5, in_place).equal(result)
        total = torch.zeros_like(x)
        assert fk.add_layer_norm(x, added, weight, bias, 1e-5, total=total).equal(result)
        over_x = x.clone()
        assert fk.add_layer_norm(over_x, added, weight, bias, 1e-5, total=over_x).equal(result)
        assert over_x.equal(total)
    wide = [None if t is None else t.double() for t in (x, added, weight, bias)]
    truth = add_layer_norm_reference(*wide, 1e-5)
    plain_total = x + residual if has_residual else x
    plain = F.layer_norm(plain_total, (width,), weight, bias, 1e-5)
    eps = torch.finfo(dtype).eps
    true_total = x.double() + residual.double() if has_residual else x.double()
    assert_within_budget(total, true_total, plain_total, slack=budget(backend, dtype), absolute=8 * eps)
    assert_within_budget(result, truth, plain, slack=budget(backend, dtype), absolute=8 * eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tables", [1, 2, 3])
@pytest.mark.parametrize("has_bias", [True, False])
def test_embed_layer_norm(backend: str, dtype: torch.dtype, tables: int, has_bias: bool) -> None:
    width, rows = 40, 9
    sizes = (50, 12, 2)[:tables]
    values = [torch.randn(size, width, device=DEVICE, dtype=torch.float64).to(dtype) for size in sizes]
    indices = [torch.randint(size, (rows,), device=DEVICE) for size in sizes]
    _, _, weight, bias = tensors(1, width, dtype)
    bias = bias if has_bias else None
    with fk.backend(backend):
        result = fk.embed_layer_norm(values, indices, weight, bias)
    wide_bias = None if bias is None else bias.double()
    truth = embed_layer_norm_reference([v.double() for v in values], indices, weight.double(), wide_bias, 1e-12)
    total = sum(F.embedding(index, table) for table, index in zip(values, indices, strict=True))
    plain = F.layer_norm(total, (width,), weight, bias, 1e-12)
    eps = torch.finfo(dtype).eps
    assert_within_budget(result, truth, plain, slack=budget(backend, dtype), absolute=8 * eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_plain_pytorch(dtype: torch.dtype) -> None:
    x, residual, weight, bias = tensors(3, 8, dtype)
    expected = add_layer_norm_reference(x, residual, weight, bias, 1e-5)
    assert fk.add_layer_norm(x, residual, weight, bias, 1e-5).equal(expected)


def test_gradients_come_from_the_reference() -> None:
    x, residual, weight, bias = tensors(2, 6, torch.float64)
    leaves = [tensor.requires_grad_(True) for tensor in (x, residual, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: fk.add_layer_norm(*t, 1e-5), leaves)


def test_bad_input_raises_before_any_work() -> None:
    x, residual, weight, bias = tensors(3, 8, torch.float32)
    with pytest.raises(ValueError, match=r"residual: got 2 rows, expected 3"):
        fk.add_layer_norm(x, residual[:2], weight, bias)
    with pytest.raises(TypeError, match=r"residual: got torch.bfloat16"):
        fk.add_layer_norm(x, residual.bfloat16(), weight, bias)
    with pytest.raises(ValueError, match=r"bias: got shape \(7,\), expected \[8\]"):
        fk.add_layer_norm(x, residual, weight, bias[1:])
    with pytest.raises(ValueError, match=r"total: got 2 rows, expected 3"):
        fk.add_layer_norm(x, residual, weight, bias, total=torch.empty(2, 8, device=DEVICE))
    out = torch.empty_like(x)
    with pytest.raises(ValueError, match=r"total: overlaps out"):
        fk.add_layer_norm(x, residual, weight, bias, out=out, total=out)
    with pytest.raises(ValueError, match="tables: got 1 and 2 indices"):
        fk.embed_layer_norm([x], [torch.tensor([0]), torch.tensor([0])], weight, bias)
    with pytest.raises(ValueError, match=r"indices\[0\]: got torch.int32"):
        fk.embed_layer_norm([x], [torch.tensor([0], dtype=torch.int32)], weight, bias)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU does not look at values")
def test_an_index_outside_its_table_raises_on_cpu() -> None:
    table, _, weight, bias = tensors(3, 8, torch.float32)
    with pytest.raises(IndexError, match=r"indices\[0\]\[1\]: got 3, expected 0 to 2"):
        fk.embed_layer_norm([table], [torch.tensor([0, 3])], weight, bias)


def test_opcheck_and_fullgraph() -> None:
    x, residual, weight, bias = tensors(3, 8, torch.float32)
    index, out = torch.tensor([2, 0, 1], device=DEVICE), torch.zeros_like(x)
    ops = torch.ops.fastkd_kernels
    torch.library.opcheck(ops.add_layer_norm_.default, (x, residual, weight, bias, 1e-5, out, None))
    torch.library.opcheck(ops.add_layer_norm_.default, (x, residual, weight, None, 1e-5, out, torch.zeros_like(x)))
    torch.library.opcheck(ops.embed_layer_norm_.default, ([x], [index], weight, bias, 1e-5, out))

    def step(x: Tensor, residual: Tensor, index: Tensor) -> Tensor:
        return fk.add_layer_norm(fk.embed_layer_norm([x], [index], weight, bias), residual * 2, weight, bias)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert compiled(x, residual, index).equal(step(x, residual, index))


@pytest.mark.skipif(not _triton.available, reason="Triton is not installed")
def test_machine_code() -> None:
    module = "fastkd_kernels.ops.layer_norm"
    specs = []
    for dtype in ("bf16", "fp32"):
        pointer = f"*{dtype}:16"
        common = {"weight_ptr": pointer, "bias_ptr": pointer, "out_ptr": pointer, "out_stride": "i32:16",
                  "width": "i32:16", "eps": "fp32", "BLOCK": 1024}  # fmt: skip
        specs += [
            KernelSpec(
                f"{module}:_add_layer_norm_kernel",
                {**common, "x_ptr": pointer, "residual_ptr": pointer, "x_stride": "i32:16",
                 "residual_stride": "i32:16", "total_ptr": pointer, "total_stride": "i32:16",
                 "HAS_RESIDUAL": has_residual, "HAS_BIAS": has_bias, "HAS_TOTAL": has_total},
            )
            for has_residual, has_bias, has_total in (
                (True, True, False), (False, True, False), (True, False, True), (False, False, False),
            )
        ]  # fmt: skip
        specs += [
            KernelSpec(
                f"{module}:_embed_layer_norm_kernel",
                {**common, **{f"table{t}_ptr": pointer for t in range(3)},
                 **{f"index{t}_ptr": "*i64:16" for t in range(3)}, "TABLES": 3,
                 "HAS_BIAS": has_bias},
            )
            for has_bias in (True, False)
        ]  # fmt: skip
    for cubin in compile_kernels(specs):
        cubin.assert_no_spills()
        cubin.assert_arithmetic_is_imitated()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the CPU backend is used for CPU tensors only")
def test_the_extension_is_what_runs_here() -> None:
    assert _extension.missing_kernel_reason("add_layer_norm_", "CPU") is None
    assert _extension.missing_kernel_reason("embed_layer_norm_", "CPU") is None


@pytest.mark.skipif(_extension.extension is None, reason="needs the compiled extension")
def test_a_prepared_embedding_is_the_embedding() -> None:
    tables = [torch.randn(9, 8), torch.randn(5, 8)]
    weight, bias = torch.randn(8), torch.randn(8)
    indices = [torch.tensor([8, 0, 3]), torch.tensor([4, 4, 1])]
    prepared = fk.PreparedEmbedding(tables, weight, bias, 1e-5)
    expected = fk.embed_layer_norm(tables, indices, weight, bias, 1e-5)
    assert prepared(indices).equal(expected)
    with_room = prepared(indices, rows=7)
    assert with_room.shape == (7, 8)
    assert with_room[:3].equal(expected)
    with pytest.raises(IndexError, match=r"indices\[1\]\[0\]: got 5"):
        prepared([indices[0], torch.tensor([5, 0, 0])])
    with pytest.raises(ValueError, match=r"^bias: got shape"):
        fk.PreparedEmbedding(tables, weight[:3], bias, 1e-5)
