"""Compact: gather the surviving rows of several tensors.

    out_t[k] = tensor_t[survivors[k]]    for k < count, for every tensor t of the call

`count` stays on the device: the output keeps room for all of `survivors`, and rows from `count` on are not written. A
`count` outside 0..K is taken as the nearer of the two.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd_kernels import _extension, _triton
from fastkd_kernels._arguments import (
    check_written,
    dense,
    mark_written,
    plain,
    refuse_gradient,
    select_rows,
    values_are_free,
)
from fastkd_kernels._backend import register_backends, resolve
from fastkd_kernels._derivatives import transforming, wants_gradient
from fastkd_kernels._launch import Launcher, next_power_of_2
from fastkd_kernels._library import library
from fastkd_kernels._triton import jit, tl, triton

# On a GPU a row number outside the tensors leaves its output row unwritten; in debug mode it raises, and waits to know.
_DEBUG = os.environ.get("FASTKD_DEBUG") == "1"


def compact_reference(
    tensors: Sequence[Tensor],
    survivors: Tensor,
    count: Tensor | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """`compact` in plain PyTorch: the oracle of the tests and the fallback on any device."""
    gathered = [_gather_reference(tensor, survivors, count) for tensor in tensors]
    if out is None:
        return gathered
    return [target[: survivors.shape[0]].copy_(rows) for target, rows in zip(out, gathered, strict=True)]


def _gather_reference(tensor: Tensor, survivors: Tensor, count: Tensor | None) -> Tensor:
    capacity = survivors.shape[0]
    if count is None:
        return select_rows(tensor, survivors)
    if tensor.shape[0] == 0:
        return tensor.new_zeros((capacity, *tensor.shape[1:]))
    # the tail of survivors is undefined: row 0 exists, and zeros keep the tail out of every gradient
    live = torch.arange(capacity, device=survivors.device) < count
    rows = select_rows(tensor, torch.where(live, survivors, 0))
    return torch.where(live.view(capacity, *[1] * (tensor.dim() - 1)), rows, rows.new_zeros(()))


@jit
def _compact_kernel(
    source_ptr,  # [rows, row_words], rows source_stride words apart
    target_ptr,  # [capacity, row_words], contiguous
    survivors_ptr,  # [capacity]
    count_ptr,  # [1], where HAS_COUNT
    rows,
    row_words,
    source_stride,
    HAS_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    live = position + 1
    if HAS_COUNT:
        live = tl.load(count_ptr).to(tl.int64)
    row = tl.load(survivors_ptr + position).to(tl.int64)
    inside = (position < live) & (row >= 0) & (row < rows)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = word < tl.where(inside, row_words, 0)
    words = tl.load(source_ptr + row * source_stride + word, mask=mask)
    tl.store(target_ptr + position * row_words + word, words, mask=mask)


_launch_compact = Launcher(_compact_kernel)


@dataclass(frozen=True)
class CompactConfig:
    """How the CUDA kernel is launched.

    Attributes:
        threads: threads of a block, a power of two from 32 to 1024.
        bulk: on sm_90 and later, move 16-byte aligned rows by `cp.async.bulk` through shared memory instead of by
            16-byte vector accesses; ignored on older GPUs.
    """

    threads: int = 256
    bulk: bool = False

    def __post_init__(self) -> None:
        if self.threads not in (32, 64, 128, 256, 512, 1024):
            raise ValueError(f"threads: got {self.threads}, expected a power of two from 32 to 1024")


_DEFAULT_CONFIG = CompactConfig()

_LAUNCH_ARGUMENTS = f"int threads={_DEFAULT_CONFIG.threads}, bool bulk=False"
_TAGS = (torch.Tag.pt2_compliant_tag,)

library.define(
    f"compact(Tensor[] tensors, Tensor survivors, Tensor? count=None, {_LAUNCH_ARGUMENTS}) -> Tensor[]", tags=_TAGS
)
library.define(
    f"compact_out(Tensor[] tensors, Tensor survivors, Tensor? count, Tensor(a!)[] out, {_LAUNCH_ARGUMENTS}) -> ()",
    tags=_TAGS,
)


@torch.library.register_fake("fastkd_kernels::compact", lib=library)
def _compact_fake(
    tensors: Sequence[Tensor], survivors: Tensor, count: Tensor | None = None, threads: int = 256, bulk: bool = False
) -> list[Tensor]:
    _check(tensors, survivors, count, None)
    return [_allocate(tensor, survivors.shape[0]) for tensor in tensors]


@torch.library.register_fake("fastkd_kernels::compact_out", lib=library)
def _compact_out_fake(
    tensors: Sequence[Tensor],
    survivors: Tensor,
    count: Tensor | None,
    out: Sequence[Tensor],
    threads: int = 256,
    bulk: bool = False,
) -> None:
    _check(tensors, survivors, count, out)


def _allocate(tensor: Tensor, rows: int) -> Tensor:
    return torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)


def _compact_triton(
    tensors: Sequence[Tensor], survivors: Tensor, count: Tensor | None = None, threads: int = 256, bulk: bool = False
) -> list[Tensor]:
    """`compact` where the extension has no CUDA kernels."""
    _check(tensors, survivors, count, None)
    out = [_allocate(tensor, survivors.shape[0]) for tensor in tensors]
    _compact_out_triton(tensors, survivors, count, out)
    return out


def _compact_out_triton(
    tensors: Sequence[Tensor],
    survivors: Tensor,
    count: Tensor | None,
    out: Sequence[Tensor],
    threads: int = 256,
    bulk: bool = False,
) -> None:
    """`compact_out` by one Triton launch a tensor; how it is launched follows from the width of the rows."""
    _check(tensors, survivors, count, out)
    capacity = survivors.shape[0]
    survivors, count = dense(survivors), None if count is None else plain(count)
    for tensor, target in zip(tensors, out, strict=True):
        if target.numel() == 0 or capacity == 0 or tensor.shape[0] == 0:
            continue
        source, words = _as_words(tensor), _as_words(target)
        row_words = source.shape[1]
        block = min(next_power_of_2(row_words), 4096)
        _launch_compact(
            (capacity, triton.cdiv(row_words, block)),
            source,
            words,
            survivors,
            survivors if count is None else count,
            source.shape[0],
            row_words,
            source.stride(0),
            HAS_COUNT=count is not None,
            BLOCK=block,
        )


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


def _as_words(tensor: Tensor) -> Tensor:
    """The same memory as [rows, words] integers, so that one kernel serves every dtype; copies rows that have gaps."""
    tensor = plain(tensor)
    rows = tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows.view(_WORDS[tensor.element_size()])


def _why_not_on_cuda() -> str | None:
    by_extension = _extension.missing_kernel_reason("compact", "CUDA")
    if by_extension is None or _triton.available:
        return None
    return f"{by_extension}, and {_triton.missing_reason}"


if _triton.available and not _extension.has_kernel("compact", "CUDA"):
    library.impl("compact", _compact_triton, "CUDA")
    library.impl("compact_out", _compact_out_triton, "CUDA")

register_backends(
    "compact",
    cuda=_why_not_on_cuda(),
    cpu=_extension.missing_kernel_reason("compact", "CPU"),
    interpretable=True,
)

_compact_op = torch.ops.fastkd_kernels.compact.default
_compact_out_op = torch.ops.fastkd_kernels.compact_out.default


def _gather(
    tensors: Sequence[Tensor],
    survivors: Tensor,
    count: Tensor | None,
    out: Sequence[Tensor] | None,
    config: CompactConfig | None,
) -> list[Tensor]:
    """`compact` without its gradient, on the backend that `resolve` names.

    The kernels check their input themselves, cheaper than Python could; `_explain` says what was wrong.
    """
    backend = resolve("compact", survivors.device)
    # tensors on the CPU reach the cuda backend only where Triton interprets its kernels
    interpreted = backend == "cuda" and not survivors.is_cuda
    if backend == "reference" or interpreted or _DEBUG:
        _check(tensors, survivors, count, out)
        if values_are_free(survivors) or (_DEBUG and not torch.compiler.is_compiling()):
            _check_rows(survivors, count, tensors[0].shape[0])
    if backend == "reference":
        return compact_reference(tensors, survivors, count, out)
    launch = () if config is None else (config.threads, config.bulk)
    try:
        if out is None:
            return (_compact_triton if interpreted else _compact_op)(tensors, survivors, count, *launch)
        (_compact_out_triton if interpreted else _compact_out_op)(tensors, survivors, count, out, *launch)
    except RuntimeError as error:
        raise _explain(error, tensors, survivors, count, out) from None
    mark_written(out)
    capacity = survivors.shape[0]
    return [target if target.shape[0] == capacity else target[:capacity] for target in out]


def _explain(
    error: RuntimeError,
    tensors: Sequence[Tensor],
    survivors: Tensor,
    count: Tensor | None,
    out: Sequence[Tensor] | None,
) -> Exception:
    """What is wrong with the arguments, in the words of Python's own checks where those find it."""
    _check(tensors, survivors, count, out)
    return _extension.as_typed_error(error)


