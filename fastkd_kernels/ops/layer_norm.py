"""Layer normalisation of rows that are sums, in one pass, for the two places where an encoder has them.

    y = (s - mean(s)) / sqrt(var(s) + eps) * weight [+ bias], over the last dimension, with

    add_layer_norm     s = x + residual                                     after attention and after the feed-forward
    embed_layer_norm   s_n = tables_0[indices_0[n]] + tables_1[...] + ...   word, position and segment embeddings

The sum and the statistics are float32 (float64 for float64). Nothing but y is written to memory, and s where the next
layer adds to it: where norms come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd_kernels import _extension, _triton
from fastkd_kernels._arguments import check_written, dense, mark_written, plain, refuse_gradient, values_are_free
from fastkd_kernels._backend import register_backends, resolve
from fastkd_kernels._derivatives import wants_gradient
from fastkd_kernels._launch import Launcher, next_power_of_2
from fastkd_kernels._library import library
from fastkd_kernels._triton import jit, tl
from fastkd_kernels.checks import check_same_device

_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, total: Tensor | None = None
) -> Tensor:
    """`add_layer_norm` in plain PyTorch: the oracle of the tests and the fallback on any device."""
    added = _wide(x) if residual is None else _wide(x) + _wide(residual)
    normalised = _normalised(added, weight, bias, eps)
    if total is not None:
        total.copy_(added)
    return normalised


def embed_layer_norm_reference(
    tables: Sequence[Tensor], indices: Sequence[Tensor], weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """`embed_layer_norm` in plain PyTorch: the oracle of the tests and the fallback on any device."""
    rows = [_wide(F.embedding(index, table)) for table, index in zip(tables, indices, strict=True)]
    return _normalised(torch.stack(rows).sum(0), weight, bias, eps)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _normalised(total: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    wide_bias = None if bias is None else _wide(bias)
    return F.layer_norm(total, total.shape[-1:], _wide(weight), wide_bias, eps).to(weight.dtype)


@jit
def _normalise_and_store(total, mask, width, weight_ptr, bias_ptr, out_ptr, column, eps, HAS_BIAS: tl.constexpr):
    mean = tl.sum(total, 0) / width
    deviation = tl.where(mask, total - mean, 0.0)
    # one root and one quotient a row, rounded: the approximate ones would cost every element three units
    scale = tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.sum(deviation * deviation, 0) / width + eps))
    weight = tl.load(weight_ptr + column, mask=mask).to(tl.float32)
    normalised = deviation * scale * weight
    if HAS_BIAS:
        normalised += tl.load(bias_ptr + column, mask=mask).to(tl.float32)
    tl.store(out_ptr + column, normalised, mask=mask)


@jit
def _add_layer_norm_kernel(
    x_ptr,  # [rows, width], rows x_stride apart
    residual_ptr,  # [rows, width], rows residual_stride apart, where HAS_RESIDUAL
    weight_ptr,  # [width]
    bias_ptr,  # [width], where HAS_BIAS
    out_ptr,  # [rows, width], rows out_stride apart
    total_ptr,  # [rows, width], rows total_stride apart, where HAS_TOTAL
    x_stride,
    residual_stride,
    out_stride,
    total_stride,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    total = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_TOTAL:
        tl.store(total_ptr + row * total_stride + column, total, mask=mask)
    _normalise_and_store(total, mask, width, weight_ptr, bias_ptr, out_ptr + row * out_stride, column, eps, HAS_BIAS)


@jit
def _embed_layer_norm_kernel(
    table0_ptr,  # [rows of the table, width], contiguous, as are the others
    table1_ptr,
    table2_ptr,  # where TABLES is 3
    index0_ptr,  # [rows] int64
    index1_ptr,
    index2_ptr,
    weight_ptr,  # [width]
    bias_ptr,  # [width], where HAS_BIAS
    out_ptr,  # [rows, width], rows out_stride apart
    out_stride,
    width,
    eps,
    TABLES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    total = tl.load(table0_ptr + tl.load(index0_ptr + row) * width + column, mask=mask, other=0.0).to(tl.float32)
    if TABLES > 1:
        total += tl.load(table1_ptr + tl.load(index1_ptr + row) * width + column, mask=mask, other=0.0).to(tl.float32)
    if TABLES > 2:
        total += tl.load(table2_ptr + tl.load(index2_ptr + row) * width + column, mask=mask, other=0.0).to(tl.float32)
    _normalise_and_store(total, mask, width, weight_ptr, bias_ptr, out_ptr + row * out_stride, column, eps, HAS_BIAS)


_launch_add_layer_norm = Launcher(_add_layer_norm_kernel)
_launch_embed_layer_norm = Launcher(_embed_layer_norm_kernel)


library.define(
    "add_layer_norm_(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, Tensor(a!) out, "
    "Tensor(b!)? total) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "embed_layer_norm_(Tensor[] tables, Tensor[] indices, Tensor weight, Tensor? bias, float eps, Tensor(a!) out) "
    "-> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("fastkd_kernels::add_layer_norm_", lib=library)
def _add_layer_norm_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    total: Tensor | None,
) -> None:
    return None


@torch.library.register_fake("fastkd_kernels::embed_layer_norm_", lib=library)
def _embed_layer_norm_fake(
    tables: Sequence[Tensor], indices: Sequence[Tensor], weight: Tensor, bias: Tensor | None, eps: float, out: Tensor
) -> None:
    return None


_MAX_TABLES = 3


def _add_layer_norm_triton(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    total: Tensor | None,
) -> None:
    rows, width = x.shape
    if rows == 0:
        return
    block = next_power_of_2(width)
    _launch_add_layer_norm(
        (rows,),
        x,
        x if residual is None else residual,
        weight,
        weight if bias is None else bias,
        out,
        out if total is None else total,
        x.stride(0),
        x.stride(0) if residual is None else residual.stride(0),
        out.stride(0),
        out.stride(0) if total is None else total.stride(0),
        width,
        eps,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        HAS_TOTAL=total is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )


def _embed_layer_norm_triton(
    tables: Sequence[Tensor], indices: Sequence[Tensor], weight: Tensor, bias: Tensor | None, eps: float, out: Tensor
) -> None:
    rows, width = out.shape
    if rows == 0:
        return
    # a kernel takes a fixed number of pointers: the missing ones are never read
    spare = _MAX_TABLES - len(tables)
    block = next_power_of_2(width)
    _launch_embed_layer_norm(
        (rows,),
        *[table.contiguous() for table in tables],
        *[tables[0]] * spare,
        *indices,
        *[indices[0]] * spare,
        weight,
        weight if bias is None else bias,
        out,
        out.stride(0),
        width,
        eps,
        TABLES=len(tables),
        HAS_BIAS=bias is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )


def _warps(block: int) -> int:
    """Warps for one row: about eight elements a thread."""
    return min(max(block // 256, 1), 16)


if _triton.available:
    library.impl("add_layer_norm_", _add_layer_norm_triton, "CUDA")
    library.impl("embed_layer_norm_", _embed_layer_norm_triton, "CUDA")

register_backends(
    "layer_norm",
    cuda=_triton.missing_reason,
    cpu=_extension.missing_kernel_reason("add_layer_norm_", "CPU"),
    interpretable=True,
)

_add_layer_norm_op: Any = torch.ops.fastkd_kernels.add_layer_norm_.default
_embed_layer_norm_op: Any = torch.ops.fastkd_kernels.embed_layer_norm_.default


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-12,
    out: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Layer normalisation of `x + residual`. Where a gradient is wanted, plain PyTorch runs.

    Args:
        x: [N, H], any strides (rows that are not dense are copied); float32 or bfloat16 run the kernels, other dtypes
            plain PyTorch.
        residual: [N, H] of the same dtype, or None.
        weight, bias: [H] of the same dtype; the bias may be None.
        eps: added to the variance.
        out: [N, H] of the same dtype with dense rows, to be written instead of new memory; may be `x` or `residual`,
            and overlaps nothing else. Not where a gradient is wanted.
        total: the same, to be written with the sum, which is what a layer whose norms come first adds to.

    Returns:
        [N, H]; `out` where given.

    Raises:
        ValueError: shapes or devices that differ, a wrong `out` or `total`.
        TypeError: dtypes that differ.
    """
    _check(weight, bias, x=x, residual=residual, out=out, total=total)
    written = {name: tensor for name, tensor in (("out", out), ("total", total)) if tensor is not None}
    if written:
        _check_written(written, {"x": x, "residual": residual, "weight": weight, "bias": bias}, (x, residual))
    backend = _backend(x, (x, residual, weight, bias))
    if backend == "reference":
        return _into(out, add_layer_norm_reference(x, residual, weight, bias, eps, total))
    x, residual = _dense_rows(x), None if residual is None else _dense_rows(residual)
    target = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    # on CPU tensors "cuda" is Triton's interpreter
    run = _add_layer_norm_triton if backend == "cuda" and not x.is_cuda else _add_layer_norm_op
    run(x, residual, dense(weight), None if bias is None else dense(bias), eps, target, total)
    mark_written(list(written.values()))
    return target


