"""Calls every op that has a Triton kernel on a CUDA driver without a device, and prints what was launched as JSON.

Each launch is made three times: by Triton's launcher, by ours, which then remembers, and by ours from memory.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from fake_cuda import FakeCuda

import fastkd_kernels as fk
from fastkd_kernels import _launch
from fastkd_kernels._launch import Launcher
from fastkd_kernels.ops import compact, layer_norm, packed

cuda = FakeCuda(Path(sys.argv[1]))
launch = Launcher.__call__
seen: list[dict[str, Any]] = []


def launch_thrice(launcher: Launcher, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    launcher.launch_by_triton(grid, arguments, constants)
    record = {"kernel": launcher.kernel.__name__, "by_triton": cuda.last_was_by_triton, "triton": asdict(cuda.last)}
    launch(launcher, grid, *arguments, **constants)
    record |= {"known": not cuda.last_was_by_triton}
    before = cuda.launches
    launch(launcher, grid, *arguments, **constants)
    record |= {"launches": cuda.launches - before, "remembered": not cuda.last_was_by_triton, "ours": asdict(cuda.last)}
    seen.append(record)


def exit_gates() -> None:
    record = fk.ExitRecord.allocate(64, 4)
    for rows, classes in ((32, 4), (1, 2), (5000, 40), (16, 5000)):
        fk.exit_gate(torch.randn(rows, classes), 0.5)
    fk.exit_gate(torch.randn(4, 32).T, 1.0, "margin")
    fk.exit_gate(torch.randn(33 * 4 + 1)[1:].view(33, 4), torch.full((33,), 0.5), "top_n", top_n=2)
    for criterion, dtype in (("patience", torch.int64), ("max_prob", torch.int32)):
        fk.exit_gate(torch.randn(9, 4).bfloat16(), 0.5, criterion, torch.arange(9, dtype=dtype), record=record, layer=1)


def heads() -> None:
    pairs = [(torch.randn(o, i), torch.randn(o)) for o, i in ((32, 48), *[(32, 32)] * 5, (3, 32))]
    with torch.no_grad():
        head = fk.StudentHeadWeights(*pairs)
        mask = torch.ones(2, 9, dtype=torch.bool)
        fk.student_head(torch.randn(2, 9, 48), head, attention_mask=mask)
        fk.student_head(torch.randn(200, 9, 48), head, lengths=torch.full((200,), 9))
        fk.student_head_exit(torch.randn(3, 300, 48), head, 0.5)
        ends = torch.tensor([0, 4, 9], dtype=torch.int32)
        record = fk.ExitRecord.allocate(2, 3)
        fk.student_head_exit(torch.randn(9, 48), head, 0.5, cu_seqlens=ends, record=record, layer=1)


def losses() -> None:
    def logits(*shape: int) -> torch.Tensor:
        return torch.randn(shape, requires_grad=True)

    fk.kd_loss(logits(8, 3), torch.randn(8, 3), 2.0).backward()
    fk.kd_loss(logits(8, 3000), torch.randn(8, 3000), reduction="none").sum().backward()
    fk.universal_kd_loss(logits(2, 8, 3), torch.randn(4, 8, 3)).backward()
    fk.universal_kd_loss(logits(2, 8, 3000), torch.randn(4, 8, 3000)).backward()
    labels = torch.zeros(8, dtype=torch.int64)
    layers = logits(2, 8, 3), torch.randn(4, 8, 3)
    weights = {"label_weight": 0.2, "kd_weight": 0.3, "intermediate_weight": 0.5}
    fk.distillation_loss(logits(8, 3), torch.randn(8, 3), labels, *layers, **weights).backward()


def packed_rows() -> None:
    rows, lengths = torch.randn(3, 7, 24), torch.tensor([3, 7, 1])
    ends, flat = torch.tensor([0, 3, 10, 11], dtype=torch.int32), torch.randn(11, 24)
    kept, count = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    packed._pack_triton([rows], lengths, [flat], ends)
    packed._unpack_triton([flat], ends, [rows])
    packed._compact_packed_triton([flat], ends, kept, count, [torch.empty(8, 24)], ends[:3].clone())
    compact._compact_triton([rows, lengths], kept, count)
    compact._compact_triton([rows, lengths], kept)


def normalisations() -> None:
    x, residual, weight, out = torch.randn(5, 24), torch.randn(5, 48)[:, ::2], torch.ones(24), torch.empty(5, 24)
    layer_norm._add_layer_norm_triton(x, residual, weight, weight, 1e-12, out, None)
    layer_norm._add_layer_norm_triton(x.bfloat16(), None, weight, None, 1e-12, out.bfloat16(), out.bfloat16())
    index = torch.zeros(5, dtype=torch.int64)
    layer_norm._embed_layer_norm_triton([x, x], [index, index], weight, weight, 1e-12, out)


@triton.jit(do_not_specialize=["unspecialised"])
def anything(
    first, second, third, size, unspecialised, factor, FLAG: tl.constexpr, NAME: tl.constexpr, N: tl.constexpr
):
    at = tl.arange(0, N)
    value = tl.load(first + at).to(tl.float32) * factor + size + unspecialised
    if second is not None:
        value += tl.load(second + at).to(tl.float32)
    if FLAG and NAME == "both":
        tl.store(third + at, value)
    tl.store(first + at, value.to(first.dtype.element_ty))


NUMBERS = (
    (1,),
    (0, 16, 48, -16, -(2**31)),
    (2, 15, 17, -1, 2**31 - 1),
    (2**31, 2**40, -(2**62)),
    (2**31 + 1, 2**62 + 1, -(2**31) - 1),
)
"""Of each class that Triton may compile another binary for."""


def random_arguments() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Pointers of every dtype and alignment, and numbers of every class; each kind twice, with other values."""
    choose = random.Random(0).choice
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.int8, torch.uint8)
    for dtype in dtypes:  # which differ in nothing else
        for at in (0, 1, 0, 1):
            pointer = torch.zeros(64, dtype=dtype)[at:]
            yield (pointer, None, pointer, 0, 0, 1.0), {"FLAG": False, "NAME": "none", "N": 16}
    for _ in range(100):
        kinds, offsets = [choose(dtypes) for _ in range(3)], [choose((0, 0, 1, 16)) for _ in range(3)]
        second = choose(("tensor", "parameter", "none"))
        size, unspecialised = choose(NUMBERS), choose(NUMBERS)
        factors = choose(((0.5, 1.0, -3.25, float("inf"), float("nan")), (1,), (3, 5)))
        constants = {"FLAG": choose((True, False)), "NAME": choose(("both", "none")), "N": choose((16, 32))}
        for _ in range(2):
            pointers = [torch.zeros(64, dtype=dtype)[at:] for dtype, at in zip(kinds, offsets, strict=True)]
            others = {"tensor": pointers[1], "parameter": torch.nn.Parameter(torch.zeros(64)), "none": None}
            numbers = choose(size), choose(unspecialised), choose(factors)
            yield (pointers[0], others[second], pointers[2], *numbers), constants


