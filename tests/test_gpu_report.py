"""The GPU report without a GPU: its data, its gate, its timing through fake devices, and every step once on the CPU."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import common
import gpu_report
import sanitize
from gpu import cases, early_exit, plan, render, steps, sweep, timing
from gpu.parts import Part
from gpu.records import (
    OURS,
    TESTS_OF_OP,
    Ceilings,
    Goal,
    ModelRow,
    Outcomes,
    Quantiles,
    Report,
    Row,
    StepResult,
    SweepRow,
    Times,
    Work,
)
from gpu.timing import CudaTimer, Provider, Sampling, WallTimer, measure

ROOT = Path(__file__).parents[1]
DISTILLATION = {"kd_loss", "universal_kd_loss", "distillation_loss"}
ENGINES = ["batch", "graphs", "stream", "stream_batches", "stream_batches, long runs"]
CEILINGS = Ceilings(copy_bytes_per_s=4e12, matmul_flops_per_s=8e14, launch_us=1.5)
PROVED = {file: Outcomes(passed=3) for files in TESTS_OF_OP.values() for file in files}
SHORT = Sampling(rounds=3, replay_seconds=1e-5, max_calls=2, host_calls=2, max_copies=3)


def times_of(warm: float, cold: float | None = None, end_to_end: float = 50.0) -> Times:
    spread = Quantiles(warm, warm * 0.9, warm * 1.1)
    return Times("graph", spread, None if cold is None else Quantiles(cold, cold, cold), 7.0, end_to_end)


def row_of(op: str = "exit_gate", provider: str = OURS, warm: float = 4.0, **options: Any) -> Row:
    fields = {"times": times_of(warm), "memory_us": 1.0, "compute_us": 0.5, "basis": "warm", **options}
    return Row(op=op, case="[32, 4] fp32", provider=provider, **fields)


def model_row(batch_size: int = 32, seconds: float = 0.02) -> ModelRow:
    return ModelRow(batch_size, 256, 1.14, "batch", seconds, 0.019, 0.021, "eager in a CUDA graph", 0.18, 10.0)


def full_report(**options: Any) -> Report:
    report = Report(environment={"device": "NVIDIA H200"}, ceilings=CEILINGS, tests=dict(PROVED), **options)
    report.rows = [row_of(), row_of(provider="eager", warm=40.0), row_of("compact", warm=3.0)]
    report.sweeps = [
        SweepRow("compact", "[8]", "chosen", 4.0, True),
        SweepRow("compact", "[8]", "bulk, threads 64", 2.0, False),
    ]
    report.models = [model_row(), model_row(128)]
    report.steps = [StepResult("ops", "done", 12.0)]
    return report


# Records


def test_the_floor_is_the_slower_of_bytes_and_operations() -> None:
    assert Work(8_000_000).floor_us(CEILINGS) == pytest.approx(2.0)
    assert Work(8_000_000, flops=8 * 10**9).floor_us(CEILINGS) == pytest.approx(10.0)
    row = row_of(warm=4.0, memory_us=1.0, compute_us=2.0)
    assert (row.floor_us, row.share_of_floor) == (2.0, 0.5)


def test_the_work_of_a_head_is_counted_by_hand() -> None:
    work = cases.head_work(256, 128, 768, itemsize=2)
    hidden_states = 256 * 128 * 768 * 2
    assert hidden_states < work.bytes_moved < 1.02 * hidden_states
    narrow = 2 * 256 * 128 * 768 * 128
    assert narrow < work.flops < 1.02 * narrow


def test_the_basis_chooses_the_time_that_counts() -> None:
    cold = row_of(times=times_of(4.0, cold=8.0), basis="cold")
    assert (cold.median_us, row_of(times=times_of(4.0, cold=8.0)).median_us) == (8.0, 4.0)
    assert row_of(times=times_of(4.0), basis="cold").median_us == 4.0


def test_rows_survive_their_file(tmp_path: Path) -> None:
    goal = Goal("<= 5 us", 5.0, lambda rows: rows[OURS].times.warm.median, at_most=True).judge({OURS: row_of()})
    assert goal is not None
    part = Part(tmp_path / "part.json", CEILINGS)
    part.rows = [replace(row_of(), goals=(goal,)), row_of(times=times_of(1.0, 2.0))]
    part.sweeps, part.models, part.problems = [SweepRow("compact", "[8]", "x", 1.0, False)], [model_row()], ["lost"]
    part.write()
    assert Part.read(part.path) == part


@pytest.mark.parametrize(("value", "at_most", "met"), [(4.0, True, True), (6.0, True, False), (6.0, False, True)])
def test_goals(value: float, at_most: bool, met: bool) -> None:
    goal = Goal("five", 5.0, lambda rows: rows[OURS].median_us, at_most)
    result = goal.judge({OURS: row_of(warm=value)})
    assert result is not None
    assert (result.value, result.met) == (value, met)
    assert goal.judge({"eager": row_of()}) is None, "without our row the goal stays open"


def test_a_ratio_of_models_is_speed_over_flops() -> None:
    assert (model_row().speedup, model_row().ratio) == (pytest.approx(9.0), pytest.approx(0.9))


# The gate


def test_rows_whose_tests_failed_are_kept_apart() -> None:
    report = full_report()
    report.tests["test_exit_gate"] = Outcomes(passed=9, failed=("test_exit_gate::test_it",))
    written, text = report.to_dict(), render.markdown(report)
    unproven = written["unproven"]
    assert {row["op"] for row in written["rows"]} == {"compact"}
    assert {row["op"] for row in unproven["rows"]} == {"exit_gate"}
    assert len(written["rows"]) + len(unproven["rows"]) == len(report.rows), "none is dropped"
    assert (written["models"], len(unproven["models"])) == ([], 2), "a whole model runs the gate too"
    assert [reason.split(":")[0] for reason in unproven["reasons"]] == ["exit_gate", "early exit"]
    shown, _, apart = text.partition("## Unproven")
    assert "exit_gate: unproven, because 1 of its tests failed in this run, first test_exit_gate::test_it" in apart
    assert "[32, 4] fp32 | eager" not in shown
    assert "[32, 4] fp32 | eager" in apart
    assert "\n## " not in apart, "no heading of its own could be taken for a proven table"


@pytest.mark.parametrize(
    ("engine", "proof"),
    [
        ("stream", "test_stream"),
        ("stream_batches", "test_stream_batches"),
        ("stream_batches, long runs", "test_stream_batches"),
    ],
)
def test_a_stream_has_its_own_proof_and_goal(engine: str, proof: str) -> None:
    report = full_report()
    report.models += [replace(model_row(), engine=engine), replace(model_row(seconds=0.024), engine=engine)]
    assert [(row.goal, row.ratio >= row.goal) for row in report.models if row.goal] == [
        (0.8, True),
        (0.8, True),
        (0.9, True),
        (0.9, False),
    ]
    assert replace(model_row(8), engine=engine).goal is None
    report.tests[proof] = Outcomes(passed=9, failed=(f"{proof}::test_it",))
    assert {row.engine for row in report.proven().models} == {"batch"}
    assert [reason.split(":")[0] for reason in report.reasons()] == [f"early exit, {engine.split(',')[0]}"]


@pytest.mark.parametrize("outcome", [None, Outcomes(skipped=5), Outcomes(not_reached=5)])
def test_rows_that_no_test_proved_are_unproven(outcome: Outcomes | None) -> None:
    report = full_report()
    del report.tests["test_compact"]
    if outcome is not None:
        report.tests["test_compact"] = outcome
    assert {row.op for row in report.proven().rows} == {"exit_gate"}
    assert report.proven().sweeps == []
    assert "compact: unproven, because no test of test_compact passed in this run" in report.reasons()


def test_what_a_fallback_took_is_unproven() -> None:
    """An op without a kernel runs the reference and passes every test: its time is not that of the op."""
    report = full_report(fallbacks={"compact": "the extension has no CUDA kernel of compact"})
    assert {row.op for row in report.proven().rows} == {"exit_gate"}
    assert report.proven().models == [], "models launch it too"
    assert report.reasons()[0].startswith("compact: unproven, because a fallback was measured in place of compact: the")


def test_an_op_without_known_tests_is_unproven() -> None:
    report = full_report()
    report.rows = [row_of("new_op")]
    assert report.proven().rows == []
    assert "add it to TESTS_OF_OP" in report.reasons()[0]


def test_every_op_that_is_measured_has_its_tests() -> None:
    planned = {case.op for cases_of in cases.ALL.values() for case in cases_of(cases.REHEARSAL, torch.device("cpu"))}
    assert planned <= set(TESTS_OF_OP)
    assert {f"{file}.py" for op in planned for file in TESTS_OF_OP[op]} <= {p.name for p in ROOT.glob("tests/*.py")}


# The report


def test_the_report_says_what_was_measured(tmp_path: Path) -> None:
    report = full_report()
    report.rows[0] = replace(
        report.rows[0],
        goals=(Goal("<= 5 us", 5.0, lambda _: 4.0, True).judge({}),),  # type: ignore[arg-type]
    )
    report.problems.append("student_head: lost")
    pictures = render.plot(report, tmp_path, "x")
    text = render.markdown(report, pictures)
    assert "copy 4.00 TB/s" in text
    assert "| [32, 4] fp32 | eager | **40.00** |" in text
    assert "10.00x |" in text
    assert "| [32, 4] fp32 | <= 5 us | 4 | yes |" in text
    assert "| compact | [8] | bulk, threads 64 | 2.00 | 4.00 | 2.00x |" in text
    assert "| 32 | 1.14 | batch | 2.500 |" in text
    assert "| 9.00x | 10.00x | 0.90 | yes |" in text
    assert "* student_head: lost" in text
    assert pictures == ["x-ops.png", "x-models.png"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in pictures)


def test_a_rehearsal_cannot_be_taken_for_a_measurement(tmp_path: Path) -> None:
    report = full_report(rehearsal=True)
    assert render.markdown(report).startswith("# A rehearsal: no GPU produced these numbers")
    assert report.to_dict()["rehearsal"] is True


def test_an_empty_report_is_one_too(tmp_path: Path) -> None:
    report = Report(environment={"device": "NVIDIA H200"})
    text = render.markdown(report)
    assert "Ceilings: not yet measured" in text
    assert "No test ran in this run, so every row is unproven." in text
    assert render.plot(report, tmp_path, "x") == []
    assert json.loads(json.dumps(report.to_dict()))["rows"] == []


# Timing


class FakeTimer:
    """A device on which every call takes 2 us cold and 1 us where its inputs were just used; an eviction takes 30."""

    def __init__(self, l2_bytes: int) -> None:
        self.device = torch.device("cpu")
        self.l2_bytes = l2_bytes
        self.clock = 0.0
        self.in_cache: list[int] = []
        self.spun_up: list[tuple[float, float]] = []

    def touch(self, tensor: Tensor) -> None:
        self.clock += 1e-6 if tensor.data_ptr() in self.in_cache else 2e-6
        self.in_cache = [tensor.data_ptr()]

    def evict(self) -> None:
        self.in_cache = []
        self.clock += 30e-6

    def capture(self, calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
        def run() -> None:
            for call in calls:
                call()

        return run

    def spin_up(self, seconds: float) -> None:
        self.spun_up.append((seconds, self.clock))

    def device_seconds(self, run: Callable[[], None], ahead: float = 0.0) -> float:
        started = self.clock
        run()
        return self.clock - started

    def host_seconds(self, run: Callable[[], None]) -> float:
        return self.device_seconds(run) + 8e-6

    def wall_seconds(self, run: Callable[[], None]) -> float:
        return self.device_seconds(run) + 20e-6


@pytest.mark.parametrize("l2_bytes", [400, 2**20], ids=["rotated", "evicted"])
def test_warm_and_cold_are_told_apart(l2_bytes: int) -> None:
    timer = FakeTimer(l2_bytes)
    made = []

    def make_inputs() -> Sequence[Any]:
        made.append(torch.zeros(100))
        return (made[-1],)

    times = measure(timer, {OURS: Provider(timer.touch)}, make_inputs, Sampling(rounds=5, max_copies=10))[OURS]
    assert len(made) == (3 if l2_bytes == 400 else 1)
    assert times.timing == "graph"
    assert times.warm.median == pytest.approx(1.0, rel=0.05)
    assert times.cold is not None
    assert times.cold.median == pytest.approx(2.0, rel=0.05)
    assert times.host_us == pytest.approx(1.4, rel=0.1)
    assert times.end_to_end_us == pytest.approx(21.0, rel=0.1)


def test_a_cold_time_lost_among_the_evictions_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = FakeTimer(2**20)
    # a call that takes no longer than the evictions differ from one another
    monkeypatch.setattr(timer, "touch", lambda tensor: None)
    times = measure(timer, {OURS: Provider(timer.touch)}, lambda: (torch.zeros(100),), SHORT)[OURS]
    assert times.cold is None


def test_the_clock_of_the_benchmarks_leaves_launches_of_graphs_out(
    fake_cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(common, "CLOCK", common.Clock())
    for kind, expected in (("graph", "event sleep event run event sleep event"), ("eager", "event run event")):
        runner = common.Runner(lambda: fake_cuda.said.append("run"), 1, kind)
        runner.sample()
        fake_cuda.said.clear()
        assert runner.sample() > 0
        assert " ".join(said.split()[0] for said in fake_cuda.said) == expected


def test_what_a_graph_refuses_is_timed_call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = FakeTimer(2**20)
    capture = timer.capture

    def refuse(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
        if len(calls) == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return capture(calls)

    monkeypatch.setattr(timer, "capture", refuse)
    times = measure(timer, {OURS: Provider(timer.touch)}, lambda: (torch.zeros(4),), SHORT)[OURS]
    assert times.timing == "call"
    assert times.warm.median == pytest.approx(1.0)
    assert times.cold is None


def test_ceilings_of_a_known_device(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = FakeTimer(64)
    monkeypatch.setattr(timer, "device_seconds", lambda run, ahead=0.0: (run(), 2e-3)[1])
    ceilings = timing.measure_ceilings(timer, copy_bytes=1000, matmul_size=4, samples=3)
    assert ceilings.copy_bytes_per_s == pytest.approx(2 * 1000 / 1e-3)
    assert ceilings.matmul_flops_per_s == pytest.approx(2 * 4**3 / 1e-3)
    assert ceilings.launch_us == pytest.approx(10.0)
    assert [clock for _, clock in timer.spun_up] == [0.0], "the clocks rise before the first ceiling"


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Enough of torch.cuda for `CudaTimer`: events that count, graphs that replay nothing, an idle device."""
    seen = SimpleNamespace(events=0, captured=0, replayed=0, waited=0, said=[])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            seen.events += 1
            seen.said.append("event")
            self.at = seen.events

        def synchronize(self) -> None:
            seen.waited += 1

        def elapsed_time(self, other: Event) -> float:
            return float(other.at - self.at)

    class CUDAGraph:
        def replay(self) -> None:
            seen.replayed += 1
            seen.said.append("replay")

    @contextmanager
    def graph(into: CUDAGraph) -> Iterator[None]:
        seen.captured += 1
        yield

    def synchronize() -> None:
        seen.waited += 1

    for name, value in {
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "synchronize": synchronize,
        "_sleep": lambda cycles: seen.said.append(f"sleep {cycles}"),
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=64),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return seen


