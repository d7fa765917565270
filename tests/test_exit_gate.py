"""exit_gate: accuracy, edge cases, compaction, record, registration, and the machine code of its kernels."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from operator import itemgetter

import pytest
import torch
from cubins import CAPABILITIES, Cubin, KernelSpec, compile_kernels
from error_budget import assert_within_budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fastkd_kernels as fk
from fastkd.exits import catalogue
from fastkd_kernels import _extension, _triton
from fastkd_kernels.ops import exit_gate as module
from fastkd_kernels.ops.exit_gate import ExitGateConfig, exit_gate_reference, uncertainty_reference

STATELESS = tuple(name for name in fk.CRITERIA if name != "patience")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps

# numpy, which runs the kernels in the interpreter, warns where a GPU silently returns NaN
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")

needs_triton = pytest.mark.skipif(not _triton.available, reason="Triton is not installed")
needs_extension = pytest.mark.skipif(
    not _extension.has_kernel("exit_gate", "CPU"), reason="fastkd_kernels._C was not compiled"
)
needs_eager = pytest.mark.skipif(
    module._eager_cpu is None, reason="fastkd_kernels._C was not compiled, or torch has no DLPack exchange"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
BACKENDS = (
    "reference",
    pytest.param("cpu", marks=needs_extension),
    pytest.param("cuda", marks=needs_triton),
)


def device_of(backend: str) -> str:
    """Without a GPU, Triton's interpreter runs the CUDA kernels on tensors of the CPU."""
    return "cuda" if backend == "cuda" and torch.cuda.is_available() else "cpu"


@contextmanager
def running_on(backend: str) -> Iterator[str]:
    with fk.backend(backend):
        yield device_of(backend)


def make_logits(rows: int, columns: int, dtype: torch.dtype = torch.float32, scale: float = 4.0) -> Tensor:
    """Rows from nearly uniform to nearly certain."""
    sharpness = torch.linspace(0.02, 1.0, max(rows, 1))[:rows, None] * scale
    return (torch.randn(rows, columns) * sharpness).to(dtype)


def limits_of(criterion: str, columns: int) -> int | None:
    return min(3, columns) if criterion == "top_n" else None


def assert_consistent(out: fk.ExitGateOutput, speed: float | Tensor) -> None:
    """Survivors and count are what the uncertainties of the same call say."""
    limit = torch.as_tensor(speed, dtype=torch.float32, device=out.uncertainty.device)
    stays = ~(out.uncertainty <= limit) | (limit == 0)
    assert out.survivors.dtype == out.count.dtype == torch.int32
    assert out.survivors.shape == out.uncertainty.shape
    assert out.count.shape == (1,)
    assert out.kept().tolist() == stays.nonzero().flatten().tolist()


# ---- accuracy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("criterion", STATELESS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_uncertainty_is_within_the_error_budget(backend: str, criterion: str, dtype: torch.dtype) -> None:
    # one row; a tile that is not full; whole tiles; tiles of the row kernel; a streamed row, not a multiple of a block
    for rows, columns in ((1, 2), (37, 5), (64, 40), (5, 300), (3, 5001)):
        logits = make_logits(rows, columns, dtype)
        top_n = limits_of(criterion, columns)
        truth = uncertainty_reference(logits.double(), criterion, top_n)
        baseline = uncertainty_reference(logits, criterion, top_n)
        with running_on(backend) as device:
            out = fk.exit_gate(logits.to(device), 0.5, criterion, top_n=top_n)
        assert out.uncertainty.dtype == torch.float32
        # u is a difference of numbers near 1, each rounded, and log(C) and its quotient are rounded once more
        assert_within_budget(out.uncertainty, truth, baseline, slack=1, absolute=4 * EPS)
        assert_consistent(out, 0.5)


