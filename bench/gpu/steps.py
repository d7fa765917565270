"""What a worker of the report does: measure one group of things and write what it has after every case.

    python -m gpu.steps --work compaction... (started by gpu_report.py alone)

A worker that dies or hangs is started again: what it had begun last is left out then, and what was done is kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gpu import cases, device, store, sweep
from gpu.cases import Case, Scale
from gpu.parts import Part
from gpu.records import OURS, Ceilings, Row
from gpu.timing import CudaTimer, Provider, Sampling, Timer, WallTimer, measure, measure_ceilings


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


@dataclass
class Context:
    """What every kind of work gets.

    Attributes:
        deadline: in seconds of `time.monotonic()`; no case is begun that would end after it.
        warm_up: compile and check everything, time nothing: later processes find the compiled kernels on disk.
        shard: (number, of how many): which cases are this process's.
        ceilings: measured by an earlier step.
        deadly: what ended earlier workers of this step, never begun again.
    """

    timer: Timer
    plan: Plan
    part: Part
    deadline: float
    warm_up: bool = False
    shard: tuple[int, int] = (0, 1)
    ceilings: Ceilings = field(default_factory=lambda: Ceilings(float("nan"), float("nan"), float("nan")))
    deadly: frozenset[str] = frozenset()
    slowest: float = 0.0
    _case: tuple[str, float] | None = None

    def begin_case(self, case: str) -> bool:
        """Whether to do `case` now: it is neither done nor deadly, and there is as much time as the slowest took."""
        if case in self.part.done or case in self.deadly:
            return False
        if time.monotonic() + self.slowest >= self.deadline:
            if not self.warm_up:
                self.part.problems.append(
                    f"{case}: left out, {max(self.deadline - time.monotonic(), 0):.0f} s were left"
                )
                self.part.write()
            return False
        self._case = (case, time.monotonic())
        self._note(case)
        return True

    def begin(self, detail: str) -> bool:
        """The same for a provider or a configuration of the case: it may be left out alone."""
        key = self._key(detail)
        if key in self.deadly:
            return False
        self._note(key)
        return True

    def carry_on(self) -> None:
        """The details are through: whatever happens from here on concerns the whole case."""
        assert self._case is not None
        self._note(self._case[0])

    def end_case(self) -> None:
        assert self._case is not None
        case, began = self._case
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.part.done.append(case)
        self.part.write()

    def _key(self, detail: str) -> str:
        assert self._case is not None
        return f"{self._case[0]}: {detail}"

    def _note(self, key: str) -> None:
        store.append_line(self.part.progress, {"begun": key, "at": time.monotonic()})

    def mine(self, number: int) -> bool:
        return number % self.shard[1] == self.shard[0]

    def report_problem(self, what: str, error: Exception) -> None:
        """Note it; where it ended the CUDA context, this process ends too, and the parent says what was lost."""
        text = " ".join(str(error).split())[:300]
        self.part.problems.append(f"{what}: {type(error).__name__}: {text}")
        self.part.write()
        self.leave_if_dead()
        device.free_memory()

    def leave_if_dead(self) -> None:
        why = device.why_dead()
        if why is not None:
            device.leave(why)


def run_ceilings(context: Context, group: str) -> None:
    if not context.begin_case("ceilings"):
        return
    context.part.ceilings = measure_ceilings(context.timer, context.plan.copy_bytes, context.plan.matmul_size)
    context.end_case()


def run_ops(context: Context, group: str) -> None:
    """Every case of one group of ops."""
    for number, case in enumerate(cases.ALL[group](context.plan.cases, context.timer.device)):
        what = f"{case.op} {case.name}"
        if not context.mine(number) or not context.begin_case(what):
            continue
        try:
            context.part.rows += measure_case(context, case)
        except Exception as error:  # one case that fails must not cost the others
            context.report_problem(what, error)
        context.end_case()


def measure_case(context: Context, case: Case) -> list[Row]:
    """Rows of the providers whose result is right; none where ours is wrong."""
    providers = _right_providers(context, case)
    if OURS not in providers or context.warm_up:
        return []
    context.carry_on()
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
        if not context.begin(name):
            continue
        try:
            (provider.check or case.check)(provider.run(*inputs), *inputs)
            right[name] = provider
        except AssertionError as error:
            first = str(error).strip().splitlines()[0]
            context.part.problems.append(f"{case.op} {case.name}: {name} gives a wrong result, not timed: {first}")
        except Exception as error:  # a baseline that does not run here is a fact to report, not a reason to stop
            context.report_problem(f"{case.op} {case.name}: {name} does not run", error)
        context.leave_if_dead()
    return right


def run_models(context: Context, group: str) -> None:
    """Whole early-exit models against the best full model."""
    from gpu import early_exit

    scale: early_exit.Scale = getattr(early_exit, context.plan.models)
    for number, batch_size in enumerate(scale.group(group)):
        what = f"early exit, batch {batch_size}"
        if not context.mine(number) or not context.begin_case(what):
            continue
        try:
            setting = early_exit.Setting(scale, batch_size, context.timer, context.begin, context.leave_if_dead)
            if context.warm_up:
                setting.prepare()
            else:
                context.part.models += setting.measure(context.part.problems)
        except Exception as error:
            context.report_problem(what, error)
        context.end_case()


def run_sweep(context: Context, group: str) -> None:
    """Every launch configuration of one op, against what the op chooses."""
    for number, swept in enumerate(sweep.OF_OP[group](context.plan.sweep, context.timer.device)):
        what = f"sweep of {swept.op} {swept.name}"
        if context.warm_up:
            sweep.compile_all(swept, context.mine, lambda: time.monotonic() < context.deadline)
            context.leave_if_dead()
            continue
        if not context.mine(number) or not context.begin_case(what):
            continue
        try:
            context.part.sweeps += sweep.measure_configs(swept, context)
        except Exception as error:
            context.report_problem(what, error)
        context.end_case()


WORK: Mapping[str, Callable[[Context, str], None]] = {
    "ceilings": run_ceilings,
    "ops": run_ops,
    "models": run_models,
    "sweep": run_sweep,
}


def run_work(
    work: Sequence[str],
    path: Path,
    deadline: float,
    *,
    rehearse: bool,
    warm_up: bool = False,
    shard: tuple[int, int] = (0, 1),
    ceilings: Sequence[float] | None = None,
) -> Part:
    """Do `work`, each "kind:group", in this process; what it finds is in `path` after every case."""
    torch.manual_seed(0)
    part = Part.read(path) if path.exists() else Part(path)
    part.write()
    timer: Timer = WallTimer() if rehearse else CudaTimer()
    deadly = frozenset(line["deadly"] for line in store.read_lines(part.progress) if "deadly" in line)
    context = Context(timer, REHEARSAL if rehearse else FULL, part, deadline, warm_up, shard, deadly=deadly)
    if ceilings is not None:
        context.ceilings = Ceilings(*ceilings)
    elif part.ceilings is None and not warm_up:
        run_ceilings(context, "")
    context.ceilings = part.ceilings or context.ceilings
    for one in work:
        kind, _, group = one.partition(":")
        WORK[kind](context, group)
    part.write()
    return part


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="One timed step of bench/gpu_report.py.")
    parser.add_argument("--work", required=True, type=lambda text: text.split(","))
    parser.add_argument("--part", required=True, type=Path)
    parser.add_argument("--deadline", required=True, type=float)
    parser.add_argument("--ceilings", type=lambda text: [float(value) for value in text.split(",")])
    parser.add_argument("--shard", default=(0, 1), type=lambda text: tuple(int(part) for part in text.split("/")))
    parser.add_argument("--warm-up", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(arguments)
    run_work(
        given.work,
        given.part,
        given.deadline,
        rehearse=given.rehearse,
        warm_up=given.warm_up,
        shard=given.shard,
        ceilings=given.ceilings,
    )


if __name__ == "__main__":
    main()
