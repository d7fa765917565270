"""compact: the same rows as the reference, on every backend that runs here, whatever the dtype and the strides."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from cubins import KernelSpec, compile_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastkd_kernels as fk
from fastkd_kernels import _extension, _triton
from fastkd_kernels.ops import compact as module
from fastkd_kernels.ops.compact import CompactConfig, compact_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "every second row": lambda t: t.repeat_interleave(2, dim=0)[::2],
    "odd storage offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "column slice": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]] if t.dim() > 1 else t,
    "conjugated": lambda t: t.conj() if t.is_complex() else t,
    "transposed": lambda t: t.transpose(1, -1).contiguous().transpose(1, -1) if t.dim() > 2 else t,
    "inner dimension expanded": lambda t: t[:, :1].expand(t.shape) if t.dim() > 1 else t,
}


def backends() -> list[str]:
    names = ["reference"]
    if DEVICE.type == "cuda" or _triton.interpreting:
        names.append("cuda")
    if DEVICE.type == "cpu":
        names.append("cpu")
    return names


@pytest.fixture(params=backends())
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def random_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bytes: every bit pattern has to arrive, NaN payloads and negative zeros too."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).view(shape).to(DEVICE)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).cpu()


def expected_rows(tensor: Tensor, rows: list[int]) -> Tensor:
    """One row after the other, by nothing that the reference uses."""
    return torch.stack([tensor[row] for row in rows]) if rows else tensor[:0]


def survivors_of(rows: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(rows, dtype=dtype, device=DEVICE)


def count_of(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_arrives_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    tensor, rows = random_rows((7, 5, 3), dtype), [0, 2, 3, 6]
    with fk.backend(backend):
        (gathered,) = fk.compact([tensor], survivors_of(rows))
    assert gathered.dtype == dtype
    assert gathered.shape == (4, 5, 3)
    assert as_bytes(gathered).equal(as_bytes(expected_rows(tensor, rows)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 4, 3), (6, 2, 3, 4), (6, 1, 8), (6, 64, 33)], ids=str)
def test_every_layout(backend: str, layout: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor, rows = LAYOUTS[layout](random_rows(shape, dtype)), [1, 2, 5]
    with fk.backend(backend):
        (gathered,) = fk.compact([tensor], survivors_of(rows, torch.int64))
    assert gathered.is_contiguous()
    assert as_bytes(gathered).equal(as_bytes(expected_rows(tensor, rows)))


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Tensor], list[int], int | None]:
    batch = draw(st.integers(1, 9))
    trailing = st.lists(st.integers(0, 5), max_size=3)
    shapes = draw(st.lists(trailing, min_size=1, max_size=10))
    layout = st.sampled_from(list(LAYOUTS.values()))
    tensors = []
    for shape in shapes:
        tensor = random_rows((batch, *shape), draw(st.sampled_from(DTYPES)))
        tensors.append(draw(layout)(tensor) if tensor.numel() else tensor)
    rows = draw(st.lists(st.integers(0, batch - 1), max_size=12))
    count = draw(st.none() | st.integers(-1, len(rows) + 2))
    return tensors, rows, count


@pytest.mark.parametrize("name", backends())
@settings(deadline=None, max_examples=60)
@given(calls(), st.sampled_from([torch.int32, torch.int64]))
def test_several_tensors_of_any_shape(
    name: str, call: tuple[list[Tensor], list[int], int | None], index_dtype: torch.dtype
) -> None:
    tensors, rows, count = call
    live = len(rows) if count is None else min(max(count, 0), len(rows))
    with fk.backend(name):
        gathered = fk.compact(tensors, survivors_of(rows, index_dtype), None if count is None else count_of(count))
    for tensor, result in zip(tensors, gathered, strict=True):
        assert result.shape == (len(rows), *tensor.shape[1:])
        assert as_bytes(result[:live]).equal(as_bytes(expected_rows(tensor, rows[:live])))


@pytest.mark.parametrize("rows", [[], [0], [2], [0, 1, 2], [2, 2, 0]], ids=str)
def test_none_one_all_or_repeated_rows(backend: str, rows: list[int]) -> None:
    tensor = random_rows((3, 4), torch.float32)
    with fk.backend(backend):
        (gathered,) = fk.compact([tensor], survivors_of(rows))
    assert as_bytes(gathered).equal(as_bytes(expected_rows(tensor, rows)))


@pytest.mark.parametrize("capacity", [0, 2])
def test_empty_batch(backend: str, capacity: int) -> None:
    tensors = [torch.zeros(0, 4, device=DEVICE), torch.zeros(0, device=DEVICE)]
    with fk.backend(backend):
        wide, narrow = fk.compact(tensors, survivors_of([7] * capacity), count_of(0))
    assert wide.shape == (capacity, 4)
    assert narrow.shape == (capacity,)


def test_no_tensors() -> None:
    assert fk.compact([], survivors_of([0])) == []


def test_rows_behind_count_are_neither_read_nor_written() -> None:
    tensor = random_rows((4, 3), torch.float32)
    survivors = survivors_of([3, 1, 2**30, -5])  # the tail is what exit_gate leaves there: anything
    for name in sorted({*backends()} - {"reference"}):
        workspace = torch.full((4, 3), 7.0, device=DEVICE)
        with fk.backend(name):
            (gathered,) = fk.compact([tensor], survivors, count_of(2), out=[workspace])
        assert as_bytes(gathered[:2]).equal(as_bytes(tensor[[3, 1]]))
        assert (workspace[2:] == 7).all()


def test_a_workspace_is_written_and_returned(backend: str) -> None:
    hidden, ids = random_rows((5, 3), torch.float16), torch.arange(5, device=DEVICE)
    out = [torch.zeros(8, 3, dtype=torch.float16, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)]
    with fk.backend(backend):
        gathered = fk.compact([hidden, ids], survivors_of([0, 4]), out=out)
    assert [view.data_ptr() for view in gathered] == [target.data_ptr() for target in out]
    assert as_bytes(gathered[0]).equal(as_bytes(hidden[[0, 4]]))
    assert gathered[1].tolist() == [0, 4]
    assert not out[0][2:].any()


def test_large_rows_are_shared_between_threads(backend: str) -> None:
    if backend == "cuda" and DEVICE.type == "cpu":
        pytest.skip("the interpreter takes minutes for megabytes")
    dense, strided = torch.randn(9, 70_001), torch.randn(9, 301, 117).transpose(1, 2)
    rows = [0, 3, 4, 8]
    with fk.backend(backend):
        gathered = fk.compact([dense.to(DEVICE), strided.to(DEVICE)], survivors_of(rows))
    for tensor, result in zip((dense, strided), gathered, strict=True):
        assert as_bytes(result).equal(as_bytes(tensor[rows]))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU checks row numbers in debug mode only")
@pytest.mark.parametrize("row", [-1, 4, 2**30])
def test_a_row_out_of_range_raises_before_anything_is_written(backend: str, row: int) -> None:
    workspace = torch.full((3, 2), 7.0)
    with fk.backend(backend), pytest.raises(IndexError, match=rf"survivors\[2\]: got row {row}, expected 0 to 3"):
        fk.compact([torch.zeros(4, 2)], survivors_of([0, 3, row]), out=[workspace])
    assert (workspace == 7).all()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: on CPU every row number is checked")
@pytest.mark.parametrize("bulk", [False, True])
def test_a_row_out_of_range_is_not_written_on_a_gpu(bulk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, workspace = torch.zeros(4, 1024, device=DEVICE), torch.full((3, 1024), 7.0, device=DEVICE)
    config = CompactConfig(threads=64, bulk=bulk)
    fk.compact([tensor], survivors_of([0, 2**30, -1]), out=[workspace], config=config)
    assert workspace[:, 0].tolist() == [0, 7, 7]
    monkeypatch.setattr(module, "_DEBUG", True)
    with pytest.raises(IndexError, match=r"survivors\[1\]: got row 1073741824"):
        fk.compact([tensor], survivors_of([0, 2**30, -1]), config=config)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize(
    "config", [CompactConfig(threads=threads, bulk=bulk) for threads in (32, 1024) for bulk in (0, 1)]
)
def test_every_launch_on_a_gpu_waits_for_nothing(config: CompactConfig) -> None:
    hidden, ids = torch.randn(33, 128, 768, device=DEVICE), torch.arange(33, device=DEVICE)
    survivors, count = torch.arange(0, 33, 2, dtype=torch.int32, device=DEVICE), count_of(11)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gathered = fk.compact([hidden, ids], survivors, count, config=config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert gathered[0][:11].equal(hidden[survivors[:11].long()])
    assert gathered[1][:11].equal(survivors[:11].long())


def launches() -> dict[str, Callable[..., None]]:
    """Every kernel that gathers on a GPU, as a function that writes into `out`."""

    def by_extension(config: CompactConfig) -> Callable[..., None]:
        def run(tensors: list[Tensor], survivors: Tensor, count: Tensor, out: list[Tensor]) -> None:
            fk.compact(tensors, survivors, count, out, config=config)

        return run

    return {
        "vector": by_extension(CompactConfig()),
        "bulk": by_extension(CompactConfig(threads=64, bulk=True)),
        "triton": module._compact_out_triton,
    }


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("launch", ["vector", "bulk", "triton"])
def test_captured_in_a_graph_and_replayed(launch: str) -> None:
    hidden, ids = torch.zeros(33, 128, 768, device=DEVICE).bfloat16(), torch.arange(33, device=DEVICE)
    survivors, count = torch.arange(33, dtype=torch.int32, device=DEVICE), count_of(33)
    out = [torch.empty_like(hidden), torch.empty_like(ids)]
    run = launches()[launch]
    run([hidden, ids], survivors, count, out)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run([hidden, ids], survivors, count, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for kept in (33, 7, 0, 32):
        hidden.copy_(torch.randn_like(hidden))
        survivors[:kept] = torch.randperm(33, device=DEVICE)[:kept].sort().values.int()
        count.fill_(kept)
        for target in out:
            target.fill_(5)
        graph.replay()
        rows = survivors[:kept].long()
        assert out[0][:kept].equal(hidden[rows])
        assert out[1][:kept].equal(rows)
        assert (out[0][kept:] == 5).all(), "rows from the count on are not written"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the GPU test above runs them there")
@pytest.mark.parametrize("launch", ["vector", "bulk", "triton"])
def test_the_launches_of_the_graph_test_are_right(launch: str) -> None:
    """The same calls with the kernels of this machine, so that the test above has been run in part."""
    if launch == "triton" and not _triton.interpreting:
        pytest.skip("needs Triton's interpreter")
    hidden, ids, rows = torch.randn(5, 3, 4), torch.arange(5), [4, 0, 2]
    out = [torch.empty_like(hidden), torch.empty_like(ids)]
    launches()[launch]([hidden, ids], survivors_of(rows), count_of(2), out)
    assert out[0][:2].equal(hidden[rows[:2]])
    assert out[1][:2].tolist() == rows[:2]


WRONG: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "survivors dtype": (TypeError, "survivors: got dtype torch.float32", lambda: call(survivors=torch.zeros(2))),
    "survivors shape": (ValueError, "survivors: got shape (1, 2)", lambda: call(survivors=survivors_of([0, 1])[None])),
    "count dtype": (TypeError, "count: got dtype torch.int64", lambda: call(count=torch.tensor([1]))),
    "count shape": (ValueError, "count: got shape (2,)", lambda: call(count=torch.zeros(2, dtype=torch.int32))),
    "first dimensions": (ValueError, "tensors[1]: got shape (3,)", lambda: call([torch.zeros(4), torch.zeros(3)])),
    "no dimension": (ValueError, "tensors[0]: got shape ()", lambda: call([torch.zeros(())])),
    "device": (ValueError, "tensors[0]: got device meta", lambda: call([torch.zeros(4, device="meta")])),
    "out length": (ValueError, "out: got 0 tensors", lambda: call(out=[])),
    "out rows": (ValueError, "out[0]: got shape (1, 2)", lambda: call(out=[torch.zeros(1, 2)])),
    "out shape": (ValueError, "out[0]: got shape (2, 3)", lambda: call(out=[torch.zeros(2, 3)])),
    "out dtype": (ValueError, "out[0]: got torch.float64", lambda: call(out=[torch.zeros(2, 2).double()])),
    "out strides": (ValueError, "out[0]: got strides (1, 2)", lambda: call(out=[torch.zeros(2, 2).t()])),
    "threads": (ValueError, "threads: got 48", lambda: CompactConfig(threads=48)),
}


def call(
    tensors: list[Tensor] | None = None,
    survivors: Tensor | None = None,
    count: Tensor | None = None,
    out: list[Tensor] | None = None,
) -> list[Tensor]:
    tensors = [torch.zeros(4, 2)] if tensors is None else tensors
    survivors = torch.tensor([0, 1], dtype=torch.int32) if survivors is None else survivors.cpu()
    return fk.compact(tensors, survivors, count, out)


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_names_the_argument(what: str) -> None:
    error, message, bad_call = WRONG[what]
    with pytest.raises(error, match=re.escape(message)):
        bad_call()


@pytest.mark.parametrize("name", sorted({*backends()} - {"reference"}))
def test_a_workspace_inside_an_input_is_refused(name: str) -> None:
    memory = torch.zeros(6, 2, device=DEVICE)
    with fk.backend(name), pytest.raises(ValueError, match=r"out.*: overlaps"):
        fk.compact([memory[:4]], survivors_of([0, 1]), out=[memory[3:5]])
    with fk.backend(name):
        fk.compact([memory[:4]], survivors_of([0, 1]), out=[memory[4:]])


def test_the_op_guards_its_memory_without_the_wrapper() -> None:
    op = torch.ops.fastkd_kernels.compact_out
    source, survivors = torch.zeros(4, 2, device=DEVICE), survivors_of([0, 1])
    for target in (torch.zeros(1, 2), torch.zeros(2, 3), torch.zeros(2, 2).t(), torch.zeros(2, 2).double()):
        with pytest.raises(RuntimeError, match="out: "):
            op([source], survivors, None, [target.to(DEVICE)])


@pytest.mark.parametrize("repeated", [False, True])
def test_gradients(backend: str, repeated: bool) -> None:
    tensor = torch.randn(4, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    survivors = survivors_of([1, 1, 3, 77] if repeated else [1, 0, 3, 77])

    def live_rows(rows: Tensor) -> Tensor:
        return fk.compact([rows, torch.arange(4, device=DEVICE)], survivors, count_of(3))[0][:3]

    with fk.backend(backend):
        assert torch.autograd.gradcheck(live_rows, (tensor,))
        assert torch.autograd.gradgradcheck(live_rows, (tensor,))


def test_rows_behind_count_have_no_gradient(backend: str) -> None:
    tensor = torch.ones(3, 2, device=DEVICE, requires_grad=True)
    with fk.backend(backend):
        (gathered,) = fk.compact([tensor], survivors_of([2, 0, 1]), count_of(1))
    gathered.backward(torch.full_like(gathered, torch.nan).index_fill(0, survivors_of([0]).long(), 1.0))
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [[0, 0], [0, 0], [1, 1]]


def test_a_workspace_takes_no_gradient() -> None:
    tensor = torch.zeros(4, 2, requires_grad=True)
    with pytest.raises(ValueError, match="out: cannot be written while a gradient is recorded"):
        fk.compact([tensor], torch.tensor([0]), out=[torch.zeros(1, 2)])
    with torch.no_grad():
        fk.compact([tensor], torch.tensor([0]), out=[torch.zeros(1, 2)])


def test_a_saved_workspace_is_seen_to_change() -> None:
    workspace, weight = torch.zeros(1, 2, device=DEVICE), torch.ones(1, 2, device=DEVICE, requires_grad=True)
    product = workspace * weight
    fk.compact([torch.ones(4, 2, device=DEVICE)], survivors_of([0]), out=[workspace])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_opcheck() -> None:
    hidden, mask = torch.randn(6, 3, 4, device=DEVICE), torch.ones(6, 3, dtype=torch.bool, device=DEVICE)
    survivors = survivors_of([0, 5, 2])
    for count in (None, count_of(3)):  # behind a smaller count nothing is defined, so nothing could be compared
        out = [torch.zeros(3, 3, 4, device=DEVICE), torch.zeros(3, 3, dtype=torch.bool, device=DEVICE)]
        torch.library.opcheck(torch.ops.fastkd_kernels.compact.default, ([hidden, mask], survivors, count))
        torch.library.opcheck(torch.ops.fastkd_kernels.compact_out.default, ([hidden, mask], survivors, count, out))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(compiler: str) -> None:
    def step(hidden: Tensor, ids: Tensor, survivors: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        kept, kept_ids = fk.compact([hidden * 2, ids], survivors, count)
        return kept + 1, kept_ids

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for batch in (4, 7):
        hidden, ids = torch.randn(batch, 3, 5, device=DEVICE), torch.arange(batch, device=DEVICE)
        survivors, count = torch.arange(0, batch, 2, dtype=torch.int32, device=DEVICE), count_of(2)
        for result, expected in zip(
            compiled(hidden, ids, survivors, count), step(hidden, ids, survivors, count), strict=True
        ):
            assert result[:2].equal(expected[:2])


def test_a_workspace_compiles() -> None:
    def step(hidden: Tensor, survivors: Tensor, workspace: Tensor) -> Tensor:
        return fk.compact([hidden], survivors, out=[workspace])[0] + 1

    hidden, workspace = torch.randn(4, 3, device=DEVICE), torch.zeros(5, 3, device=DEVICE)
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, survivors_of([3, 0]), workspace)
    assert result.equal(hidden[[3, 0]] + 1)
    assert workspace[:2].equal(hidden[[3, 0]])


def test_gradients_compile() -> None:
    tensor = torch.randn(4, 3, device=DEVICE, requires_grad=True)

    def loss(tensor: Tensor) -> Tensor:
        return fk.compact([tensor], survivors_of([3, 0]))[0].square().sum()

    torch.compile(loss, fullgraph=True, backend="aot_eager")(tensor).backward()
    expected = torch.zeros(4, 3, device=DEVICE)
    expected[[0, 3]] = 2 * tensor.detach()[[0, 3]]
    torch.testing.assert_close(tensor.grad, expected, rtol=0, atol=0)


def test_the_reference_is_index_select() -> None:
    tensor = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda rows: compact_reference([rows], torch.tensor([4, 1, 9]), torch.tensor([2]))[0], (tensor,)
    )


@pytest.mark.skipif(not _triton.available, reason="needs Triton")
def test_the_triton_kernel_moves_16_bytes_at_a_time_and_spills_nothing() -> None:
    specs = [
        KernelSpec(
            "fastkd_kernels.ops.compact:_compact_kernel",
            {
                "source_ptr": f"*{word}:16", "target_ptr": f"*{word}:16", "survivors_ptr": f"*{index}:16",
                "count_ptr": "*i32:16", "rows": "i32", "row_words": "i32:16", "source_stride": "i32:16",
                "HAS_COUNT": has_count, "BLOCK": 4096,
            },
        )
        # fp16 and bf16 move as i16, fp32 as i32
        for word, index, has_count in (("i16", "i32", True), ("i32", "i64", False))
    ]  # fmt: skip
    for cubin in compile_kernels(specs):
        cubin.assert_no_spills()
        opcodes = cubin.opcodes()
        assert sum(n for name, n in opcodes.items() if name.startswith("LDG.E.128")), (cubin.spec, opcodes)
        assert opcodes["STG.E.128"], (cubin.spec, opcodes)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the CPU backend is used for CPU tensors only")
def test_the_extension_is_what_runs_here() -> None:
    """The parity tests above would pass on the reference alone: make sure that they compared something."""
    assert _extension.missing_kernel_reason("compact", "CPU") is None
    assert _triton.interpreting