def embed_layer_norm(
    tables: Sequence[Tensor],
    indices: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-12,
    out: Tensor | None = None,
) -> Tensor:
    """Layer normalisation of a sum of rows gathered from tables. Where a gradient is wanted, plain PyTorch runs.

    Args:
        tables: one to three of [rows, H], one dtype.
        indices: for each table [N] int64; on a GPU out-of-range values are undefined.
        weight, bias: [H] of the same dtype; the bias may be None.
        eps: added to the variance.
        out: [N, H] of the same dtype with dense rows, to be written instead of new memory; overlaps no input. Not where
            a gradient is wanted.

    Returns:
        [N, H]; `out` where given.

    Raises:
        ValueError: shapes or devices that differ, not one index a table, a wrong `out`.
        TypeError: dtypes that differ.
        IndexError: on CPU, an index outside its table.
    """
    if not 1 <= len(tables) <= _MAX_TABLES or len(indices) != len(tables):
        raise ValueError(
            f"tables: got {len(tables)} and {len(indices)} indices, expected 1 to {_MAX_TABLES} tables and one tensor "
            "of indices for each"
        )
    read: dict[str, Tensor | None] = {"weight": weight, "bias": bias}
    for number, (table, index) in enumerate(zip(tables, indices, strict=True)):
        read[f"tables[{number}]"], read[f"indices[{number}]"] = table, index
        _check(weight, bias, **{f"tables[{number}]": table})
        check_same_device(f"indices[{number}]", index, "weight", weight)
        if index.dtype != torch.int64 or index.shape != indices[0].shape or index.dim() != 1:
            raise ValueError(
                f"indices[{number}]: got {index.dtype} {tuple(index.shape)}, expected int64 [N], like the others"
            )
    shape = (indices[0].shape[0], weight.shape[0])
    if out is not None:
        _check(weight, bias, out=out)
        if out.shape != shape:
            raise ValueError(f"out: got shape {tuple(out.shape)}, expected {list(shape)}")
        _check_written({"out": out}, read)
    backend = _backend(weight, [*tables, weight, bias])
    # the C++ kernel looks at the values itself
    if backend != "cpu" and values_are_free(weight):
        _check_indices(tables, indices)
    if backend == "reference":
        return _into(out, embed_layer_norm_reference(tables, indices, weight, bias, eps))
    tables = [_dense_rows(table) for table in tables]
    indices = [dense(index) for index in indices]
    target = torch.empty(shape, dtype=weight.dtype, device=weight.device) if out is None else out
    run = _embed_layer_norm_triton if backend == "cuda" and not weight.is_cuda else _embed_layer_norm_op
    try:
        run(tables, indices, dense(weight), None if bias is None else dense(bias), eps, target)
    except RuntimeError as error:
        raise _extension.as_typed_error(error) from None
    if out is not None:
        mark_written([out])
    return target


