"""CUDA graphs, streams and events without a GPU: tensors stay on the CPU, and what torch does with a GPU is played.

A captured graph is the list of operations that were dispatched while it was captured, with the addresses that they
read and wrote. A replay runs them again on the same memory, and fails where that memory is gone. `Cuda` does what torch
2.11 and 2.13 do, the stricter of the two where they differ: current devices and streams of each thread, 32 streams in
turn, a pool that goes with its last graph, cuBLAS' workspaces, and what a failed capture leaves behind.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from fastkd.engines import cuda_graphs
from fastkd_kernels import _student_head_weights

PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm")


class Placed:
    """A model that takes itself to be on a GPU."""

    def __init__(self, model: Any, device: str) -> None:
        self._model = model
        self.device = torch.device(device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def move(self, device: str) -> None:
        """As `nn.Module.to`: other memory under the same parameters."""
        for parameter in self._model.parameters():
            parameter.data = parameter.data.clone()
        self.device = torch.device(device)


@dataclass(eq=False)
class Stream:
    device: torch.device
    number: int
    waited_for: list[Stream] = field(default_factory=list)
    capturing: Graph | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and (self.device, self.number) == (other.device, other.number)

    def __hash__(self) -> int:
        return hash((self.device, self.number))

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


@dataclass(eq=False)
class Pool:
    """Of graphs; `alive` ends with the last of them."""

    graphs: int = 0
    alive: bool = True


@dataclass(eq=False)
class Workspace:
    """Of cuBLAS: freed memory of a pool stays the pool's as long as that is alive."""

    pool: Pool | None
    freed: bool = False

    @property
    def is_lost(self) -> bool:
        return self.freed and (self.pool is None or not self.pool.alive)


class _ThisThread(threading.local):
    device = 0

    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}


