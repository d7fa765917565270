"""Functions of the extension that Python calls without PyTorch's dispatcher, which costs more than what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastkd_kernels import _backend, _extension
from fastkd_kernels._derivatives import transforming

available = (
    _extension.extension is not None
    and _extension.tensor_exchange is not None
    and _extension.extension.enable_eager_tensors(_extension.tensor_exchange)
)
"""Whether this torch offers DLPack's C exchange interface, by which tensors reach them."""


def find(name: str) -> Callable[..., Any] | None:
    """The function of that name; None without the extension, or where tensors do not reach it."""
    return getattr(_extension.extension, name) if available else None


def is_unwatched() -> bool:
    """Whether no backend is forced and nothing records ops, so that skipping the dispatcher goes unseen."""
    return (
        _backend._forced.name is None
        and not torch.compiler.is_compiling()
        and not transforming()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
    )
