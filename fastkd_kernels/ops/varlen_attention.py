"""Attention over packed sequences: every token attends to the tokens of its own sequence, and nothing is padded.

    O_b = softmax(scale * Q_b K_b') V_b        for the rows cu_seqlens[b] to cu_seqlens[b + 1] of Q, K and V, each head

With a window, token i of a sequence sees its tokens i - window to i + window, and no others are computed. With rotary
tables (RoFormer, arXiv 2104.09864), the halves (a, b) of each query and key of token i become
(a cos_i - b sin_i, b cos_i + a sin_i) before that.

On a GPU this is PyTorch's own `torch.nn.attention.varlen.varlen_attn` (FlashAttention); on CPU, where PyTorch has no
such kernel, it is C++, computed in float32 whatever the dtype.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd_kernels import _extension
from fastkd_kernels._arguments import check_rising, dense, plain, values_are_free
from fastkd_kernels._backend import attention_of_reference, register_backends, resolve
from fastkd_kernels._derivatives import wants_gradient
from fastkd_kernels._library import library
from fastkd_kernels.ops.packed import unpack_reference

# what the C++ kernel and FlashAttention take; the others run the reference
_CPU_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_DTYPES = (torch.float16, torch.bfloat16)
# torch 2.10 knows no windows
_CUDA_HAS_WINDOWS = not torch.__version__.startswith("2.10.")


def varlen_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    window: int | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`varlen_attention` in plain PyTorch, padded: the oracle of the tests and the fallback on any device."""
    lengths = cu_seqlens.diff().tolist()
    used = sum(lengths)
    if used == 0:
        return torch.zeros_like(query)

    token = torch.arange(max(lengths), device=query.device)
    mask = token < cu_seqlens.diff()[:, None]
    packed_rows = query.shape[0]
    query, key, value = (
        rows.transpose(1, 2) for rows in unpack_reference([query, key, value], cu_seqlens, max(lengths))
    )
    if rotary is not None:
        query, key = _turned((query, key), token, rotary)
    # a sequence without tokens would attend to nothing, which softmax turns into NaN
    attendable = (mask | (token == 0))[:, None, None, :]
    if window is not None:
        # padding sees itself, because it may be too far from every token to see one
        far = (token[:, None] - token).abs()
        attendable = (attendable & (far <= window)) | (far == 0)
    with attention_of_reference():
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attendable, scale=scale)
    packed = attended.transpose(1, 2)[mask]
    return torch.cat([packed, packed.new_zeros((packed_rows - used, *packed.shape[1:]))])


def _places(cu_seqlens: Tensor, rows: int) -> Tensor:
    """[rows, 1], the place of each packed row in its sequence; those behind the last one have a place as well."""
    row = torch.arange(rows, device=cu_seqlens.device)
    sequence = torch.searchsorted(dense(cu_seqlens[1:]), row, right=True)
    return (row - cu_seqlens[sequence])[:, None]


