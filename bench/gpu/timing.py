"""How calls are timed: replays of CUDA graphs between events on a GPU, and the same by a wall clock in a rehearsal."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from gpu.records import Ceilings, Quantiles, Times

LAUNCH_SECONDS = 50e-6
"""How long the device sleeps before the first event, at least: the launch of one graph is over by then."""
LONGEST_SLEEP = 2e-3
SPIN_UP_SECONDS = 0.1
"""Before each case: the clocks fall while the host checks results and captures."""
BUSY_SIZE = 4096
CYCLES_PER_SECOND = 3e9
"""Above the clock of any GPU, so that a sleep is never too short."""
Call = Callable[[], object]
Run = Callable[[], None]


class Timer(Protocol):
    """A device and its clocks; everything in seconds."""

    device: torch.device
    l2_bytes: int

    def capture(self, calls: Sequence[Call]) -> Run:
        """All `calls` as one run that costs the host next to nothing."""

    def device_seconds(self, run: Run, ahead: float = LAUNCH_SECONDS) -> float:
        """How long the device is busy with one run, whose launches take the host `ahead` seconds."""

    def spin_up(self, seconds: float) -> None:
        """Keep the device busy until its clocks have risen."""

    def host_seconds(self, run: Run) -> float:
        """Until one run returns; the device is idle before and waited for after it, outside the clock."""

    def wall_seconds(self, run: Run) -> float:
        """Until one run returns and the device is done."""

    def evict(self) -> None:
        """Fill the caches with something else."""


class CudaTimer:
    """CUDA events, and graphs."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)
        self.l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        self._filler = torch.empty(2 * self.l2_bytes, dtype=torch.uint8, device=self.device)
        self._busy = torch.randn(BUSY_SIZE, BUSY_SIZE, device=self.device).bfloat16()

    def capture(self, calls: Sequence[Call]) -> Run:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def device_seconds(self, run: Run, ahead: float = LAUNCH_SECONDS) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # the device waits in front of the first event until all is launched: launches are not in the window
        torch.cuda._sleep(int(min(ahead, LONGEST_SLEEP) * CYCLES_PER_SECOND))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def spin_up(self, seconds: float) -> None:
        """Products until two bursts take equally long, for `seconds` at least and four times that at most."""
        started, before = time.perf_counter(), math.inf
        while (elapsed := time.perf_counter() - started) < 4 * seconds:
            burst = self.device_seconds(_in_turn([lambda: torch.mm(self._busy, self._busy)] * 20))
            if elapsed >= seconds and abs(burst - before) <= 0.02 * before:
                return
            before = burst

    def host_seconds(self, run: Run) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        elapsed = time.perf_counter() - started
        torch.cuda.synchronize()
        return elapsed

    def wall_seconds(self, run: Run) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def evict(self) -> None:
        self._filler.fill_(1)


class WallTimer:
    """A wall clock on the CPU: shows in a rehearsal that every line runs; its numbers mean nothing."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.l2_bytes = 2**18
        self._filler = torch.empty(2 * self.l2_bytes, dtype=torch.uint8)

    def capture(self, calls: Sequence[Call]) -> Run:
        def run() -> None:
            for call in calls:
                call()

        return run

    def device_seconds(self, run: Run, ahead: float = LAUNCH_SECONDS) -> float:
        return self.wall_seconds(run)

    def spin_up(self, seconds: float) -> None:
        """A rehearsal has no clocks to wait for."""

    def host_seconds(self, run: Run) -> float:
        return self.wall_seconds(run)

    def wall_seconds(self, run: Run) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def evict(self) -> None:
        self._filler.fill_(1)


@dataclass(frozen=True)
class Sampling:
    """How long one case is measured."""

    rounds: int = 25
    replay_seconds: float = 4e-4  # a sample repeats its call until it lasts about this long
    max_calls: int = 128
    host_calls: int = 20
    max_copies: int = 64


@dataclass(frozen=True)
class Provider:
    """One way to do what a case asks for.

    Attributes:
        run: called with the inputs of the case.
        capturable: False where it waits for the device, or replays graphs of its own.
        check: instead of the check of the case, for a provider that does another part of the work.
    """

    run: Callable[..., Any]
    capturable: bool = True
    check: Callable[..., None] | None = None


@dataclass(frozen=True)
class _Sampler:
    """Seconds a call of one provider, of one kind."""

    run: Run
    calls: int
    base: Run | None = None  # what of `run` is not the calls
    ahead: float = LAUNCH_SECONDS

    def sample(self, timer: Timer) -> float:
        seconds = timer.device_seconds(self.run, self.ahead)
        if self.base is not None:
            seconds -= timer.device_seconds(self.base, self.ahead)
        return max(seconds, 0.0) / self.calls


def copies_beyond_cache(timer: Timer, inputs: Sequence[Any], most: int) -> int | None:
    """How many sets of inputs exceed the L2 cache twice over; None where `most` are not enough."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(inputs))
    wanted = 1 + 2 * timer.l2_bytes // max(size, 1)
    return wanted if wanted <= most else None


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def measure(
    timer: Timer,
    providers: Mapping[str, Provider],
    make_inputs: Callable[[], Sequence[Any]],
    sampling: Sampling,
) -> dict[str, Times]:
    """Time every provider, all taking turns, so that a drift of the clocks hits them alike."""
    first = make_inputs()
    providers = {name: _as_it_can(timer, provider, first) for name, provider in providers.items()}
    wanted = copies_beyond_cache(timer, first, sampling.max_copies)
    copies = [first, *(make_inputs() for _ in range((wanted or 1) - 1))]
    warm, cold = {}, {}
    for name, provider in providers.items():
        for inputs in copies[:3] * 2:
            provider.run(*inputs)
        calls = _calls_per_sample(timer, provider, first, sampling)
        warm[name] = _sampler(timer, provider, [first] * calls)
        if wanted is None:
            cold[name] = _evicting_sampler(timer, provider, first) if provider.capturable else None
        else:
            visits = max(calls // len(copies), 1)
            cold[name] = _sampler(timer, provider, copies * visits)
    timer.spin_up(SPIN_UP_SECONDS)
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in providers}
    for _ in range(sampling.rounds):
        for name in providers:
            samples[name][0].append(warm[name].sample(timer))
            if (cold_sampler := cold[name]) is not None:
                samples[name][1].append(cold_sampler.sample(timer))
    return {
        name: Times(
            timing="graph" if provider.capturable else "call",
            warm=quantiles(samples[name][0]),
            cold=_measurable(samples[name][1]),
            host_us=host_us(timer, provider, first, sampling),
            end_to_end_us=end_to_end_us(timer, provider, first, sampling),
        )
        for name, provider in providers.items()
    }


