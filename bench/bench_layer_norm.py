"""Benchmarks of the fused sums and layer normalisations of an encoder against eager PyTorch and `torch.compile`.

Every provider is checked in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import common
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd_kernels as fk

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [(512, 384), (4096, 384), (4096, 768), (32768, 768)]
TOKENS, POSITIONS, SEGMENTS = 30522, 512, 2


def tolerance(dtype: str) -> float:
    return 1e-5 if dtype == "fp32" else 5e-2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_add_layer_norm(compare: Callable[..., object], dtype: str, shape: tuple[int, int]) -> None:
    torch.compiler.reset()

    def make() -> list[Tensor]:
        sizes = (shape, shape, shape[1:], shape[1:])
        return [torch.randn(size, device=common.DEVICE).to(DTYPES[dtype]) for size in sizes]

    def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x + residual, shape[1:], weight, bias, 1e-12)

    def check(result: Tensor, *inputs: Tensor) -> None:
        exact = eager(*(tensor.double() for tensor in inputs))
        torch.testing.assert_close(result.double(), exact, rtol=tolerance(dtype), atol=tolerance(dtype))

    compare(
        "add_layer_norm",
        f"{list(shape)} {dtype}",
        {"fastkd": fk.add_layer_norm, "eager": eager, "compile": torch.compile(eager, fullgraph=True)},
        make,
        check,
        bytes_moved=3 * shape[0] * shape[1] * DTYPES[dtype].itemsize,
    )


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_embed_layer_norm(compare: Callable[..., object], dtype: str, shape: tuple[int, int]) -> None:
    torch.compiler.reset()
    rows, hidden = shape

    def make() -> list[Tensor]:
        tables = [
            torch.randn(size, hidden, device=common.DEVICE).to(DTYPES[dtype]) for size in (TOKENS, POSITIONS, SEGMENTS)
        ]
        indices = [torch.randint(0, table.shape[0], (rows,), device=common.DEVICE) for table in tables]
        vectors = [torch.randn(hidden, device=common.DEVICE).to(DTYPES[dtype]) for _ in range(2)]
        return [*tables, *indices, *vectors]

    def fused(*inputs: Tensor) -> Tensor:
        return fk.embed_layer_norm(inputs[:3], inputs[3:6], inputs[6], inputs[7])

    def eager(*inputs: Tensor) -> Tensor:
        words, positions, segments = (
            F.embedding(index, table) for table, index in zip(inputs[:3], inputs[3:6], strict=True)
        )
        return F.layer_norm(words + segments + positions, (hidden,), inputs[6], inputs[7], 1e-12)

    def check(result: Tensor, *inputs: Tensor) -> None:
        exact = eager(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs))
        torch.testing.assert_close(result.double(), exact, rtol=tolerance(dtype), atol=tolerance(dtype))

    compare(
        "embed_layer_norm",
        f"{list(shape)} {dtype}",
        {"fastkd": fused, "eager": eager, "compile": torch.compile(eager, fullgraph=True)},
        make,
        check,
        bytes_moved=2 * rows * hidden * DTYPES[dtype].itemsize,
    )
