"""Triton, or the one sentence that says why it is not there."""

from __future__ import annotations

import os
from typing import Any

import torch

# A torch without a GPU launches no kernel, so importing Triton, a tenth of torch's own time, would be in vain. Whoever
# sets this means Triton: 1 interprets its kernels, 0 compiles them.
_asked_for = os.environ.get("TRITON_INTERPRET")


def _import() -> tuple[Any, Any, str | None]:
    if _asked_for is None and torch.version.cuda is None and torch.version.hip is None:
        reason = f"torch {torch.__version__} has no CUDA; TRITON_INTERPRET=1 runs Triton's kernels on a CPU, slowly"
        return None, None, reason
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        return None, None, f"Triton is not installed ({error}); install it with: pip install triton"
    return triton, tl, None


triton, tl, missing_reason = _import()
available = missing_reason is None

# Triton decides when a kernel is defined whether it will be interpreted, so this is read once, at import.
interpreting = available and _asked_for not in (None, "", "0", "false", "False")


def _leave(kernel: Any = None, **options: Any) -> Any:
    """In the place of `triton.jit`: kernels are defined as the functions they are, and never run."""
    return _leave if kernel is None else kernel


jit: Any = triton.jit if available else _leave

__all__ = ["available", "interpreting", "jit", "missing_reason", "tl", "triton"]