def _measurable(seconds: Sequence[float]) -> Quantiles | None:
    """None where nothing was measured, or nothing but the noise of the evictions."""
    found = quantiles(seconds) if seconds else None
    return found if found is not None and found.median > 0 else None


def _as_it_can(timer: Timer, provider: Provider, inputs: Sequence[Any]) -> Provider:
    """The provider, timed call by call where a CUDA graph refuses it."""
    call = _bind(provider, inputs)
    for _ in range(3):
        call()
    if not provider.capturable:
        return provider
    try:
        timer.capture([call])()
    except RuntimeError:
        return replace(provider, capturable=False)
    return provider


def _sampler(timer: Timer, provider: Provider, inputs: Sequence[Sequence[Any]]) -> _Sampler:
    calls = [_bind(provider, one) for one in inputs]
    run = timer.capture(calls) if provider.capturable else _in_turn(calls)
    return _Sampler(run, len(calls), ahead=_ahead(timer, run))


def _ahead(timer: Timer, run: Run) -> float:
    """How long the host takes to launch all of `run`, with room to spare."""
    return max(2 * min(timer.host_seconds(run) for _ in range(2)), LAUNCH_SECONDS)


def _evicting_sampler(timer: Timer, provider: Provider, inputs: Sequence[Any]) -> _Sampler:
    """Each call after an eviction, minus the evictions alone: for inputs too small to rotate."""
    calls = 4
    both = timer.capture([timer.evict, _bind(provider, inputs)] * calls)
    return _Sampler(both, calls, timer.capture([timer.evict] * calls), _ahead(timer, both))


def _bind(provider: Provider, inputs: Sequence[Any]) -> Call:
    return lambda: provider.run(*inputs)


def _in_turn(calls: Sequence[Call]) -> Run:
    def run() -> None:
        for call in calls:
            call()

    return run


def _calls_per_sample(timer: Timer, provider: Provider, inputs: Sequence[Any], sampling: Sampling) -> int:
    seconds = min(timer.device_seconds(_in_turn([_bind(provider, inputs)])) for _ in range(3))
    return min(max(int(sampling.replay_seconds / max(seconds, 1e-7)), 1), sampling.max_calls)


def host_us(timer: Timer, provider: Provider, inputs: Sequence[Any], sampling: Sampling) -> float:
    """Host microseconds of one call among several that are launched without waiting, median."""
    run = _in_turn([_bind(provider, inputs)] * sampling.host_calls)
    seconds = [timer.host_seconds(run) / sampling.host_calls for _ in range(max(sampling.rounds // 2, 3))]
    return statistics.median(seconds) * 1e6


def end_to_end_us(timer: Timer, provider: Provider, inputs: Sequence[Any], sampling: Sampling) -> float:
    """Wall-clock microseconds of one call with the waiting for its result, median."""
    run = _in_turn([_bind(provider, inputs)])
    return statistics.median(timer.wall_seconds(run) for _ in range(2 * sampling.rounds)) * 1e6


def quantiles(seconds: Sequence[float]) -> Quantiles:
    """Median, p20 and p80 in microseconds."""
    p20, median, p80 = (torch.tensor(seconds, dtype=torch.float64).quantile(q).item() * 1e6 for q in (0.2, 0.5, 0.8))
    return Quantiles(median, p20, p80)


def measure_ceilings(timer: Timer, copy_bytes: int, matmul_size: int, samples: int = 15) -> Ceilings:
    """What the device can do: a copy that no cache holds, a bfloat16 product, and kernels that do nothing."""
    timer.spin_up(10 * SPIN_UP_SECONDS)
    copy_seconds = _copy_seconds(timer, copy_bytes, samples)
    # random, because products of zeros run faster
    a, b = (torch.randn(matmul_size, matmul_size, device=timer.device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    matmul_seconds = _median_seconds(timer, lambda: torch.mm(a, b, out=product), 2, samples)
    one = torch.zeros(1, device=timer.device)
    launch_seconds = _median_seconds(timer, lambda: one.add_(1), 200, samples)
    return Ceilings(2 * copy_bytes / copy_seconds, 2 * matmul_size**3 / matmul_seconds, launch_seconds * 1e6)


def _copy_seconds(timer: Timer, copy_bytes: int, samples: int) -> float:
    source = torch.randint(0, 255, (copy_bytes,), dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return _median_seconds(timer, lambda: target.copy_(source), 2, samples)


def _median_seconds(timer: Timer, call: Call, calls: int, samples: int) -> float:
    for _ in range(3):
        call()
    run = timer.capture([call] * calls)
    run()
    return statistics.median(timer.device_seconds(run) for _ in range(samples)) / calls