@pytest.mark.parametrize("top_n", [2, 7, 39, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_top_n_is_right_for_every_n_and_for_ties(backend: str, top_n: int) -> None:
    logits = make_logits(20, 40)
    logits[:10] = logits[:10].round()  # many ties, also at the n-th place
    truth = uncertainty_reference(logits.double(), "top_n", top_n)
    with running_on(backend) as device:
        out = fk.exit_gate(logits.to(device), 0.3, "top_n", top_n=top_n)
    baseline = uncertainty_reference(logits, "top_n", top_n)
    assert_within_budget(out.uncertainty, truth, baseline, slack=1, absolute=4 * EPS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_n_of_a_streamed_row_with_ties(backend: str) -> None:
    logits = make_logits(3, 4500).mul(4).round()
    logits[2] = 1.5
    truth = uncertainty_reference(logits.double(), "top_n", 50)
    with running_on(backend) as device:
        out = fk.exit_gate(logits.to(device), 0.3, "top_n", top_n=50)
    baseline = uncertainty_reference(logits, "top_n", 50)
    assert_within_budget(out.uncertainty, truth, baseline, slack=1, absolute=4 * EPS)


@needs_extension
@pytest.mark.parametrize("columns", [2, 257, 2**17])
def test_the_cpu_kernel_takes_any_number_of_classes(columns: int) -> None:
    logits = make_logits(9, columns)
    truth, baseline = uncertainty_reference(logits.double()), uncertainty_reference(logits)
    out = fk.exit_gate(logits, 0.5)
    assert_within_budget(out.uncertainty, truth, baseline, slack=1, absolute=4 * EPS)


@pytest.mark.slow
@needs_extension
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_of_the_cpu_kernel(capability: str) -> None:
    tests = "(error_budget or every_n or edge_rows) and cpu"
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-k", tests, "-p", "no:cacheprovider"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=os.path.dirname(__file__))
    assert child.returncode == 0, child.stdout[-3000:]


@pytest.mark.parametrize("criterion", STATELESS)
def test_the_reference_is_differentiable(criterion: str) -> None:
    logits = make_logits(4, 5).double().requires_grad_()
    top_n = limits_of(criterion, 5)
    assert torch.autograd.gradcheck(lambda z: uncertainty_reference(z, criterion, top_n), (logits,))


P = (5 / 8, 2 / 8, 1 / 8)
EXACT = {
    "entropy": -sum(p * math.log(p) for p in P) / math.log(3),
    "max_prob": (1 - P[0]) / (1 - 1 / 3),
    "margin": 1 - (P[0] - P[1]),
    "top_n": -(5 / 7 * math.log(5 / 7) + 2 / 7 * math.log(2 / 7)) / math.log(2),  # of the two largest
    "patience": 1.0,  # in the first layer
}


@pytest.mark.parametrize("criterion", fk.CRITERIA)
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_values(backend: str, criterion: str) -> None:
    """Every criterion has a value here that no formula of another one gives."""
    assert len(set(EXACT.values())) == len(EXACT)
    logits = torch.tensor([P, P[::-1], (P[1], P[0], P[2])]).log()
    with running_on(backend) as device:
        record = fk.ExitRecord.allocate(3, 3, device)
        out = fk.exit_gate(logits.to(device), 0.5, criterion, top_n=2, record=record, layer=1)
    assert out.uncertainty.tolist() == pytest.approx([EXACT[criterion]] * 3, abs=8 * EPS)


# ---- edge cases


@pytest.mark.parametrize("criterion", fk.CRITERIA)
@pytest.mark.parametrize("backend", BACKENDS)
def test_edge_rows(backend: str, criterion: str) -> None:
    inf, nan = math.inf, math.nan
    rows = {
        "one NaN": [1.0, nan, 0.0],
        "only NaN": [nan, nan, nan],
        "one +inf": [inf, 0.0, 1.0],
        "all -inf": [-inf, -inf, -inf],
        "certain": [5.0, -inf, -inf],
        "even, huge": [1e38, 1e38, 1e38],
        "certain, huge": [3e38, -3e38, -3e38],
        "even": [0.0, 0.0, 0.0],
        "denormal": [1e-40, 0.0, -1e-40],
    }
    logits = torch.tensor(list(rows.values()))
    with running_on(backend) as device:
        record = fk.ExitRecord.allocate(len(rows), 3, device)
        out = fk.exit_gate(logits.to(device), 0.999, criterion, top_n=limits_of(criterion, 3), record=record, layer=1)
    u = dict(zip(rows, out.uncertainty.tolist(), strict=True))
    broken = ["one NaN", "only NaN", "one +inf", "all -inf"]
    assert all(math.isnan(u[name]) for name in broken)
    assert out.kept().tolist()[: len(broken)] == [0, 1, 2, 3], "a row that is no distribution must stay"
    assert record.exit_layer[: len(broken)].tolist() == [0, 0, 0, 0]
    if criterion == "patience":
        assert all(u[name] == 1 for name in rows if name not in broken)
        assert record.history[:5, 0].tolist() == [-1, -1, -1, -1, 0]
        return
    assert u["certain"] == u["certain, huge"] == 0
    assert u["even, huge"] == u["even"] == pytest.approx(1, abs=2 * EPS)
    assert u["denormal"] == pytest.approx(1, abs=2 * EPS)


@pytest.mark.parametrize("criterion", fk.CRITERIA)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_in_any_place_of_any_tile_keeps_its_row(backend: str, criterion: str) -> None:
    for columns in (3, 70, 4500):
        logits = make_logits(3, columns)
        logits[0, 0] = logits[1, columns // 2] = logits[2, -1] = math.nan
        with running_on(backend) as device:
            record = fk.ExitRecord.allocate(3, columns, device)
            out = fk.exit_gate(
                logits.to(device), 1.0, criterion, top_n=limits_of(criterion, columns), record=record, layer=1
            )
        assert out.uncertainty.isnan().all()
        assert out.kept().tolist() == [0, 1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_speed_zero_keeps_even_the_certain(backend: str) -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 0.0]])
    speeds = torch.tensor([0.0, 1.0])
    with running_on(backend) as device:
        off = fk.exit_gate(logits.to(device), 0.0)
        # speeds below the smallest float32 are the same as 0
        tiny = fk.exit_gate(logits.to(device), 1e-60)
        by_row = fk.exit_gate(logits.to(device), speeds.to(device))
    assert off.uncertainty[0] == 0
    assert off.kept().tolist() == tiny.kept().tolist() == [0, 1]
    assert by_row.kept().tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_speeds_by_row_of_any_dtype(backend: str) -> None:
    logits = make_logits(50, 4)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        speeds = torch.linspace(0, 1, 100).to(dtype)[::2]
        with running_on(backend) as device:
            assert_consistent(fk.exit_gate(logits.to(device), speeds.to(device)), speeds.to(device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_stay_none_stay_and_empty(backend: str) -> None:
    logits = make_logits(33, 3, scale=1.0)
    with running_on(backend) as device:
        assert fk.exit_gate(logits.to(device), 1.0).kept().tolist() == []
        assert fk.exit_gate(logits.to(device) * 0, 0.5).kept().tolist() == list(range(33))
        empty = fk.exit_gate(logits[:0].to(device), 0.5)
    assert (empty.uncertainty.shape, empty.survivors.shape, empty.count.tolist()) == ((0,), (0,), [0])
    assert empty.kept().tolist() == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_change_nothing(backend: str, dtype: torch.dtype) -> None:
    logits = make_logits(21, 6, dtype)
    spread = torch.full((21, 30), math.nan, dtype=dtype)
    spread[:, 1::5] = logits
    layouts = {
        "column-major": logits.t().contiguous().t(),
        "every fifth column": spread[:, 1::5],
        "padded rows": torch.cat([logits, logits], dim=1)[:, :6],
        "one row for all": logits[:1].expand(21, 6),
        "offset": torch.cat([logits.flatten()[:1], logits.flatten()])[1:].view(21, 6),
    }
    for name, view in layouts.items():
        with running_on(backend) as device:
            record, packed = (fk.ExitRecord.allocate(21, 6, device) for _ in range(2))
            view = view.to(device) if device == "cuda" else view
            out = fk.exit_gate(view, 0.6, record=record, layer=1)
            expected = fk.exit_gate(view.contiguous(), 0.6, record=packed, layer=1)
        torch.testing.assert_close(out.uncertainty, expected.uncertainty, rtol=0, atol=0, msg=name)
        assert out.kept().tolist() == expected.kept().tolist(), name
        assert torch.equal(record.logits, packed.logits), name


# ---- compaction


@pytest.mark.parametrize("rows", [1, 511, 512, 513, 2048, 2049, 5000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_survivors_ascend_across_tiles_and_programs(backend: str, rows: int) -> None:
    logits = torch.randn(rows, 2) * 3
    with running_on(backend) as device:
        assert_consistent(fk.exit_gate(logits.to(device), 0.4), 0.4)


@needs_triton
def test_the_launch_covers_both_ways_of_compacting() -> None:
    assert ExitGateConfig.choose(2048, 2).programs == 1
    assert ExitGateConfig.choose(2049, 2).programs == 5
    assert ExitGateConfig.choose(3, 5001) == ExitGateConfig(1, 4096, False, 1, 3, 8)
    large = ExitGateConfig.choose(65536, 1024)
    assert (large.tiles, large.programs) == (16, 4096)
    assert ExitGateConfig.choose(2**20, 3).tiles == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_programs_than_one_look_back_window(backend: str) -> None:
    logits = make_logits(80, 1030)[torch.randperm(80)]
    with running_on(backend) as device:
        assert_consistent(fk.exit_gate(logits.to(device), 0.9), 0.9)


@needs_triton
@pytest.mark.parametrize(("rows", "block_rows", "tiles"), [(70, 1, 16), (75, 4, 4), (64, 2, 8), (33, 16, 1)])
@pytest.mark.parametrize("criterion", fk.CRITERIA)
def test_programs_of_several_tiles(
    rows: int, block_rows: int, tiles: int, criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = make_logits(rows, 30).to(device_of("cuda"))
    programs = -(-rows // (block_rows * tiles))
    config = ExitGateConfig(block_rows, 32, True, tiles, programs, 4)
    outputs = []
    for choice in (ExitGateConfig.choose(rows, 30), config):
        record = fk.ExitRecord.allocate(rows, 30, logits.device)
        monkeypatch.setattr(ExitGateConfig, "choose", lambda *_, choice=choice: choice)
        with fk.backend("cuda"):
            out = fk.exit_gate(logits, 0.5, criterion, top_n=limits_of(criterion, 30), record=record, layer=1)
        outputs.append([out.uncertainty, out.kept(), record.logits, record.exit_layer, record.history])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, equal_nan=True)


if _triton.available:
    import triton
    import triton.language as tl

    @triton.jit
    def _look_back(
        scan,  # [BLOCKS]
        before,  # [1], out
        block,
        total,
        WINDOW: tl.constexpr,
    ):
        tl.store(before, module._survivors_before(scan, block, total, WINDOW))


@needs_triton
@pytest.mark.parametrize("complete", [0, 3, 4, 5, 10])
def test_look_back_adds_what_earlier_programs_have_published(complete: int) -> None:
    """On a GPU most earlier programs have published only their own survivors; the interpreter never shows that."""
    totals = [5, 0, 7, 1, 2, 9, 4, 4, 0, 3, 6]
    words = [4 * total + 1 for total in totals]
    words[complete] = 4 * sum(totals[: complete + 1]) + 2
    scan = torch.tensor([*words, 0], dtype=torch.int32, device=device_of("cuda"))
    before = torch.zeros(1, dtype=torch.int32, device=scan.device)
    _look_back[(1,)](scan, before, len(totals), 8, WINDOW=4)
    assert before.item() == sum(totals)
    assert scan[-1].item() == 4 * (sum(totals) + 8) + 2


@needs_extension
def test_a_million_rows_on_cpu() -> None:
    logits = torch.randn(2**20, 2) * 3
    out = fk.exit_gate(logits, 0.5)
    assert_consistent(out, 0.5)
    torch.testing.assert_close(out.uncertainty, uncertainty_reference(logits), rtol=0, atol=4 * EPS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same_is_the_same(backend: str) -> None:
    logits = make_logits(3000, 3)
    with running_on(backend) as device:
        first, second = (fk.exit_gate(logits.to(device), 0.5) for _ in range(2))
    assert torch.equal(first.uncertainty, second.uncertainty)
    assert torch.equal(first.kept(), second.kept())


@needs_extension
def test_threads_change_nothing() -> None:
    logits = make_logits(20_000, 7)
    threads = torch.get_num_threads()
    outs = []
    for number in (1, 2):
        torch.set_num_threads(number)
        outs.append(fk.exit_gate(logits, 0.5))
    torch.set_num_threads(threads)
    assert torch.equal(outs[0].uncertainty, outs[1].uncertainty)
    assert torch.equal(outs[0].kept(), outs[1].kept())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_backends_agree_with_the_reference(backend: str, data: st.DataObject) -> None:
    if backend == "cpu" and not _extension.has_kernel("exit_gate", "CPU"):
        pytest.skip("fastkd_kernels._C was not compiled")
    if backend == "cuda" and not _triton.available:
        pytest.skip("Triton is not installed")
    rows = data.draw(st.integers(0, 70))
    columns = data.draw(st.integers(2, 90))
    criterion = data.draw(st.sampled_from(fk.CRITERIA))
    top_n = data.draw(st.integers(2, columns)) if criterion == "top_n" else None
    dtype = data.draw(st.sampled_from(DTYPES))
    speed = data.draw(st.floats(0, 1))
    scale = data.draw(st.sampled_from([0.01, 1.0, 30.0, 1e4]))
    logits = make_logits(rows, columns, dtype, scale)
    row_ids = torch.randperm(rows + 3)[:rows]
    records = [fk.ExitRecord.allocate(rows + 3, columns) for _ in range(2)]
    expected = exit_gate_reference(logits, speed, criterion, row_ids, top_n, record=records[0], layer=2)
    with running_on(backend) as device:
        if device == "cuda":
            records[1] = fk.ExitRecord.allocate(rows + 3, columns, device)
        out = fk.exit_gate(logits.to(device), speed, criterion, row_ids.to(device), top_n, record=records[1], layer=2)
    torch.testing.assert_close(out.uncertainty.cpu(), expected.uncertainty, rtol=0, atol=8 * EPS)
    assert_consistent(out, speed)
    left = torch.ones(rows + 3, dtype=torch.bool)
    left[row_ids[out.kept().cpu().long()]] = False
    left[[number for number in range(rows + 3) if number not in row_ids.tolist()]] = False
    assert (records[1].exit_layer.cpu() == torch.where(left, 2, 0)).all()
    answered = torch.zeros(rows + 3, columns)
    answered[row_ids] = logits.float()
    assert torch.equal(records[1].logits.cpu(), torch.where(left[:, None], answered, 0))


# ---- record


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("columns", [3, 300, 4300])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_leave_are_written_at_their_ids(backend: str, columns: int, id_dtype: torch.dtype) -> None:
    logits = make_logits(4, columns)
    logits[0] = 0
    logits[2, 1] = 500.0
    row_ids = torch.tensor([6, 0, 3, 5], dtype=id_dtype)
    with running_on(backend) as device:
        record = fk.ExitRecord.allocate(7, columns, device)
        before = record.logits.clone()
        out = fk.exit_gate(
            logits.to(device),
            torch.tensor([0.5, 0.0, 0.5, 0.0]).to(device),
            row_ids=row_ids.to(device),
            record=record,
            layer=4,
        )
    assert out.kept().tolist() == [0, 1, 3]
    assert record.exit_layer.tolist() == [0, 0, 0, 4, 0, 0, 0]
    before[3] = logits[2]
    assert torch.equal(record.logits, before)
    assert record.uncertainty[3] == out.uncertainty[2]
    assert record.uncertainty.count_nonzero() <= 1


def pabee(labels: list[list[int]], patience: int) -> list[int]:
    """PABEE (NeurIPS 2020) one sample at a time: the layer after which each leaves, 0 if never."""
    answers = []
    for sequence in labels:
        repeats, left = 0, 0
        for layer, (label, last) in enumerate(zip(sequence, [-1, *sequence], strict=False), start=1):
            repeats = repeats + 1 if label == last else 0
            if repeats >= patience:
                left = layer
                break
        answers.append(left)
    return answers


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_patience_over_a_shrinking_batch_is_pabee(backend: str, patience: int) -> None:
    samples, layers, columns = 30, 8, 3
    labels = torch.randint(0, columns, (samples, layers))
    labels[::3, 2:] = labels[::3, 2:3]
    logits = torch.nn.functional.one_hot(labels, columns).float() * 3 + torch.rand(samples, layers, columns)
    with running_on(backend) as device:
        record = fk.ExitRecord.allocate(samples, columns, device)
        row_ids = torch.arange(samples, device=device)
        for layer in range(layers):
            answers = logits[:, layer].to(device)[row_ids]
            out = fk.exit_gate(answers, 1 / (1 + patience), "patience", row_ids, record=record, layer=layer + 1)
            row_ids = row_ids[out.kept().long()]
    assert record.exit_layer.tolist() == pabee(labels.tolist(), patience)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_row_forgets_its_patience(backend: str) -> None:
    with running_on(backend) as device:
        record = fk.ExitRecord.allocate(1, 2, device)
        seen = []
        for row in ([1.0, 0.0], [1.0, 0.0], [math.nan, 0.0], [1.0, 0.0], [1.0, 0.0]):
            fk.exit_gate(torch.tensor([row], device=device), 0.1, "patience", record=record, layer=1)
            seen.append(record.history[0].tolist())
    assert seen == [[0, 0], [0, 1], [-1, 0], [0, 0], [0, 1]]


# ---- bad input


def wrong(message: str, error: type[Exception] = ValueError, **arguments: object) -> pytest.param:
    return pytest.param(arguments, error, message, id=message)


RECORD = fk.ExitRecord.allocate(4, 3)
RECORDED = {"record": RECORD, "layer": 1}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        wrong("logits: got dtype torch.int64", TypeError, logits=torch.zeros(4, 3, dtype=torch.int64)),
        wrong("logits: got shape", logits=torch.zeros(4)),
        wrong("logits: got C=1", logits=torch.zeros(4, 1)),
        wrong("criterion: got 'energy', expected one of entropy", criterion="energy"),
        wrong("speed: got 1.5", speed=1.5),
        wrong("speed: got -0.1", speed=-0.1),
        wrong("speed: got nan", speed=math.nan),
        wrong("speed: got str", TypeError, speed="0.5"),
        wrong("speed: got a value that is NaN", speed=torch.tensor([0.5, math.nan, 0.1, 0.2])),
        wrong(r"or outside \[0, 1\]", speed=torch.tensor([0.5, 2.0, 0.1, 0.2])),
        wrong(r"speed: got shape \(3,\)", speed=torch.rand(3)),
        wrong("speed: got dtype torch.int64", TypeError, speed=torch.ones(4, dtype=torch.int64)),
        wrong("speed: got device meta", speed=torch.rand(4, device="meta")),
        wrong("top_n: got None", criterion="top_n"),
        wrong("top_n: got 1", criterion="top_n", top_n=1),
        wrong("top_n: got 4", criterion="top_n", top_n=4),
        wrong("record: got None", criterion="patience"),
        wrong("layer: got None", record=RECORD),
        wrong(r"row_ids: got shape \(3,\)", row_ids=torch.arange(3)),
        wrong("row_ids: got dtype torch.float32", TypeError, row_ids=torch.zeros(4)),
        wrong("row_ids: got values from 1 to 4", IndexError, row_ids=torch.arange(1, 5), **RECORDED),
        wrong("row_ids: got values from -1 to 2", IndexError, row_ids=torch.arange(-1, 3), **RECORDED),
        wrong("record: got room for 2 rows", record=fk.ExitRecord.allocate(2, 3), layer=1),
        wrong("record: got C=2 classes, the logits have 3", record=fk.ExitRecord.allocate(4, 2), layer=1),
        wrong("record: got device meta", record=fk.ExitRecord.allocate(4, 3, "meta"), layer=1),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fk.exit_gate(**{"logits": torch.zeros(4, 3), "speed": 0.5, **arguments})
    assert not RECORD.exit_layer.any(), "nothing was written"


@needs_triton
def test_more_rows_than_the_cuda_kernel_can_count_are_refused() -> None:
    with running_on("cuda") as device, pytest.raises(ValueError, match="B=536870912 rows"):
        fk.exit_gate(torch.zeros(1, 2, device=device).expand(2**29, 2), 0.5)


@pytest.mark.parametrize(
    ("name", "tensor", "error", "message"),
    [
        ("exit_layer", torch.zeros(4, dtype=torch.int64), TypeError, "ExitRecord.exit_layer: got dtype torch.int64"),
        ("logits", torch.zeros(4), ValueError, "ExitRecord.logits: got shape"),
        ("logits", torch.zeros(3, 4).t(), ValueError, "expected contiguous"),
        ("uncertainty", torch.zeros(5), ValueError, r"ExitRecord.uncertainty: got shape \(5,\)"),
        ("history", torch.zeros(4, 2, dtype=torch.int32, device="meta"), ValueError, "on meta, expected"),
    ],
)
def test_a_record_that_does_not_fit_itself_is_refused(
    name: str, tensor: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fk.ExitRecord(**{**vars(RECORD), name: tensor})


def test_float64_takes_the_reference_and_says_so() -> None:
    logits = make_logits(9, 3).double()
    expected = exit_gate_reference(logits, 0.5)
    module._backend._warned.clear()
    with pytest.warns(UserWarning, match="logits are torch.float64"):
        out = fk.exit_gate(logits, 0.5)
    assert torch.equal(out.uncertainty, expected.uncertainty)
    for backend in ("cpu", "cuda"):
        with fk.backend(backend), pytest.raises(fk.BackendUnavailableError):
            fk.exit_gate(logits, 0.5)


# ---- the table of criteria


def test_the_catalogue_of_the_models_names_what_is_fused() -> None:
    assert tuple(name for name, criterion in catalogue.CRITERIA.items() if criterion.is_fused) == fk.CRITERIA


@needs_extension
def test_the_extension_numbers_the_same_criteria() -> None:
    assert _extension.extension is not None
    assert _extension.extension.criteria == fk.CRITERIA


@needs_eager
def test_the_eager_gate_decides_by_every_criterion_that_needs_no_record() -> None:
    assert module._eager_cpu is not None
    logits = make_logits(4, 3)
    decided = {code for code in range(-1, len(fk.CRITERIA) + 1) if module._eager_cpu(logits, 0.5, code, 2) is not None}
    assert decided == {fk.CRITERIA.index(name) for name in STATELESS}
    assert module._eager_cpu(logits, 0.5, fk.CRITERIA.index("top_n"), 4) is None


def test_the_references_refuse_an_unknown_criterion() -> None:
    logits = make_logits(4, 3)
    for unknown in ("energy", "patience"):
        with pytest.raises(ValueError, match=f"criterion: got '{unknown}', expected one of entropy, max_prob"):
            uncertainty_reference(logits, unknown)
    with pytest.raises(ValueError, match="criterion: got 'energy', expected one of entropy"):
        exit_gate_reference(logits, 0.5, "energy")


def test_the_reference_has_no_formula_for_a_name_that_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OF_ONE_LAYER", (*module._OF_ONE_LAYER, "new"))
    with pytest.raises(NotImplementedError, match="criterion: 'new' is in CRITERIA; give it a formula"):
        uncertainty_reference(make_logits(4, 3), "new")


@pytest.mark.parametrize("name", fk.CRITERIA)
def test_the_docstrings_name_every_criterion(name: str) -> None:
    assert f"\n    {name} " in (module.__doc__ or "")
    assert f'"{name}"' in (fk.exit_gate.__doc__ or "")


@needs_extension
@pytest.mark.parametrize("code", [-1, len(fk.CRITERIA)])
def test_the_cpu_kernel_refuses_an_unknown_criterion(code: int) -> None:
    with pytest.raises(RuntimeError, match="criterion: unknown"):
        torch.ops.fastkd_kernels.exit_gate(make_logits(4, 3), 0.5, code, 0, None)


@needs_triton
def test_the_triton_kernel_refuses_an_unknown_criterion() -> None:
    logits = make_logits(4, 3).to(device_of("cuda"))
    with pytest.raises(Exception, match="unknown criterion"):
        module._exit_gate_triton(logits, module.GateCall(0.5, "energy"))


# ---- registration


def op_arguments(criterion: str, dtype: torch.dtype, with_speeds: bool) -> tuple[object, ...]:
    speeds = torch.rand(6) if with_speeds else None
    return make_logits(6, 4, dtype), 0.4, fk.CRITERIA.index(criterion), 3, speeds


@needs_extension
@pytest.mark.parametrize("criterion", fk.CRITERIA)
def test_opcheck(criterion: str) -> None:
    record = fk.ExitRecord.allocate(8, 4)
    columns = (record.logits, record.uncertainty, record.exit_layer, record.history)
    for dtype, with_speeds in product(DTYPES, (False, True)):
        arguments = op_arguments(criterion, dtype, with_speeds)
        if criterion != "patience":
            torch.library.opcheck(torch.ops.fastkd_kernels.exit_gate.default, arguments)
        row_ids = torch.randperm(8)[:6] if with_speeds else None
        torch.library.opcheck(torch.ops.fastkd_kernels.exit_gate_record.default, (*arguments, row_ids, *columns, 2))


@needs_extension
def test_the_op_checks_what_it_would_crash_on() -> None:
    op, with_record = torch.ops.fastkd_kernels.exit_gate, torch.ops.fastkd_kernels.exit_gate_record
    logits, record = torch.zeros(4, 3), fk.ExitRecord.allocate(4, 3)
    columns = [record.logits, record.uncertainty, record.exit_layer, record.history]
    bad = [
        (op, (torch.zeros(4), 0.5, 0, 0, None)),
        (op, (logits.double(), 0.5, 0, 0, None)),
        (op, (logits, 0.5, 9, 0, None)),
        (op, (logits, 0.5, 4, 0, None)),
        (op, (logits, 0.5, 3, 4, None)),
        (op, (logits, math.nan, 0, 0, None)),
        (op, (logits, 0.5, 0, 0, torch.zeros(3))),
        (op, (logits, 0.5, 0, 0, torch.full((4,), math.nan))),
        (with_record, (logits, 0.5, 0, 0, None, torch.arange(1, 5), *columns, 1)),
        (with_record, (logits, 0.5, 0, 0, None, torch.zeros(4), *columns, 1)),
        (with_record, (logits, 0.5, 0, 0, None, None, record.logits[:, :2], *columns[1:], 1)),
        (with_record, (logits, 0.5, 0, 0, None, None, *columns[:3], record.history.float(), 1)),
    ]
    for function, arguments in bad:
        with pytest.raises(RuntimeError):
            function(*arguments)


@pytest.mark.parametrize("criterion", fk.CRITERIA)
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
def test_compiles_into_one_graph(backend: str, criterion: str) -> None:
    def decide(logits: Tensor, record: fk.ExitRecord) -> tuple[Tensor, Tensor, Tensor]:
        with fk.backend(backend):
            out = fk.exit_gate(logits * 2, 0.5, criterion, top_n=limits_of(criterion, 3), record=record, layer=1)
        return out.uncertainty, out.survivors, out.count

    torch._dynamo.reset()
    compiled = torch.compile(decide, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        logits = make_logits(rows, 3)
        records = [fk.ExitRecord.allocate(rows, 3) for _ in range(2)]
        expected, out = decide(logits, records[0]), compiled(logits, records[1])
        count = int(expected[2])
        assert int(out[2]) == count
        assert torch.equal(out[1][:count], expected[1][:count])
        torch.testing.assert_close(out[0], expected[0])
        assert torch.equal(records[0].exit_layer, records[1].exit_layer)
        assert torch.equal(records[0].history, records[1].history)


@needs_extension
def test_compiles_without_a_record_and_with_inductor() -> None:
    def decide(logits: Tensor, speed: float) -> tuple[Tensor, Tensor]:
        out = fk.exit_gate(logits + 1, speed)
        return out.uncertainty * 2, out.count

    torch._dynamo.reset()
    logits = make_logits(12, 4)
    for speed in (0.3, 0.6):
        uncertainty, count = torch.compile(decide, fullgraph=True)(logits, speed)
        expected = decide(logits, speed)
        torch.testing.assert_close(uncertainty, expected[0])
        assert torch.equal(count, expected[1])


@needs_extension
def test_skipping_the_dispatcher_changes_nothing() -> None:
    logits = make_logits(100, 5)
    assert module._eager_cpu is not None or not hasattr(Tensor, "__dlpack_c_exchange_api__")
    direct = fk.exit_gate(logits, 0.5)
    dispatched = torch.ops.fastkd_kernels.exit_gate(logits, 0.5, 0, 0, None)
    assert torch.equal(direct.uncertainty, dispatched[0])
    assert torch.equal(direct.kept(), dispatched[1][: int(dispatched[2])])
    # outputs own their memory, outlive the call and are ordinary tensors
    del logits
    again = fk.exit_gate(make_logits(100, 5), 0.5)
    assert direct.uncertainty.data_ptr() != again.uncertainty.data_ptr()
    assert (direct.uncertainty + 1).add_(1).sum().isfinite()


@needs_extension
def test_a_traced_call_is_seen() -> None:
    graph = make_fx(lambda z: fk.exit_gate(z, 0.5).uncertainty, tracing_mode="real")(make_logits(4, 3)).graph
    assert any("exit_gate" in str(node.target) for node in graph.nodes)


@needs_extension
def test_logits_that_want_gradients_are_decided_without() -> None:
    logits = make_logits(10, 3)
    parameter = torch.nn.Parameter(logits)
    expected = fk.exit_gate(logits, 0.5)
    for tensor in (parameter, logits.clone().requires_grad_()):
        out = fk.exit_gate(tensor, 0.5)
        assert not out.uncertainty.requires_grad
        assert torch.equal(out.uncertainty, expected.uncertainty)
    with torch.inference_mode():
        assert torch.equal(fk.exit_gate(logits, 0.5).uncertainty, expected.uncertainty)


# ---- on a GPU


@needs_gpu
@pytest.mark.parametrize("criterion", fk.CRITERIA)
def test_the_reference_waits_for_nothing_and_can_be_captured(criterion: str) -> None:
    logits, record = make_logits(64, 4).cuda(), fk.ExitRecord.allocate(64, 4, "cuda")
    options = {"top_n": limits_of(criterion, 4), "record": record, "layer": 1}
    expected = exit_gate_reference(logits, 0.5, criterion, **options)
    record.forget()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            out = exit_gate_reference(logits, 0.5, criterion, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert out.kept().tolist() == expected.kept().tolist()


@needs_gpu
@pytest.mark.parametrize("criterion", fk.CRITERIA)
@pytest.mark.parametrize("rows", [64, 5000])
def test_captured_in_a_graph_and_replayed(criterion: str, rows: int) -> None:
    logits = make_logits(rows, 4).cuda()
    record = fk.ExitRecord.allocate(rows, 4, "cuda")
    arguments = {"top_n": limits_of(criterion, 4), "record": record, "layer": 1}
    torch.cuda.set_sync_debug_mode("error")
    try:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            fk.exit_gate(logits, 0.5, criterion, **arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            out = fk.exit_gate(logits, 0.5, criterion, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(3):
        fresh = make_logits(rows, 4)[torch.randperm(rows)]
        logits.copy_(fresh)
        record.history.copy_(fk.ExitRecord.allocate(rows, 4).history)
        graph.replay()
        torch.cuda.synchronize()
        assert_consistent(out, 0.5)
        if criterion != "patience":
            expected = uncertainty_reference(fresh, criterion, limits_of(criterion, 4))
            torch.testing.assert_close(out.uncertainty.cpu(), expected, rtol=0, atol=8 * EPS)


@needs_gpu
def test_a_million_rows_on_a_gpu() -> None:
    logits = torch.randn(2**20, 3, device="cuda") * 3
    for _ in range(20):
        assert_consistent(fk.exit_gate(logits, 0.5), 0.5)


# ---- machine code

POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def kernel_spec(criterion: str, dtype: torch.dtype, rows: int, columns: int, flags: bool) -> KernelSpec:
    """What the launcher asks for, with everything optional given (`flags`) or nothing."""
    config = ExitGateConfig.choose(rows, columns)
    size = "i32:16" if columns % 16 == 0 else "i32"
    recorded = flags or criterion == "patience"
    arguments = {
        "logits": f"*{POINTERS[dtype]}:16",
        "speeds": "*fp32:16" if flags else None,
        "row_ids": ("*i64:16" if dtype == torch.float32 else "*i32:16") if flags else None,
        "uncertainty": "*fp32:16",
        "survivors": "*i32:16",
        "count": "*i32:16",
        "scan": "*i32:16" if config.programs > 1 else None,
        "exit_logits": "*fp32:16" if recorded else None,
        "exit_uncertainty": "*fp32:16" if recorded else None,
        "exit_layer": "*i32:16" if recorded else None,
        "history": "*i32:16" if recorded else None,
        "rows": "i32",
        "columns": size,
        "row_stride": size,
        "column_stride": "i32" if flags and columns == 2 else 1,
        "capacity": "i32",
        "layer": "i32",
        "speed": "fp32",
        "scale": "fp32",
        "top_n": "i32",
        "CRITERION": criterion,
        **config.constants(),
    }
    kernel = "fastkd_kernels.ops.exit_gate:_exit_gate_kernel"
    return KernelSpec(kernel, arguments, config.options())


# one program; several with a look-back; several, and rows streamed through a tile
LAUNCHES = ((128, 2), (4096, 48), (64, 8192))


Launch = tuple[str, torch.dtype, int]


@pytest.fixture(scope="module")
def cubins() -> dict[int, dict[Launch, Cubin]]:
    """Of every architecture: on sm_90 all of criterion x dtype x launch, elsewhere a third, where every two meet."""
    found = {}
    for a, capability in enumerate(CAPABILITIES):
        specs = {}
        for (c, criterion), (d, dtype), (j, launch) in product(*map(enumerate, (fk.CRITERIA, DTYPES, LAUNCHES))):
            if capability == 90 or (a + c + j) % len(DTYPES) == d:
                # flags alternate, so that every criterion meets both on every launch and every dtype
                specs[criterion, dtype, launch[1]] = kernel_spec(criterion, dtype, *launch, (d + j) % 2 == 0)
        found[capability] = dict(zip(specs, compile_kernels(specs.values(), [capability]), strict=True))
    return found


@needs_triton
def test_no_kernel_spills(cubins: dict[int, dict[Launch, Cubin]]) -> None:
    launches = [*product(fk.CRITERIA, DTYPES, [columns for _, columns in LAUNCHES])]
    assert cubins[90].keys() == set(launches)
    for group in cubins.values():
        for two in (itemgetter(0, 1), itemgetter(0, 2), itemgetter(1, 2)):
            assert {*map(two, group)} == {*map(two, launches)}
        for cubin in group.values():
            cubin.assert_no_spills()
            cubin.assert_arithmetic_is_imitated()


@needs_triton
@pytest.mark.parametrize("columns", [48, 8192])
def test_wide_rows_are_loaded_16_bytes_at_a_time(cubins: dict[int, dict[Launch, Cubin]], columns: int) -> None:
    for group in cubins.values():
        cubin = next(cubin for launch, cubin in group.items() if launch[1:] == (torch.float32, columns))
        opcodes = cubin.opcodes()
        assert opcodes["LDL"] == opcodes["STL"] == 0
        assert any(name.startswith("LDG.E.128") for name in opcodes), (cubin.capability, opcodes)


def test_the_launcher_and_the_spec_name_the_same_parameters() -> None:
    if not _triton.available:
        pytest.skip("Triton is not installed")
    spec = kernel_spec("entropy", torch.float32, 128, 2, True)
    assert list(spec.arguments) == module._exit_gate_kernel.arg_names