def test_cuda_events_around_graph_replays(fake_cuda: SimpleNamespace) -> None:
    timer, calls = CudaTimer("cpu"), []
    run = timer.capture([lambda: calls.append(1)] * 3)
    assert (len(calls), fake_cuda.captured) == (3, 1)
    assert timer.device_seconds(run) == pytest.approx(1e-3)
    assert fake_cuda.replayed == 1
    asleep = f"sleep {int(timing.LAUNCH_SECONDS * timing.CYCLES_PER_SECOND)}"
    assert fake_cuda.said == [asleep, "event", "replay", "event"], "the launch is over before the first event"
    fake_cuda.said.clear()
    timer.device_seconds(run, ahead=1.0)
    assert fake_cuda.said[0] == f"sleep {int(timing.LONGEST_SLEEP * timing.CYCLES_PER_SECOND)}"
    assert len(calls) == 3, "a replay calls nothing on the host"
    waited = fake_cuda.waited
    assert timer.host_seconds(lambda: time.sleep(0.01)) >= 0.01
    assert timer.wall_seconds(lambda: time.sleep(0.01)) >= 0.01
    assert fake_cuda.waited == waited + 4
    timer.evict()
    assert timer._filler.numel() == 128


def test_the_clocks_are_up_when_two_bursts_take_equally_long(
    fake_cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "BUSY_SIZE", 8)
    timer, bursts = CudaTimer("cpu"), iter([8.0, 4.0, 2.0, 2.01, 1.0])
    monkeypatch.setattr(timer, "device_seconds", lambda run, ahead=0.0: (run(), next(bursts))[1])
    monkeypatch.setattr(timing.time, "perf_counter", iter([0.0, 0.0, 0.1, 0.2, 0.3, 0.4]).__next__)
    timer.spin_up(0.15)
    assert next(bursts) == 1.0, "the fourth burst took as long as the third"


