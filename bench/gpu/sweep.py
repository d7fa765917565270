"""Launch configurations against each other: what beats an op's own choice, shape by shape.

A configuration replaces `choose` while a provider runs, so what is timed is what the op would launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

import fastkd_kernels as fk
from fastkd_kernels.ops.compact import CompactConfig
from fastkd_kernels.ops.exit_gate import ENOUGH_PROGRAMS, ExitGateConfig
from fastkd_kernels.ops.student_head import GpuLimits, StudentHeadConfig
from gpu import cases
from gpu.cases import DTYPES, LABELS, SPEED, WIDTH
from gpu.records import SweepRow
from gpu.timing import Provider, Timer, measure

CHOSEN = "chosen"


@dataclass(frozen=True)
class Scale:
    """On what shapes configurations are compared."""

    gate_shapes: Sequence[tuple[int, int]]
    head_shapes: Sequence[tuple[int, int, int, str]]
    head_options: Sequence[tuple[int, int, int, int, int]]
    """splits, block_tokens, block_hidden, num_warps, num_stages"""
    compact_batches: Sequence[int]
    compact_row: tuple[int, int]


FULL = Scale(
    gate_shapes=((32, 4), (256, 4), (1024, 10), (4096, 2), (4096, 40), (65536, 1024)),
    head_shapes=((256, 128, 768, "bf16"), (32, 128, 768, "bf16"), (8, 128, 768, "bf16"), (1, 128, 768, "bf16")),
    head_options=tuple(
        (splits, *options)
        for splits, options in product(
            (1, 2, 4),
            (
                *product((64,), (64,), (8,), (3, 4, 6)),
                *product((64,), (128,), (8,), (3, 4)),
                *product((128,), (64,), (8, 16), (3, 4, 6)),
                *product((128,), (128,), (8, 16), (3,)),
            ),
        )
    ),
    compact_batches=(2, 8, 32, 128, 512, 2048),
    compact_row=(128, 768),
)
REHEARSAL = Scale(
    gate_shapes=((40, 4),),
    head_shapes=((2, 5, 32, "fp32"),),
    head_options=((2, 64, 32, 4, 2),),
    compact_batches=(4,),
    compact_row=(5, 32),
)


@dataclass(frozen=True)
class Swept:
    """One op on one shape with its configurations; "chosen" is what is launched without the sweep."""

    op: str
    name: str
    configs: Mapping[str, Callable[..., Any]]
    make_inputs: Callable[[], Sequence[Any]]
    basis: str


def _exit_gates(scale: Scale, device: torch.device) -> Iterator[Swept]:
    for rows, columns in scale.gate_shapes:
        usual = ExitGateConfig.choose(rows, columns)
        configs = {CHOSEN: _gate(None)}
        for block_rows, warps, each in product((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (1, 2, 4, 8), (0, 1, 4, 16)):
            elements = block_rows * usual.block_columns
            tiles = -(-rows // block_rows)
            programs = -(-tiles // each) if each else 1
            # one program takes few tiles; several take many only where they fill the GPU all the same
            if not 128 * warps <= 4 * elements <= 4 * 16384 or (each == 0 and tiles > 16):
                continue
            if each and (programs == 1 or (each > 1 and (programs < ENOUGH_PROGRAMS or each * block_rows > 1024))):
                continue
            config = replace(usual, block_rows=block_rows, num_warps=warps, tiles=max(each, 1), programs=programs)
            if config != usual:
                name = f"rows {block_rows}, warps {warps}, tiles {config.tiles}, programs {programs}"
                configs[name] = _gate(config)
        make_inputs = cases.gate_inputs(rows, columns, torch.float32, device)
        yield Swept("exit_gate", f"[{rows}, {columns}] fp32", configs, make_inputs, "cold" if rows > 4096 else "warm")


def _gate(config: ExitGateConfig | None) -> Callable[..., Any]:
    def run(logits: Tensor) -> Any:
        with _instead_of(ExitGateConfig, config):
            return fk.exit_gate(logits, SPEED)[:3]

    return run


def _student_heads(scale: Scale, device: torch.device) -> Iterator[Swept]:
    for batch, tokens, hidden, dtype in scale.head_shapes:
        limits = GpuLimits.of(device)
        usual = StudentHeadConfig.choose(DTYPES[dtype], hidden, WIDTH, LABELS, batch, tokens, limits)
        configs = {CHOSEN: _head(None)}
        for splits, block_tokens, block_hidden, warps, stages in scale.head_options:
            # a split reads all narrow weights: only for multiprocessors that would be idle
            if hidden % block_hidden or (splits > 1 and batch * splits > limits.multiprocessors):
                continue
            config = replace(
                usual,
                splits=splits,
                block_tokens=block_tokens,
                block_hidden=block_hidden,
                num_warps=warps,
                num_stages=stages,
            )
            if config != usual:
                name = f"splits {splits}, tokens {block_tokens}, hidden {block_hidden}, warps {warps}, stages {stages}"
                configs[name] = _head(config)
        make_inputs = cases.head_inputs(batch, tokens, hidden, DTYPES[dtype], device)
        yield Swept("student_head_exit", f"[{batch}, {tokens}, {hidden}] {dtype}", configs, make_inputs, "cold")


def _head(config: StudentHeadConfig | None) -> Callable[..., Any]:
    @torch.no_grad()
    def run(hidden_states: Tensor, head: fk.StudentHeadWeights) -> Any:
        with _instead_of(StudentHeadConfig, config):
            out = fk.student_head_exit(hidden_states, head, SPEED)
        return out.uncertainty, out.survivors, out.count

    return run


def _compactions(scale: Scale, device: torch.device) -> Iterator[Swept]:
    tokens, hidden = scale.compact_row
    for batch in scale.compact_batches:
        configs = {CHOSEN: _compaction(None)}
        for threads, bulk in product((32, 64, 128, 256, 512, 1024), (False, True)):
            config = CompactConfig(threads, bulk)
            if config != CompactConfig():
                configs[f"{'bulk' if bulk else 'vector'}, threads {threads}"] = _compaction(config)
        make_inputs = cases.compact_inputs(batch, tokens, hidden, torch.bfloat16, device)
        yield Swept("compact", f"[{batch}, {tokens}, {hidden}] bf16, half kept", configs, make_inputs, "cold")


def _compaction(config: CompactConfig | None) -> Callable[..., Any]:
    return lambda hidden_states, rows, keep: fk.compact([hidden_states], rows, config=config)[0]


def _instead_of(config_class: type, config: object) -> AbstractContextManager[Any]:
    """Every launch takes `config`; None leaves the choice to the op."""
    if config is None:
        return nullcontext()
    return mock.patch.object(config_class, "choose", return_value=config)


def compile_all(swept: Swept, mine: Callable[[int], bool], has_time: Callable[[], bool]) -> None:
    """Launch each configuration once: the compiled kernels stay on disk for the process that times them."""
    inputs = swept.make_inputs()
    for number, run in enumerate(swept.configs.values()):
        if mine(number) and has_time():
            try:
                run(*inputs)
            except Exception:  # the process that times it says so
                continue


class Beginning(Protocol):
    """What `steps.Context` offers a sweep."""

    timer: Timer
    plan: Any
    part: Any

    def begin(self, detail: str) -> bool:
        """Whether to launch this configuration; the last one begun is what ended the process, if it ends."""

    def carry_on(self) -> None:
        """All that is left was launched before."""

    def leave_if_dead(self) -> None:
        """End the process where the device does not answer any more."""


def measure_configs(swept: Swept, context: Beginning) -> list[SweepRow]:
    """Every configuration that runs and agrees with the result of the op's own choice."""
    cases.fresh_tickets()
    inputs = swept.make_inputs()
    expected = swept.configs[CHOSEN](*inputs)
    providers = {}
    for name, run in swept.configs.items():
        if not context.begin(name):
            continue
        try:
            _check_same(run(*inputs), expected)
            providers[name] = Provider(run)
        except Exception as error:  # too much shared memory for this GPU, say
            text = " ".join(str(error).split())[:120]
            context.part.problems.append(f"sweep of {swept.op} {swept.name}: {name}: {type(error).__name__}: {text}")
            context.part.write()
        context.leave_if_dead()
    context.carry_on()
    times = measure(context.timer, providers, swept.make_inputs, context.plan.sampling)
    rows = []
    for name, measured in times.items():
        quantiles = measured.cold if swept.basis == "cold" and measured.cold is not None else measured.warm
        rows.append(SweepRow(swept.op, swept.name, name, quantiles.median, chosen=name == CHOSEN))
    return rows


def _check_same(result: Any, expected: Any) -> None:
    if isinstance(result, Tensor):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        return
    uncertainty, survivors, count = result
    # sums in another order may move an uncertainty by a rounding, and rows that sit on the speed with it
    torch.testing.assert_close(uncertainty, expected[0], rtol=1e-3, atol=1e-3)
    kept = (~(uncertainty <= SPEED)).nonzero().flatten()
    assert survivors[: int(count)].tolist() == kept.tolist(), "survivors are not the rows above the speed, in order"


OF_OP: Mapping[str, Callable[[Scale, torch.device], Iterator[Swept]]] = {
    "compact": _compactions,
    "student_head_exit": _student_heads,
    "exit_gate": _exit_gates,
}
"""Every shape of an op."""


def cases_of(scale: Scale, device: torch.device) -> Iterator[Swept]:
    """Every shape of every op."""
    for of_op in OF_OP.values():
        yield from of_op(scale, device)
