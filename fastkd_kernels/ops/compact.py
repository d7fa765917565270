"""Compact: gather the surviving rows of several tensors.

    out_t[k] = tensor_t[survivors[k]]    for k < count, for every tensor t of the call

`count` stays on the device: the output keeps room for all of `survivors`, and rows from `count` on are not written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def compact_reference(
    tensors: Sequence[Tensor],
    survivors: Tensor,
    count: Tensor | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """`compact` in plain PyTorch: the oracle of the tests and the fallback on any device."""
    capacity = survivors.shape[0]
    rows = survivors.long()
    if count is not None:
        # the tail of survivors is undefined: point it at row 0, which exists wherever anything survives
        rows = torch.where(torch.arange(capacity, device=rows.device) < count, rows, 0)
        if tensors and tensors[0].shape[0] == 0:
            rows = rows[:0]
    gathered = [tensor.index_select(0, rows) for tensor in tensors]
    if out is None:
        return gathered
    views = [target[:capacity] for target in out]
    for view, value in zip(views, gathered, strict=True):
        view[: value.shape[0]].copy_(value)
    return views


def compact(
    tensors: Sequence[Tensor],
    survivors: Tensor,
    count: Tensor | None = None,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Gather the rows `survivors[:count]` of every tensor, in one launch on a GPU.

    Args:
        tensors: each [B, ...] of any dtype and with any strides between rows; all on one device.
        survivors: [K] int32 or int64 row numbers; with `count`, only the first `count` are read.
        count: [1] int32 on the device of the tensors, as `exit_gate` returns it; default: all K.
        out: one contiguous tensor a tensor, of its dtype and trailing shape, with at least K rows, to be written
            instead of new memory; must not overlap the inputs.

    Returns:
        One [K, ...] tensor a tensor (views of `out` where given); rows from `count` on are undefined.

    Raises:
        ValueError: tensors of different first dimensions or devices, a wrong `out`.
        TypeError: survivors that are not int32 or int64.
        IndexError: on CPU, a row number outside 0..B-1.
    """
    return compact_reference(tensors, survivors, count, out)
