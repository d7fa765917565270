"""The GPU report without a GPU: its data, its gate, its timing through fake devices, and every step once on the CPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
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

import gpu_report
import sanitize
from gpu import cases, early_exit, outcomes, render, steps, sweep, timing
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


# --- records --------------------------------------------------------------------------------------------------------


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
    part = steps.Part(tmp_path / "part.json", CEILINGS)
    part.rows = [replace(row_of(), goals=(goal,)), row_of(times=times_of(1.0, 2.0))]
    part.sweeps, part.models, part.problems = [SweepRow("compact", "[8]", "x", 1.0, False)], [model_row()], ["lost"]
    part.write()
    assert steps.Part.read(part.path) == part


@pytest.mark.parametrize(("value", "at_most", "met"), [(4.0, True, True), (6.0, True, False), (6.0, False, True)])
def test_goals(value: float, at_most: bool, met: bool) -> None:
    goal = Goal("five", 5.0, lambda rows: rows[OURS].median_us, at_most)
    result = goal.judge({OURS: row_of(warm=value)})
    assert result is not None
    assert (result.value, result.met) == (value, met)
    assert goal.judge({"eager": row_of()}) is None, "without our row the goal stays open"


def test_a_ratio_of_models_is_speed_over_flops() -> None:
    assert (model_row().speedup, model_row().ratio) == (pytest.approx(9.0), pytest.approx(0.9))


# --- the gate -------------------------------------------------------------------------------------------------------


def test_rows_whose_tests_failed_are_not_reported() -> None:
    report = full_report()
    report.tests["test_exit_gate"] = Outcomes(passed=9, failed=("test_exit_gate::test_it",))
    written, text = report.to_dict(), render.markdown(report)
    assert {row["op"] for row in written["rows"]} == {"compact"}
    assert written["models"] == [], "a whole model runs the gate too"
    assert [reason.split(":")[0] for reason in written["withheld"]] == ["exit_gate", "early exit"]
    assert "exit_gate: not reported, because 1 of its tests failed in this run, first test_exit_gate::test_it" in text
    assert "[32, 4] fp32 | eager" not in text


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
    assert {row.engine for row in report.shown_models()} == {"batch"}
    assert [reason.split(":")[0] for reason in report.withheld()] == [f"early exit, {engine.split(',')[0]}"]


@pytest.mark.parametrize("outcome", [None, Outcomes(skipped=5), Outcomes(not_reached=5)])
def test_rows_that_no_test_proved_are_not_reported(outcome: Outcomes | None) -> None:
    report = full_report()
    del report.tests["test_compact"]
    if outcome is not None:
        report.tests["test_compact"] = outcome
    assert {row.op for row in report.shown_rows()} == {"exit_gate"}
    assert report.shown_sweeps() == []
    assert "compact: not reported, because no test of test_compact passed in this run" in report.withheld()


def test_an_op_without_known_tests_is_not_reported() -> None:
    report = full_report()
    report.rows = [row_of("new_op")]
    assert report.shown_rows() == []
    assert "add it to TESTS_OF_OP" in report.withheld()[0]


def test_every_op_that_is_measured_has_its_tests() -> None:
    planned = {case.op for cases_of in cases.ALL.values() for case in cases_of(cases.REHEARSAL, torch.device("cpu"))}
    assert planned <= set(TESTS_OF_OP)
    assert {f"{file}.py" for op in planned for file in TESTS_OF_OP[op]} <= {p.name for p in ROOT.glob("tests/*.py")}


# --- the report -----------------------------------------------------------------------------------------------------


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
    assert "No test ran in this run, so no row may be shown." in text
    assert render.plot(report, tmp_path, "x") == []
    assert json.loads(json.dumps(report.to_dict()))["rows"] == []


# --- timing ---------------------------------------------------------------------------------------------------------


class FakeTimer:
    """A device on which every call takes 2 us cold and 1 us where its inputs were just used; an eviction takes 30."""

    def __init__(self, l2_bytes: int) -> None:
        self.device = torch.device("cpu")
        self.l2_bytes = l2_bytes
        self.clock = 0.0
        self.in_cache: list[int] = []

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

    def device_seconds(self, run: Callable[[], None]) -> float:
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
    monkeypatch.setattr(timer, "device_seconds", lambda run: (run(), 2e-3)[1])
    ceilings = timing.measure_ceilings(timer, copy_bytes=1000, matmul_size=4, samples=3)
    assert ceilings.copy_bytes_per_s == pytest.approx(2 * 1000 / 1e-3)
    assert ceilings.matmul_flops_per_s == pytest.approx(2 * 4**3 / 1e-3)
    assert ceilings.launch_us == pytest.approx(10.0)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Enough of torch.cuda for `CudaTimer`: events that count, graphs that replay nothing, an idle device."""
    seen = SimpleNamespace(events=0, captured=0, replayed=0, waited=0)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            seen.events += 1
            self.at = seen.events

        def synchronize(self) -> None:
            seen.waited += 1

        def elapsed_time(self, other: Event) -> float:
            return float(other.at - self.at)

    class CUDAGraph:
        def replay(self) -> None:
            seen.replayed += 1

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
    assert len(calls) == 3, "a replay calls nothing on the host"
    waited = fake_cuda.waited
    assert timer.host_seconds(lambda: time.sleep(0.01)) >= 0.01
    assert timer.wall_seconds(lambda: time.sleep(0.01)) >= 0.01
    assert fake_cuda.waited == waited + 4
    timer.evict()
    assert timer._filler.numel() == 128


