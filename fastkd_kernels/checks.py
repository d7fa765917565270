"""Checks of arguments that ops share."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError for an argument that is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError for a tensor that is not on the device of the other."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: got device {tensor.device}, expected that of {other_name}, {other.device}")
