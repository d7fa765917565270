"""What a CPU multiplies by oneDNN, and one product of it with tanh as its epilogue."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ROW_BUCKET = 64
"""oneDNN prepares a primitive for every new number of rows, which takes as long as a few hundred rows."""


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of `dtype` on this CPU with instructions for it."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def linear_tanh(rows: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
    """tanh(rows W' + b), [N, D], as the rows up to a multiple of the bucket and the tail after them."""
    # without instructions for a dtype, float32 is several times faster
    dtype = rows.dtype if onednn_multiplies(rows.dtype) else torch.float32
    rows, weight, bias = rows.to(dtype).contiguous(), weight.to(dtype), bias.to(dtype)
    if not onednn_multiplies(dtype):
        return F.linear(rows, weight, bias).tanh_(), None
    return _in_buckets(rows, weight, bias)


def _in_buckets(rows: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
    rest = rows.shape[0] % ROW_BUCKET
    if rest == 0:
        return _multiply(rows, weight, bias), None
    if rows.shape[0] < ROW_BUCKET:
        bucket = rows.new_zeros(ROW_BUCKET if rest > ROW_BUCKET // 2 else ROW_BUCKET // 2, rows.shape[1])
        bucket[:rest] = rows
        return _multiply(bucket, weight, bias)[:rest], None
    # the last bucket overlaps the one before it: no copy
    tail = _multiply(rows[-ROW_BUCKET:], weight, bias)[-rest:]
    return _multiply(rows[:-rest], weight, bias), tail


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One product with its epilogue; in float32 it is also twice as fast as MKL on AMD's CPUs."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "tanh", [], "")
