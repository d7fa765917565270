"""The compiled extension, or the one sentence that says why it is not there.

Its CUDA kernels are a library of their own: where that cannot be loaded, the CPU kernels still are.
"""

from __future__ import annotations

import re
from types import ModuleType

import torch

extension: ModuleType | None
missing_reason: str | None
missing_cuda_reason: str | None
"""Why there are no CUDA kernels of the extension, although it was built with them; else None."""

INTERFACE = 5
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
    lacking = [name for name in _BINDINGS if not hasattr(loaded, name)]
    problem = _version_problem(loaded) or (f"lacks {', '.join(lacking)}" if lacking else None)
    if problem is None:
        return loaded, None
    return None, f"the compiled extension fastkd_kernels._C belongs to another version: it {problem}; {_REBUILD}"


def _version_problem(loaded: ModuleType) -> str | None:
    found = getattr(loaded, "interface", 1)
    return None if found == INTERFACE else f"has interface {found}, expected {INTERFACE}"


def _load_cuda(loaded: ModuleType | None) -> str | None:
    """Load the CUDA kernels that were built with `loaded`; returns why they cannot be, else None."""
    if loaded is None or not loaded.cuda_toolkit:
        return None
    problem = _cuda_problem(loaded.cuda_toolkit)
    if problem is None:
        return None
    return (
        f"the CUDA kernels of the compiled extension, built for CUDA {loaded.cuda_toolkit}, are left out: {problem}; "
        "its CPU kernels are in use"
    )


def _cuda_problem(toolkit: str) -> str | None:
    """A library of another major version may be there to be loaded, and would be a second runtime beside torch's."""
    major = toolkit.split(".")[0]
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if torch.version.cuda.split(".")[0] != major:
        return (
            f"torch {torch.__version__} has CUDA {torch.version.cuda}; install a torch with CUDA {major}, or "
            f"{_REBUILD} where a toolkit of CUDA {torch.version.cuda.split('.')[0]} is found"
        )
    try:
        from fastkd_kernels import _C_cuda as loaded  # type: ignore[attr-defined]
    except ImportError as error:
        return f"fastkd_kernels._C_cuda could not be loaded ({error}); {_REBUILD}"
    problem = _version_problem(loaded)
    return None if problem is None else f"fastkd_kernels._C_cuda {problem}; {_REBUILD}"


extension, missing_reason = _load()
missing_cuda_reason = _load_cuda(extension)

tensor_exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
"""With which the extension reads tensors without the dispatcher, where this torch offers it."""


def has_kernel(op: str, dispatch_key: str) -> bool:
    """Whether the extension registered `fastkd_kernels::op` for `dispatch_key` ("CPU" or "CUDA")."""
    is_left_out = extension is None or (dispatch_key == "CUDA" and missing_cuda_reason is not None)
    return not is_left_out and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastkd_kernels::{op}", dispatch_key)


def missing_kernel_reason(op: str, dispatch_key: str) -> str | None:
    """Why the extension cannot run `fastkd_kernels::op` for `dispatch_key`, or None where it can."""
    if missing_reason is not None:
        return missing_reason
    if has_kernel(op, dispatch_key):
        return None
    if dispatch_key == "CUDA" and missing_cuda_reason is not None:
        return missing_cuda_reason
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
