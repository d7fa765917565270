"""The op benchmarks of the report: what is compared, on which shapes, with which floors and goals.

Baselines come from bench_*.py of the same op, so that no second version of one can drift. To add an op, write a
function that yields `Case`s, add it to `ALL`, and name its tests in `records.TESTS_OF_OP`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import bench_exit_gate as gate_baselines
import bench_kd as kd_baselines
import bench_student_head as head_baselines
import torch
from common import by_tritons_launcher
from torch import Tensor

import fastkd_kernels as fk
from fastkd_kernels._tickets import Tickets
from fastkd_kernels.ops import student_head as head_op
from fastkd_kernels.ops.compact import CompactConfig
from fastkd_kernels.ops.exit_gate import exit_gate_reference, uncertainty_reference
from fastkd_kernels.ops.student_head import student_head_reference
from gpu.records import OURS, Goal, Row, Work
from gpu.timing import Provider

SPEED = 0.5
IN_A_GRAPH = "torch.compile without waiting"
"""Compiled in the default mode and replayed from a CUDA graph of ours, where reduce-overhead replays its own."""
WIDTH, LABELS = head_baselines.WIDTH, head_baselines.LABELS
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Scale:
    """On what shapes the report measures."""

    gate_shapes: Sequence[tuple[int, int, str]]
    head_shapes: Sequence[tuple[int, int, int, str]]
    head_exit_shapes: Sequence[tuple[int, int, int, str]]
    compact_shapes: Sequence[tuple[int, int, int, str]]
    step_batches: Sequence[int]
    step_tokens: tuple[int, int]
    kd_classes: Sequence[int]
    compile_backend: str

    def compile(self, function: Callable[..., Any], mode: str | None = None, dynamic: bool | None = None) -> Any:
        """`torch.compile` with what this scale compiles with."""
        if self.compile_backend == "inductor":
            return torch.compile(function, mode=mode, dynamic=dynamic)
        return torch.compile(function, backend=self.compile_backend, dynamic=dynamic)


FULL = Scale(
    gate_shapes=(
        *[(32, columns, "fp32") for columns in (2, 4, 40)],
        (256, 4, "fp32"),
        (256, 4, "bf16"),
        (1024, 10, "fp32"),
        *[(4096, columns, "fp32") for columns in (2, 40)],
        (65536, 1024, "fp32"),
        (65536, 1024, "bf16"),
        (32, 2**17, "fp32"),
    ),
    head_shapes=(
        *[(batch, 128, 768, "bf16") for batch in (1, 8, 32, 128, 256, 512)],
        (32, 128, 768, "fp32"),
        (32, 64, 384, "bf16"),
        (8, 512, 768, "bf16"),
    ),
    head_exit_shapes=(*[(batch, 128, 768, "bf16") for batch in (1, 8, 32, 256)], (32, 128, 768, "fp32")),
    compact_shapes=(
        *[(batch, 128, 768, "bf16") for batch in (2, 8, 32, 128, 512, 1024, 2048)],
        (32, 128, 768, "fp32"),
        (1024, 128, 768, "fp32"),
    ),
    step_batches=(8, 32, 128),
    step_tokens=(128, 768),
    kd_classes=(3, 20),
    compile_backend="inductor",
)

REHEARSAL = Scale(
    gate_shapes=((32, 4, "fp32"), (33, 300, "bf16")),
    head_shapes=((2, 5, 32, "fp32"),),
    head_exit_shapes=((3, 5, 32, "bf16"),),
    compact_shapes=((4, 5, 32, "bf16"), (6, 70, 33, "fp32")),
    step_batches=(4,),
    step_tokens=(5, 32),
    kd_classes=(3,),
    compile_backend="eager",
)


@dataclass(frozen=True)
class Case:
    """Providers of one op on one shape; `providers` holds OURS."""

    op: str
    name: str
    providers: Mapping[str, Provider]
    make_inputs: Callable[[], Sequence[Any]]
    check: Callable[..., None]
    """Called as check(result, *inputs) for every provider before it is timed; raises AssertionError."""
    work: Work
    basis: str = "warm"
    goals: Sequence[Goal] = ()


def exit_gate(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Softmax, uncertainty, decision and compaction."""
    for rows, columns, dtype in scale.gate_shapes:
        torch.compiler.reset()  # each shape is compiled for itself, the best that the compiler has
        work = Work(rows * (columns * DTYPES[dtype].itemsize + 8))
        large = work.bytes_moved >= 32 * MIB
        providers = {
            OURS: Provider(lambda logits: fk.exit_gate(logits, SPEED)),
            "eager": Provider(gate_baselines.eager, capturable=False),
            "torch.compile": Provider(scale.compile(gate_baselines.eager, dynamic=True), capturable=False),
            "eager without waiting": Provider(gate_baselines.without_waiting),
            IN_A_GRAPH: Provider(scale.compile(gate_baselines.without_waiting)),
            "reduce-overhead without waiting": Provider(
                scale.compile(gate_baselines.without_waiting, "reduce-overhead"), capturable=False
            ),
        }
        if large:
            providers |= _softmax_of_peers()
        else:
            providers[f"{OURS}, Triton's launcher"] = Provider(by_tritons_launcher(providers[OURS].run))
            providers["FastBERT"] = Provider(gate_baselines.fastbert, capturable=False)
        goals = [Goal("<= 5 us", 5.0, lambda rows: _replayed_us(rows[OURS]), at_most=True)]
        goals.append(_end_to_end(10, "eager"))
        if large:
            goals = [Goal(">= 90 % of the copy bandwidth", 0.9, lambda rows: rows[OURS].share_of_floor)]
        yield Case(
            op="exit_gate",
            name=f"[{rows}, {columns}] {dtype}",
            providers=providers,
            make_inputs=gate_inputs(rows, columns, DTYPES[dtype], device),
            check=_check_gate,
            work=work,
            basis="cold" if large else "warm",
            goals=goals if large or columns <= 40 else (),
        )


