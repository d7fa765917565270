"""The launcher of Triton kernels on this machine: from memory it gives the bits that Triton's own launcher gives."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_kd
import pytest
import torch
from common import by_tritons_launcher
from torch import Tensor

import fastkd_kernels as fk
from fastkd_kernels import _distillation_triton, _launch, _tickets, _triton
from fastkd_kernels._launch import Launcher
from fastkd_kernels._tickets import Tickets
from fastkd_kernels.ops import (
    compact,
    distillation_loss,
    exit_gate,
    fused_linear_kd_loss,
    kd_loss,
    layer_norm,
    packed,
    student_head,
    universal_kd_loss,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODULES = (
    *(_distillation_triton, compact, distillation_loss, exit_gate, kd_loss, layer_norm, packed),
    *(student_head, universal_kd_loss),
)

pytestmark = pytest.mark.skipif(not _triton.available, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")


def randn(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE).requires_grad_(grad)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def gate() -> Sequence[Tensor]:
    record = fk.ExitRecord.allocate(9, 4, DEVICE)
    row_ids = torch.arange(9, dtype=torch.int32, device=DEVICE)
    decided = fk.exit_gate(randn(9, 4), 0.5, "patience", row_ids, record=record, layer=2)
    return [*decided[:3], record.logits, record.uncertainty, record.exit_layer, record.history]


def large_gate() -> Sequence[Tensor]:
    return fk.exit_gate(randn(1100, 7), 0.5)[:3]


@torch.no_grad()
def head_and_gate() -> Sequence[Tensor]:
    sizes = ((32, 48), *[(32, 32)] * 5, (3, 32))
    head = fk.StudentHeadWeights(*[(randn(*size) / size[1] ** 0.5, randn(size[0])) for size in sizes])
    decided = fk.student_head_exit(randn(3, 9, 48), head, 0.5)
    assert decided.logits is not None
    return [decided.logits, *decided[:3], fk.student_head(randn(9, 48), head, cu_seqlens=integers(0, 4, 9))]


def losses() -> Sequence[Tensor]:
    return [
        *bench_kd.step(bench_kd.our_kd)(randn(8, 3, grad=True), randn(8, 3)),
        *bench_kd.step(bench_kd.our_kd)(randn(2, 1500, grad=True), randn(2, 1500)),
        *bench_kd.step(bench_kd.our_universal)(randn(2, 8, 3, grad=True), randn(4, 8, 3)),
        *bench_kd.step(bench_kd.our_universal)(randn(2, 2, 1500, grad=True), randn(3, 2, 1500)),
        *bench_kd.step(bench_kd.our_mixture)(
            randn(8, 3, grad=True),
            randn(2, 8, 3, grad=True),
            randn(8, 3),
            randn(4, 8, 3),
            torch.zeros(8, dtype=torch.int64, device=DEVICE),
        ),
    ]


def packed_rows() -> Sequence[Tensor]:
    rows = randn(3, 7, 24)
    (flat,), cu_seqlens = fk.pack([rows], integers(3, 7, 1), 11)
    (kept,), kept_cu_seqlens = fk.compact_packed([flat], cu_seqlens, integers(0, 2), integers(2))
    return [flat, cu_seqlens, *fk.unpack([flat], cu_seqlens, 7), kept[:4], kept_cu_seqlens]


@torch.no_grad()
def normalisations() -> Sequence[Tensor]:
    x, weight, bias, index = randn(5, 24), randn(24), randn(24), integers(0, 1, 1, 4, 3).long()
    return [fk.add_layer_norm(x, randn(5, 24), weight, bias), fk.embed_layer_norm([x, x], [index, index], weight, bias)]


def launchers() -> Iterator[tuple[str, Launcher]]:
    for module in MODULES:
        for name, value in vars(module).items():
            if isinstance(value, Launcher):
                yield f"{module.__name__}.{name}", value


class _NotAgain:
    """In the place of a kernel that has been remembered."""

    pre_run_hooks = ()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        raise AssertionError("Triton's launcher was asked again")


CASES = (gate, large_gate, head_and_gate, losses, packed_rows, normalisations)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_bits_are_those_of_tritons_launcher(
    case: Callable[[], Sequence[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def seeded() -> Sequence[Tensor]:
        torch.manual_seed(1)
        with fk.backend("cuda"):
            return case()

    expected = by_tritons_launcher(seeded)()
    seeded()
    if DEVICE.type == "cuda":
        for _, launcher in launchers():
            monkeypatch.setattr(launcher, "kernel", _NotAgain())
    for one, other in zip(seeded(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@needs_gpu
def test_in_another_stream_and_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = randn(33, 5)
    first = fk.exit_gate(logits, 0.5)
    assert _launch._enable()
    monkeypatch.setattr(exit_gate._launch_exit_gate, "kernel", _NotAgain())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there = fk.exit_gate(logits, 0.5)
    stream.synchronize()
    assert there.kept().tolist() == first.kept().tolist()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fk.exit_gate(logits, 0.5)
    logits.copy_(randn(33, 5))
    graph.replay()
    assert captured.kept().tolist() == fk.exit_gate(logits, 0.5).kept().tolist()


@pytest.mark.parametrize(
    ("changes", "plain"),
    [
        ({}, True),
        ({"num_ctas": 2}, False),
        ({"global_scratch_size": 128}, False),
        ({"profile_scratch_size": 128}, False),
        ({"launch_cooperative_grid": True}, False),
        ({"launch_pdl": True}, False),
    ],
)
def test_only_plain_launches_are_ours(changes: dict[str, int], plain: bool) -> None:
    usual = {"num_ctas": 1, **dict.fromkeys(_launch._SPECIAL, 0)}
    assert _launch._is_plain(SimpleNamespace(**{**usual, **changes})) == plain
    for name in changes:
        usual.pop(name)
        assert not _launch._is_plain(SimpleNamespace(**usual))


class _Compiles:
    """In the place of a kernel: Triton's launcher gives back `compiled`."""

    def __init__(self, compiled: object) -> None:
        self.compiled = compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return lambda *arguments, **constants: self.compiled