def test_a_device_whose_clocks_never_settle_is_not_waited_for(
    fake_cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "BUSY_SIZE", 8)
    timer, seconds = CudaTimer("cpu"), itertools.cycle((1.0, 2.0))
    monkeypatch.setattr(timer, "device_seconds", lambda run, ahead=0.0: next(seconds))
    started = time.monotonic()
    timer.spin_up(0.02)
    assert time.monotonic() - started < 5


def test_the_clocks_rise_before_a_case_and_launches_stay_out_of_it() -> None:
    timer = FakeTimer(2**20)
    asked: list[float] = []
    measured = timer.device_seconds

    def device_seconds(run: Callable[[], None], ahead: float = 0.0) -> float:
        asked.append(ahead)
        return measured(run, ahead)

    timer.device_seconds = device_seconds  # type: ignore[method-assign]
    measure(timer, {OURS: Provider(timer.touch)}, lambda: (torch.zeros(100),), SHORT)
    assert [seconds for seconds, _ in timer.spun_up] == [timing.SPIN_UP_SECONDS]
    slept = [ahead for ahead in asked if ahead]
    assert len(slept) == 3 * SHORT.rounds, "warm, cold, and the evictions alone"
    assert min(slept) >= timing.LAUNCH_SECONDS
    slow = timing._ahead(timer, lambda: setattr(timer, "clock", timer.clock + 1e-3))
    assert slow == pytest.approx(2 * (1e-3 + 8e-6)), "what takes the host long to launch gets a longer sleep"