def test_a_whole_case_on_the_cuda_timer(fake_cuda: SimpleNamespace, tmp_path: Path) -> None:
    context = steps.Context(CudaTimer("cpu"), steps.REHEARSAL, steps.Part(tmp_path / "p.json"), math.inf)
    context = replace(context, ceilings=CEILINGS)
    case = next(cases.compact(cases.REHEARSAL, torch.device("cpu")))
    rows = {row.provider: row for row in steps.measure_case(context, case)}
    assert set(rows) == set(case.providers)
    assert rows[OURS].times.timing == "graph"
    assert rows["h[mask]"].times.timing == "call"
    assert [goal.text for goal in rows[OURS].goals] == ["never slower than index_select"]
    assert context.part.problems == []


# --- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", steps.STEPS)
def test_every_step_on_the_cpu(name: str, tmp_path: Path) -> None:
    """The very code that a GPU would run, with tiny shapes and a wall clock."""
    part = steps.run_step(name, tmp_path / "part.json", math.inf, rehearse=True)
    assert part.problems == []
    assert part.ceilings is not None
    assert steps.Part.read(part.path) == part
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
        part = steps.run_step(name, tmp_path / "part.json", math.inf, rehearse=True, warm_up=True, shard=(0, 2))
        assert (part.rows, part.sweeps, part.problems) == ([], [], [])


def test_a_step_whose_time_is_over_says_what_is_missing(tmp_path: Path) -> None:
    part = steps.run_step("ops", tmp_path / "part.json", 0.0, rehearse=True)
    assert part.rows == []
    assert "exit_gate [32, 4] fp32: not measured, the time of its step was over" in part.problems


def some_case(**providers: Provider) -> cases.Case:
    def check(result: Tensor, x: Tensor) -> None:
        assert result.equal(x + 1), "not one more"

    providers = {OURS: Provider(lambda x: x + 1), **providers}
    return cases.Case("compact", "[4]", providers, lambda: (torch.zeros(4),), check, Work(32))


