"""What every bench_*.py shares: interleaved timing of several providers, their check, and the table of ratios.

Providers of one case take turns in one process, so drift of the machine hits all of them alike, and the speed-up is the
median of the ratios of neighbours. On a GPU each sample is one replay of a CUDA graph between two events, over copies
of the inputs that together exceed the L2 cache; on CPU it is a batch of plain calls.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from memory import peak_bytes

from fastkd_kernels._launch import Launcher

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS = "fastkd"
_SPIN_UP_SECONDS = 0.5
_LAUNCH_CYCLES = 150_000  # 50 us at 3 GHz, which no GPU exceeds

Provider = Callable[..., Any]
Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Sampling:
    """How long one case is measured."""

    sample_seconds: float = 5e-4  # a sample repeats its call until it lasts about this long
    case_seconds: float = 2.0
    min_rounds: int = 15
    max_rounds: int = 200
    max_calls: int = 1000


@dataclass(frozen=True)
class Row:
    """One line of the table: times in microseconds a call."""

    op: str
    case: str
    provider: str
    timing: str  # "call", "graph" (replayed CUDA graph) or "eager" (host launches included)
    median_us: float
    p20_us: float
    p80_us: float
    speedup: float  # median over rounds of this provider's time divided by that of OURS
    gb_per_s: float | None
    share_of_copy: float | None  # of the bandwidth of a large copy measured in this run
    peak_mib: float | None = None  # memory that one call adds to its inputs


class Clock:
    """Seconds a call, in CUDA events on a GPU: the timer of pytest-benchmark and of every provider here."""

    def __init__(self) -> None:
        self.calls = 1
        self.asleep = False  # whether the next interval begins only once the launches of one graph are over
        self._last_event: torch.cuda.Event | None = None
        self._device_seconds = 0.0

    def __call__(self) -> float:
        return self._now() / self.calls

    def _now(self) -> float:
        if DEVICE.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._last_event is not None:
            # summed here, because one float32 interval since the start of the session would lose its microseconds
            self._device_seconds += self._last_event.elapsed_time(event) / 1e3
        self._last_event = event
        if self.asleep:
            torch.cuda._sleep(_LAUNCH_CYCLES)
            self._last_event = torch.cuda.Event(enable_timing=True)
            self._last_event.record()
        return self._device_seconds


CLOCK = Clock()


@dataclass
class Runner:
    """One provider, ready to be sampled: `run()` makes `calls` calls."""

    run: Callable[[], None]
    calls: int
    timing: str

    def set_clock(self) -> None:
        """Tell the clock what its next interval holds."""
        CLOCK.calls, CLOCK.asleep = self.calls, self.timing == "graph"

    def sample(self) -> float:
        self.set_clock()
        start = CLOCK()
        self.run()
        return CLOCK() - start


def compare(
    benchmark: Any,
    op: str,
    case: str,
    providers: Mapping[str, Provider],
    make_inputs: Callable[[], Sequence[Any]],
    check: Callable[..., None],
    *,
    bytes_moved: int | None = None,
    uncapturable: Collection[str] = (),
    sampling: Sampling | None = None,
    memory: bool = False,
) -> list[Row]:
    """Check every provider, then time them in turns; rows come back in the order of `providers`.

    Args:
        benchmark: the fixture of pytest-benchmark; it times `providers["fastkd"]`.
        op, case: names for the table, such as "compact" and "[32, 128, 768] bf16".
        providers: name to callable; each is called with the inputs. Must hold "fastkd".
        make_inputs: makes one set of inputs on DEVICE; called again for the copies that a GPU rotates through.
        check: called as check(result, *inputs) for every provider before any timing; raises where a result is wrong.
        bytes_moved: bytes read and written by one call, for the bandwidth columns.
        uncapturable: providers that wait for the device and so cannot be in a CUDA graph; they are timed eagerly.
        sampling: how long to measure.
        memory: measure the peak of every provider too.
    """
    sampling = sampling or Sampling()
    first = make_inputs()
    for name, provider in providers.items():
        try:
            check(provider(*first), *first)
        except AssertionError as error:
            raise AssertionError(f"{op} {case}: {name} gives a wrong result, so nothing was timed") from error

    peaks = {name: _peak_mib(provider, first) for name, provider in providers.items()} if memory else {}

    copies = [first, *(make_inputs() for _ in range(_rotations(first) - 1))]
    runners = {
        name: _runner(provider, copies, capture=name not in uncapturable, sampling=sampling)
        for name, provider in providers.items()
    }
    samples = _interleave(benchmark, runners, sampling)
    rows = [
        replace(_row(op, case, name, runner.timing, samples, bytes_moved), peak_mib=peaks.get(name))
        for name, runner in runners.items()
    ]
    benchmark.group = op
    benchmark.extra_info.update(case=case, environment=environment(), rows=[asdict(row) for row in rows])
    return rows


def by_tritons_launcher(provider: Provider) -> Provider:
    """The same, with every Triton kernel launched by Triton."""
    ours = Launcher._launch

    def launch(self: Launcher, device: int, grid: Any, arguments: Any, constants: Any) -> None:
        self.launch_by_triton(grid, arguments, constants)

    def run(*inputs: Any) -> Any:
        Launcher._launch = launch  # type: ignore[method-assign]
        try:
            return provider(*inputs)
        finally:
            Launcher._launch = ours  # type: ignore[method-assign]

    return run


def _peak_mib(provider: Provider, inputs: Sequence[Any]) -> float:
    return peak_bytes(lambda: provider(*inputs), on=DEVICE.type) / 2**20


def _interleave(benchmark: Any, runners: dict[str, Runner], sampling: Sampling) -> Samples:
    """Let pytest-benchmark time OURS, and sample the others just before each of its rounds."""
    ours = runners[OURS]
    others = {name: runner for name, runner in runners.items() if name != OURS}
    samples: Samples = {name: [] for name in others}

    def others_take_their_turn() -> None:
        for name, runner in others.items():
            samples[name].append(runner.sample())
        ours.set_clock()

    _spin_up(*runners.values())
    round_seconds = sum(runner.sample() * runner.calls for runner in runners.values())
    rounds = int(sampling.case_seconds / round_seconds)
    rounds = min(max(rounds, sampling.min_rounds), sampling.max_rounds)
    benchmark.pedantic(ours.run, setup=others_take_their_turn, rounds=rounds, iterations=1)
    samples[OURS] = list(benchmark.stats.stats.data)
    return samples


def _spin_up(*runners: Runner) -> None:
    """Keep a GPU busy until its clocks have risen: they fall while results are checked and graphs captured."""
    started = time.perf_counter()
    while DEVICE.type == "cuda" and time.perf_counter() - started < _SPIN_UP_SECONDS:
        for runner in runners:
            runner.sample()


def _runner(provider: Provider, copies: list[Sequence[Any]], *, capture: bool, sampling: Sampling) -> Runner:
    for inputs in copies * 3:
        provider(*inputs)
    calls = _calls_per_sample(provider, copies, sampling)

    def run() -> None:
        for call in range(calls):
            provider(*copies[call % len(copies)])

    if DEVICE.type != "cuda":
        return Runner(run, calls, "call")
    if not capture:
        return Runner(run, calls, "eager")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return Runner(graph.replay, calls, "graph")


def _calls_per_sample(provider: Provider, copies: list[Sequence[Any]], sampling: Sampling) -> int:
    probe = 3

    def run() -> None:
        for call in range(probe):
            provider(*copies[call % len(copies)])

    seconds = min(Runner(run, probe, "call").sample() for _ in range(3))
    # a graph replay has to last long enough to hide its own launch, and to visit every copy
    wanted = max(int(sampling.sample_seconds / max(seconds, 1e-7)), len(copies))
    return min(max(wanted, 1), sampling.max_calls)


def _rotations(inputs: Sequence[Any]) -> int:
    """How many copies of the inputs exceed the L2 cache twice over; 1 on CPU."""
    if DEVICE.type != "cuda":
        return 1
    size = sum(t.numel() * t.element_size() for t in _tensors(inputs))
    l2_cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return min(1 + 2 * l2_cache // max(size, 1), 64)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _row(op: str, case: str, provider: str, timing: str, samples: Samples, bytes_moved: int | None) -> Row:
    seconds = samples[provider]
    p20, median, p80 = (statistics.quantiles(seconds, n=10)[at] for at in (1, 4, 7))
    speedup = statistics.median(theirs / ours for theirs, ours in zip(seconds, samples[OURS], strict=True))
    gb_per_s = None if bytes_moved is None else bytes_moved / median / 1e9
    share = None if gb_per_s is None else gb_per_s / copy_bandwidth()
    return Row(op, case, provider, timing, median * 1e6, p20 * 1e6, p80 * 1e6, speedup, gb_per_s, share)


@cache
def copy_bandwidth() -> float:
    """GB/s, read plus written, of a copy that no cache holds."""
    source = torch.ones(64 * 2**20, device=DEVICE)
    target = torch.ones_like(source)
    runner = Runner(lambda: target.copy_(source), 1, "call")  # type: ignore[arg-type, return-value]
    _spin_up(runner)
    runner.sample()
    return 2 * source.numel() * 4 / statistics.median(runner.sample() for _ in range(9)) / 1e9


@cache
def environment() -> dict[str, Any]:
    """Where the numbers come from."""
    import fastkd_kernels

    on_gpu = DEVICE.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(DEVICE) if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fastkd_kernels": fastkd_kernels.__version__,
        "python": platform.python_version(),
        "copy_gb_per_s": round(copy_bandwidth(), 1),
        # above the number of cores, the times are those of the neighbours
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def format_table(rows: Sequence[Row]) -> str:
    """The rows as text; `speedup` is how many times faster OURS is than that row."""
    width = max(len(row.case) for row in rows)
    names = max(len(row.provider) for row in rows)
    with_memory = any(row.peak_mib is not None for row in rows)
    head = f"{'case':{width}}  {'provider':{names}}  timing   median us      p20      p80   speedup    GB/s  of copy"
    head += "  peak MiB" if with_memory else ""
    lines = [head, "-" * len(head)]
    for row in rows:
        bandwidth = "" if row.gb_per_s is None else f"{row.gb_per_s:8.1f}  {row.share_of_copy or 0:6.0%}"
        peak = "" if row.peak_mib is None else f"{row.peak_mib:10.1f}"
        lines.append(
            f"{row.case:{width}}  {row.provider:{names}}  {row.timing:6}  {row.median_us:10.2f} {row.p20_us:8.1f} "
            f"{row.p80_us:8.1f}  {row.speedup:7.2f}x{bandwidth:16}{peak}".rstrip()
        )
    return "\n".join(lines)


def save_results(rows: Sequence[Row], folder: Path) -> Path:
    """Write rows and environment to one JSON file, by way of a temporary name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{rows[0].op}-{DEVICE.type}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"environment": environment(), "rows": [asdict(row) for row in rows]}, indent=1))
    temporary.replace(path)
    return path