def _softmax_of_peers() -> dict[str, Provider]:
    """The first part of a gate as other packages do it, where they are installed; they have no op for the rest."""

    def check(result: Tensor, logits: Tensor) -> None:
        torch.testing.assert_close(result.float(), logits.float().softmax(-1), rtol=1e-2, atol=1e-3)

    found: dict[str, Provider] = {}
    with suppress(ImportError):
        liger = import_module("liger_kernel.ops.softmax").LigerSoftmaxFunction.apply
        found["Liger, softmax alone"] = Provider(liger, check=check)
    with suppress(ImportError):
        quack = import_module("quack.softmax").softmax
        found["QuACK, softmax alone"] = Provider(quack, check=check)
    return found


def gate_inputs(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Callable[[], tuple[Tensor]]:
    def make() -> tuple[Tensor]:
        sharpness = torch.linspace(0.1, 6.0, rows, device=device)[:, None]
        return ((torch.randn(rows, columns, device=device) * sharpness).to(dtype),)

    return make


def _check_gate(result: Any, logits: Tensor) -> None:
    """Uncertainties against float64; the list against what the provider's own uncertainties say."""
    uncertainty, survivors, count = result[:3]
    truth = torch.cat([uncertainty_reference(rows.double()) for rows in logits.split(4096)])
    torch.testing.assert_close(uncertainty.double(), truth, rtol=0, atol=1e-5)
    kept = (~(uncertainty <= SPEED)).nonzero().flatten()
    assert survivors[: int(count)].tolist() == kept.tolist(), "survivors are not the rows above the speed, in order"


def _replayed_us(row: Row) -> float:
    """Warm microseconds of one call in a CUDA graph; a goal about those stays open where the graph was refused."""
    if row.times.timing != "graph":
        raise KeyError(row.provider)
    return row.times.warm.median


def _end_to_end(times: float, baseline: str) -> Goal:
    return Goal(
        f">= {times:g}x {baseline}, end to end",
        times,
        lambda rows: rows[baseline].times.end_to_end_us / rows[OURS].times.end_to_end_us,
    )


def _faster(times: float, baseline: str, say: str) -> Goal:
    return Goal(f">= {times:g}x {say}", times, lambda rows: rows[baseline].median_us / rows[OURS].median_us)


def head_work(batch: int, tokens: int, hidden: int, itemsize: int) -> Work:
    """The folded head: hidden states and weights are read once, the narrow product dominates the operations."""
    heads, narrow = 2, batch * tokens * hidden * WIDTH
    folded = 2 * heads * WIDTH * WIDTH + (1 + heads) * WIDTH + LABELS * (WIDTH + 1)
    per_sequence = 2 * heads * WIDTH * WIDTH + 2 * heads * tokens * WIDTH + LABELS * WIDTH
    moved = (batch * tokens * hidden + WIDTH * (hidden + 1)) * itemsize + 4 * (folded + batch * LABELS)
    return Work(moved, 2 * (narrow + batch * per_sequence))


def student_head(scale: Scale, device: torch.device) -> Iterator[Case]:
    """FastBERT's head, logits only."""
    for batch, tokens, hidden, dtype in scale.head_shapes:
        torch.compiler.reset()
        yield Case(
            op="student_head",
            name=f"[{batch}, {tokens}, {hidden}] {dtype}",
            providers={
                OURS: Provider(_no_grad(fk.student_head)),
                "eager": Provider(_no_grad(head_baselines.all_queries)),
                "eager, token 0": Provider(_no_grad(student_head_reference)),
                "torch.compile": Provider(_no_grad(scale.compile(head_baselines.all_queries))),
                "torch.compile, token 0": Provider(_no_grad(scale.compile(student_head_reference))),
            },
            make_inputs=head_inputs(batch, tokens, hidden, DTYPES[dtype], device),
            check=_no_grad(head_baselines.check_logits),
            work=head_work(batch, tokens, hidden, DTYPES[dtype].itemsize),
            basis="cold",
        )


def student_head_exit(scale: Scale, device: torch.device) -> Iterator[Case]:
    """The head with its gate; "eager" is FastBERT's own chain, which waits and so cannot be in a CUDA graph."""
    for batch, tokens, hidden, dtype in scale.head_exit_shapes:
        torch.compiler.reset()
        goals: list[Goal] = []
        if (batch, dtype) == (32, "bf16"):
            goals = [
                Goal("<= 20 us", 20.0, lambda rows: _replayed_us(rows[OURS]), at_most=True),
                _end_to_end(5, "eager"),
                Goal(
                    ">= 2x CUDA-graphed eager",
                    2.0,
                    lambda rows: _replayed_us(rows["eager without waiting"]) / _replayed_us(rows[OURS]),
                ),
            ]
        if (batch, dtype) == (256, "bf16"):
            goals = [Goal(">= 60 % of the slower floor", 0.6, lambda rows: rows[OURS].share_of_floor)]
        yield Case(
            op="student_head_exit",
            name=f"[{batch}, {tokens}, {hidden}] {dtype}",
            providers={
                OURS: Provider(_no_grad(_head_and_gate)),
                f"{OURS}, Triton's launcher": Provider(_no_grad(by_tritons_launcher(_head_and_gate))),
                "eager": Provider(_no_grad(head_baselines.fastbert_exit), capturable=False),
                "eager without waiting": Provider(_no_grad(_eager_head_and_gate)),
                "eager, token 0, without waiting": Provider(_no_grad(_token_0_and_gate)),
                IN_A_GRAPH: Provider(_no_grad(scale.compile(_eager_head_and_gate))),
                "token 0, compiled, without waiting": Provider(_no_grad(scale.compile(_token_0_and_gate))),
                "reduce-overhead": Provider(
                    _no_grad(scale.compile(_eager_head_and_gate, "reduce-overhead")), capturable=False
                ),
            },
            make_inputs=head_inputs(batch, tokens, hidden, DTYPES[dtype], device),
            check=_no_grad(_check_head_and_gate),
            work=head_work(batch, tokens, hidden, DTYPES[dtype].itemsize),
            basis="cold",
            goals=goals,
        )


def _head_and_gate(hidden_states: Tensor, head: fk.StudentHeadWeights) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    out = fk.student_head_exit(hidden_states, head, SPEED)
    return out.logits, out.uncertainty, out.survivors, out.count


def _eager_head_and_gate(hidden_states: Tensor, head: fk.StudentHeadWeights) -> tuple[Tensor, ...]:
    logits = head_baselines.all_queries(hidden_states, head)
    return logits, *exit_gate_reference(logits, SPEED)[:3]


def _token_0_and_gate(hidden_states: Tensor, head: fk.StudentHeadWeights) -> tuple[Tensor, ...]:
    logits = student_head_reference(hidden_states, head)
    return logits, *exit_gate_reference(logits, SPEED)[:3]


def _check_head_and_gate(result: Any, hidden_states: Tensor, head: fk.StudentHeadWeights) -> None:
    head_baselines.check_logits(result[0], hidden_states, head)
    if len(result) == 2:  # FastBERT's chain returns the list alone
        return
    logits, uncertainty, survivors, count = result
    expected = exit_gate_reference(logits.float(), SPEED)
    torch.testing.assert_close(uncertainty, expected.uncertainty, rtol=1e-5, atol=1e-5)
    kept = (~(uncertainty <= SPEED)).nonzero().flatten()
    assert survivors[: int(count)].tolist() == kept.tolist(), "survivors are not the rows above the speed, in order"


def head_inputs(
    batch: int, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], tuple[Tensor, fk.StudentHeadWeights]]:
    def make() -> tuple[Tensor, fk.StudentHeadWeights]:
        sizes = [(WIDTH, hidden), *[(WIDTH, WIDTH)] * 5, (LABELS, WIDTH)]
        pairs = [
            (
                (torch.randn(size, device=device) / size[1] ** 0.5).to(dtype),
                torch.randn(size[0], device=device).to(dtype),
            )
            for size in sizes
        ]
        return torch.randn(batch, tokens, hidden, device=device).to(dtype), fk.StudentHeadWeights(*pairs)

    return make