def test_a_whole_case_on_the_cuda_timer(fake_cuda: SimpleNamespace, tmp_path: Path) -> None:
    context = steps.Context(CudaTimer("cpu"), steps.REHEARSAL, Part(tmp_path / "p.json"), math.inf)
    context.ceilings = CEILINGS
    assert context.begin_case("compact")
    case = next(cases.compact(cases.REHEARSAL, torch.device("cpu")))
    rows = {row.provider: row for row in steps.measure_case(context, case)}
    assert set(rows) == set(case.providers)
    assert rows[OURS].times.timing == "graph"
    assert rows["h[mask]"].times.timing == "call"
    assert [goal.text for goal in rows[OURS].goals] == ["never slower than index_select"]
    assert context.part.problems == []


# Steps


WORK = {
    "ceilings": ("ceilings",),
    "ops": tuple(f"ops:{group}" for group in cases.ALL),
    "models": ("models:large", "models:small"),
    "sweep": tuple(f"sweep:{op}" for op in sweep.OF_OP),
}


def test_every_work_has_a_step() -> None:
    planned = [one for step in plan.ORDER for one in step.work]
    assert sorted(planned) == sorted(one for work in WORK.values() for one in work)


@pytest.mark.parametrize("name", WORK)
def test_every_work_on_the_cpu(name: str, tmp_path: Path) -> None:
    """The very code that a GPU would run, with tiny shapes and a wall clock."""
    part = steps.run_work(WORK[name], tmp_path / "part.json", math.inf, rehearse=True)
    assert part.problems == []
    assert part.ceilings is not None
    assert Part.read(part.path) == part
    if name == "ops":
        assert {row.op for row in part.rows} == set(cases.ALL) - {"distillation"} | DISTILLATION
        assert all(row.floor_us > 0 and row.times.end_to_end_us > 0 for row in part.rows)
    if name == "sweep":
        assert {row.op for row in part.sweeps} == {"exit_gate", "student_head_exit", "compact"}
        assert sum(row.chosen for row in part.sweeps) == 3
        assert len(part.sweeps) > 6
    if name == "models":
        assert {(row.batch_size, row.engine) for row in part.models} == set(product((1, 4), ENGINES))
        assert all(row.seconds > 0 and row.ratio > 0 for row in part.models)