def _check_indices(tables: Sequence[Tensor], indices: Sequence[Tensor]) -> None:
    for number, (table, index) in enumerate(zip(tables, indices, strict=True)):
        rows = table.shape[0]
        wrong = ((index < 0) | (index >= rows)).nonzero()
        if wrong.numel():
            position = int(wrong[0])
            raise IndexError(f"indices[{number}][{position}]: got {int(index[position])}, expected 0 to {rows - 1}")


def _dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where each row's values are neighbours in memory, else a copy."""
    tensor = plain(tensor)
    return tensor if tensor.stride(1) == 1 or tensor.numel() <= 1 else tensor.contiguous()


def _check_written(
    written: dict[str, Tensor], read: dict[str, Tensor | None], in_place: Sequence[Tensor | None] = ()
) -> None:
    for name, tensor in written.items():
        if tensor.stride(1) != 1 and tensor.numel() > 1:
            raise ValueError(f"{name}: got strides {tensor.stride()}, expected dense rows")
        refuse_gradient(name, [tensor, *read.values()])
    check_written(written, read, in_place)


def _backend(tensor: Tensor, tensors: Sequence[Tensor | None]) -> str:
    if wants_gradient(tensors):
        return "reference"
    backend = resolve("layer_norm", tensor.device)
    return backend if tensor.dtype in _KERNEL_DTYPES else "reference"


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)


