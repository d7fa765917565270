"""The memory that a call needs at its peak: PyTorch's on a GPU, on CPU the process's, scratch of kernels included."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

# what else the process touches meanwhile only adds, so the smallest of a few is nearest to the truth
_ATTEMPTS = 5

# of <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def peak_bytes(step: Callable[[], object], on: str = "cpu") -> int:
    """Bytes that a call of `step` after the first adds at its peak, `on` "cpu", which needs Linux, or on "cuda"."""
    step()
    gc.collect()
    if on == "cuda":
        return _peak_on_gpu(step)
    with _blocks_of_their_own() as libc:
        return min(_peak_on_cpu(step, libc) for _ in range(_ATTEMPTS))


@contextmanager
def _blocks_of_their_own() -> Iterator[ctypes.CDLL]:
    """Every large block is a mapping, gone once freed: a heap in pieces keeps those that the next one does not fit."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        _forget_peak()
    except OSError as error:
        pytest.skip(f"the peak of this process's memory cannot be read here: {error}")
    libc.mallopt(_M_MMAP_MAX, 2**16)
    libc.mallopt(_M_MMAP_THRESHOLD, 2**16)
    try:
        yield libc
    finally:
        # where glibc arrives by itself in a process that has freed blocks of 32 MiB
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**26)


def _peak_on_cpu(step: Callable[[], object], libc: ctypes.CDLL) -> int:
    # gives back what earlier calls have freed, so that this one's is seen
    libc.malloc_trim(0)
    _forget_peak()
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


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
