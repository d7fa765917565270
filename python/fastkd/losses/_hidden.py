"""What the losses on hidden states share: their checks, their precision and their reductions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

REDUCTIONS = ("mean", "batchmean", "sum", "none")


def comparable(
    student_hidden: Tensor, teacher_hidden: Tensor, projection: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """Both in float32 (float64 where one of them is), the student's projected.

    Raises:
        ValueError: not [L, B, H], batches or widths that differ, or a teacher that requires grad.
    """
    for name, hidden in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
        if hidden.dim() != 3:
            raise ValueError(f"{name}: got shape {tuple(hidden.shape)}, expected [layers, B, H]")
    check_no_gradient("teacher_hidden", teacher_hidden)
    if student_hidden.shape[1] != teacher_hidden.shape[1]:
        raise ValueError(
            f"teacher_hidden: got {teacher_hidden.shape[1]} samples, expected {student_hidden.shape[1]} as in "
            "student_hidden"
        )
    if projection is not None:
        student_hidden = projection(student_hidden)
    check_same_width(student_hidden, teacher_hidden)
    student, teacher = widen(student_hidden, teacher_hidden)
    return student, teacher


def check_same_width(student_hidden: Tensor, teacher_hidden: Tensor) -> None:
    if student_hidden.shape[-1] != teacher_hidden.shape[-1]:
        raise ValueError(
            f"student_hidden: got width {student_hidden.shape[-1]}, expected the teacher's, "
            f"{teacher_hidden.shape[-1]}; give a projection such as "
            f"nn.Linear({student_hidden.shape[-1]}, {teacher_hidden.shape[-1]})"
        )


def check_no_gradient(name: str, teacher: Tensor) -> None:
    if teacher.requires_grad:
        raise ValueError(f"{name}: got a tensor that requires grad; run the teacher under torch.no_grad()")


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in float32, or in float64 where one of them is."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)


def squared_distance(student: Tensor, target: Tensor, reduction: str) -> Tensor:
    """|student - target|^2 of [L, B, H]: "mean" over L * B * H, "batchmean" over B, "sum", or "none", [L, B]."""
    squares = (student - target).square()
    if reduction == "none":
        return squares.sum(-1)
    if reduction == "mean":
        return squares.mean()
    total = squares.sum()
    return total if reduction == "sum" else total / max(student.shape[1], 1)
