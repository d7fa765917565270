"""CUDA graphs of the engines: what can be captured, the stream and the pool of a capture, and whose turn it is.

What torch (2.10 to 2.13) leaves to its callers, and this file keeps in one place:

* Streams, events and captures belong to the current device, which need not be that of the model.
* A pool goes with the last graph in it; capturing into it again is an internal error of torch 2.11.
* Of cuBLAS torch keeps a workspace for each stream. A graph holds its address, and in torch 2.13 destroying a graph
  frees that of its stream. Therefore every `CudaGraphs` captures on a stream of its own, where nothing else ever runs,
  warm-ups neither: the workspace lies in its pool, where nothing has to outlast a replay and what is queued behind it.
* `torch.cuda.Stream` hands out 32 streams in turn, so a stream of one's own has to come from the driver.
* A capture that fails leaves the allocator recording and the stream of the capture current.
* A graph reads addresses. What lies there is kept by whoever has it captured, or asked about before it is replayed.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastkd_kernels as fk
from fastkd.encoders.untouched import is_untouched
from fastkd.engines.protocol import ExitModel

Recorder = Callable[[Callable[[], Any]], Callable[[], None]]
"""Turns a function without arguments into what replays it on the same memory."""

K = TypeVar("K")
V = TypeVar("V")


class Recent(dict[K, V]):
    """A dictionary of the `most` values that were used last."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def find(self, key: K) -> V | None:
        value = self.pop(key, None)
        if value is not None:
            self[key] = value
        return value

    def keep(self, key: K, value: V) -> None:
        self.pop(key, None)
        self[key] = value
        while len(self) > self._most:
            del self[next(iter(self))]


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Turns:
    """Who uses the memory of an engine: one caller at a time, on its device, behind what the one before has queued."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.RLock()
        self._last: torch.cuda.Stream | None = None

    @contextmanager
    def take(self) -> Iterator[None]:
        with self._lock, on(self.device):
            if self.device.type == "cuda":
                self._follow(torch.cuda.current_stream(self.device))
            yield

    def _follow(self, stream: torch.cuda.Stream) -> None:
        """Callers may have streams of their own, which the lock does not put in an order."""
        if self._last is not None and self._last.device == stream.device and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream


def capture(recorder: Recorder, run: Callable[[], Any], record: fk.ExitRecord) -> Callable[[], None]:
    """What replays `run`, which decides with `record`."""
    # recording may run it, and what was said before is all that it both reads and writes
    history = record.history.clone()
    replay = recorder(run)
    record.history.copy_(history)
    return replay


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in there now; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def obstacle(model: ExitModel) -> str | None:
    """What keeps a model out of CUDA graphs, as far as it shows without a run; None where nothing does."""
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        return f"the weights lie on {' and '.join(devices)}"
    for module in model.modules():
        name = type(module).__name__
        if not is_untouched(module):
            return f"a {name} has a hook or a wrapper, which would not run when a graph is replayed"
        if _is_compiled(module):
            return f"a {name} is compiled, and may have graphs of its own"
    return None


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


class Look(TorchDispatchMode):
    """Notes the first operation that a CUDA graph cannot hold: one that the host waits for, or that leaves the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.problem: str | None = None

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        options = options or {}
        result = function(*arguments, **options)
        if self.problem is None:
            self.problem = _problem_of(function, arguments, options, result)
        return result


_COPIES = ("_to_copy", "copy_")


def _problem_of(function: Any, arguments: Sequence[Any], options: Mapping[str, Any], result: Any) -> str | None:
    name = function.name().partition("::")[2].partition(".")[0]
    tensors = [leaf for leaf in tree_leaves((arguments, options, result)) if isinstance(leaf, Tensor)]
    # a number on the host is an argument of the kernel, unless it is to be copied
    devices = sorted({str(tensor.device) for tensor in tensors if tensor.dim() or tensor.is_cuda or name in _COPIES})
    if not any(device.startswith("cuda") for device in devices):
        return None
    if len(devices) > 1:
        return f"{name} takes tensors on {' and '.join(devices)}"
    if torch.Tag.data_dependent_output in function.tags or _has_unknown_size(function, name, arguments, options):
        return f"the host waits for the GPU in {name}"
    return None