def _no_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    @torch.no_grad()
    def run(*inputs: Any) -> Any:
        return function(*inputs)

    return run


def compact(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Half of a batch's hidden states; our two ways of moving a row are both there."""
    for batch, tokens, hidden, dtype in scale.compact_shapes:
        output_bytes = batch // 2 * tokens * hidden * DTYPES[dtype].itemsize
        goals = [
            Goal(
                "never slower than index_select",
                1.0,
                lambda rows: min(
                    _replayed_us(rows["index_select"]) / _replayed_us(rows[OURS]),
                    rows["index_select"].median_us / rows[OURS].median_us,
                ),
            )
        ]
        if output_bytes >= 64 * MIB:
            goals.append(Goal(">= 92 % of the copy bandwidth", 0.92, lambda rows: rows[OURS].share_of_floor))
        yield Case(
            op="compact",
            name=f"[{batch}, {tokens}, {hidden}] {dtype}, {output_bytes / MIB:.3g} MiB kept",
            providers={
                OURS: Provider(lambda hidden_states, rows, keep: fk.compact([hidden_states], rows)[0]),
                f"{OURS}, vector": Provider(_compact_with(CompactConfig(bulk=False))),
                f"{OURS}, bulk": Provider(_compact_with(CompactConfig(threads=64, bulk=True))),
                "index_select": Provider(lambda hidden_states, rows, keep: hidden_states.index_select(0, rows)),
                "h[mask]": Provider(lambda hidden_states, rows, keep: hidden_states[keep], capturable=False),
                "torch.compile": Provider(scale.compile(_index_select, dynamic=True)),
            },
            make_inputs=compact_inputs(batch, tokens, hidden, DTYPES[dtype], device),
            check=_check_compact,
            work=Work(2 * output_bytes + 4 * (batch // 2)),
            basis="cold",
            goals=goals,
        )


def _compact_with(config: CompactConfig) -> Callable[..., Tensor]:
    return lambda hidden_states, rows, keep: fk.compact([hidden_states], rows, config=config)[0]


def _index_select(hidden_states: Tensor, rows: Tensor, keep: Tensor) -> Tensor:
    return hidden_states.index_select(0, rows)


def compact_inputs(
    batch: int, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    def make() -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randperm(batch, device=device)[: max(batch // 2, 1)].sort().values.int()
        keep = torch.zeros(batch, dtype=torch.bool, device=device)
        keep[rows.long()] = True
        return torch.randn(batch, tokens, hidden, device=device).to(dtype), rows, keep

    return make


def _check_compact(result: Tensor, hidden_states: Tensor, rows: Tensor, keep: Tensor) -> None:
    torch.testing.assert_close(result, hidden_states[rows.long()], rtol=0, atol=0)


def compaction_step(scale: Scale, device: torch.device) -> Iterator[Case]:
    """From a gate's output to the next layer's hidden states, mask and row ids; FastBERT's code does `h[mask]`."""
    tokens, hidden = scale.step_tokens
    for batch in scale.step_batches:
        kept = batch // 2
        moved = 2 * kept * (tokens * hidden * 2 + tokens * 8 + 8)
        goals = [_end_to_end(5, "h[mask]"), _faster(5, "h[mask]", "h[mask], device time")] if batch == 32 else []
        yield Case(
            op="compaction step",
            name=f"[{batch}, {tokens}, {hidden}] bf16 + mask + ids",
            providers={
                OURS: Provider(lambda tensors, rows, count, u: fk.compact(tensors, rows, count)),
                f"{OURS}, waiting for the count": Provider(_compact_the_kept, capturable=False),
                "h[mask]": Provider(_boolean_masks, capturable=False),
                "index_select": Provider(_index_select_each),
            },
            make_inputs=_step_inputs(batch, tokens, hidden, device),
            check=_check_step,
            work=Work(moved + 4 * kept),
            goals=goals,
        )


def _compact_the_kept(tensors: Sequence[Tensor], rows: Tensor, count: Tensor, uncertainty: Tensor) -> list[Tensor]:
    """As the batch engine does it: the host reads the count, and the next layer gets no rows too many."""
    return fk.compact(tensors, rows[: int(count)])


def _boolean_masks(tensors: Sequence[Tensor], rows: Tensor, count: Tensor, uncertainty: Tensor) -> list[Tensor]:
    mask = uncertainty > SPEED
    return [tensor[mask] for tensor in tensors]


def _index_select_each(tensors: Sequence[Tensor], rows: Tensor, count: Tensor, uncertainty: Tensor) -> list[Tensor]:
    return [tensor.index_select(0, rows) for tensor in tensors]


def _step_inputs(batch: int, tokens: int, hidden: int, device: torch.device) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        # clear of the speed on either side, so that half of the rows stay
        uncertainty = torch.where(torch.randperm(batch, device=device) < batch // 2, 0.75, 0.25)
        rows = (uncertainty <= SPEED).to(torch.uint8).sort(stable=True).indices.int()
        count = torch.full((1,), batch // 2, dtype=torch.int32, device=device)
        mask = torch.ones(batch, tokens, dtype=torch.int64, device=device)
        ids = torch.arange(batch, device=device)
        return [torch.randn(batch, tokens, hidden, device=device).bfloat16(), mask, ids], rows, count, uncertainty

    return make


def _check_step(
    result: Sequence[Tensor], tensors: Sequence[Tensor], rows: Tensor, count: Tensor, uncertainty: Tensor
) -> None:
    kept = rows[: int(count)].long()
    for gathered, tensor in zip(result, tensors, strict=True):
        torch.testing.assert_close(gathered[: len(kept)], tensor[kept], rtol=0, atol=0)


def distillation(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Losses with their gradients: knowledge distillation, Universal-KD, and the mixture of both with labels."""
    m, n, batch = kd_baselines.M, kd_baselines.N, kd_baselines.B

    def randn(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(shape, device=device).requires_grad_(grad)

    for classes in scale.kd_classes:
        made: dict[str, tuple[Any, Any, Callable[[], tuple[Tensor, ...]], int]] = {
            "kd_loss": (
                kd_baselines.our_kd,
                kd_baselines.eager_kd,
                lambda classes=classes: (randn(batch, classes, grad=True), randn(batch, classes)),
                3 * batch * classes,
            ),
            "universal_kd_loss": (
                kd_baselines.our_universal,
                kd_baselines.eager_universal,
                lambda classes=classes: (randn(m, batch, classes, grad=True), randn(n, batch, classes)),
                (n + 2 * m) * batch * classes,
            ),
            "distillation_loss": (
                kd_baselines.our_mixture,
                kd_baselines.eager_mixture,
                lambda classes=classes: (
                    randn(batch, classes, grad=True),
                    randn(m, batch, classes, grad=True),
                    randn(batch, classes),
                    randn(n, batch, classes),
                    torch.randint(classes, (batch,), device=device),
                ),
                (n + 2 * m + 3) * batch * classes,
            ),
        }
        for op, (ours, eager, make_inputs, elements) in made.items():
            torch.compiler.reset()
            yield Case(
                op=op,
                name=f"N={n} M={m} B={batch} C={classes} fp32",
                providers={
                    OURS: Provider(kd_baselines.step(ours)),
                    "eager": Provider(kd_baselines.step(eager)),
                    "torch.compile": Provider(kd_baselines.step(scale.compile(eager))),
                },
                make_inputs=make_inputs,
                check=kd_baselines.checker(eager),
                work=Work(4 * elements),
            )


def fresh_tickets() -> None:
    """Every captured launch of the head keeps counters of a fixed store: those of graphs that are gone come back."""
    head_op.tickets = Tickets()


Cases = Callable[[Scale, torch.device], Iterator[Case]]

ALL: Mapping[str, Cases] = {
    "compact": compact,
    "compaction step": compaction_step,
    "exit_gate": exit_gate,
    "student_head_exit": student_head_exit,
    "student_head": student_head,
    "distillation": distillation,
}