def test_what_triton_did_not_compile_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter gives nothing back, nor does a launch that `jit_cache_hook` took over."""
    monkeypatch.setattr(_launch, "_enable", lambda: True)
    launcher = Launcher(_Compiles(None))
    launcher._launch(0, (1,), (), {})
    assert launcher._binaries is None


def test_a_binary_that_replaces_another_stays_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = [
        SimpleNamespace(
            src=SimpleNamespace(signature={}),
            metadata=SimpleNamespace(num_ctas=1, num_warps=4, shared=0, **dict.fromkeys(_launch._SPECIAL, 0)),
            function=function,
        )
        for function in (1, 2)
    ]
    remembered = {}

    def remember(binaries: object, kind: int, device: int, function: int, *rest: object) -> bool:
        known = device in remembered
        remembered[device] = function
        return not known

    native = SimpleNamespace(new_triton_binaries=object, remember_triton=remember)
    monkeypatch.setattr(_launch, "_native", native)
    launcher = Launcher(None)
    for binary in compiled * 2:
        launcher._remember(binary, 0, (), {})
    assert remembered == {0: 2}
    assert list(launcher._alive.values()) == compiled


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Makes what a launcher asks of a tensor's memory: a tensor on the first GPU, where nothing is being captured."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for module in (_distillation_triton, _tickets):
        monkeypatch.setattr(module, "current_stream", lambda device: 7)
    made = SimpleNamespace(
        is_cuda=True,
        device=torch.device("cpu"),
        get_device=lambda: 0,
        new_zeros=lambda count, dtype: torch.zeros(count, dtype=dtype),
    )
    return lambda: made


def counters_of_two_calls(tensor: Any) -> list[bool]:
    """Whether two calls share memory, for the losses' counter and for the heads' tickets."""
    tickets = Tickets()
    tickets._cells[tensor.device] = torch.zeros(64, dtype=torch.int32)
    takes = (lambda: _distillation_triton.arrival_counter(tensor), lambda: tickets.take(tensor, 3))
    return [first.data_ptr() == second.data_ptr() for first, second in ((take(), take()) for take in takes)]


def test_ops_keep_nothing_once_torch_compile_has_graphs(
    on_a_gpu: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graphs own a pool, in which nothing may outlive the call (mode="reduce-overhead")."""
    monkeypatch.setattr(_distillation_triton, "_counters", {})
    as_op = _launch.as_op(counters_of_two_calls)
    monkeypatch.delitem(sys.modules, _launch._GRAPHS_OF_INDUCTOR, raising=False)
    assert as_op(on_a_gpu()) == [True, True]
    _distillation_triton._counters.clear()
    monkeypatch.setitem(sys.modules, _launch._GRAPHS_OF_INDUCTOR, SimpleNamespace())
    assert as_op(on_a_gpu()) == [False, False]
    assert not _distillation_triton._counters
    assert counters_of_two_calls(on_a_gpu()) == [True, True], "a call past the dispatcher lies in no pool"


def test_the_graphs_of_torch_compile_are_where_they_are_looked_for() -> None:
    compile_fx = importlib.util.find_spec("torch._inductor.compile_fx")
    assert compile_fx is not None
    assert f"from {_launch._GRAPHS_OF_INDUCTOR} import" in Path(str(compile_fx.origin)).read_text()


def test_ops_with_memory_of_their_own_say_that_they_are_ops() -> None:
    """Every kernel on a GPU that asks for a counter, tickets or folded weights."""
    for module in (kd_loss, universal_kd_loss, distillation_loss, fused_linear_kd_loss, student_head):
        source = Path(str(module.__file__)).read_text()
        plain = re.findall(r"library\.impl\(\"\w+\", (?!as_op)\w+, \"CUDA\"\)", source)
        composite = re.findall(r"\"CompositeExplicitAutograd\"\)\n(?!@as_op)", source)
        assert plain + composite == [], module.__name__
        assert "as_op" in source


def test_every_kernel_has_a_launcher() -> None:
    """A kernel started by Triton's own syntax would take its time, and the current device instead of its tensors'."""
    package = Path(fk.__file__).parent
    starts = [
        f"{path.relative_to(package)}:{number}"
        for path in sorted(package.rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "kernel[" in line and path.name != "_launch.py"
    ]
    assert starts == []
    kernels = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    assert {launcher.kernel.__name__ for _, launcher in launchers()} == kernels
