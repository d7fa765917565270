"""The compiled extension, or the one sentence that says why it is not there."""

from __future__ import annotations

import re
from types import ModuleType

import torch

extension: ModuleType | None
missing_reason: str | None

INTERFACE = 4
"""Version of schemas and bindings, raised along with csrc/module.cpp: another extension would read other arguments."""

_BINDINGS = (
    "built_with_torch",
    "compiler",
    "cuda_architectures",
    "cuda_toolkit",
    "enable_eager_tensors",
    "enable_triton_launch",
    "exit_gate",
    "launch_triton",
    "module_stamp",
    "module_stamp_is_current",
    "new_triton_binaries",
    "pack_tokens",
    "packed_stage",
    "remember_triton",
)
_REBUILD = "rebuild it with: pip install --no-build-isolation ."


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from fastkd_kernels import _C as loaded  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"the compiled extension fastkd_kernels._C could not be loaded ({error}); {_REBUILD}"
    found = getattr(loaded, "interface", 1)
    lacking = [name for name in _BINDINGS if not hasattr(loaded, name)]
    if found == INTERFACE and not lacking:
        return loaded, None
    problem = f"has interface {found}, expected {INTERFACE}" if found != INTERFACE else f"lacks {', '.join(lacking)}"
    return None, f"the compiled extension fastkd_kernels._C belongs to another version: it {problem}; {_REBUILD}"


extension, missing_reason = _load()

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


def as_typed_error(error: RuntimeError) -> Exception:
    """What the extension meant by "function, file:line, message": it can only raise RuntimeError.

    A row number out of range becomes IndexError, another complaint about an argument ValueError; anything else stays.
    """
    message = re.sub(r"^\w+, [^\n]*?:\d+, ", "", str(error)).split("\n")[0]
    if message == str(error).split("\n")[0]:
        return error
    if re.match(r"(survivors|indices|row_ids)\[", message):
        return IndexError(message)
    return ValueError(message)