def test_a_warm_up_times_nothing(tmp_path: Path) -> None:
    for name in ("ops", "sweep"):
        part = steps.run_work(WORK[name], tmp_path / "p.json", math.inf, rehearse=True, warm_up=True, shard=(0, 2))
        assert (part.rows, part.sweeps, part.problems) == ([], [], [])


def test_a_step_whose_time_is_over_says_what_is_missing(tmp_path: Path) -> None:
    part = steps.run_work(["ops:exit_gate"], tmp_path / "part.json", 0.0, rehearse=True)
    assert part.rows == []
    assert "exit_gate [32, 4] fp32: left out, 0 s were left" in part.problems


def test_a_case_that_would_not_end_in_time_is_not_begun(tmp_path: Path) -> None:
    context = context_in(tmp_path)
    context.deadline, context.slowest = time.monotonic() + 5, 8.0
    assert not context.begin_case("exit_gate [4]")
    assert context.part.problems == ["exit_gate [4]: left out, 5 s were left"]
    context.slowest = 2.0
    assert context.begin_case("exit_gate [4]")


def some_case(**providers: Provider) -> cases.Case:
    def check(result: Tensor, x: Tensor) -> None:
        assert result.equal(x + 1), "not one more"

    providers = {OURS: Provider(lambda x: x + 1), **providers}
    return cases.Case("compact", "[4]", providers, lambda: (torch.zeros(4),), check, Work(32))


