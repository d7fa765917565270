"""What the host pays for a call of an op whose Triton kernel is known, against the same call launched by Triton.

Without a GPU a CUDA driver that runs nothing is in charge, so its own time and the device's are not in the figures; on
a GPU the column `host` of `make gpu` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import bench_kd
import bench_student_head
import common
import fake_cuda
import pytest
import torch

import fastkd_kernels as fk
from fastkd_kernels import _triton
from fastkd_kernels._tickets import tickets as shared_tickets

SAMPLING = common.Sampling(case_seconds=2.0)

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU `make gpu` measures the host too"),
    pytest.mark.skipif(not _triton.available or _triton.interpreting, reason="needs Triton, not interpreting"),
    pytest.mark.skipif((reason := fake_cuda.missing()) is not None, reason=str(reason)),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fake_cuda.FakeCuda]:
    cuda = fake_cuda.FakeCuda(fake_cuda.build(tmp_path_factory.mktemp("driver")))
    with cuda.in_charge():
        yield cuda


def gate(logits: torch.Tensor) -> Any:
    return fk.exit_gate(logits, 0.5)


@torch.no_grad()
def head(hidden_states: torch.Tensor, weights: fk.StudentHeadWeights) -> Any:
    return fk.student_head_exit(hidden_states, weights, 0.5)


CASES: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
    "exit_gate [32, 4]": (gate, lambda: (torch.randn(32, 4),)),
    "student_head_exit [32, 128, 768] bf16": (head, bench_student_head.make_inputs((32, 128, 768), torch.bfloat16)),
    "kd_loss [32, 3], forward and backward": (
        bench_kd.step(bench_kd.our_kd),
        lambda: (torch.randn(32, 3, requires_grad=True), torch.randn(32, 3)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_launch(
    compare: Callable[..., Any], driver: fake_cuda.FakeCuda, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    tickets = torch.zeros(64, dtype=torch.int32)
    # a GPU has them already; on a CPU every call would make new ones
    monkeypatch.setattr(shared_tickets, "take", lambda tensor, count: tickets)
    run, make_inputs = CASES[case]
    seen = []

    def check(result: Any, *inputs: Any) -> None:
        last = driver.last
        seen.append((driver.last_was_by_triton, last.function, last.grid, last.block, last.shared_bytes))

    run(*make_inputs())
    providers = {"fastkd": run, "Triton's launcher": common.by_tritons_launcher(run)}
    compare("launch", case, providers, make_inputs, check, sampling=SAMPLING)
    ours, theirs = seen
    assert (ours[0], theirs[0]) == (False, True)
    assert ours[1:] == theirs[1:], "another binary was launched"
