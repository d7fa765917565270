"""Triton, or the one sentence that says why it is not there."""

from __future__ import annotations

import os
from typing import Any

missing_reason: str | None

try:
    import triton
    import triton.language as tl

    missing_reason = None
except ImportError as error:
    triton = None  # type: ignore[assignment]
    tl = None  # type: ignore[assignment]
    missing_reason = f"Triton is not installed ({error}); install it with: pip install triton"

available = missing_reason is None

# Triton decides when a kernel is defined whether it will be interpreted, so this is read once, at import.
interpreting = available and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "False")


def _leave(kernel: Any = None, **options: Any) -> Any:
    """In the place of `triton.jit`: kernels are defined as the functions they are, and never run."""
    return _leave if kernel is None else kernel


jit: Any = triton.jit if available else _leave

__all__ = ["available", "interpreting", "jit", "missing_reason", "tl", "triton"]
