"""Freed memory that is kept: fewer page faults, where the C library is glibc."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from fastkd.engines.allocator import keep_freed_memory

PROGRAM = """
import resource, sys
import torch
from fastkd.engines.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def layer():
    for _ in range(3):
        torch.zeros(16 * 2**20)

layer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    layer()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_is_freed_is_there_for_the_next_layer() -> None:
    # 15 blocks of 64 MiB: a fault for every page, of 4 KiB or larger, or for none
    assert faults("keep") < faults("hand back") / 10


def test_a_size_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="up_to: got 2147483648"):
        keep_freed_memory(2**31)
