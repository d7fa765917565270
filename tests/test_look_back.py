"""The look-back of the exit gate: what a block reads of blocks that are still writing.

A program's threads poll words that other programs change. Where two threads hold a copy of one word, the copies may be
of different moments, and the reductions over them disagree; so no word may be held twice, which layouts and PTX tell,
and the algorithm must be right in any interleaving of warps that hold each word once, which is tried at random.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from cubins import KernelSpec, compile_kernels

import fastkd_kernels as fk
from fastkd_kernels import _triton
from fastkd_kernels.ops.exit_gate import ExitGateConfig

needs_triton = pytest.mark.skipif(not _triton.available, reason="Triton is not installed")

WARPS = (1, 2, 4, 8)
Steps = Generator[None, None, int]


def window_of(warps: int) -> int:
    return replace(ExitGateConfig.choose(4096, 48), num_warps=warps).constants()["WINDOW"]


class Block:
    """Shared memory and barrier of one block."""

    def __init__(self, warps: int) -> None:
        self.warps = warps
        self.partial = [0] * warps
        self.arrived = self.phase = 0

    def barrier(self) -> Generator[None, None, None]:
        phase = self.phase
        self.arrived += 1
        if self.arrived == self.warps:
            self.arrived, self.phase = 0, phase + 1
        while self.phase == phase:
            yield

    def reduce(self, warp: int, value: int, combine: Callable[[Sequence[int]], int], slots: int) -> Steps:
        """As Triton lowers it: warps that hold copies write the same slot, each its own partial result."""
        yield from self.barrier()
        self.partial[warp % slots] = value
        yield
        yield from self.barrier()
        combined = combine(self.partial[:slots])
        yield
        return combined


def look_back(words: list[int], blocks: list[Block], block: int, warp: int, total: int, window: int) -> Steps:
    """`_survivors_before` by one warp; it yields where another may come in between."""
    shared = blocks[block]
    slots = max(min(window // 32, shared.warps), 1)
    own = [at for at in range(window) if at // 32 % slots == warp % slots]
    if block > 0:
        if warp == 0:
            words[block] = 4 * total + 1
        yield from shared.barrier()
    before, end = 0, block
    while end > 0:
        held = {at: words[end - 1 - at] if end > at else 2 for at in own}
        yield
        full = min((at for at, word in held.items() if word & 3 == 2), default=window)
        none = min((at for at, word in held.items() if word & 3 == 0), default=window)
        complete = yield from shared.reduce(warp, full, min, slots)
        missing = yield from shared.reduce(warp, none, min, slots)
        if complete < missing:
            part = sum(word >> 2 for at, word in held.items() if at <= complete)
            before += yield from shared.reduce(warp, part, sum, slots)
            end = 0
        elif missing == window:
            before += yield from shared.reduce(warp, sum(word >> 2 for word in held.values()), sum, slots)
            end -= window
    yield from shared.barrier()
    if warp == 0:
        words[block] = 4 * (before + total) + 2
    return before


def is_right(count: int, warps: int, window: int, generator: random.Random) -> bool:
    """One launch of `count` blocks, their warps interleaved at random."""
    words, totals = [0] * count, [generator.randrange(5) for _ in range(count)]
    blocks, found = [Block(warps) for _ in range(count)], {}
    running = {
        (block, warp): look_back(words, blocks, block, warp, totals[block], window)
        for block in range(count)
        for warp in range(warps)
    }
    while running:
        key = generator.choice(list(running))
        try:
            next(running[key])
        except StopIteration as stopped:
            found[key] = stopped.value
            del running[key]
    return all(value == sum(totals[:block]) for (block, _), value in found.items())


@pytest.mark.parametrize("warps", WARPS)
def test_the_sums_are_right_in_any_interleaving(warps: int) -> None:
    generator = random.Random(warps)
    assert all(is_right(5, warps, window_of(warps), generator) for _ in range(40))


def test_the_interleavings_find_words_that_are_held_twice() -> None:
    generator = random.Random(0)
    assert not all(is_right(5, 4, 64, generator) for _ in range(40))


def gate_spec(warps: int, window: int | None = None) -> KernelSpec:
    config = replace(ExitGateConfig.choose(4096, 48), num_warps=warps)
    constants = config.constants() | ({} if window is None else {"WINDOW": window})
    arguments = {
        **dict.fromkeys(("speeds", "row_ids", "exit_logits", "exit_uncertainty", "exit_layer", "history")),
        **dict.fromkeys(("uncertainty", "logits"), "*fp32:16"),
        **dict.fromkeys(("survivors", "count", "scan"), "*i32:16"),
        **dict.fromkeys(("rows", "capacity", "layer", "top_n"), "i32"),
        **dict.fromkeys(("columns", "row_stride"), "i32:16"),
        **dict.fromkeys(("speed", "scale"), "fp32"),
        **{"column_stride": 1, "CRITERION": "entropy"},
        **constants,
    }
    return KernelSpec("fastkd_kernels.ops.exit_gate:_exit_gate_kernel", arguments, config.options())


@needs_triton
def test_no_changing_word_is_held_twice() -> None:
    """By layouts and PTX of the installed Triton: versions lower copies differently, so nothing may rest on it."""
    specs = [*map(gate_spec, WARPS), gate_spec(4, window=64)]
    *polls, twice = (cubin.polled_words() for cubin in compile_kernels(specs, [90]))
    assert polls == [[(32 * warps, 1)] for warps in WARPS]
    assert twice == [(64, 2)], "copies are not recognised"


@needs_triton
def test_counts_are_published_without_fences() -> None:
    """A word carries all that is to be known of its block; a fence would wait for the block's stores as well."""
    (cubin,) = compile_kernels([gate_spec(4)], [90])
    ptx = Path(cubin.path).with_suffix(".ptx").read_text()
    assert ptx.count("atom.global.gpu.relaxed") == 3
    assert "acq_rel" not in ptx
    assert "fence" not in ptx


def test_only_the_look_back_polls() -> None:
    """Other kernels read what others wrote once the last program has taken its ticket, when nothing changes."""
    package = Path(fk.__file__).parent
    polling = [path.name for path in sorted(package.rglob("*.py")) if "volatile=True" in path.read_text()]
    assert polling == ["exit_gate.py"]