def context_in(folder: Path) -> steps.Context:
    return steps.Context(WallTimer(), steps.REHEARSAL, steps.Part(folder / "part.json"), math.inf, ceilings=CEILINGS)


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
    problems: list[str] = []
    swept = sweep.Swept("compact", "[4]", configs, lambda: (torch.zeros(4),), "warm")
    rows = sweep.measure_configs(swept, WallTimer(), SHORT, problems)
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


def test_a_swept_configuration_is_the_one_that_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    config = sweep.ExitGateConfig.choose(4096, 2)
    with sweep._instead_of(sweep.ExitGateConfig, config):
        assert sweep.ExitGateConfig.choose(1, 3) is config
    assert sweep.ExitGateConfig.choose(1, 3) != config


# --- whole models ---------------------------------------------------------------------------------------------------


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


def test_an_average_that_is_too_deep_is_refused() -> None:
    with pytest.raises(ValueError, match=r"average: got 7, expected 1 to 6.5"):
        early_exit.exit_pattern(8, 7, 12)


# --- the tests of a run ---------------------------------------------------------------------------------------------

SUITE = """
import pytest
def test_good(): pass
def test_bad(): assert False
@pytest.mark.skip
def test_skipped(): pass
def test_nothing_spills(): assert False
@pytest.fixture
def broken(): raise RuntimeError
def test_error(broken): pass
"""