def _check(weight: Tensor, bias: Tensor | None, **tensors: Tensor | None) -> None:
    width = weight.shape[-1] if weight.dim() else 0
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (width,):
            raise ValueError(f"{name}: got shape {tuple(vector.shape)}, expected [{width}]")
    rows = None
    for name, tensor in (("bias", None if bias is None else bias[None]), *tensors.items()):
        if tensor is None:
            continue
        if tensor.dtype != weight.dtype or tensor.device != weight.device:
            raise TypeError(
                f"{name}: got {tensor.dtype} on {tensor.device}, expected that of weight, {weight.dtype} on "
                f"{weight.device}"
            )
        if tensor.dim() != 2 or tensor.shape[1] != width:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected [N, {width}]")
        if name == "bias":
            continue
        if rows is not None and tensor.shape[0] != rows:
            raise ValueError(f"{name}: got {tensor.shape[0]} rows, expected {rows}")
        rows = tensor.shape[0]


class PreparedEmbedding:
    """`embed_layer_norm` of the same tables again and again on a CPU, checked once; without a gradient.

    Args:
        tables: one to three of [rows, H], one dtype.
        weight, bias, eps: as in `embed_layer_norm`.

    Raises:
        ValueError, TypeError: as `embed_layer_norm`.
    """

    def __init__(self, tables: Sequence[Tensor], weight: Tensor, bias: Tensor | None, eps: float) -> None:
        nothing = torch.empty(0, dtype=torch.int64)
        with torch.no_grad():
            embed_layer_norm(tables, [nothing] * len(tables), weight, bias, eps)
        self.tables = [_dense_rows(table) for table in tables]
        """As the kernel reads them."""
        self.norm = dense(weight), None if bias is None else dense(bias), eps
        """Weight, bias and epsilon."""

    def __call__(self, indices: Sequence[Tensor], rows: int | None = None) -> Tensor:
        """[R, H] of N rows, and what happens to be in memory behind them.

        Args:
            indices: for each table [N] int64, contiguous.
            rows: R, at least N; default N.

        Raises:
            IndexError: an index outside its table.
        """
        table, used = self.tables[0], indices[0].shape[0]
        room = table.new_empty(used if rows is None else rows, table.shape[1])
        target = room if rows in (None, used) else room[:used]
        try:
            _embed_layer_norm_op(self.tables, indices, *self.norm, target)
        except RuntimeError as error:
            raise _extension.as_typed_error(error) from None
        return room
