"""The memory that a call needs at its peak: PyTorch's on a GPU, on CPU the process's, scratch of kernels included."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# what else the process touches meanwhile only adds, so the smallest of a few is nearest to the truth
_ATTEMPTS = 5


def peak_bytes(step: Callable[[], object], on: str = "cpu") -> int:
    """Bytes that a call of `step` after the first adds at its peak, `on` "cpu", which needs Linux, or on "cuda"."""
    step()
    gc.collect()
    if on == "cuda":
        return _peak_on_gpu(step)
    return min(_peak_on_cpu(step) for _ in range(_ATTEMPTS))


def _peak_on_cpu(step: Callable[[], object]) -> int:
    try:
        # gives back what earlier calls have freed, so that this one's is seen
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the peak of this process's memory cannot be read here: {error}")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _peak_on_gpu(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