class _Compact(torch.autograd.Function):
    """Rows that were gathered twice add up their gradients; rows from `count` on have none."""

    @staticmethod
    def forward(
        ctx: Any, survivors: Tensor, count: Tensor | None, config: CompactConfig | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(survivors, count)
        ctx.rows = tensors[0].shape[0]
        gathered = _gather(tensors, survivors, count, None, config)
        ctx.mark_non_differentiable(*[g for g in gathered if not (g.is_floating_point() or g.is_complex())])
        return tuple(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        survivors, count = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        scattered = [
            _scatter_add(gradient, survivors, count, ctx.rows) if need and gradient is not None else None
            for gradient, need in zip(gradients, needed, strict=True)
        ]
        return None, None, None, *scattered


def _scatter_add(gradient: Tensor, survivors: Tensor, count: Tensor | None, rows: int) -> Tensor:
    total = gradient.new_zeros((rows, *gradient.shape[1:]))
    if rows == 0:
        return total
    if count is not None:
        live = torch.arange(survivors.shape[0], device=survivors.device) < count
        survivors = torch.where(live, survivors, 0)
        gradient = torch.where(live.view(-1, *[1] * (gradient.dim() - 1)), gradient, gradient.new_zeros(()))
    return total.index_add(0, survivors, gradient)


def compact(
    tensors: Sequence[Tensor],
    survivors: Tensor,
    count: Tensor | None = None,
    out: Sequence[Tensor] | None = None,
    *,
    config: CompactConfig | None = None,
) -> list[Tensor]:
    """Gather the rows `survivors[:count]` of every tensor, in one launch on a GPU.

    Differentiable in every floating-point tensor, once more in its gradient too.

    Args:
        tensors: each [B, ...] of any dtype and with any strides; all on one device. On a GPU a tensor whose rows are
            not dense in themselves costs one more launch.
        survivors: [K] int32 or int64 row numbers; with `count`, only the first `count` are read.
        count: [1] int32 on the device of the tensors, as `exit_gate` returns it; default: all K.
        out: one contiguous tensor a tensor, of its dtype and trailing shape, with at least K rows, to be written
            instead of new memory; must not overlap the inputs, nor be used where a gradient is wanted.
        config: the launch on a GPU; the default is what suits most sizes.

    Returns:
        One [K, ...] tensor a tensor (views of `out` where given); rows from `count` on are undefined.

    Raises:
        ValueError: tensors of different first dimensions or devices, a wrong `out`.
        TypeError: survivors that are not int32 or int64, a count that is not int32.
        IndexError: on CPU, and with FASTKD_DEBUG=1 on a GPU, a row number outside 0..B-1; nothing was written then.
            A compiled graph raises it as RuntimeError.
    """
    if not tensors:
        return []
    if out is not None:
        refuse_gradient("out", [*out, *tensors])
    elif wants_gradient(tensors) and not transforming():
        return list(_Compact.apply(survivors, count, config, *tensors))
    return _gather(tensors, survivors, count, out, config)


def _check(tensors: Sequence[Tensor], survivors: Tensor, count: Tensor | None, out: Sequence[Tensor] | None) -> None:
    if survivors.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"survivors: got dtype {survivors.dtype}, expected int32 or int64")
    if survivors.dim() != 1:
        raise ValueError(f"survivors: got shape {tuple(survivors.shape)}, expected [K]")
    if count is not None:
        _check_count(count, survivors.device)
    for number, tensor in enumerate(tensors):
        if tensor.dim() == 0 or tensor.shape[0] != tensors[0].shape[0]:
            raise ValueError(
                f"tensors[{number}]: got shape {tuple(tensor.shape)}, expected the first dimension of tensors[0], "
                f"whose shape is {tuple(tensors[0].shape)}"
            )
        if tensor.device != survivors.device:
            raise ValueError(
                f"tensors[{number}]: got device {tensor.device}, expected that of survivors, {survivors.device}"
            )
    if out is not None:
        _check_out(tensors, survivors.shape[0], out)
        check_written(
            {f"out[{number}]": target for number, target in enumerate(out)},
            {
                **{f"tensors[{number}]": tensor for number, tensor in enumerate(tensors)},
                "survivors": survivors,
                "count": count,
            },
        )


def _check_count(count: Tensor, device: torch.device) -> None:
    if count.dtype != torch.int32:
        raise TypeError(f"count: got dtype {count.dtype}, expected int32")
    if count.numel() != 1 or count.device != device:
        raise ValueError(
            f"count: got shape {tuple(count.shape)} on {count.device}, expected [1] on {device}, where survivors is"
        )


def _check_out(tensors: Sequence[Tensor], capacity: int, out: Sequence[Tensor]) -> None:
    if len(out) != len(tensors):
        raise ValueError(f"out: got {len(out)} tensors, expected one for each of the {len(tensors)} in tensors")
    for number, (target, tensor) in enumerate(zip(out, tensors, strict=True)):
        expected = (capacity, *tensor.shape[1:])
        fits = target.dim() == tensor.dim() and target.shape[0] >= capacity and target.shape[1:] == tensor.shape[1:]
        if not fits:
            raise ValueError(f"out[{number}]: got shape {tuple(target.shape)}, expected {expected} or more rows")
        if target.dtype != tensor.dtype or target.device != tensor.device:
            raise ValueError(
                f"out[{number}]: got {target.dtype} on {target.device}, expected that of tensors[{number}], "
                f"{tensor.dtype} on {tensor.device}"
            )
        if not target.is_contiguous():
            raise ValueError(f"out[{number}]: got strides {target.stride()}, expected a contiguous tensor")


def _check_rows(survivors: Tensor, count: Tensor | None, rows: int) -> None:
    live = survivors if count is None else survivors[: max(int(count), 0)]
    wrong = ((live < 0) | (live >= rows)).nonzero()
    if wrong.numel():
        position = int(wrong[0])
        raise IndexError(f"survivors[{position}]: got row {int(live[position])}, expected 0 to {rows - 1}")