def _turned(tensors: tuple[Tensor, ...], position: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Rows [..., head_size], each turned by its position, of a shape that fits them."""
    cosines, sines = (table[position.clamp(max=table.shape[0] - 1)] for table in rotary)
    turned = []
    for tensor in tensors:
        left, right = tensor.to(torch.promote_types(tensor.dtype, cosines.dtype)).chunk(2, dim=-1)
        halves = torch.cat([left * cosines - right * sines, right * cosines + left * sines], dim=-1)
        turned.append(halves.to(tensor.dtype))
    return tuple(turned)


library.define(
    "varlen_attention_(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, float scale, int? window, "
    "Tensor? cosines, Tensor? sines, Tensor(a!) out) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("fastkd_kernels::varlen_attention_", lib=library)
def _varlen_attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    cosines: Tensor | None,
    sines: Tensor | None,
    out: Tensor,
) -> None:
    return None


register_backends(
    "varlen_attention",
    cuda=None if find_spec("torch.nn.attention.varlen") else "this PyTorch has no torch.nn.attention.varlen",
    cpu=_extension.missing_kernel_reason("varlen_attention_", "CPU"),
    interpretable=False,
)

_varlen_attention_op: Any = torch.ops.fastkd_kernels.varlen_attention_.default


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    window: int | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention inside each of B packed sequences; every query sees the keys of its own sequence.

    Without a gradient on CPU. Float64, and on a GPU float32 and heads that FlashAttention does not take (their size no
    multiple of 8), run the padded reference.

    Args:
        query, key, value: [N, heads, head_size] of one dtype; the rows may be slices of a wider tensor.
        cu_seqlens: [B + 1] int32, sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]; the first is 0.
        max_seqlen: the longest sequence, or a bound on it.
        scale: of the scores; default 1 / sqrt(head_size).
        window: a query sees keys at most so many tokens away, on both sides: (window, window) as `window_size` of
            PyTorch's and FlashAttention's functions; None: all.
        rotary: cosines and sines [positions, head_size / 2] float32 (also float64 where the queries are), a row for
            each position up to `max_seqlen`, by which queries and keys are turned.

    Returns:
        [N, heads, head_size]; rows from cu_seqlens[B] on are zero (undefined on a GPU).

    Raises:
        ValueError: shapes that differ, `cu_seqlens` of another form, or, on CPU, that do not rise from 0 to at most N;
            a negative window; tables of another form.
        TypeError: dtypes that differ, or `cu_seqlens` that is not int32.
    """
    _check(query, key, value, cu_seqlens)
    if window is not None and window < 0:
        raise ValueError(f"window: got {window}, expected at least 0, or None for all tokens")
    if rotary is not None:
        _check_rotary(rotary, query, max_seqlen)
    if window is not None and window >= max_seqlen - 1:
        window = None
    usual = max(query.shape[-1], 1) ** -0.5
    scale = usual if scale is None else scale
    backend = resolve("varlen_attention", query.device)
    takes_window = window is None or _CUDA_HAS_WINDOWS
    if backend == "cuda" and query.dtype in _CUDA_DTYPES and query.shape[-1] % 8 == 0 and takes_window:
        # not above, because it brings all of torch.compile along
        from torch.nn.attention.varlen import varlen_attn

        if max_seqlen == 0 or cu_seqlens.shape[0] == 1:
            return torch.zeros_like(query)  # a grid of no blocks cannot be launched
        cu_seqlens = dense(cu_seqlens)
        if rotary is not None:
            query, key = _turned((query, key), _places(cu_seqlens, query.shape[0]), rotary)
        # torch 2.10 knows the usual scale only
        query = query if scale == usual else query * (scale / usual)
        query, key, value = plain(query), plain(key), plain(value)
        options: dict[str, Any] = {} if window is None else {"window_size": (window, window)}
        attended: Any = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
        return attended
    tables = rotary or (None, None)
    if backend != "cpu" or query.dtype not in _CPU_DTYPES or wants_gradient((query, key, value, *tables)):
        if values_are_free(cu_seqlens):
            check_rising(cu_seqlens, query.shape[0], f"N={query.shape[0]}")
        return varlen_attention_reference(query, key, value, cu_seqlens, max_seqlen, scale, window, rotary)
    out = torch.empty(query.shape, dtype=query.dtype)
    cosines, sines = (None if table is None else dense(table) for table in tables)
    rows = map(_dense_rows, (query, key, value))
    try:
        _varlen_attention_op(*rows, dense(cu_seqlens), scale, window, cosines, sines, out)
    except RuntimeError as error:
        raise _extension.as_typed_error(error) from None
    return out


def _dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where each token's heads lie behind one another, else a copy."""
    tensor = plain(tensor)
    is_dense = tensor.stride(2) == 1 and tensor.stride(1) == tensor.shape[2]
    return tensor if is_dense else tensor.contiguous()


def _check_rotary(rotary: tuple[Tensor, Tensor], query: Tensor, max_seqlen: int) -> None:
    head_size = query.shape[-1]
    for name, table in zip(("rotary[0]", "rotary[1]"), rotary, strict=True):
        if table.dtype not in (torch.float32, query.dtype if query.dtype == torch.float64 else torch.float32):
            raise TypeError(f"{name}: got {table.dtype}, expected float32")
        is_right = table.dim() == 2 and table.shape[0] >= max_seqlen and 2 * table.shape[1] == head_size
        if not is_right or table.shape != rotary[0].shape or table.device != query.device:
            raise ValueError(
                f"{name}: got shape {tuple(table.shape)} on {table.device}, expected [max_seqlen={max_seqlen} or more, "
                f"head_size / 2 = {head_size / 2:g}] on {query.device}"
            )


def _check(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> None:
    if query.dim() != 3:
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected [N, heads, head_size]")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected that of query, {tuple(query.shape)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise TypeError(
                f"{name}: got {tensor.dtype} on {tensor.device}, expected that of query, {query.dtype} on "
                f"{query.device}"
            )
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: got dtype {cu_seqlens.dtype}, expected int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.device != query.device:
        raise ValueError(
            f"cu_seqlens: got shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}, expected [B + 1] on "
            f"{query.device}"
        )
