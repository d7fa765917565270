"""The steps of a run in their order, what each should take, and the three ways to go through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpu.records import TESTS_OF_OP

RESERVE = 12.0
"""Seconds that no step gets: for ending what hangs and for writing."""
SLACK = 1.5
"""A step is stopped after this many times its estimate, if it is not done by then."""


@dataclass(frozen=True)
class Step:
    """One step: it begins only where its estimate fits into what is left, and is left out by name where not.

    Attributes:
        name: as `--only` and the report have it.
        seconds, cpu_seconds: estimates for one H200 with 16 cores and a bundle, made before any run on a GPU: starting
            processes and tracing models were timed on a CPU, numbers of cases counted, everything else is assumed.
        does: one line for the report and the documentation.
        work: what a worker measures, "kind" or "kind:group" of `steps.WORK`; empty for steps that measure nothing.
        tests: files of tests/ that it runs, all others where it is ("*",).
    """

    name: str
    seconds: float
    cpu_seconds: float
    does: str
    work: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()


def _tests(*ops: str, but: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Files that prove rows of `ops`, in the order of the first op that needs them."""
    return tuple(dict.fromkeys(name for op in ops for name in TESTS_OF_OP[op] if name not in but))


EARLY_EXIT_TESTS = (
    "test_look_back",
    *_tests("exit_gate", "student_head", "student_head_exit", "compact", "compaction step", "early exit"),
)
STREAM_TESTS = _tests("early exit, stream_batches", "early exit, stream", but=EARLY_EXIT_TESTS)
LOSS_TESTS = _tests("kd_loss", "universal_kd_loss", "distillation_loss", but=EARLY_EXIT_TESTS)

ORDER: tuple[Step, ...] = (
    Step("build", 15, 20, "builds what is missing; says what is not there or not used"),
    Step("sanitizers", 40, 60, "memcheck and racecheck on one small case of each kernel"),
    Step("early exit", 60, 500, "tests of the early-exit ops, graphs and models", tests=EARLY_EXIT_TESTS),
    Step("ceilings", 12, 14, "copy, product and empty kernel, once the clocks are up", ("ceilings",)),
    Step(
        "compaction", 35, 35, "the sweep of compact, then compact and the step against PyTorch",
        ("sweep:compact", "ops:compact", "ops:compaction step"),
    ),
    Step("gates and heads", 55, 90, "exit_gate and student_head_exit", ("ops:exit_gate", "ops:student_head_exit")),
    Step("models", 90, 150, "whole early-exit BERT-base, B = 32 and 128", ("models:large",)),
    Step("streams", 30, 240, "tests of streams and of what they pack", tests=STREAM_TESTS),
    Step(
        "sweep", 60, 70, "launch configurations of the gate and the head",
        ("sweep:student_head_exit", "sweep:exit_gate"),
    ),
    Step("losses", 30, 120, "tests of the losses", tests=LOSS_TESTS),
    Step("rest", 45, 90, "the losses, the head alone", ("ops:distillation", "ops:student_head")),
    Step("small models", 45, 90, "whole early-exit BERT-base, B = 8 and 1", ("models:small",)),
    Step("other tests", 120, 1500, "every other test", tests=("*",)),
)  # fmt: skip
STEPS: Mapping[str, Step] = {step.name: step for step in ORDER}


@dataclass(frozen=True)
class Mode:
    """A way through the steps that ends within `budget` seconds, starting included."""

    budget: float
    steps: tuple[str, ...]
    does: str


MODES: Mapping[str, Mode] = {
    "prove": Mode(
        240,
        ("build", "sanitizers", "early exit", "ceilings", "compaction", "gates and heads", "models"),
        "a first call: sanitizers and tests, then the first measurements",
    ),
    "measure": Mode(
        450,
        tuple(step.name for step in ORDER if step.name not in ("sanitizers", "other tests")),
        "a second call: the tests that the rows need, and all measurements",
    ),
    "all": Mode(530, tuple(STEPS), "everything, as far as it fits"),
}


def table() -> str:
    """The steps with their estimates and the modes that have them, in Markdown."""
    lines = ["| step | s | CPU-s | `--prove` | `--measure` | what |", "|---|---|---|---|---|---|"]
    for step in ORDER:
        has = ["yes" if step.name in MODES[mode].steps else "" for mode in ("prove", "measure")]
        lines.append(f"| {step.name} | {step.seconds:g} | {step.cpu_seconds:g} | {has[0]} | {has[1]} | {step.does} |")
    return "\n".join(lines)


def limit(step: Step, remaining: float) -> float | None:
    """Seconds that `step` may take of `remaining`; None where its estimate does not fit."""
    usable = remaining - RESERVE
    return None if usable < step.seconds else min(SLACK * step.seconds + 5, usable)
