"""What a report holds: rows with their floors and goals, what the steps did, and which rows may be shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

OURS = "fastkd"
STREAM = "stream"
STREAM_BATCHES = "stream_batches"
LONG_RUNS = "stream_batches, long runs"

_PACKED_TESTS = (
    "test_launch",
    "test_engine_packed",
    "test_packed",
    "test_varlen_attention",
    "test_layer_norm",
    "test_student_head",
    "test_exit_gate",
)
TESTS_OF_OP: Mapping[str, tuple[str, ...]] = {
    "exit_gate": ("test_launch", "test_exit_gate"),
    "student_head": ("test_launch", "test_student_head"),
    "student_head_exit": ("test_launch", "test_student_head", "test_exit_gate"),
    "compact": ("test_compact",),
    "compaction step": ("test_compact", "test_exit_gate"),
    "kd_loss": ("test_launch", "test_kd_loss"),
    "universal_kd_loss": ("test_launch", "test_universal_kd_loss"),
    "distillation_loss": ("test_launch", "test_distillation_loss"),
    "early exit": (
        *("test_launch", "test_model", "test_engine_graphs", "test_cuda_graphs"),
        *("test_student_head", "test_exit_gate", "test_compact"),
    ),
    "early exit, stream": ("test_stream", *_PACKED_TESTS),
    "early exit, stream_batches": ("test_stream_batches", "test_cuda_graphs", *_PACKED_TESTS),
}
"""Files of tests/ whose failure leaves the rows of an op unproven."""

_MODEL_KERNELS = ("student_head", "student_head_exit", "exit_gate", "compact")
KERNELS_OF_OP: Mapping[str, tuple[str, ...]] = {
    "compaction step": ("compact",),
    "early exit": _MODEL_KERNELS,
    "early exit, stream": (*_MODEL_KERNELS, "layer_norm"),
    "early exit, stream_batches": (*_MODEL_KERNELS, "layer_norm"),
}
"""What rows of an op launch, where that is not the op of the same name."""


@dataclass(frozen=True)
class Ceilings:
    """What this device can do, measured in the same run.

    Attributes:
        copy_bytes_per_s: bytes read plus bytes written of a large device-to-device copy.
        matmul_flops_per_s: of a large bfloat16 matrix product on random data.
        launch_us: an empty kernel as a node of a CUDA graph; nothing that launches is faster.
    """

    copy_bytes_per_s: float
    matmul_flops_per_s: float
    launch_us: float


@dataclass(frozen=True)
class Work:
    """The fewest bytes that have to move and the operations that have to be done."""

    bytes_moved: int
    flops: int = 0

    def memory_us(self, ceilings: Ceilings) -> float:
        return self.bytes_moved / ceilings.copy_bytes_per_s * 1e6

    def compute_us(self, ceilings: Ceilings) -> float:
        return self.flops / ceilings.matmul_flops_per_s * 1e6

    def floor_us(self, ceilings: Ceilings) -> float:
        """The slower of the two floors: no version runs faster."""
        return max(self.memory_us(ceilings), self.compute_us(ceilings))


@dataclass(frozen=True)
class Quantiles:
    """Microseconds of one call."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Times:
    """How long one call of one provider takes.

    Attributes:
        timing: "graph" where calls were replayed from a CUDA graph, "call" where they were launched one by one.
        warm: over the same inputs again and again.
        cold: over inputs that no cache holds; None where that was not measured.
        host_us: host time until a call returns, median; a call that waits for the device includes the waiting.
        end_to_end_us: wall-clock of a call whose result the host then waits for, median.
    """

    timing: str
    warm: Quantiles
    cold: Quantiles | None
    host_us: float
    end_to_end_us: float


@dataclass(frozen=True)
class GoalResult:
    """One goal of the project, its measured value, and whether it was met."""

    text: str
    value: float
    target: float
    met: bool


@dataclass(frozen=True)
class Row:
    """One provider of one case."""

    op: str
    case: str
    provider: str
    times: Times
    memory_us: float
    compute_us: float
    basis: str  # "warm" or "cold": the time that floors and speed-ups refer to
    goals: tuple[GoalResult, ...] = ()

    @property
    def median_us(self) -> float:
        """The time that counts."""
        return self.quantiles.median

    @property
    def quantiles(self) -> Quantiles:
        return self.times.cold if self.basis == "cold" and self.times.cold is not None else self.times.warm

    @property
    def floor_us(self) -> float:
        return max(self.memory_us, self.compute_us)

    @property
    def share_of_floor(self) -> float:
        """1 at the floor, less above it."""
        return self.floor_us / self.median_us

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "floor_us": self.floor_us, "share_of_floor": self.share_of_floor}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Row:
        times = value["times"]
        cold = times["cold"]
        return cls(
            op=value["op"],
            case=value["case"],
            provider=value["provider"],
            times=Times(
                times["timing"],
                Quantiles(**times["warm"]),
                None if cold is None else Quantiles(**cold),
                times["host_us"],
                times["end_to_end_us"],
            ),
            memory_us=value["memory_us"],
            compute_us=value["compute_us"],
            basis=value["basis"],
            goals=tuple(GoalResult(**goal) for goal in value["goals"]),
        )


@dataclass(frozen=True)
class Goal:
    """`value(rows by provider)` at most or at least `target`; a provider that is missing leaves it open."""

    text: str
    target: float
    value: Callable[[Mapping[str, Row]], float]
    at_most: bool = False

    def judge(self, rows: Mapping[str, Row]) -> GoalResult | None:
        try:
            value = self.value(rows)
        except KeyError:
            return None
        return GoalResult(self.text, value, self.target, value <= self.target if self.at_most else value >= self.target)


