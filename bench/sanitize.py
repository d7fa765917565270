"""Every CUDA kernel once on a small case, for compute-sanitizer:

    compute-sanitizer --tool memcheck python bench/sanitize.py
    compute-sanitizer --tool racecheck python bench/sanitize.py student_head_exit

Racecheck reports Triton's own reductions, falsely: `gpu/races.py` says which and why, and

    compute-sanitizer --tool racecheck --print-limit 0 python bench/sanitize.py | python bench/gpu/races.py

leaves the others.

The head with its gate comes first: its last block lists the survivors by an atomic ticket. Results are checked, so a
run that ends well also computed the right thing. With the kernels on a CPU (TRITON_INTERPRET=1) it shows that the
script works.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

# memory from cudaMalloc itself, so that memcheck sees the ends of every tensor; read when torch starts
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch
from gpu.races import ALL_RIGHT
from interpreter import mend_interpreter
from torch import Tensor

import fastkd_kernels as fk
from fastkd_kernels.ops.compact import CompactConfig
from fastkd_kernels.ops.exit_gate import exit_gate_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def made(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    # on the CPU first: kernels of torch are not what is examined here
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).to(DEVICE)


def student_head_exit() -> None:
    """More programs than multiprocessors would hide no race, fewer than two would hide all: the ticket is contended."""
    sizes = [(32, 48), *[(32, 32)] * 5, (3, 32)]
    head = fk.StudentHeadWeights(*[(made(size) / size[1] ** 0.5, made(size[:1])) for size in sizes])
    hidden_states = made((37, 70, 48))
    lengths = (torch.arange(37) % 70 + 1).to(DEVICE)
    record = fk.ExitRecord.allocate(37, 3, DEVICE)
    for masks in ({}, {"lengths": lengths}):
        out = fk.student_head_exit(hidden_states, head, 0.9, record=record, layer=1, **masks)
        assert out.logits is not None
        check_gate(out, out.logits, 0.9)


def exit_gate() -> None:
    """One program, several with a look-back, and rows that are streamed."""
    for rows, columns in ((40, 4), (3000, 10), (5, 5000)):
        logits = made((rows, columns))
        record = fk.ExitRecord.allocate(rows, columns, DEVICE)
        check_gate(fk.exit_gate(logits, 0.7, record=record, layer=2), logits, 0.7)


def compact() -> None:
    """Rows of 16-byte, 4-byte and single-byte accesses, and bulk copies."""
    tensors = [made((9, 33, 16)), made((9, 3)), made((9, 7)).to(torch.int8)]
    survivors = torch.tensor([8, 0, 3, 2**30, -1], dtype=torch.int32).to(DEVICE)
    count = torch.tensor([3], dtype=torch.int32).to(DEVICE)
    for config in (CompactConfig(), CompactConfig(threads=64, bulk=True)):
        gathered = fk.compact(tensors, survivors, count, config=config)
        for rows, tensor in zip(gathered, tensors, strict=True):
            assert torch.equal(rows[:3].cpu(), tensor.cpu()[[8, 0, 3]])


def check_gate(out: fk.ExitGateOutput, logits: Tensor, speed: float) -> None:
    expected = exit_gate_reference(logits.cpu(), speed)
    torch.testing.assert_close(out.uncertainty.cpu(), expected.uncertainty, rtol=0, atol=1e-5)
    stays = ~(out.uncertainty.cpu() <= speed)
    assert out.survivors.cpu()[: int(out.count)].tolist() == stays.nonzero().flatten().tolist()


KERNELS: dict[str, Callable[[], None]] = {
    "student_head_exit": student_head_exit,
    "exit_gate": exit_gate,
    "compact": compact,
}


@torch.no_grad()
def main(names: list[str]) -> int:
    unknown = set(names) - set(KERNELS)
    if unknown:
        print(f"sanitize: got {', '.join(sorted(unknown))}, expected some of {', '.join(KERNELS)}", file=sys.stderr)
        return 2
    for name in names or KERNELS:
        with fk.backend("cuda" if DEVICE.type == "cuda" or name != "compact" else "cpu"):
            KERNELS[name]()
        print(f"{name}: the results are right", flush=True)
    print(ALL_RIGHT, flush=True)
    return 0


if __name__ == "__main__":
    mend_interpreter()
    sys.exit(main(sys.argv[1:]))
