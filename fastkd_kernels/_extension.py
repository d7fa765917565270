"""The compiled extension, or the one sentence that says why it is not there."""

from __future__ import annotations

from types import ModuleType

import torch

extension: ModuleType | None
missing_reason: str | None

try:
    from fastkd_kernels import _C as extension  # type: ignore[attr-defined, no-redef]

    missing_reason = None
except ImportError as error:
    extension = None
    missing_reason = (
        "the compiled extension fastkd_kernels._C could not be loaded "
        f"({error}); rebuild it with: pip install --no-build-isolation ."
    )


tensor_exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
"""With which the extension reads tensors without the dispatcher, where this torch offers it."""


def has_kernel(op: str, dispatch_key: str) -> bool:
    """Whether the extension registered `fastkd_kernels::op` for `dispatch_key` ("CPU" or "CUDA")."""
    return extension is not None and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"fastkd_kernels::{op}", dispatch_key
    )


def missing_kernel_reason(op: str, dispatch_key: str) -> str | None:
    """Why the extension cannot run `fastkd_kernels::op` for `dispatch_key`, or None where it can."""
    if missing_reason is not None:
        return missing_reason
    if has_kernel(op, dispatch_key):
        return None
    return (
        f"the compiled extension has no {dispatch_key} kernel of {op}; rebuild it"
        f"{' where nvcc is found' if dispatch_key == 'CUDA' else ''} with: pip install --no-build-isolation ."
    )
