"""What ops do with tensors of any kind before they choose a backend, so that every backend is given the same.

Kernels read bytes: a lazily negated or conjugated view is made real (`plain`), what an op writes must neither overlap
what it reads nor itself (`check_written`), and autograd is told of what was written (`mark_written`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastkd_kernels import _derivatives


def plain(tensor: Tensor) -> Tensor:
    """The tensor with its values in memory: a negative or conjugate view is only marked as one."""
    if torch.compiler.is_compiling() or not (tensor.is_neg() or tensor.is_conj()):
        return tensor
    return tensor.resolve_conj().resolve_neg()


def dense(tensor: Tensor) -> Tensor:
    """The tensor as its kernel reads it, element behind element; copied only where it is not."""
    return plain(tensor).contiguous()


def select_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """tensor[rows], of any dtype: `index_select` knows no vector of unsigned integers, but matrices of them."""
    return tensor.unsqueeze(-1).index_select(0, rows).squeeze(-1)


def values_are_free(tensor: Tensor) -> bool:
    """Whether looking at values costs no waiting for a GPU and no graph break, and is not hidden by a transform."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not _derivatives.transforming()


def check_rising(cu_seqlens: Tensor, rows: int, bound: str) -> None:
    """What the C++ kernels check for themselves; ValueError names `rows` as `bound` does.

    Args:
        cu_seqlens: [B + 1] int32.
        rows: of the tensors that it cuts.
        bound: as in "at most N=7".
    """
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last > rows or not bool((cu_seqlens.diff() >= 0).all()):
        raise ValueError(
            f"cu_seqlens: got values from {first} to {last}, expected them to rise from 0 to at most {bound}"
        )


def refuse_gradient(written: str, tensors: Sequence[Tensor | None]) -> None:
    """Raise ValueError where a gradient is wanted, which a written result would not have."""
    if _derivatives.wants_gradient(tensors):
        raise ValueError(
            f"{written}: cannot be written while a gradient is recorded; leave it out or use torch.no_grad()"
        )


def check_written(
    written: Mapping[str, Tensor], read: Mapping[str, Tensor | None], in_place: Sequence[Tensor | None] = ()
) -> None:
    """Check that tensors can be written while others are read.

    Args:
        written: by the names of the arguments.
        read: likewise; None where an argument was left out.
        in_place: tensors of `read` that may be written to, if it is exactly their memory.

    Raises:
        ValueError: one of `written` is a negative or conjugate view, holds an element twice or overlaps another tensor.
    """
    if torch.compiler.is_compiling():
        return
    others = [(name, tensor, _memory(tensor)) for name, tensor in read.items() if tensor is not None]
    for name, target in written.items():
        if target.is_neg() or target.is_conj():
            raise ValueError(
                f"{name}: got a negative or conjugate view, which cannot be written; pass its resolve_neg()"
            )
        if not target.is_contiguous() and _repeats_elements(target):
            raise ValueError(
                f"{name}: got strides {target.stride()} for shape {tuple(target.shape)}, which "
                "use the same memory twice; pass a tensor without overlaps"
            )
        start, stop = _memory(target)
        for other_name, other, (other_start, other_stop) in others:
            if start >= other_stop or other_start >= stop or _are_columns_apart(target, other, other_start - start):
                continue
            if not (_is_one_of(other, in_place) and _is_same_view(target, other)):
                raise ValueError(f"{name}: overlaps {other_name} in memory; pass a separate tensor")
        others.append((name, target, (start, stop)))


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that a kernel wrote into `tensors`, so that a graph which saved one refuses to use it."""
    if torch.compiler.is_compiling():
        return
    # tensors made in inference mode count no changes
    counted = [tensor for tensor in tensors if not tensor.is_inference()]
    if counted:
        torch.autograd.graph.increment_version(counted)


def _is_one_of(tensor: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    return any(tensor is other for other in tensors)


def _is_same_view(one: Tensor, other: Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last one; no bytes where there is no memory, as in a fake tensor."""
    if tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter):
        return 0, 0
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    return start, start + _extent(tensor.shape, tensor.stride()) * tensor.element_size()


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1


def _repeats_elements(tensor: Tensor) -> bool:
    """Whether two indices may be one element: a dimension does not step over all that the smaller ones span."""
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size == 1:
            continue
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _are_columns_apart(one: Tensor, other: Tensor, distance: int) -> bool:
    """Whether both are columns of one matrix, `distance` bytes apart, of which neither reaches into the other's."""
    if one.dim() < 2 or other.dim() < 2:
        return False
    step = one.stride(0) * one.element_size()
    width = _extent(one.shape[1:], one.stride()[1:]) * one.element_size()
    other_width = _extent(other.shape[1:], other.stride()[1:]) * other.element_size()
    if step == 0 or step != other.stride(0) * other.element_size():
        return False
    return width <= distance % step <= step - other_width