def context_in(folder: Path) -> steps.Context:
    context = steps.Context(WallTimer(), steps.REHEARSAL, Part(folder / "part.json"), math.inf, ceilings=CEILINGS)
    assert context.begin_case("compact [4]")
    return context


def test_a_wrong_result_is_not_timed(tmp_path: Path) -> None:
    def crash(x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    context = context_in(tmp_path)
    rows = steps.measure_case(context, some_case(wrong=Provider(lambda x: x), crashing=Provider(crash)))
    assert [row.provider for row in rows] == [OURS]
    assert context.part.problems == [
        "compact [4]: wrong gives a wrong result, not timed: not one more",
        "compact [4]: crashing does not run: RuntimeError: out of memory",
    ]
    other = Provider(lambda x: x, check=lambda result, x: None)
    assert len(steps.measure_case(context, some_case(other=other))) == 2
    broken = replace(some_case(), providers={OURS: Provider(lambda x: x), "right": Provider(lambda x: x + 1)})
    assert steps.measure_case(context, broken) == [], "where ours is wrong nothing is reported"


def test_a_baseline_that_a_graph_refuses_is_told_and_meets_no_goal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
        def run() -> None:
            for call in calls:
                call()

        waits = any("index_select" in str(call()) for call in calls)
        if waits:
            raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
        return run

    goal = next(
        goal
        for case in cases.compact(cases.REHEARSAL, torch.device("cpu"))
        for goal in case.goals
        if goal.text == "never slower than index_select"
    )
    case = replace(some_case(index_select=Provider(lambda x: "index_select")), check=lambda *_: None, goals=[goal])
    context = context_in(tmp_path)
    assert [len(row.goals) for row in steps.measure_case(context, case)] == [1, 0]
    assert context.part.problems == []
    monkeypatch.setattr(context.timer, "capture", refuse)
    rows = steps.measure_case(context, case)
    assert [row.times.timing for row in rows] == ["graph", "call"]
    assert [len(row.goals) for row in rows] == [0, 0]
    assert context.part.problems == [
        "compact [4]: index_select was refused by a CUDA graph, so it is timed call by call"
    ]


def test_a_configuration_that_gives_another_result_is_a_problem(tmp_path: Path) -> None:
    def out_of_resources(x: Tensor) -> Tensor:
        raise RuntimeError("out of resource: shared memory")

    configs = {
        "chosen": lambda x: x,
        "wrong": lambda x: x + 1,
        "too large": out_of_resources,
        "good": lambda x: x * 1,
    }
    swept = sweep.Swept("compact", "[4]", configs, lambda: (torch.zeros(4),), "warm")
    context = context_in(tmp_path)
    rows = sweep.measure_configs(swept, context)
    problems = context.part.problems
    assert [(row.config, row.chosen) for row in rows] == [("chosen", True), ("good", False)]
    assert [problem.split(": ")[1] for problem in problems] == ["wrong", "too large"]


def test_the_whole_plan_can_be_laid_out() -> None:
    device = torch.device("cpu")
    planned = [case for cases_of in cases.ALL.values() for case in cases_of(cases.FULL, device)]
    texts = {(case.op, goal.text) for case in planned for goal in case.goals}
    assert texts == {
        ("exit_gate", "<= 5 us"),
        ("exit_gate", ">= 10x eager, end to end"),
        ("exit_gate", ">= 90 % of the copy bandwidth"),
        ("student_head_exit", "<= 20 us"),
        ("student_head_exit", ">= 5x eager, end to end"),
        ("student_head_exit", ">= 2x CUDA-graphed eager"),
        ("student_head_exit", ">= 60 % of the slower floor"),
        ("compact", "never slower than index_select"),
        ("compact", ">= 92 % of the copy bandwidth"),
        ("compaction step", ">= 5x h[mask], end to end"),
        ("compaction step", ">= 5x h[mask], device time"),
    }
    for case in planned:
        assert case.work.floor_us(CEILINGS) > 0
        assert all(goal.judge(dict.fromkeys(case.providers, row_of())) is not None for goal in case.goals), case.name
    swept = list(sweep.cases_of(sweep.FULL, device))
    assert {one.op for one in swept} == {"exit_gate", "student_head_exit", "compact"}
    assert min(len(one.configs) for one in swept) >= 5


def test_everything_fits_a_card_of_24_gb() -> None:
    """Inputs, their copies beyond the cache, and for each provider two graphs with thrice the inputs in between."""
    meta, gib = torch.device("meta"), 2**30
    l2 = 96 * 2**20
    inputs = [
        (one.name, len(providers), sum(t.numel() * t.element_size() for t in timing.tensors_in(one.make_inputs())))
        for made, scale in ((cases.ALL, cases.FULL), (sweep.OF_OP, sweep.FULL))
        for of_op in made.values()
        for one in of_op(scale, meta)  # type: ignore[arg-type]
        for providers in [getattr(one, "providers", ["one", "another"])]  # a swept op allocates its results alone
    ]
    for name, providers, size in inputs:
        copies = size * (1 + 2 * l2 // size) if size * steps.FULL.sampling.max_copies > 2 * l2 else size
        assert copies + 2 * 3 * providers * size < 20 * gib, name
    assert 2 * steps.FULL.copy_bytes + 3 * 2 * steps.FULL.matmul_size**2 < 20 * gib


def test_a_swept_configuration_is_the_one_that_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    config = sweep.ExitGateConfig.choose(4096, 2)
    with sweep._instead_of(sweep.ExitGateConfig, config):
        assert sweep.ExitGateConfig.choose(1, 3) is config
    assert sweep.ExitGateConfig.choose(1, 3) != config


# Whole models


@pytest.mark.parametrize(("average", "layers"), [(1.14, 12), (2.79, 12), (1.0, 12), (6.5, 12), (1.5, 4)])
def test_an_exit_pattern_has_its_average(average: float, layers: int) -> None:
    pattern = early_exit.exit_pattern(512, average, layers)
    assert (int(pattern.min()), int(pattern.max()) <= layers) == (1, True)
    assert pattern.double().mean().item() == pytest.approx(average, abs=0.02)
    counts = pattern.bincount(minlength=layers + 1)[1:]
    assert counts[:-1].diff().max() <= 1, "deeper layers answer fewer rows, but for those that never leave"
    assert pattern.equal(early_exit.exit_pattern(512, average, layers)), "the same every time"


def test_an_engine_that_answers_something_else_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = early_exit.Setting(early_exit.REHEARSAL, 4, WallTimer())
    pattern = early_exit.exit_pattern(setting.rows, 1.5, 3)
    problems: list[str] = []
    early = setting._right_engines(pattern, problems)
    assert (list(early), problems) == (ENGINES, [])
    predictions, _ = early["batch"]()
    for make, message in (
        (lambda: (predictions + 1, pattern), "AssertionError: only 0.0% of its answers are those of batch"),
        (lambda: (predictions, pattern + 1), "AssertionError: it does not follow the imposed exit pattern"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
    ):
        contestants = {**early, "stream": make}
        monkeypatch.setattr(setting, "early_exits", lambda _, contestants=contestants: contestants)
        problems.clear()
        assert list(setting._right_engines(pattern, problems)) == [name for name in ENGINES if name != "stream"]
        assert problems == [f"early exit, batch 4: stream: {message}"]


def test_a_full_model_that_answers_something_else_is_not_the_best_one(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = early_exit.Setting(early_exit.REHEARSAL, 4, WallTimer())
    problems: list[str] = []
    with torch.inference_mode():
        assert len(setting.full_models(problems)) == 5
        assert problems == []
        eager = setting._full
        for wrong, said in ((lambda ids: eager(ids) * math.nan, r"its logits differ from eager's by nan%"),
                            (lambda ids: eager(ids).roll(1, 0), r"its logits differ from eager's by")):  # fmt: skip
            problems.clear()
            monkeypatch.setattr(setting, "_full_in_torch", wrong)
            assert list(setting.full_models(problems)) == ["eager", "eager in a CUDA graph"]
            assert len(problems) == 3
            assert all(said in problem for problem in problems)


def test_rounding_of_bfloat16_is_no_other_answer() -> None:
    logits = torch.randn(64, 4)
    early_exit.check_logits(logits.bfloat16(), logits)
    with pytest.raises(AssertionError, match="differ from eager's by"):
        early_exit.check_logits(logits + 0.2 * torch.randn(64, 4), logits)


@pytest.mark.parametrize("make", [cases.exit_gate, cases.student_head_exit, cases.student_head])
def test_the_compiler_in_its_default_mode_stands_in_a_cuda_graph(make: cases.Cases) -> None:
    """reduce-overhead has graphs of its own, with copies around them: the best baseline is a graph of ours."""
    modes: list[str | None] = []

    class Compiling(cases.Scale):
        def compile(self, function: Callable[..., Any], mode: str | None = None, dynamic: bool | None = None) -> Any:
            modes.append(mode)
            return (lambda *inputs: function(*inputs)) if mode is None else function

    scale = Compiling(**{name: getattr(cases.REHEARSAL, name) for name in cases.Scale.__dataclass_fields__})
    for case in make(scale, torch.device("cpu")):
        in_graphs = [name for name, one in case.providers.items() if "compile" in name and one.capturable]
        assert in_graphs, case.name
        assert None in modes


def test_an_average_that_is_too_deep_is_refused() -> None:
    with pytest.raises(ValueError, match=r"average: got 7, expected 1 to 6.5"):
        early_exit.exit_pattern(8, 7, 12)


# Sanitizers


@pytest.mark.parametrize(
    ("status", "log", "expected", "note"),
    [
        ("done", "x\n========= ERROR SUMMARY: 0 errors\n", "done", "ERROR SUMMARY: 0 errors"),
        ("failed", "========= ERROR SUMMARY: 3 errors\n", "failed", "ERROR SUMMARY: 3 errors"),
        ("failed", "Error: Device not supported\n", "skipped", "the tool does not run here: Device not supported"),
        ("timed out", "", "timed out", "its time was over"),
        ("failed", "Traceback\n", "failed", "last line"),
    ],
)
def test_what_a_sanitizer_found(status: str, log: str, expected: str, note: str) -> None:
    said = "its time was over" if status == "timed out" else "last line"
    assert gpu_report.sanitizer_result(status, said, log) == (expected, note)


def race(first: str, second: str, kind: str = "Error") -> str:
    return f"========= {kind}: Race reported between {first}\n=========     and {second} [6136 hazards]\n=========\n"


STANDARD = "/env/lib/python3.12/site-packages/triton/language/standard.py:237"
REDUCTION = race(
    f"Write access at _head_kernel+0x5ad20 in {STANDARD}", f"Write access at _head_kernel+0x5ad20 in {STANDARD}"
)
TRUE_RACES = [
    # as NVIDIA's documentation shows it, without lines
    race("Write access at _head_kernel+0x5ad20", "Write access at _head_kernel+0x5ad20"),
    race(f"Write access at _head_kernel+0x10 in {STANDARD}", f"Write access at _head_kernel+0x20 in {STANDARD}"),
    race(f"Read access at _head_kernel+0x10 in {STANDARD}", f"Write access at _head_kernel+0x10 in {STANDARD}"),
    race(
        "Write access at _k+0x1 in /x/student_head.py:281",
        "Write access at _k+0x1 in /x/student_head.py:281",
        "Warning",
    ),
    "========= Error: Potential WAW hazard detected at __shared__ 0x404 in block (0,0,0) :\n"
    "=========     Write Thread (23,0,0) at kernel+0x1a0 in kernel.ttgir:32\n",
]


def raced(*reports: str, counted: int | None = None, end: str = "sanitize: every result is right\n") -> str:
    hazards = len(reports) if counted is None else counted
    summary = f"{hazards} hazards displayed ({hazards} errors, 0 warnings)"
    return f"{end}{''.join(reports)}========= RACECHECK SUMMARY: {summary}\n"


def test_known_reports_of_racecheck_hide_no_race() -> None:
    known = gpu_report.sanitizer_result("failed", "x", raced(REDUCTION, REDUCTION))
    assert known == ("done", "2 known reports of Triton's reductions, no other")
    for report in TRUE_RACES:
        status, note = gpu_report.sanitizer_result("failed", "x", raced(REDUCTION, report, REDUCTION))
        assert status == "failed"
        assert note.startswith("1 races, and 2 known reports; the first: ========= "), note
    # more than were printed, and a script that did not come to its end
    assert gpu_report.sanitizer_result("failed", "x", raced(REDUCTION, counted=2))[0] == "failed"
    assert gpu_report.sanitizer_result("failed", "x", raced(REDUCTION, end="Traceback\n"))[0] == "failed"


def test_sanitize_names_its_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["attention"]) == 2
    assert "got attention, expected some of student_head_exit, exit_gate, compact" in capsys.readouterr().err
    assert next(iter(sanitize.KERNELS)) == "student_head_exit", "its ticket is the first thing to examine"