class Cuda:
    """What is patched over `torch.cuda` while `in_charge`."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.pools: dict[Any, Pool] = {}
        self.workspaces: dict[Stream, Workspace] = {}
        self.recording: list[Any] = []
        """Pools that the allocator records for: after a failed capture torch forgets to end that."""
        self.fail_captures = False
        self._made: dict[int, int] = defaultdict(int)
        self._own = 1000
        self._next_pool = 0
        self._here = _ThisThread()
        self._defaults: dict[int, Stream] = {}

    # Devices and streams

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self._here.device = self._here.device, self._index(device)
        try:
            yield
        finally:
            self._here.device = before

    def _index(self, device: Any) -> int:
        if device is None:
            return self._here.device
        if isinstance(device, int):
            return device
        index = device.index
        return self._here.device if index is None else index

    def new_stream(self, device: Any = None) -> Stream:
        """As `torch.cuda.Stream`: one of 32."""
        index = self._index(device)
        self._made[index] += 1
        return Stream(torch.device("cuda", index), 1 + self._made[index] % 32)

    def own_stream(self, device: torch.device) -> Stream:
        """As the driver makes one."""
        assert self._index(None) == device.index, "cuStreamCreate makes a stream of the current device"
        self._own += 1
        return Stream(device, self._own)

    def current_stream(self, device: Any = None) -> Stream:
        index = self._index(device)
        default = self._defaults.setdefault(index, Stream(torch.device("cuda", index), 0))
        return self._here.streams.get(index, default)

    def stream(self, stream: Stream) -> _Within:
        return _Within(self, stream)

    def new_event(self) -> Event:
        return Event(self)

    def synchronize(self, device: Any = None) -> None:
        assert not self.recording, "CUDA error: operation not permitted when stream is capturing"
        self.log.append(("synchronize", self._index(device)))

    def empty_cache(self) -> None:
        assert not self.recording, "INTERNAL ASSERT FAILED: captures_underway.empty()"

    # Pools

    def graph_pool_handle(self) -> tuple[int, int]:
        self._next_pool += 1
        return (0, self._next_pool)

    def begin(self, handle: Any) -> Pool:
        if handle not in self.pools:
            self.pools[handle] = Pool()
        pool = self.pools[handle]
        assert pool.alive, "INTERNAL ASSERT FAILED: it->second->use_count > 0"
        assert handle not in self.recording, "already recording to mempool_id"
        pool.graphs += 1
        self.recording.append(handle)
        return pool

    def end_recording(self, device: int, handle: Any) -> None:
        if handle not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(handle)

    def release(self, device: int, handle: Any) -> None:
        pool = self.pools[handle]
        pool.graphs -= 1
        assert pool.graphs >= 0
        pool.alive = pool.graphs > 0

    def workspace(self, pool: Pool | None) -> Workspace:
        """That of the current stream, allocated where it has none."""
        return self.workspaces.setdefault(self.current_stream(), Workspace(pool))

    def clear_workspace(self, stream: Stream) -> None:
        workspace = self.workspaces.pop(stream, None)
        if workspace is not None:
            workspace.freed = True

    # Patches

    @contextmanager
    def in_charge(self) -> Iterator[None]:
        """Patches `torch.cuda`; each thread that runs a model enters `on_cpu` itself."""
        replaced: list[tuple[Any, str, Any]] = [
            (torch.cuda, "device", self.device),
            (torch.cuda, "Stream", self.new_stream),
            (torch.cuda, "stream", self.stream),
            (torch.cuda, "current_stream", self.current_stream),
            (torch.cuda, "Event", self.new_event),
            (torch.cuda, "CUDAGraph", lambda: Graph(self)),
            (torch.cuda, "graph_pool_handle", self.graph_pool_handle),
            (torch.cuda, "synchronize", self.synchronize),
            (torch.cuda, "empty_cache", self.empty_cache),
            (torch._C, "_host_emptyCache", lambda: None),
            (torch._C, "_cuda_endAllocateToPool", self.end_recording),
            (torch._C, "_cuda_releasePool", self.release),
            (_student_head_weights, "is_capturing", lambda tensor: self.current_stream().capturing is not None),
            (cuda_graphs, "_new_stream", self.own_stream),
            (cuda_graphs, "_free_streams", {}),
            (cuda_graphs, "_left_recording", []),
            (torch.cuda.graph, "default_capture_stream", None),
        ]
        with pytest.MonkeyPatch.context() as patch:
            for owner, name, value in replaced:
                patch.setattr(owner, name, value, raising=False)
            with on_cpu(self):
                yield


@dataclass(eq=False)
class _Within:
    """`torch.cuda.stream`: what enters it and never leaves stays there."""

    cuda: Cuda
    stream: Stream

    def __enter__(self) -> None:
        here, index = self.cuda._here, self.stream.device.index
        self._before = here.device, here.streams.get(index)
        here.device, here.streams[index] = index, self.stream

    def __exit__(self, *_: object) -> None:
        here, index = self.cuda._here, self.stream.device.index
        here.device, stream = self._before
        del here.streams[index]
        if stream is not None:
            here.streams[index] = stream


@dataclass(eq=False)
class Event:
    cuda: Cuda

    def record(self) -> None:
        self.cuda.log.append(("record", self.cuda.current_stream().device.index))

    def synchronize(self) -> None:
        pass


class on_cpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU lie on the CPU, which has nothing to pin."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(function, "__name__", "") in ("linear", "matmul", "__matmul__"):
            capturing = self._cuda.current_stream().capturing
            self._cuda.workspace(None if capturing is None else capturing.pool)
        if function is Tensor.pin_memory:
            return args[0]
        kwargs.pop("pin_memory", None)
        args = tuple(self._device(value) for value in args)
        return function(*args, **{name: self._device(value) for name, value in kwargs.items()})

    @staticmethod
    def _device(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


# Graphs


@dataclass(frozen=True)
class _Address:
    """Memory that was there before the capture: a graph knows where it is, and keeps it from nobody."""

    storage: Callable[[], Any]
    dtype: torch.dtype
    geometry: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Address:
        geometry = tensor.storage_offset(), tensor.size(), tensor.stride()
        return cls(weakref.ref(tensor.untyped_storage()), tensor.dtype, geometry)

    def read(self) -> Tensor:
        storage = self.storage()
        if storage is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered (the memory was freed)")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.geometry)


def _storages(value: Any) -> set[int]:
    leaves = tree_flatten(value)[0]
    return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_mkldnn}


class _Capture(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        graph, arguments = self._graph, function._schema.arguments
        changes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments)
        made = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor) and not leaf.is_mkldnn]
        fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in _storages((args, kwargs))]
        graph.made.update(tensor.untyped_storage()._cdata for tensor in fresh)
        graph.kept.extend(fresh)
        if function.name() in PRODUCTS:
            graph.workspaces.add(graph.cuda.workspace(graph.pool))
        if changes or fresh:
            graph.operations.append((function, *tree_map_only(Tensor, graph.remember, (args, kwargs)), fresh))
        return result


class Graph:
    """In the place of `torch.cuda.CUDAGraph`."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.operations: list[tuple[Any, ...]] = []
        self.made: set[int] = set()
        self.kept: list[Tensor] = []
        self.workspaces: set[Workspace] = set()
        self.replays = 0

    def remember(self, tensor: Tensor) -> Any:
        if tensor.is_mkldnn or tensor.untyped_storage()._cdata in self.made:
            return tensor
        return _Address.of(tensor)

    def capture_begin(self, pool: Any, capture_error_mode: str = "global", **_: Any) -> None:
        self.stream = self.cuda.current_stream()
        assert self.stream.number != 0, "CUDA graphs must be captured on a non-default stream"
        assert self.stream.capturing is None
        self.handle, self.pool = pool, self.cuda.begin(pool)
        self.stream.capturing = self
        self.cuda.log.append(("capture", self.stream, self.handle, capture_error_mode))
        self._mode = _Capture(self)
        self._mode.__enter__()

    def capture_end(self) -> None:
        assert self.cuda.current_stream() == self.stream, "Capture must end on the same stream it began on."
        self._mode.__exit__(None, None, None)
        del self._mode  # which knows the graph: nothing but its user keeps one alive
        self.stream.capturing = None
        if self.cuda.fail_captures:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.cuda.end_recording(self.stream.device.index, self.handle)
        weakref.finalize(self, self._destroy, self.cuda, self.stream, self.handle)

    @staticmethod
    def _destroy(cuda: Cuda, stream: Stream, handle: Any) -> None:
        cuda.clear_workspace(stream)
        cuda.release(stream.device.index, handle)

    def replay(self) -> None:
        self.replays += 1
        if any(workspace.is_lost for workspace in self.workspaces):
            raise RuntimeError("CUDA error: an illegal memory access was encountered (cuBLAS' workspace was freed)")
        for function, args, kwargs, results in self.operations:
            args, kwargs = tree_map_only(_Address, _Address.read, (args, kwargs))
            with torch.autocast("cpu", enabled=False):  # what it does was captured
                out = function(*args, **kwargs)
            made = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor) and not leaf.is_mkldnn]
            before = _storages((args, kwargs))
            again = [tensor for tensor in made if tensor.untyped_storage()._cdata not in before]
            for old, new in zip(results, again, strict=True):
                old.copy_(new)
