"""How Triton kernels are launched: the first call of a kind by Triton, later ones straight through the CUDA driver.

For a gate's 20 arguments Triton's launcher takes 23 us of the host, a look-up in the extension 2. What that cannot
know, such as a hook of a profiler or a kernel that wants scratch memory, goes to Triton's launcher every time.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import cached_property, lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastkd_kernels import _extension, _triton

OPTIONS = {"enable_fp_fusion": True}
"""What every kernel is compiled with; the default differs between versions of Triton."""

_native: Any = _extension.extension
_CUDA = 2  # kDLCUDA of DLPack
_KINDS = {"constexpr": "-", "i32": "4", "i64": "8", "fp32": "f"}
"""Types of arguments in Triton's notation, as the extension has them; "p" is any pointer."""


@lru_cache(maxsize=1)
def _enable() -> bool:
    """Whether this torch, this driver and the extension can launch by themselves; loads the driver."""
    if _native is None or _extension.tensor_exchange is None:
        return False
    return _native.enable_triton_launch(_extension.tensor_exchange, torch.Tensor, torch.nn.Parameter)


def current_stream(device: int) -> int:
    """The handle of the current stream of a GPU, for which `torch.cuda.current_stream` would make an object."""
    return torch._C._cuda_getCurrentRawStream(device)


def is_capturing(tensor: Tensor) -> bool:
    """Whether the work on `tensor` is being captured in a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Op(threading.local):
    is_running = False


_op = _Op()


def as_op(function: _Function) -> _Function:
    """`function` as what the dispatcher calls, and with it torch.compile; see `may_keep`."""

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        before, _op.is_running = _op.is_running, True
        try:
            return function(*arguments, **options)
        finally:
            _op.is_running = before

    return run  # type: ignore[return-value]


def is_captured_op(tensor: Tensor) -> bool:
    """Whether an op is being captured: its graph is replayed whatever becomes of the op's inputs."""
    return _op.is_running and is_capturing(tensor)


def may_keep(tensor: Tensor) -> bool:
    """Whether memory allocated now, on the device of `tensor`, may be kept for later calls.

    What is allocated in a CUDA graph is the graph's. What an op allocates may lie in the pool that torch.compile keeps
    for its graphs (mode="reduce-overhead"), which raises where it finds anything that outlived the call.
    """
    if not tensor.is_cuda:
        return True
    return not is_capturing(tensor) and not (_op.is_running and _GRAPHS_OF_INDUCTOR in sys.modules)


_GRAPHS_OF_INDUCTOR = "torch._inductor.cudagraph_trees"  # imported with the first such graph


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size`: what blocks of Triton are made of."""
    return 1 << max(size - 1, 0).bit_length()


class LaunchConfig:
    """What a frozen dataclass of launch parameters inherits."""

    def constants(self) -> dict[str, int]:
        """The constexprs under the kernel's names."""
        raise NotImplementedError

    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        raise NotImplementedError

    @cached_property
    def launch(self) -> dict[str, int]:
        """Constexprs and options, as the launcher takes them."""
        return {**self.constants(), **self.options()}


class Launcher:
    """Launches one Triton kernel on the device of its first argument, in the current stream.

    The kernel's tensors and numbers are passed in their order, its `tl.constexpr`s by name with the compiler's options.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._binaries: Any = None
        self._alive: dict[int, Any] = {}  # by their id: a binary is unloaded with its CompiledKernel

    def __call__(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        device = arguments[0].get_device()
        if device < 0 or device == torch._C._cuda_getDevice():
            self._launch(device, grid, arguments, constants)
            return
        with torch.cuda.device(device):
            self._launch(device, grid, arguments, constants)

    def _launch(
        self, device: int, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        if device >= 0 and self._binaries is not None and not self._is_observed():
            stream = current_stream(device)
            if _native.launch_triton(self._binaries, _CUDA, device, stream, grid, arguments, constants):
                return
        compiled = self.launch_by_triton(grid, arguments, constants)
        # the interpreter compiles nothing, and a hook may have kept Triton from compiling
        if compiled is not None and device >= 0 and _enable():
            self._remember(compiled, device, arguments, constants)

    def launch_by_triton(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        """Launch on the current device, however long that takes the host; returns what Triton compiled, if it did."""
        return self.kernel[grid](*arguments, **constants, **OPTIONS)

    def _is_observed(self) -> bool:
        """Whether a profiler or a test wants to be told of launches."""
        runtime = _triton.triton.knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        # chains of hooks, or a hook put in the place of one
        return bool(self.kernel.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave))

    def _remember(self, compiled: Any, device: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        names = list(compiled.src.signature.values())[: len(arguments)]
        kinds = "".join("p" if str(name).startswith("*") else _KINDS.get(name, "?") for name in names)
        if "?" in kinds or not _is_plain(compiled.metadata):
            return
        if self._binaries is None:
            self._binaries = _native.new_triton_binaries()
        # also where it takes the place of another, which a launch of another thread may still be using
        self._alive[id(compiled)] = compiled
        _native.remember_triton(
            self._binaries,
            _CUDA,
            device,
            compiled.function,
            32 * compiled.metadata.num_warps,
            compiled.metadata.shared,
            kinds,
            arguments,
            constants,
        )


_SPECIAL = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")


def _is_plain(metadata: Any) -> bool:
    """Whether a launch needs no cluster, scratch memory or attribute; what Triton no longer says counts as needed."""
    return getattr(metadata, "num_ctas", 0) == 1 and not any(getattr(metadata, name, True) for name in _SPECIAL)
