"""Which implementation of an op runs: chosen from the tensors' device, or forced by `backend(name)`.

`cuda` is the Triton kernel or the CUDA extension, `cpu` the C++ extension, `reference` plain PyTorch. A backend that
the caller asked for and that cannot run raises; only an automatic choice may fall back, and it says so once.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastkd_kernels import _derivatives, _triton
from fastkd_kernels.checks import check_choice

BACKENDS = ("cuda", "cpu", "reference")

Reason = str | None
"""None where a backend can run, else the sentence that says why not."""


@dataclass(frozen=True)
class OpBackends:
    """Why each backend of one op cannot run here, looked up at import: torch.compile cannot trace the question."""

    cuda: Reason
    cpu: Reason
    interpretable: bool  # a Triton kernel, which the interpreter can run on CPU tensors

    def reason(self, name: str) -> Reason:
        if name == "reference":
            return None
        return self.cuda if name == "cuda" else self.cpu


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


class _Forced(threading.local):
    name: str | None = None


_forced = _Forced()
_ops: dict[str, OpBackends] = {}
_warned: set[tuple[str, str]] = set()


def register_backends(op: str, *, cuda: Reason, cpu: Reason, interpretable: bool) -> None:
    """Declare why `op` cannot run on each backend, None where it can; every op file calls this once."""
    _ops[op] = OpBackends(cuda=cuda, cpu=cpu, interpretable=interpretable)


def missing_kernels(ops: Sequence[str], name: str) -> Reason:
    """Why one of `ops` cannot run on backend `name`, or will not because another one is forced; None where all do."""
    if _forced.name not in (None, name):
        return f"backend {_forced.name!r} was asked for"
    return next((reason for op in ops if (reason := _ops[op].reason(name)) is not None), None)


def registered_ops() -> dict[str, OpBackends]:
    return dict(_ops)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op of this thread on one backend.

    Args:
        name: "cuda", "cpu" or "reference".

    Raises:
        ValueError: `name` is none of these.
        BackendUnavailableError: from the op itself, where that backend cannot run.
    """
    check_choice("backend", name, BACKENDS)
    previous = _forced.name
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = previous


def resolve(op: str, device: torch.device) -> str:
    """The backend on which `op` runs for tensors on `device`.

    Raises:
        BackendUnavailableError: the forced backend cannot run on this device or in this installation.
    """
    forced = _forced.name
    automatic = device.type if device.type in ("cuda", "cpu") else "reference"
    if _derivatives.transforming() and forced != "reference":
        return fall_back(op, forced or automatic, _derivatives.TRANSFORM_REASON)
    if forced is not None:
        return _resolve_forced(op, forced, device)
    reason = _ops[op].reason(automatic)
    if reason is None:
        return automatic
    if not torch.compiler.is_compiling():
        _warn_once(op, automatic, reason)
    return "reference"


def _resolve_forced(op: str, forced: str, device: torch.device) -> str:
    if forced == "reference":
        return forced
    if forced == "cuda" and device.type == "cpu" and _ops[op].interpretable and _triton.interpreting:
        return forced
    if device.type != forced:
        raise BackendUnavailableError(
            f"{op}: backend {forced!r} was asked for, but the tensors are on {device}; move them to a {forced} "
            "device or leave the backend() block"
        )
    reason = _ops[op].reason(forced)
    if reason is not None:
        raise BackendUnavailableError(f"{op}: backend {forced!r} was asked for, but {reason}")
    return forced


def attention_of_reference() -> AbstractContextManager[object]:
    """The context in which references call `scaled_dot_product_attention`: it then has every derivative that is wanted.

    PyTorch's fused attention has the first one in reverse mode only, and is left alone where that is enough.
    """
    if _forced.name == "reference" or _derivatives.transforming():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def fall_back(op: str, name: str, reason: str) -> str:
    """The backend of a call whose shape or dtype `name` does not take: "reference".

    Raises:
        BackendUnavailableError: the backend was forced.
    """
    if _forced.name is not None:
        raise BackendUnavailableError(f"{op}: backend {name!r} was asked for, but {reason}")
    if not torch.compiler.is_compiling():
        _warn_once(op, name, reason)
    return "reference"


def _warn_once(op: str, name: str, reason: str) -> None:
    if (op, name) in _warned:
        return
    _warned.add((op, name))
    warnings.warn(f"{op}: using the plain PyTorch reference on {name}, because {reason}", stacklevel=4)
