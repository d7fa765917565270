"""How many kernels a step launches on a GPU, counted without one: PyTorch's operations that compute, and Triton's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = ("empty", "new_empty")


class _Launches(TorchDispatchMode):
    """Counts operations by name, but not what the interpreter does to run a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.inside_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside_kernel and _computes(func):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class OpNames(TorchDispatchMode):
    """Keeps the names of all operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _computes(func: Any) -> bool:
    name = func._schema.name.removeprefix("aten::")
    return not (func.is_view or name == "_unsafe_view" or name.startswith(ALLOCATIONS))


def count_launches(step: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The launches of one call of `step` by name; the Triton kernels have to run in the interpreter."""
    from triton.runtime.interpreter import GridExecutor

    from fastkd_kernels import _distillation_triton

    launches = _Launches()
    run_kernel = GridExecutor.__call__

    def counted(executor: Any, *args: Any, **kwargs: Any) -> None:
        launches.counts[executor.fn.__name__] += 1
        launches.inside_kernel = True
        run_kernel(executor, *args, **kwargs)
        launches.inside_kernel = False

    counter = torch.zeros(1, dtype=torch.int32)
    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", counted)
        # a GPU has one of these for all launches of a stream
        patch.setattr(_distillation_triton, "arrival_counter", lambda device: counter)
        with launches:
            step()
    return launches.counts
