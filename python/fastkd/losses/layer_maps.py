"""Which teacher layer a student layer learns from. Layers are numbered from 1; the last is the output layer."""

from __future__ import annotations

import random
from collections.abc import Sequence

LAYER_MAPS = ("skip", "last", "reverse", "random")


def inner_layer_map(
    layer_map: str | Sequence[int], student_layers: int, teacher_layers: int, seed: int = 0
) -> tuple[int, ...]:
    """The teacher layers of student layers 1..M-1 (the last learns from logits).

    Args:
        layer_map: "skip" g(j) = j N / M, rounded down (PKD-Skip, arXiv:1908.09355: 2, 4, 6, 8, 10 for 12 -> 6 layers);
            "last" g(j) = N - M + j (PKD-Last: 7 to 11); "reverse", skip from the top down, and "random", different
            layers below the last in any order, are controls (arXiv:2502.04499 finds that even those work); or the
            teacher layers themselves, one for each student layer below the last.
        student_layers: M.
        teacher_layers: N.
        seed: of "random".

    Raises:
        ValueError: an unknown name, too few teacher layers, a list of a wrong length, or a layer that does not exist.
    """
    inner = student_layers - 1
    if inner < 1:
        raise ValueError(
            f"student_layers: got {student_layers}, a loss on inner layers needs at least 2 (the last one learns from "
            "logits)"
        )
    if not isinstance(layer_map, str):
        return _explicit(tuple(layer_map), inner, teacher_layers)
    if layer_map not in LAYER_MAPS:
        raise ValueError(f"layer_map: got {layer_map!r}, expected one of {', '.join(LAYER_MAPS)}, or a list of layers")
    if teacher_layers < student_layers:
        raise ValueError(
            f"layer_map: {layer_map!r} maps {student_layers} student layers onto at least as many of the teacher, got "
            f"{teacher_layers}; give a list of layers"
        )
    if layer_map == "last":
        return tuple(teacher_layers - student_layers + j for j in range(1, student_layers))
    if layer_map == "random":
        return tuple(random.Random(seed).sample(range(1, teacher_layers), inner))
    skip = tuple(j * teacher_layers // student_layers for j in range(1, student_layers))
    return skip[::-1] if layer_map == "reverse" else skip


def _explicit(layers: tuple[int, ...], inner: int, teacher_layers: int) -> tuple[int, ...]:
    if len(layers) != inner:
        raise ValueError(
            f"layer_map: got {len(layers)} teacher layers, expected {inner}, one for each student layer below the last"
        )
    wrong = [layer for layer in layers if not 1 <= layer <= teacher_layers]
    if wrong:
        raise ValueError(f"layer_map: got teacher layer {wrong[0]}, expected 1 to {teacher_layers}")
    return layers


def rows_of(layers: Sequence[int]) -> list[int]:
    """Rows of a tensor [L, ...] that hold the layers with these numbers."""
    return [layer - 1 for layer in layers]