def anything_at_all() -> None:
    launcher = Launcher(anything)
    for arguments, constants in random_arguments():
        launcher((3, 2), *arguments, **constants, num_warps=2)


def by_triton(action: Callable[[], None], before: Callable[[], None] = lambda: None) -> bool:
    """Whether Triton's launcher makes a launch that could have been remembered; `before` comes in between."""
    action()
    before()
    launches = cuda.launches
    action()
    assert cuda.launches == launches + 1
    return cuda.last_was_by_triton


def special_cases() -> dict[str, Any]:
    """Which of them Triton's launcher has to make, and what else is to be seen of them."""
    logits = torch.randn(32, 4)

    def gate() -> None:
        fk.exit_gate(logits, 0.5)

    def in_another_thread() -> None:
        thread = threading.Thread(target=gate)
        thread.start()
        thread.join()

    def small(launcher: Launcher, size: int = 0, second: Any = None) -> Callable[[], None]:
        return lambda: launcher((1,), logits, second, logits, size, 0, 1.0, FLAG=False, NAME="none", N=16)

    found: dict[str, Any] = {"nothing special": by_triton(gate), "another thread": by_triton(in_another_thread)}
    hook = triton.knobs.runtime.launch_enter_hook
    names: list[str] = []
    hook.add(lambda metadata: names.append(metadata.get()["name"]))
    found |= {"a hook": by_triton(gate), "names told to the hook": names}
    hook.calls.clear()
    found["no context"] = by_triton(gate, lambda: cuda.set_context(False))
    found["a number beyond 64 bits"] = by_triton(small(Launcher(anything), size=2**64 - 1))
    found["a pointer as a number"] = by_triton(small(Launcher(anything), second=PointerLike()))
    nothing = Launcher(anything)
    nothing((0,), logits, None, logits, 0, 0, 1.0, FLAG=False, NAME="none", N=16)
    launches = cuda.launches
    nothing((0,), logits, None, logits, 0, 0, 1.0, FLAG=False, NAME="none", N=16)
    found["launches of an empty grid"] = cuda.launches - launches
    cuda.fail_launches(700)
    try:
        gate()
    except RuntimeError as error:
        found["error"] = str(error)
    cuda.fail_launches(0)
    cuda.knows_parameters = False
    found["parameters unknown to the driver"] = by_triton(lambda: fk.exit_gate(logits, 0.5, "margin"))
    _launch._native = None
    _launch._enable.cache_clear()
    found["no extension"] = by_triton(small(Launcher(anything)))
    return found


class PointerLike:
    """What Triton takes for a pointer and DLPack does not."""

    dtype = torch.float32

    def data_ptr(self) -> int:
        return 64


def main() -> None:
    parts = {}
    for part in (exit_gates, heads, losses, packed_rows, normalisations, anything_at_all):
        with patch.object(Launcher, "__call__", launch_thrice):
            part()
        parts[part.__name__] = seen.copy()
        seen.clear()
    print(json.dumps({"parts": parts, "special": special_cases()}))


with cuda.in_charge():
    main()
