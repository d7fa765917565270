"""Benchmarks of attention over packed sequences against what PyTorch offers for sequences of different lengths.

Baselines: `scaled_dot_product_attention` on the padded batch with a mask, the same through `torch.compile`, and one
sequence after the other without padding. Queries, keys and values are slices of one projection, as in an encoder; what
padding and unpadding would cost is not charged. Every provider is checked in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import common
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd_kernels as fk
from fastkd_kernels.ops.varlen_attention import varlen_attention_reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# lengths as in SST-2 (short and uneven), AG News (even) and long documents; heads of MiniLM and of BERT-base
CASES = {
    "160 x 5..45, 12 x 32": ([5 + 40 * i // 159 for i in range(160)], 12, 32),
    "80 x 50, 12 x 32": ([50] * 80, 12, 32),
    "32 x 16..128, 12 x 64": ([16 + 112 * i // 31 for i in range(32)], 12, 64),
    "8 x 512, 12 x 64": ([512] * 8, 12, 64),
}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor, Tensor]


def make_inputs(lengths: Sequence[int], heads: int, head_size: int, dtype: torch.dtype) -> Callable[[], Inputs]:
    def make() -> Inputs:
        projected = torch.randn(sum(lengths), 3, heads, head_size, device=common.DEVICE).to(dtype)
        cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(common.DEVICE, torch.int32)
        token = torch.arange(max(lengths), device=common.DEVICE)
        mask = token < torch.tensor(lengths, device=common.DEVICE)[:, None]
        padded = torch.zeros(3, len(lengths), heads, max(lengths), head_size, device=common.DEVICE, dtype=dtype)
        padded.permute(1, 3, 0, 2, 4)[mask] = projected
        query, key, value = projected.unbind(1)
        return query, key, value, cu_seqlens, max(lengths), padded, mask

    return make


def packed(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, *_: Tensor) -> Tensor:
    return fk.varlen_attention(query, key, value, cu_seqlens, longest)


def padded_sdpa(*inputs: Tensor) -> Tensor:
    (query, key, value), mask = inputs[-2], inputs[-1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])


def one_by_one(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *_: Tensor) -> Tensor:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for start, end in pairwise(cu_seqlens.tolist()):
        q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        out[start:end] = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
    return out


def check(result: Tensor, *inputs: Tensor) -> None:
    query, key, value, cu_seqlens, longest, _, mask = inputs
    exact = varlen_attention_reference(query.double(), key.double(), value.double(), cu_seqlens, int(longest))
    if result.dim() == 4:
        result = result.transpose(1, 2)[mask]
    tolerance = 1e-5 if query.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_varlen_attention(compare: Callable[..., object], dtype: str, case: str) -> None:
    torch.compiler.reset()
    lengths, heads, head_size = CASES[case]
    compare(
        "varlen_attention",
        f"{case} {dtype}",
        {
            "fastkd": packed,
            "sdpa, padded": padded_sdpa,
            "sdpa, one by one": one_by_one,
            "compile, padded": torch.compile(padded_sdpa, fullgraph=True),
        },
        make_inputs(lengths, heads, head_size, DTYPES[dtype]),
        check,
        bytes_moved=4 * sum(lengths) * heads * head_size * DTYPES[dtype].itemsize,
        uncapturable=["sdpa, one by one"],
    )
