"""A CUDA driver without a device for Triton and for our launcher, in processes that do not interpret kernels.

Kernels are compiled for compute capability 9.0 and their launches recorded; nothing runs. Tensors stay on the CPU.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

SOURCE = Path(__file__).with_suffix(".c")
MOST_PARAMETERS = 128
DEVICE, STREAM = 0, 0x5EED


class _Record(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int),
        ("by_triton", ctypes.c_int),
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("attribute_count", ctypes.c_uint),
        ("parameters", ctypes.c_uint),
        ("values", ctypes.c_uint64 * MOST_PARAMETERS),
    )


@dataclass(frozen=True)
class Launch:
    """What the driver was asked to run."""

    function: int
    stream: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    attribute_count: int
    parameters: tuple[int, ...]


def missing() -> str | None:
    """Why the driver cannot be built here, or None."""
    return None if shutil.which("gcc") else "no gcc to build the driver without a device with"


def build(folder: Path) -> Path:
    """libcuda.so.1 in `folder`."""
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


class FakeCuda:
    """The driver, loaded into this process, where it stays."""

    def __init__(self, library: Path) -> None:
        self.knows_parameters = True
        # later requests for this name find it already loaded
        self._driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._record = _Record.in_dll(self._driver, "last")
        os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)

    @contextmanager
    def in_charge(self) -> Iterator[None]:
        """Put it in the place of the real one: Triton launches on it, and ops take tensors of the CPU for a GPU's."""
        with ExitStack() as stack:
            for replacement in self._replacements():
                stack.enter_context(replacement)
            yield

    def _triton_driver(self) -> Any:
        from triton.backends.nvidia.driver import CudaDriver

        active: Any = CudaDriver()
        active.get_device_capability = lambda device=DEVICE: (9, 0)
        active.get_current_device = lambda: DEVICE
        active.get_current_stream = lambda device=DEVICE: STREAM
        return active

    def _replacements(self) -> list[Any]:
        import torch
        from triton.compiler.compiler import CompiledKernel
        from triton.runtime import driver

        from fastkd_kernels import _backend, _launch
        from fastkd_kernels.ops import exit_gate

        load = CompiledKernel._init_handles

        def load_and_describe(compiled: Any) -> None:
            load(compiled)
            if not self.knows_parameters:
                return
            sizes = bytes(int(bits) // 8 for bits in re.findall(r"\.param \.[ubf](\d+)", _signature(compiled)))
            self._driver.fake_describe(ctypes.c_uint64(compiled.function), len(sizes), sizes)

        return [
            patch.object(driver, "_active", self._triton_driver()),
            patch.object(CompiledKernel, "_init_handles", load_and_describe),
            patch.object(torch.Tensor, "get_device", lambda tensor: DEVICE),
            patch.object(torch._C, "_cuda_getDevice", lambda: DEVICE, create=True),
            patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, create=True),
            patch.object(_launch, "_CUDA", 1),
            patch.object(_backend, "resolve", lambda op, device: "cuda"),
            patch.object(exit_gate, "_eager_cpu", None),
        ]

    def set_context(self, current: bool) -> None:
        """Whether this thread has a context."""
        self._driver.fake_set_context(int(current))

    def fail_launches(self, code: int) -> None:
        """What launching returns from now on, 0 for success."""
        self._driver.fake_fail(code)

    @property
    def launches(self) -> int:
        return self._record.count

    @property
    def last_was_by_triton(self) -> bool:
        return bool(self._record.by_triton)

    @property
    def last(self) -> Launch:
        record = self._record
        return Launch(
            record.function,
            record.stream,
            tuple(record.grid),
            tuple(record.block),
            record.shared_bytes,
            record.attribute_count,
            tuple(record.values[: record.parameters]),
        )


def _signature(compiled: Any) -> str:
    """The parameter list of the kernel in PTX."""
    found = re.search(r"\.entry \w+\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    assert found is not None
    return found.group(1)