@dataclass(frozen=True)
class SweepRow:
    """One launch configuration of one case."""

    op: str
    case: str
    config: str
    median_us: float
    chosen: bool  # what is launched without the sweep


@dataclass(frozen=True)
class ModelRow:
    """Early-exit BERT at one batch size and average depth against the best full model; times for the whole workload."""

    batch_size: int
    rows: int
    average_layers: float
    engine: str
    seconds: float
    p20_seconds: float
    p80_seconds: float
    full_engine: str
    full_seconds: float
    flops_speedup: float

    @property
    def op(self) -> str:
        """What has to be proved in the same run."""
        streams = {STREAM: STREAM, STREAM_BATCHES: STREAM_BATCHES, LONG_RUNS: STREAM_BATCHES}
        return f"early exit, {streams[self.engine]}" if self.engine in streams else "early exit"

    @property
    def goal(self) -> float | None:
        """For `ratio`; None for batches that are too small to have one."""
        if self.batch_size < 32:
            return None
        return 0.8 if self.op == "early exit" else 0.9

    @property
    def speedup(self) -> float:
        return self.full_seconds / self.seconds

    @property
    def ratio(self) -> float:
        """How much of the FLOPs speed-up arrived."""
        return self.speedup / self.flops_speedup

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup, "ratio": self.ratio}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ModelRow:
        return cls(**{name: value[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class StepResult:
    """What became of one step of the run."""

    name: str
    status: str  # "done", "failed", "timed out", "skipped", "left out"
    seconds: float
    note: str = ""
    cpu_seconds: float = 0.0
    estimate: float | None = None  # of its seconds, made before the run
    cpu_estimate: float | None = None


@dataclass(frozen=True)
class Outcomes:
    """How the tests of one file went on the device."""

    passed: int = 0
    failed: tuple[str, ...] = ()
    skipped: int = 0
    not_reached: int = 0


@dataclass(frozen=True)
class Measured:
    """Rows of all kinds."""

    rows: Sequence[Row] = ()
    sweeps: Sequence[SweepRow] = ()
    models: Sequence[ModelRow] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [row.to_dict() for row in self.rows],
            "sweeps": [asdict(row) for row in self.sweeps],
            "models": [row.to_dict() for row in self.models],
        }


@dataclass
class Report:
    """Everything that one run found out."""

    environment: dict[str, Any]
    rehearsal: bool = False
    ceilings: Ceilings | None = None
    rows: list[Row] = field(default_factory=list)
    sweeps: list[SweepRow] = field(default_factory=list)
    models: list[ModelRow] = field(default_factory=list)
    tests: dict[str, Outcomes] = field(default_factory=dict)
    steps: list[StepResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Cases without rows and why, one sentence each."""
    fallbacks: dict[str, str] = field(default_factory=dict)
    """Ops without a kernel on this machine, and why: their rows would be those of a fallback."""

    def why_unproven(self, op: str) -> str | None:
        """Why rows of `op` count as unproven, or None."""
        files = TESTS_OF_OP.get(op, ())
        fallen = [name for name in KERNELS_OF_OP.get(op, (op,)) if name in self.fallbacks]
        if fallen:
            return (
                f"{op}: unproven, because a fallback was measured in place of {fallen[0]}: {self.fallbacks[fallen[0]]}"
            )
        if not files:
            return f"{op}: no test file is known to prove it; add it to TESTS_OF_OP"
        failed = [name for file in files for name in self.tests.get(file, Outcomes()).failed]
        if failed:
            return f"{op}: unproven, because {len(failed)} of its tests failed in this run, first {failed[0]}"
        unproved = [file for file in files if self.tests.get(file, Outcomes()).passed == 0]
        if unproved:
            return f"{op}: unproven, because no test of {', '.join(unproved)} passed in this run"
        return None

    def reasons(self) -> list[str]:
        """One sentence for every op that was measured and is unproven."""
        ops = sorted({row.op for row in self.rows} | {row.op for row in self.sweeps})
        ops += sorted({row.op for row in self.models})
        return [reason for op in ops if (reason := self.why_unproven(op)) is not None]

    def proven(self, proven: bool = True) -> Measured:
        """What tests of this run prove, or with False all else that was measured."""

        def kept(op: str) -> bool:
            return (self.why_unproven(op) is None) == proven

        return Measured(
            [row for row in self.rows if kept(row.op)],
            [row for row in self.sweeps if kept(row.op)],
            [row for row in self.models if kept(row.op)],
        )

    def to_dict(self) -> dict[str, Any]:
        """What is written to the results: rows that no test of this run proves stand apart."""
        return {
            "environment": self.environment,
            "rehearsal": self.rehearsal,
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            **self.proven().to_dict(),
            "tests": {name: asdict(outcomes) for name, outcomes in sorted(self.tests.items())},
            "steps": [asdict(step) for step in self.steps],
            "problems": self.problems,
            "fallbacks": self.fallbacks,
            "unproven": {"reasons": self.reasons(), **self.proven(False).to_dict()},
        }


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Rows by provider, of every (op, case) in their order."""
    grouped: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        grouped.setdefault((row.op, row.case), {})[row.provider] = row
    return grouped


def best_of_sweep(rows: Sequence[SweepRow]) -> dict[tuple[str, str], tuple[SweepRow, SweepRow | None]]:
    """The fastest configuration of every (op, case), and what the op chooses where it was measured."""
    grouped: dict[tuple[str, str], list[SweepRow]] = {}
    for row in rows:
        grouped.setdefault((row.op, row.case), []).append(row)
    return {
        key: (min(group, key=lambda row: row.median_us), next((row for row in group if row.chosen), None))
        for key, group in grouped.items()
    }