def _has_unknown_size(function: Any, name: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether the size of the result depends on values."""
    if torch.Tag.dynamic_output_shape not in function.tags or options.get("output_size") is not None:
        return False
    if name != "index":
        return True
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])


class CudaGraphs:
    """Captures into CUDA graphs of one device that share a memory pool: they are never replayed at the same time.

    What a graph cannot hold is called in its place, and so is everything after it, which one warning says.
    """

    WARM_UPS = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self.calls_instead = False

    def refuse(self, reason: str) -> None:
        """Capture nothing from now on."""
        if not self.calls_instead:
            self.calls_instead = True
            warnings.warn(
                f"CUDA graphs: {reason}; the model is called instead, which costs the host more time",
                RuntimeWarning,
                stacklevel=2,
            )

    def __call__(self, run: Callable[[], Any]) -> Callable[[], None]:
        if self.calls_instead:
            return run
        with on(self._device), _casts_not_kept():
            with Look() as look:
                run()
            if look.problem is not None:
                self.refuse(look.problem)
                return run
            for _ in range(1, self.WARM_UPS):
                run()
            graph = self._captured(run)
        return run if graph is None else graph.replay

    def _captured(self, run: Callable[[], Any]) -> torch.cuda.CUDAGraph | None:
        """The graph of `run`; None where the capture failed."""
        graph = torch.cuda.CUDAGraph()
        with _one_at_a_time:
            if not self._graphs:
                self._pool = torch.cuda.graph_pool_handle()
            try:
                if self._stream is None:
                    self._stream = _own_stream(self, self._device)
                # thread_local: other threads may allocate, as the one that pins the memory of a DataLoader's batches.
                # The outer context gives the stream of before back where torch does not, after a failure
                with (
                    torch.cuda.stream(self._stream),
                    _nothing_collected(),
                    torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
                ):
                    run()
            except Exception as error:
                _end_recording(graph, self._device, self._pool)
                self.refuse(f"a capture failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
                return None
        # the stream may be lent again when the last graph has gone, not before
        graph.captured_by = self  # type: ignore[attr-defined]
        self._graphs.add(graph)
        return graph


_one_at_a_time = threading.Lock()
"""Held by the one capture of this process: beginning one waits for the device, which another one forbids."""


@contextmanager
def _casts_not_kept() -> Iterator[None]:
    """Autocast keeps casts of weights until it ends; a graph would read them after that."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """A graph that the garbage collector destroys in the middle of a capture may break it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_left_recording: list[torch.cuda.CUDAGraph] = []
"""Graphs that torch's allocator for pinned memory may still ask."""


def _end_recording(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """After a failed capture: what torch's own clean-up does not reach, without which no later one succeeds."""
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
        _left_recording.append(graph)
        torch._C._cuda_releasePool(device.index, pool)
    except RuntimeError:  # it was not recording
        return


# Streams, which are never destroyed but lent again: the allocator knows memory by them

_free_streams: dict[torch.device, list[torch.cuda.Stream]] = {}


def _own_stream(owner: CudaGraphs, device: torch.device) -> torch.cuda.Stream:
    """A stream that is the owner's alone as long as the owner lives."""
    free = _free_streams.setdefault(device, [])
    stream = free.pop() if free else _new_stream(device)
    weakref.finalize(owner, free.append, stream).atexit = False
    return stream


_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the default stream


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of the driver on the current device, which is `device`."""
    torch.cuda.synchronize(device)  # gives this thread a context, which the driver takes for granted
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    handle = ctypes.c_void_p()
    code = driver.cuStreamCreate(ctypes.byref(handle), _NON_BLOCKING)
    if code or handle.value is None:
        raise RuntimeError(f"cuStreamCreate returned {code}")
    return torch.cuda.ExternalStream(handle.value, device=device)