def test_outcomes_are_written_as_they_come(tmp_path: Path) -> None:
    (tmp_path / "test_later.py").write_text(SUITE)
    (tmp_path / "test_exit_gate.py").write_text("def test_first(): pass\n")
    (tmp_path / "test_absent.py").write_text("import a_package_that_is_not_there\n")
    lines = tmp_path / "outcomes.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu.outcomes", "--continue-on-collection-errors"]
    environment = gpu_report._environment({outcomes.FILE_VARIABLE: str(lines), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    subprocess.run([*command, "-c", "/dev/null", str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True)
    with lines.open("a") as stream:
        stream.write('{"file": "test_later", "test": "test_torn')  # the run was stopped here
    found = outcomes.read(lines)
    assert found["test_exit_gate"] == Outcomes(passed=1)
    assert found["test_later"] == Outcomes(1, ("test_later::test_bad", "test_later::test_error"), 1)
    assert found["test_later, machine code"].failed == ("test_later, machine code::test_nothing_spills",)
    assert found["test_absent"].failed == ("test_absent::its collection",)
    ran = [json.loads(line)["file"] for line in lines.read_text().splitlines()[:-1] if "outcome" in line]
    assert ran.index("test_exit_gate") < ran.index("test_later"), "what proves the rows runs first"


def test_tests_that_were_not_reached_are_counted(tmp_path: Path) -> None:
    lines = tmp_path / "outcomes.jsonl"
    lines.write_text(
        '{"file": "test_compact", "collected": 5}\n{"file": "test_compact", "test": "a", "outcome": "passed"}\n'
    )
    assert outcomes.read(lines) == {"test_compact": Outcomes(passed=1, not_reached=4)}
    assert outcomes.read(tmp_path / "missing") == {}


# --- the run --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main([]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no CUDA GPU" in said
    assert "--rehearse" in said


@pytest.mark.parametrize("arguments", [["--only", "everything"], ["--budget", "0"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_report.main(arguments)
    assert stopped.value.code == 2
    assert f"{arguments[0]}: got" in capsys.readouterr().err


def options_of(folder: Path, **changes: Any) -> gpu_report.Options:
    return gpu_report.Options(**{"output": folder, "budget": 60.0, "only": tuple(gpu_report.SHARES), "rehearse": True,
                                 "tests": (), **changes})  # fmt: skip


def test_a_step_that_fails_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = steps.Part(tmp_path / "done.json", CEILINGS)
    done.rows = [row_of("compact")]
    done.write()

    def command(self: gpu_report.Run, name: str, deadline: float, part: Path) -> list[str]:
        copies = f"import shutil, time; shutil.copy({str(done.path)!r}, {str(part)!r})"
        script = {
            "ceilings": "print('first'); raise SystemExit('no | device')",
            "models": f"{copies}; time.sleep(60)",
        }
        return [sys.executable, "-c", script.get(name, copies)]

    monkeypatch.setattr(gpu_report.Run, "_step_command", command)
    monkeypatch.setattr(gpu_report.Run, "prove", lambda self: 1 / 0)
    monkeypatch.setattr(gpu_report.Run, "deadline", lambda self, step: time.time() + (-8 if step == "models" else 30))
    run = gpu_report.Run(options_of(tmp_path))
    report = run.go()
    assert {step.name: step.status for step in report.steps} == {
        "build": "skipped",
        "proof": "failed",
        "ceilings": "failed",
        "ops": "done",
        "models": "timed out",
        "sweep": "done",
    }
    assert report.ceilings == CEILINGS, "a later step measured them too"
    assert len(report.rows) == 3
    assert report.problems == ["ceilings: no / device"]
    written = json.loads((tmp_path / f"{run.stem}.json").read_text())
    assert written["rows"] == [], "no test proved them"
    assert "no / device" in (tmp_path / f"{run.stem}.md").read_text()


def test_a_whole_run_of_one_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = gpu_report.main(["--rehearse", "--only", "build,ceilings", "--output", str(tmp_path), "--budget", "120"])
    assert code == 0
    assert "Ceilings of this run: copy" in capsys.readouterr().out


def test_the_budget_is_shared_in_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = gpu_report.Run(options_of(tmp_path, budget=520.0, only=("ops", "models", "sweep")))
    shares = gpu_report.SHARES
    given = run.deadline("ops") - time.time()
    assert given == pytest.approx(520 * shares["ops"] / (shares["ops"] + shares["models"] + shares["sweep"]), abs=1)
    assert run.deadline("sweep") - time.time() == pytest.approx(520, abs=1), "the last step may take what is left"
    assert sum(shares.values()) == gpu_report.BUDGET < 540


@pytest.mark.parametrize(
    ("status", "log", "expected", "note"),
    [
        ("done", "x\n========= ERROR SUMMARY: 0 errors\n", "done", "ERROR SUMMARY: 0 errors"),
        ("failed", "========= ERROR SUMMARY: 3 errors\n", "failed", "ERROR SUMMARY: 3 errors"),
        ("failed", "Error: Device not supported\n", "skipped", "the tool does not run here: Device not supported"),
        ("timed out", "", "timed out", "its time was over"),
    ],
)
def test_what_a_sanitizer_found(status: str, log: str, expected: str, note: str) -> None:
    result = StepResult("memcheck", status, 3.0, "its time was over" if status == "timed out" else "last line")
    result = gpu_report._sanitizer_result(result, log)
    assert (result.status, result.note) == (expected, note)


def test_commands_of_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name, path=None: f"/tools/{name}")
    monkeypatch.setattr(gpu_report.Run, "__init__", lambda self, options: None)
    run = gpu_report.Run(options_of(tmp_path))
    run.options, run.report, run.parts = options_of(tmp_path, rehearse=False), full_report(), tmp_path
    memcheck, racecheck = run._sanitizers()
    assert memcheck.command[:3] == ["/tools/compute-sanitizer", "--tool", "memcheck"]
    assert racecheck.command[-1] == "bench/sanitize.py"
    warm = run._warm_ups(7.0)
    assert [child.name for child in warm if "models" in child.name] == [f"compile models {n}" for n in range(4)]
    assert warm[0].command[-3:] == ["--warm-up", "--shard", "0/2"]
    assert run._pytest()[-1] == "tests"


def test_sanitize_names_its_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.main(["attention"]) == 2
    assert "got attention, expected some of student_head_exit, exit_gate, compact" in capsys.readouterr().err
    assert next(iter(sanitize.KERNELS)) == "student_head_exit", "its ticket is the first thing to examine"
