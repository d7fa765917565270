"""What a child process of the report does: measure one group of things and write what it has after every case."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from gpu import cases, sweep
from gpu.cases import Case, Scale
from gpu.records import OURS, Ceilings, ModelRow, Row, SweepRow
from gpu.timing import CudaTimer, Provider, Sampling, Timer, WallTimer, measure, measure_ceilings


@dataclass
class Part:
    """What one step found; written whole after every case, so that a step that dies loses one case."""

    path: Path
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)
    sweeps: list[SweepRow] = field(default_factory=list)
    models: list[ModelRow] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def write(self) -> None:
        value = {
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "rows": [row.to_dict() for row in self.rows],
            "sweeps": [asdict(row) for row in self.sweeps],
            "models": [row.to_dict() for row in self.models],
            "problems": self.problems,
        }
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(value, indent=1))
        temporary.replace(self.path)

    @classmethod
    def read(cls, path: Path) -> Part:
        value = json.loads(path.read_text())
        return cls(
            path,
            None if value["ceilings"] is None else Ceilings(**value["ceilings"]),
            [Row.from_dict(row) for row in value["rows"]],
            [SweepRow(**row) for row in value["sweeps"]],
            [ModelRow.from_dict(row) for row in value["models"]],
            value["problems"],
        )


@dataclass(frozen=True)
class Plan:
    """How much a run measures: all of it on a GPU, a little of everything in a rehearsal."""

    cases: Scale
    models: str
    """The name of a scale in `gpu.early_exit`, which is imported by the step that needs transformers."""
    sweep: sweep.Scale
    sampling: Sampling
    copy_bytes: int
    matmul_size: int


FULL = Plan(cases.FULL, "FULL", sweep.FULL, Sampling(), 2**31, 8192)
REHEARSAL = Plan(
    cases.REHEARSAL,
    "REHEARSAL",
    sweep.REHEARSAL,
    Sampling(rounds=3, replay_seconds=1e-5, max_calls=2, host_calls=2, max_copies=3),
    2**16,
    32,
)


@dataclass(frozen=True)
class Context:
    """What every step gets.

    Attributes:
        deadline: in seconds of `time.time()`; no case is begun after it.
        warm_up: compile and check everything, time nothing: later processes find the compiled kernels on disk.
        shard: (number, of how many): which cases are this process's.
        ceilings: measured by an earlier step.
    """

    timer: Timer
    plan: Plan
    part: Part
    deadline: float
    warm_up: bool = False
    shard: tuple[int, int] = (0, 1)
    ceilings: Ceilings = field(default_factory=lambda: Ceilings(float("nan"), float("nan"), float("nan")))

    def has_time(self, what: str) -> bool:
        """Whether another case may begin; notes it where not."""
        if time.time() < self.deadline:
            return True
        if not self.warm_up:
            self.part.problems.append(f"{what}: not measured, the time of its step was over")
            self.part.write()
        return False

    def mine(self, number: int) -> bool:
        return number % self.shard[1] == self.shard[0]

    def report_problem(self, what: str, error: Exception) -> None:
        text = " ".join(str(error).split())[:300]
        self.part.problems.append(f"{what}: {type(error).__name__}: {text}")
        self.part.write()


def run_ceilings(context: Context) -> None:
    context.part.ceilings = measure_ceilings(context.timer, context.plan.copy_bytes, context.plan.matmul_size)
    context.part.write()


def run_ops(context: Context) -> None:
    """Every case of every op."""
    number = 0
    for op, cases_of in cases.ALL.items():
        for case in cases_of(context.plan.cases, context.timer.device):
            number += 1
            if not context.mine(number) or not context.has_time(f"{op} {case.name}"):
                continue
            try:
                context.part.rows += measure_case(context, case)
            except Exception as error:  # one case that fails must not cost the others
                context.report_problem(f"{op} {case.name}", error)
            context.part.write()


def measure_case(context: Context, case: Case) -> list[Row]:
    """Rows of the providers whose result is right; none where ours is wrong."""
    providers = _right_providers(context, case)
    if OURS not in providers or context.warm_up:
        return []
    times = measure(context.timer, providers, case.make_inputs, context.plan.sampling)
    context.part.problems += [
        f"{case.op} {case.name}: {name} was refused by a CUDA graph, so it is timed call by call"
        for name, measured in times.items()
        if providers[name].capturable and measured.timing != "graph"
    ]
    memory_us, compute_us = case.work.memory_us(context.ceilings), case.work.compute_us(context.ceilings)
    rows = {
        name: Row(case.op, case.name, name, measured, memory_us, compute_us, case.basis)
        for name, measured in times.items()
    }
    goals = tuple(result for goal in case.goals if (result := goal.judge(rows)) is not None)
    ours = rows[OURS]
    rows[OURS] = Row(ours.op, ours.case, OURS, ours.times, memory_us, compute_us, case.basis, goals)
    return list(rows.values())


def _right_providers(context: Context, case: Case) -> dict[str, Provider]:
    cases.fresh_tickets()
    inputs = case.make_inputs()
    right = {}
    for name, provider in case.providers.items():
        try:
            (provider.check or case.check)(provider.run(*inputs), *inputs)
            right[name] = provider
        except AssertionError as error:
            first = str(error).strip().splitlines()[0]
            context.part.problems.append(f"{case.op} {case.name}: {name} gives a wrong result, not timed: {first}")
        except Exception as error:  # a baseline that does not run here is a fact to report, not a reason to stop
            context.report_problem(f"{case.op} {case.name}: {name} does not run", error)
    return right


def run_models(context: Context) -> None:
    """Whole early-exit models against the best full model."""
    from gpu import early_exit

    scale: early_exit.Scale = getattr(early_exit, context.plan.models)
    for number, batch_size in enumerate(scale.batch_sizes):
        what = f"early exit, batch {batch_size}"
        if not context.mine(number) or not context.has_time(what):
            continue
        try:
            setting = early_exit.Setting(scale, batch_size, context.timer)
            if context.warm_up:
                setting.prepare()
            else:
                context.part.models += setting.measure(context.part.problems)
        except Exception as error:
            context.report_problem(what, error)
        context.part.write()


def run_sweep(context: Context) -> None:
    """Every launch configuration of every op, against what the op chooses."""
    for number, swept in enumerate(sweep.cases_of(context.plan.sweep, context.timer.device)):
        what = f"sweep of {swept.op} {swept.name}"
        if context.warm_up:
            sweep.compile_all(swept, context.mine, lambda: time.time() < context.deadline)
            continue
        if not context.mine(number) or not context.has_time(what):
            continue
        try:
            context.part.sweeps += sweep.measure_configs(
                swept, context.timer, context.plan.sampling, context.part.problems
            )
        except Exception as error:
            context.report_problem(what, error)
        context.part.write()


STEPS: Mapping[str, Callable[[Context], None]] = {
    "ceilings": run_ceilings,
    "ops": run_ops,
    "models": run_models,
    "sweep": run_sweep,
}


def run_step(
    name: str,
    path: Path,
    deadline: float,
    *,
    rehearse: bool,
    warm_up: bool = False,
    shard: tuple[int, int] = (0, 1),
    ceilings: Sequence[float] | None = None,
) -> Part:
    """Do one step in this process; what it finds is in `path` after every case."""
    torch.manual_seed(0)
    part = Part(path)
    part.write()
    timer: Timer = WallTimer() if rehearse else CudaTimer()
    plan = REHEARSAL if rehearse else FULL
    context = Context(timer, plan, part, deadline, warm_up, shard)
    if ceilings is not None:
        context = replace(context, ceilings=Ceilings(*ceilings))
    elif name != "ceilings" and not warm_up:
        run_ceilings(context)
        assert part.ceilings is not None
        context = replace(context, ceilings=part.ceilings)
    STEPS[name](context)
    part.write()
    return part
