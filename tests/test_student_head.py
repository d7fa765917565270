"""student_head and student_head_exit: the folded kernels against the unfolded head in float64."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import json
import random
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cubins import Cubin, KernelSpec, compile_kernels
from error_budget import assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastkd_kernels as fk
from fastkd_kernels import _backend, _extension, _student_head_weights, _triton
from fastkd_kernels._student_head_weights import StudentHeadWeights, fold, fold_cache, parameters_of
from fastkd_kernels._tickets import Tickets
from fastkd_kernels.ops import student_head as ops
from fastkd_kernels.ops.student_head import GpuLimits, StudentHeadConfig, student_head_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["padded", "lengths", "mask", "packed"]

# numpy speaks up where the interpreter meets the NaN and infinity that tests put there
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

needs_triton = pytest.mark.skipif(not _triton.available, reason=str(_triton.missing_reason))
needs_extension = pytest.mark.skipif(
    not _extension.has_kernel("student_head_pool", "CPU"), reason="the compiled extension is not built"
)
CUDA = pytest.param("cuda", marks=needs_triton)  # on a machine without a GPU, in Triton's interpreter
CPU = pytest.param("cpu", marks=[needs_extension, pytest.mark.skipif(DEVICE.type != "cpu", reason="tensors on a GPU")])
BACKENDS = [CUDA, CPU, "reference"]
FOLDED = [CUDA, CPU]


def random_head(
    hidden: int = 48, width: int = 32, labels: int = 3, heads: int = 2, dtype: torch.dtype = torch.float32
) -> StudentHeadWeights:
    shapes = [(width, hidden), *[(width, width)] * 5, (labels, width)]
    # larger than at initialisation, so that tanh saturates and the attention is far from uniform
    pairs = [
        (
            (torch.randn(shape, device=DEVICE) * 2 / shape[1] ** 0.5).to(dtype),
            torch.randn(shape[0], device=DEVICE).to(dtype),
        )
        for shape in shapes
    ]
    return StudentHeadWeights(*pairs, num_attention_heads=heads)


def converted(head: StudentHeadWeights, convert: Callable[[Tensor], Tensor]) -> StudentHeadWeights:
    return StudentHeadWeights(*[(convert(w), convert(b)) for w, b in head[:7]], head.num_attention_heads)


def laid_out(hidden_states: Tensor, lengths: Tensor, layout: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The same sequences in one of the four layouts; "padded" keeps the padding as tokens."""
    if layout == "padded":
        return hidden_states, {}
    if layout == "lengths":
        return hidden_states, {"lengths": lengths}
    valid = torch.arange(hidden_states.shape[1], device=DEVICE) < lengths[:, None]
    if layout == "mask":
        return hidden_states, {"attention_mask": valid.long()}
    cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return hidden_states[valid], {"cu_seqlens": cu_seqlens}


def assert_accurate(actual: Tensor, hidden_states: Tensor, head: StudentHeadWeights, **masks: Tensor) -> None:
    """Not less accurate than the unfolded head in the same dtype, but for what the last roundings may add."""
    truth = student_head_reference(hidden_states.double(), converted(head, Tensor.double), **masks)
    baseline = student_head_reference(hidden_states, head, **masks)
    eps = torch.finfo(hidden_states.dtype).eps
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    # float32: hundreds of products are summed in another order; below: the narrow activations are rounded once
    absolute = (32 if eps < 1e-6 else 0.5) * eps * max(scale, 1.0)
    assert actual.dtype == (torch.float64 if hidden_states.dtype == torch.float64 else torch.float32)
    assert_within_budget(actual, truth, baseline, absolute=absolute)


# Numbers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", FOLDED)
def test_error_budget(backend: str, dtype: torch.dtype, layout: str) -> None:
    head = random_head(dtype=dtype)
    padded = torch.randn(3, 70, 48, device=DEVICE).to(dtype)
    hidden_states, masks = laid_out(padded, torch.tensor([70, 1, 65], device=DEVICE), layout)
    with fk.backend(backend):
        logits = fk.student_head(hidden_states, head, **masks)
    assert_accurate(logits, hidden_states, head, **masks)


@pytest.mark.parametrize(
    ("hidden", "width", "labels", "heads"),
    [
        (768, 128, 2, 2),  # FastBERT
        (384, 128, 40, 2),  # MiniLM, many classes
        (100, 64, 3, 4),  # H is no multiple of 16
        (7, 16, 2, 1),  # H smaller than any tile
        (64, 256, 300, 8),  # the widest head, classes in two blocks
    ],
)
@pytest.mark.parametrize("backend", FOLDED)
def test_error_budget_of_sizes(backend: str, hidden: int, width: int, labels: int, heads: int) -> None:
    head = random_head(hidden, width, labels, heads)
    hidden_states = torch.randn(2, 67, hidden, device=DEVICE)
    lengths = torch.tensor([67, 20], device=DEVICE)
    with fk.backend(backend):
        logits = fk.student_head(hidden_states, head, lengths)
    assert_accurate(logits, hidden_states, head, lengths=lengths)


@needs_extension
@pytest.mark.skipif(DEVICE.type != "cpu", reason="tensors on a GPU")
def test_float64_is_computed_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "_warned", set())  # it is said once a process
    head = random_head(dtype=torch.float64)
    hidden_states = torch.randn(2, 9, 48, dtype=torch.float64)
    with fk.backend("cpu"), pytest.raises(fk.BackendUnavailableError, match="float64"):
        fk.student_head(hidden_states, head)
    with torch.no_grad(), pytest.warns(UserWarning, match="float64"):
        logits = fk.student_head(hidden_states, head)
    assert torch.equal(logits, student_head_reference(hidden_states, head))


@pytest.mark.parametrize("tokens", [1, 31, 33, 63, 64, 65, 128, 193])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [CPU])
def test_every_row_bucket(backend: str, dtype: torch.dtype, tokens: int) -> None:
    head = random_head(dtype=dtype)
    hidden_states = torch.randn(1, tokens, 48).to(dtype)
    with fk.backend(backend):
        assert_accurate(fk.student_head(hidden_states, head), hidden_states, head)


def _tf32(x: Tensor) -> Tensor:
    """Rounded to the ten bits of mantissa that a tensor core reads."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize(("products", "holds"), [(3, True), (1, False)])
def test_three_tf32_products_are_as_good_as_float32(products: int, holds: bool) -> None:
    """The interpreter multiplies in float32 whatever it is told, so what a tensor core would do is done here."""
    head, hidden_states = random_head(768, 128), torch.randn(64, 768, device=DEVICE)
    weight, bias = head.narrow
    (x, x_rest), (w, w_rest) = ((_tf32(t), _tf32(t - _tf32(t))) for t in (hidden_states, weight))
    product = x @ w.t()
    if products == 3:
        product = x_rest @ w.t() + x @ w_rest.t() + product
    truth = nn.functional.linear(hidden_states.double(), weight.double(), bias.double()).tanh()
    baseline = nn.functional.linear(hidden_states, weight, bias).tanh()
    with nullcontext() if holds else pytest.raises(AssertionError, match="less accurate"):
        assert_within_budget((product + bias).tanh(), truth, baseline, absolute=32 * torch.finfo(torch.float32).eps)


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, list[int], int, int, int, int, str]:
    tokens = draw(st.integers(1, 80))
    lengths = draw(st.lists(st.integers(1, tokens), max_size=4))
    width = draw(st.sampled_from([16, 32, 64]))
    return (
        tokens,
        lengths,
        draw(st.integers(1, 80)),
        width,
        draw(st.integers(2, 5)),
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from(LAYOUTS)),
    )


@pytest.mark.parametrize("backend", FOLDED)
@settings(max_examples=20, deadline=None, derandomize=True)  # 1 in 10,000 random heads comes to 31 of 32 eps
@given(problem=problems())
def test_any_shape(backend: str, problem: tuple[int, list[int], int, int, int, int, str]) -> None:
    tokens, lengths, hidden, width, labels, heads, layout = problem
    head = random_head(hidden, width, labels, heads)
    padded = torch.randn(len(lengths), tokens, hidden, device=DEVICE)
    hidden_states, masks = laid_out(padded, torch.tensor(lengths, dtype=torch.int64, device=DEVICE), layout)
    with fk.backend(backend):
        logits = fk.student_head(hidden_states, head, **masks)
    assert logits.shape == (len(lengths), labels)
    assert_accurate(logits, hidden_states, head, **masks)


@pytest.mark.parametrize("backend", FOLDED)
@settings(max_examples=10, deadline=None)
@given(masks=st.lists(st.integers(0, 2**69 - 1), min_size=1, max_size=3))
def test_any_mask(backend: str, masks: list[int]) -> None:
    head = random_head()
    rows = [[1, *(mask >> bit & 1 for bit in range(69))] for mask in masks]
    attention_mask = torch.tensor(rows, dtype=torch.bool, device=DEVICE)
    hidden_states = torch.randn(len(masks), 70, 48, device=DEVICE)
    hidden_states[~attention_mask] = torch.nan
    with fk.backend(backend):
        logits = fk.student_head(hidden_states, head, attention_mask=attention_mask)
    assert_accurate(logits, hidden_states, head, attention_mask=attention_mask)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("layout", ["lengths", "mask"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_nothing(backend: str, layout: str, garbage: float) -> None:
    head = random_head()
    clean = torch.zeros(3, 70, 48, device=DEVICE)
    dirty = torch.full_like(clean, garbage)
    lengths = torch.tensor([1, 69, 40], device=DEVICE)
    for row, length in enumerate(lengths.tolist()):
        clean[row, :length] = dirty[row, :length] = torch.randn(length, 48, device=DEVICE)
    _, masks = laid_out(clean, lengths, layout)
    with fk.backend(backend):
        expected, actual = fk.student_head(clean, head, **masks), fk.student_head(dirty, head, **masks)
    assert expected.isfinite().all()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_a_token_reaches_only_its_sequence(backend: str) -> None:
    head = random_head()
    hidden_states = torch.randn(3, 5, 48, device=DEVICE)
    hidden_states[1, 2, 0] = torch.nan
    with fk.backend(backend):
        logits = fk.student_head(hidden_states, head)
    assert logits.isnan().all(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_every_dtype_and_stride(backend: str, dtype: torch.dtype) -> None:
    head = random_head()
    hidden_states = torch.randn(2, 9, 48, device=DEVICE)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 1], [1] * 9], device=DEVICE)
    strided = mask.to(dtype).t().contiguous().t()
    with fk.backend(backend):
        logits = fk.student_head(hidden_states, head, attention_mask=strided)
    assert_accurate(logits, hidden_states, head, attention_mask=mask)


@pytest.mark.parametrize(
    "stride",
    [
        pytest.param(lambda x: x[::2, 1::3], id="rows and tokens"),
        pytest.param(lambda x: x[..., ::2], id="features"),
        pytest.param(lambda x: x.transpose(0, 1), id="time first"),
        pytest.param(lambda x: x[:1].expand(3, -1, -1), id="expanded"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_hidden_states(backend: str, stride: Callable[[Tensor], Tensor]) -> None:
    hidden_states = stride(torch.randn(6, 12, 48, device=DEVICE))
    head = random_head(hidden=hidden_states.shape[-1])
    lengths = torch.arange(1, 2 * hidden_states.shape[0], 2, device=DEVICE).clamp(max=hidden_states.shape[1])[::1]
    with fk.backend(backend):
        logits = fk.student_head(hidden_states, head, lengths)
    assert_accurate(logits, hidden_states, head, lengths=lengths)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str, layout: str) -> None:
    hidden_states, masks = laid_out(
        torch.empty(0, 5, 48, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE), layout
    )
    with fk.backend(backend):
        assert fk.student_head(hidden_states, random_head(), **masks).shape == (0, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_mates_and_layouts_change_nothing(backend: str, layout: str) -> None:
    head = random_head()
    padded, lengths = torch.randn(4, 70, 48, device=DEVICE), torch.tensor([70, 5, 1, 33], device=DEVICE)
    if layout == "padded":
        lengths = torch.full_like(lengths, 70)
    hidden_states, masks = laid_out(padded, lengths, layout)
    with fk.backend(backend):
        together = fk.student_head(hidden_states, head, **masks)
        alone = [
            fk.student_head(row[None, :length], head) for row, length in zip(padded, lengths.tolist(), strict=True)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=3e-6)


# Several programs a sequence

SPLITS = [1, 2, 4]


def configure(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """The usual choice with some fields changed, from here on."""
    usual = StudentHeadConfig.choose
    monkeypatch.setattr(StudentHeadConfig, "choose", lambda *sizes: dataclasses.replace(usual(*sizes), **changes))


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", SPLITS)
def test_error_budget_of_splits(monkeypatch: pytest.MonkeyPatch, splits: int, dtype: torch.dtype, layout: str) -> None:
    """Lengths around the ends of tiles and shares, and shares that have no token."""
    configure(monkeypatch, splits=splits)
    head, lengths = random_head(dtype=dtype), torch.tensor([1, 2, 63, 64, 65, 127, 128, 129], device=DEVICE)
    hidden_states, masks = laid_out(torch.randn(8, 129, 48, device=DEVICE).to(dtype), lengths, layout)
    with fk.backend("cuda"):
        logits = fk.student_head(hidden_states, head, **masks)
    assert_accurate(logits, hidden_states, head, **masks)


@needs_triton
@pytest.mark.parametrize("splits", SPLITS)
def test_a_share_may_be_masked_as_a_whole(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    configure(monkeypatch, splits=splits)
    head, attention_mask = random_head(), torch.ones(3, 130, dtype=torch.bool, device=DEVICE)
    attention_mask[0, 1:] = attention_mask[1, 30:100] = attention_mask[2, 1:129] = False
    hidden_states = torch.randn(3, 130, 48, device=DEVICE).masked_fill(~attention_mask[..., None], torch.nan)
    with fk.backend("cuda"):
        logits = fk.student_head(hidden_states, head, attention_mask=attention_mask)
    assert_accurate(logits, hidden_states, head, attention_mask=attention_mask)


@needs_triton
@pytest.mark.parametrize("token", [0, 1, 40, 129])
@pytest.mark.parametrize("splits", SPLITS)
def test_nan_in_a_share_reaches_its_sequence(monkeypatch: pytest.MonkeyPatch, splits: int, token: int) -> None:
    configure(monkeypatch, splits=splits)
    hidden_states = torch.randn(3, 130, 48, device=DEVICE)
    hidden_states[1, token, 0] = torch.nan
    with fk.backend("cuda"):
        logits = fk.student_head(hidden_states, random_head())
    assert logits.isnan().all(dim=1).tolist() == [False, True, False]


@needs_triton
@pytest.mark.parametrize("criterion", fk.CRITERIA)
@pytest.mark.parametrize("splits", SPLITS[1:])
@torch.no_grad()
def test_whoever_comes_last_finishes(monkeypatch: pytest.MonkeyPatch, splits: int, criterion: str) -> None:
    """Programs in any order give the same bits, are listed in the batch's order, and leave the tickets at zero."""
    configure(monkeypatch, splits=splits)
    batch, layers = 4, 2
    tickets = torch.zeros(1 + batch, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(ops.tickets, "take", lambda tensor, count: tickets[:count])
    head, hidden_states = random_head(), torch.randn(batch, 70, 48, device=DEVICE)
    lengths, row_ids = torch.tensor([70, 2, 65, 1], device=DEVICE), torch.tensor([3, 0, 2, 1], device=DEVICE)
    speed = torch.full((batch,), 0.6, device=DEVICE)
    results = []
    for order in ORDERS:
        record = fk.ExitRecord.allocate(batch, 3, DEVICE)
        for layer in range(1, layers + 1):
            with fk.backend("cuda"), order(batch, splits):
                out = fk.student_head_exit(
                    hidden_states,
                    head,
                    speed,
                    criterion,
                    row_ids,
                    2 if criterion == "top_n" else None,
                    lengths=lengths,
                    record=record,
                    layer=layer,
                )
            assert not tickets.any()
            assert out.logits is not None
        results.append((out.logits, out.uncertainty, out.kept(), *vars(record).values()))
    assert_accurate(results[0][0], hidden_states, head, lengths=lengths)
    stays = ~(results[0][1] <= speed)
    assert results[0][2].tolist() == stays.nonzero().flatten().tolist()
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert torch.equal(ours, theirs)


def test_launches_share_no_tickets_and_they_are_aligned() -> None:
    tickets, tensor = Tickets(), torch.empty(0, device=DEVICE)
    tickets._cells[tensor.device] = store = torch.zeros(20, dtype=torch.int32, device=DEVICE)
    taken = [tickets._new_cells(tensor, count) for count in (1, 9, 4, 1)]
    assert [cells.shape[0] for cells in taken] == [4, 12, 4, 4]
    assert all(cells.data_ptr() % 16 == 0 for cells in taken), "the launcher compiles another kernel for other pointers"
    for number, cells in enumerate(taken):
        assert not cells.any()
        cells.fill_(number)
    assert store.unique_consecutive(return_counts=True)[1].tolist() == [4, 12, 4]


@contextmanager
def _programs_run(order: Callable[[int, int], list[tuple[int, int]]], batch: int, splits: int) -> Iterator[None]:
    """Triton's interpreter runs program (0, 0) first and (batch - 1, splits - 1) last; here in another order."""
    if not _triton.interpreting:
        yield  # a GPU has its own order
        return
    from triton.runtime import interpreter

    permuted, started = order(batch, splits), itertools.count()
    set_grid_idx = interpreter.interpreter_builder.set_grid_idx
    with mock.patch.object(
        interpreter.interpreter_builder, "set_grid_idx", lambda x, y, z: set_grid_idx(*permuted[next(started)], z)
    ):
        yield
    assert next(started) == batch * splits


def _as_numbered(batch: int, splits: int) -> list[tuple[int, int]]:
    return list(itertools.product(range(batch), range(splits)))


def _reversed(batch: int, splits: int) -> list[tuple[int, int]]:
    return _as_numbered(batch, splits)[::-1]


def _shuffled(batch: int, splits: int) -> list[tuple[int, int]]:
    return random.Random(batch).sample(_as_numbered(batch, splits), batch * splits)


ORDERS = [functools.partial(_programs_run, order) for order in (_as_numbered, _reversed, _shuffled)]


@pytest.mark.parametrize(
    ("batch", "tokens", "multiprocessors", "splits", "block_tokens"),
    [
        *[(1, 128, 132, 4, 64), (33, 128, 132, 4, 64), (34, 128, 132, 1, 128), (34, 127, 132, 2, 64)],
        *[(66, 127, 132, 2, 64), (67, 127, 132, 1, 128), (256, 128, 132, 1, 128), (8, 512, 132, 4, 128)],
        *[(1, 64, 132, 1, 64), (1, 65, 132, 2, 64), (1, 1, 132, 1, 64), (8, 0, 132, 1, 64)],
        *[(14, 128, 56, 4, 64), (15, 128, 56, 1, 128)],
    ],
)
def test_sequences_are_split_where_it_saves_rows_and_multiprocessors_are_free(
    batch: int, tokens: int, multiprocessors: int, splits: int, block_tokens: int
) -> None:
    limits = GpuLimits(multiprocessors)
    config = StudentHeadConfig.choose(torch.bfloat16, 768, 128, 4, batch, tokens, limits)
    assert (config.splits, config.block_tokens) == (splits, block_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 128, 256])
@pytest.mark.parametrize("shared_memory", [101_376, 166_912, 232_448])
def test_stages_fit_the_shared_memory(shared_memory: int, width: int, dtype: torch.dtype) -> None:
    for tokens in (64, 128):
        limits = GpuLimits(shared_memory=shared_memory)
        config = StudentHeadConfig.choose(dtype, 768, width, 4, 256, tokens, limits)
        assert config.num_stages >= 2
        stage = (config.block_tokens + width) * config.block_hidden * dtype.itemsize
        assert config.num_stages * stage <= shared_memory


# Folding and its cache


def test_fold_is_exact_in_float64() -> None:
    head = random_head(dtype=torch.float64)
    folded = fold(head)
    tokens = torch.randn(6, 32, dtype=torch.float64, device=DEVICE)
    split = lambda pair: nn.functional.linear(tokens, *pair).unflatten(-1, (2, 16))  # noqa: E731
    scores = torch.einsum("hd,thd->ht", split(head.query)[0], split(head.key)) / 4
    ours = (tokens[0] @ folded.query_key + folded.query_bias) @ tokens.t()
    # they differ by the keys' bias, which is the same for every token
    torch.testing.assert_close(ours - ours[:, :1], scores - scores[:, :1])


class Module(nn.Module):
    """A head as a model keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(48 if i == 0 else 32, 3 if i == 6 else 32) for i in range(7))

    def weights(self) -> StudentHeadWeights:
        return StudentHeadWeights(*[(layer.weight, layer.bias) for layer in self.layers])


def _in_place(module: Module) -> None:
    for parameter in module.parameters():
        parameter.mul_(1.5)


def _one_bias(module: Module) -> None:
    module.layers[3].bias.add_(1)


def _optimizer_step(module: Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def _fused_optimizer_step(module: Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    # raises no version where it runs fused, as transformers.Trainer has it by default
    torch.optim.AdamW(module.parameters(), lr=0.1, fused=True).step()


def _load(module: Module) -> None:
    module.load_state_dict({name: 1.5 * value for name, value in module.state_dict().items()})


def _there_and_back(module: Module) -> None:
    module.to(torch.bfloat16).to(torch.float32)


def _replace_data(module: Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 1.5


def _replace_parameter(module: Module) -> None:
    module.layers[1].weight = nn.Parameter(module.layers[1].weight * 1.5)


@pytest.mark.parametrize(
    "change",
    [
        _in_place,
        _one_bias,
        _optimizer_step,
        _fused_optimizer_step,
        _load,
        _there_and_back,
        _replace_data,
        _replace_parameter,
    ],
)
@pytest.mark.parametrize("backend", FOLDED)
@torch.no_grad()
def test_never_stale(backend: str, change: Callable[[Module], None]) -> None:
    module = Module().to(DEVICE)
    hidden_states = torch.randn(2, 5, 48, device=DEVICE)
    with fk.backend(backend):
        before = fk.student_head(hidden_states, module.weights())
        assert torch.equal(fk.student_head(hidden_states, module.weights()), before)
        change(module)
        after = fk.student_head(hidden_states, module.weights())
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, student_head_reference(hidden_states, module.weights()), rtol=1e-5, atol=3e-6)


@torch.no_grad()
def test_folds_once_and_forgets_with_the_module() -> None:
    gc.collect()
    entries = len(fold_cache)
    module = Module().to(DEVICE)
    folded = fold_cache.get(module.weights())
    assert fold_cache.get(module.weights()) is folded
    assert len(fold_cache) == entries + 1
    del module, folded
    gc.collect()
    assert len(fold_cache) == entries


@torch.no_grad()
def test_what_a_graph_captured_lives_as_long_as_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module().to(DEVICE)
    fold_cache.get(module.weights())
    monkeypatch.setattr(_student_head_weights, "is_capturing", lambda tensor: True)
    captured = weakref.ref(fold_cache.get(module.weights()))
    monkeypatch.undo()
    _in_place(module)
    assert fold_cache.get(module.weights()) is not captured()
    gc.collect()
    assert captured() is not None
    del module
    gc.collect()
    assert captured() is None


@torch.no_grad()
def test_a_captured_op_folds_the_weights_it_is_replayed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module().to(DEVICE)
    folded = fold_cache.get(module.weights())
    monkeypatch.setattr(_student_head_weights, "is_captured_op", lambda tensor: True)
    monkeypatch.setattr(_student_head_weights, "may_keep", lambda tensor: False)
    anew = fold_cache.get(module.weights())
    monkeypatch.undo()
    assert anew is not folded
    assert fold_cache.get(module.weights()) is folded, "what was folded in a capture must not be kept"


@torch.no_grad()
def test_streams_that_read_folded_weights_are_told_to_the_allocator_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module().to(DEVICE)
    folded = fold_cache.get(module.weights())
    entry = _student_head_weights._CacheEntry(folded, None, [])  # type: ignore[arg-type]
    current, told = [1], []
    monkeypatch.setattr(_student_head_weights, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: told.append((id(tensor), stream)))
    for current[0] in (1, 2, 1, 2):
        entry.keep_for_stream()
    assert told == [(id(tensor), stream) for stream in (1, 2) for tensor in folded.tensors()]


@torch.no_grad()
def test_inference_tensors_have_no_version_and_are_not_cached() -> None:
    with torch.inference_mode():
        module = Module().to(DEVICE)
        first = fold_cache.get(module.weights())
        module.layers[1].weight.mul_(2)
        second = fold_cache.get(module.weights())
    assert not torch.equal(first.query_key, second.query_key)


def test_folded_under_inference_mode_serves_later_calls() -> None:
    module, hidden_states = Module().to(DEVICE), torch.randn(2, 5, 48, device=DEVICE)
    with torch.inference_mode():
        first = fk.student_head(hidden_states, module.weights())
    with torch.no_grad():
        assert torch.equal(fk.student_head(hidden_states, module.weights()), first)


@torch.no_grad()
def test_threads_share_a_head() -> None:
    module, hidden_states = Module().to(DEVICE), torch.randn(2, 5, 48, device=DEVICE)
    expected = student_head_reference(hidden_states, module.weights())
    results: list[Tensor] = []
    start = threading.Barrier(8)

    def call() -> None:
        start.wait()
        with torch.no_grad():
            results.append(fk.student_head(hidden_states, module.weights()))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=3e-6)


# Training, tracing


def test_gradcheck_of_the_reference() -> None:
    head = random_head(hidden=5, width=4, labels=2, dtype=torch.float64)
    hidden_states = torch.randn(2, 3, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    lengths = torch.tensor([3, 2], device=DEVICE)
    flat = [tensor.requires_grad_() for pair in head[:7] for tensor in pair]  # type: ignore[attr-defined]

    def run(hidden_states: Tensor, *flat: Tensor) -> Tensor:
        return student_head_reference(hidden_states, ops._head_of(list(flat), 2), lengths)

    assert torch.autograd.gradcheck(run, (hidden_states, *flat))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_gets_the_gradients_of_the_unfolded_head(layout: str) -> None:
    module = Module().to(DEVICE)
    padded = torch.randn(2, 5, 48, device=DEVICE, requires_grad=True)
    hidden_states, masks = laid_out(padded, torch.tensor([5, 2], device=DEVICE), layout)
    wanted = [padded, *module.parameters()]
    expected = torch.autograd.grad(
        student_head_reference(hidden_states, module.weights(), **masks).sum(), wanted, retain_graph=True
    )
    actual = torch.autograd.grad(fk.student_head(hidden_states, module.weights(), **masks).sum(), wanted)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_garbage_in_padding_reaches_no_gradient() -> None:
    module = Module().to(DEVICE)
    hidden_states = torch.randn(2, 5, 48, device=DEVICE)
    hidden_states[1, 2:] = torch.nan
    fk.student_head(hidden_states, module.weights(), torch.tensor([5, 2], device=DEVICE)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters() if parameter.grad is not None)


def test_autocast_takes_mixed_dtypes() -> None:
    module, hidden_states = Module().to(DEVICE), torch.randn(2, 5, 48, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16), torch.no_grad():
        logits = fk.student_head(hidden_states.bfloat16(), module.weights())
    expected = student_head_reference(hidden_states, module.weights())
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)


def _op_arguments(layout: str) -> tuple[Any, ...]:
    padded, lengths = torch.randn(2, 5, 48, device=DEVICE), torch.tensor([5, 2], device=DEVICE)
    hidden_states, masks = laid_out(padded, lengths, layout)
    named = [masks.get(name) for name in ("lengths", "attention_mask", "cu_seqlens")]
    return (hidden_states, parameters_of(random_head()), 2, *named)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    torch.library.opcheck(torch.ops.fastkd_kernels.student_head.default, _op_arguments(layout))


@needs_extension
def test_opcheck_of_the_cpu_kernel() -> None:
    folded = fold(converted(random_head(), Tensor.cpu))
    weights = (folded.query_key, folded.query_bias, folded.mix, folded.mix_bias, *folded.classifier)
    lengths = torch.tensor([5, 2])
    arguments = (torch.randn(8, 32), torch.randn(2, 32), 2, 5, 2, *weights, lengths, None, None)
    torch.library.opcheck(torch.ops.fastkd_kernels.student_head_pool.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_to_one_graph_that_follows_the_weights(layout: str) -> None:
    module = Module().to(DEVICE)
    padded, lengths = torch.randn(2, 5, 48, device=DEVICE), torch.tensor([5, 2], device=DEVICE)
    hidden_states, masks = laid_out(padded, lengths, layout)

    def run(hidden_states: Tensor, masks: dict[str, Tensor]) -> Tensor:
        return fk.student_head(hidden_states * 1, module.weights(), **masks) + 0

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(hidden_states, masks), run(hidden_states, masks), rtol=0, atol=0)
            _in_place(module)


@torch.no_grad()
def test_compiled_calls_fold_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, hidden_states = Module().to(DEVICE), torch.randn(2, 5, 48, device=DEVICE)
    compiled = torch.compile(lambda x: fk.student_head(x, module.weights()), fullgraph=True, backend="aot_eager")
    compiled(hidden_states)
    monkeypatch.setattr(_student_head_weights, "fold", lambda head: pytest.fail("folded again"))
    compiled(hidden_states)


# Bad input

CPU_ONLY = pytest.mark.skipif(DEVICE.type != "cpu", reason="checking values would wait for the GPU")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "lengths and attention_mask", {"lengths": [5, 5], "attention_mask": [[1] * 5] * 2}),
        (TypeError, "lengths: got dtype torch.float32", {"lengths": [5.0, 5.0]}),
        (ValueError, r"lengths: got shape \(3,\)", {"lengths": [5, 5, 5]}),
        (ValueError, r"attention_mask: got shape \(2, 4\)", {"attention_mask": [[1] * 4] * 2}),
        (ValueError, r"expected \[N_tokens, H\]", {"cu_seqlens": [0, 5, 10]}),
        pytest.param(ValueError, "lengths: got values from 0 to 5", {"lengths": [0, 5]}, marks=CPU_ONLY),
        pytest.param(ValueError, "lengths: got values from 1 to 6", {"lengths": [1, 6]}, marks=CPU_ONLY),
        pytest.param(ValueError, "row whose token 0", {"attention_mask": [[1] * 5, [0, 1, 1, 1, 1]]}, marks=CPU_ONLY),
    ],
)
def test_bad_masks(backend: str, error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    tensors = {name: torch.tensor(value, device=DEVICE) for name, value in arguments.items()}
    with fk.backend(backend), pytest.raises(error, match=message):
        fk.student_head(torch.randn(2, 5, 48, device=DEVICE), random_head(), **tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_behind_the_last_sequence_belong_to_none(backend: str) -> None:
    head, hidden_states = random_head(), torch.randn(14, 48, device=DEVICE)
    hidden_states[10:] = float("nan")
    cu_seqlens = torch.tensor([0, 5, 10], dtype=torch.int32, device=DEVICE)
    with fk.backend(backend):
        expected = fk.student_head(hidden_states[:10], head, cu_seqlens=cu_seqlens)
        result = fk.student_head(hidden_states, head, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@CPU_ONLY
@pytest.mark.parametrize("cu_seqlens", [[0, 5, 11], [1, 5, 10], [0, 5, 5, 10], [0, 7, 5, 10]])
def test_bad_cu_seqlens(cu_seqlens: list[int]) -> None:
    with pytest.raises(ValueError, match="rise from 0 to at most N_tokens=10"):
        fk.student_head(torch.randn(10, 48), random_head(), cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32))


@pytest.mark.parametrize(
    ("error", "message", "hidden_states", "head"),
    [
        (TypeError, "expected a floating-point", torch.ones(2, 5, 48, dtype=torch.int64), random_head()),
        (TypeError, "expected that of the weights, torch.float32", torch.ones(2, 5, 48).half(), random_head()),
        (ValueError, "with H=48", torch.ones(2, 5, 47), random_head()),
        (ValueError, r"expected \[B, T, H\]", torch.ones(5, 48), random_head()),
        (ValueError, "T=0", torch.ones(2, 0, 48), random_head()),
        (ValueError, "divisor of the head width 32", torch.ones(2, 5, 48), random_head(heads=5)),
        (ValueError, r"key: got a weight of shape \(32, 31\)", torch.ones(2, 5, 48), {"key": (32, 31)}),
        (ValueError, r"narrow: got a weight of shape \(32,\)", torch.ones(2, 5, 48), {"narrow": (32,)}),
        (TypeError, "dense: got torch.float16", torch.ones(2, 5, 48), {"dense": torch.float16}),
    ],
)
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_bad_head(needs_gradient: bool, error: type[Exception], message: str, hidden_states: Tensor, head: Any) -> None:
    if isinstance(head, dict):
        [(name, wrong)] = head.items()
        weight, bias = getattr(random_head(), name)
        wrong_weight = weight.to(wrong) if isinstance(wrong, torch.dtype) else torch.ones(wrong)
        head = random_head()._replace(**{name: (wrong_weight.to(DEVICE), bias)})
    hidden_states = hidden_states.to(DEVICE)
    if needs_gradient and hidden_states.is_floating_point():
        hidden_states.requires_grad_()
    with pytest.raises(error, match=message):
        fk.student_head(hidden_states, head)


@needs_triton
def test_a_head_the_kernel_does_not_take() -> None:
    head, hidden_states = random_head(width=24), torch.randn(2, 5, 48, device=DEVICE)
    with fk.backend("cuda"), pytest.raises(fk.BackendUnavailableError, match="power of two"):
        fk.student_head(hidden_states, head)


# The exit


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("criterion", fk.CRITERIA)
@pytest.mark.parametrize("labels", [2, 40, 300])
@pytest.mark.parametrize("backend", BACKENDS)
def test_exit_is_head_then_gate(backend: str, labels: int, criterion: str, per_row: bool) -> None:
    rows, layers = 4, 2
    row_ids = torch.randperm(2 * rows, device=DEVICE)[:rows]
    speed = torch.rand(rows, device=DEVICE) if per_row else 0.6
    top_n = 2 if criterion == "top_n" else None
    ours, theirs = (fk.ExitRecord.allocate(2 * rows, labels, DEVICE) for _ in range(2))
    head = random_head(labels=labels)
    for layer in range(1, layers + 1):
        hidden_states = torch.randn(rows, 5, 48, device=DEVICE)
        hidden_states[1, 3] = torch.nan
        with fk.backend(backend):
            out = fk.student_head_exit(hidden_states, head, speed, criterion, row_ids, top_n, record=ours, layer=layer)
            assert out.logits is not None
            assert torch.equal(out.logits.nan_to_num(), fk.student_head(hidden_states, head).nan_to_num())
        with fk.backend("reference"):
            expected = fk.exit_gate(out.logits, speed, criterion, row_ids, top_n, record=theirs, layer=layer)
        assert out.kept().tolist() == expected.kept().tolist()
        assert 1 in out.kept().tolist()  # its NaN is never answered early
        torch.testing.assert_close(out.uncertainty, expected.uncertainty, equal_nan=True, rtol=1e-5, atol=1e-6)
        assert torch.equal(ours.exit_layer, theirs.exit_layer)
        assert torch.equal(ours.logits, theirs.logits)
        torch.testing.assert_close(ours.uncertainty, theirs.uncertainty, rtol=1e-5, atol=1e-6)
        answers = ours.history[:, 0]
        assert torch.equal(answers, theirs.history[:, 0])
        assert torch.equal(ours.history[answers >= 0], theirs.history[answers >= 0])


@pytest.mark.parametrize(("speed", "kept"), [(0.0, 5), (1.0, 0)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_stay_and_none_stay(backend: str, layout: str, speed: float, kept: int) -> None:
    padded, lengths = torch.randn(5, 7, 48, device=DEVICE), torch.tensor([7, 1, 2, 7, 3], device=DEVICE)
    hidden_states, masks = laid_out(padded, lengths, layout)
    with fk.backend(backend):
        out = fk.student_head_exit(hidden_states, random_head(), speed, **masks)
    assert out.kept().tolist() == list(range(kept))


@pytest.mark.parametrize("backend", BACKENDS)
def test_exit_of_an_empty_batch(backend: str) -> None:
    with fk.backend(backend):
        out = fk.student_head_exit(torch.empty(0, 5, 48, device=DEVICE), random_head(), 0.5)
    assert out.kept().tolist() == []
    assert out.logits is not None
    assert out.logits.shape == (0, 3)


@needs_triton
def test_more_rows_than_are_listed_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, list_rows=4)
    head, hidden_states = random_head(), torch.randn(11, 2, 48, device=DEVICE)
    with fk.backend("cuda"):
        uncertainty = fk.student_head_exit(hidden_states, head, 0.0).uncertainty
        speed = uncertainty.median()
        out = fk.student_head_exit(hidden_states, head, speed.expand(11))
    assert out.kept().tolist() == (uncertainty > speed).nonzero().flatten().tolist()
    assert int(out.count) == 5


@needs_triton
@pytest.mark.parametrize("with_record", [False, True])
def test_opcheck_of_the_exit(with_record: bool) -> None:
    record = fk.ExitRecord.allocate(2, 3, DEVICE)
    fields = (record.logits, record.uncertainty, record.exit_layer, record.history)
    gate = (0.5, None, "entropy", None, None, *(fields if with_record else (None,) * 4), 1)
    arguments = (*_op_arguments("lengths"), *gate)
    torch.library.opcheck(torch.ops.fastkd_kernels.student_head_exit.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exit_compiles_to_one_graph(backend: str) -> None:
    head, hidden_states = random_head(), torch.randn(4, 5, 48, device=DEVICE)
    compiled_record, eager_record = (fk.ExitRecord.allocate(4, 3, DEVICE) for _ in range(2))

    def run(hidden_states: Tensor, record: fk.ExitRecord) -> tuple[Tensor, Tensor, Tensor]:
        out = fk.student_head_exit(hidden_states * 1, head, 0.6, record=record, layer=2)
        assert out.logits is not None
        return out.logits, out.uncertainty, out.count

    with fk.backend(backend):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(hidden_states, compiled_record)
        eager = run(hidden_states, eager_record)
    assert torch.equal(compiled_record.exit_layer, eager_record.exit_layer)
    # NumPy, which multiplies in Triton's interpreter, may add up in another order at another address
    rtol, atol = (1e-5, 1e-6) if backend == "cuda" and _triton.interpreting else (0, 0)
    for ours, theirs in zip((*compiled, compiled_record.logits), (*eager, eager_record.logits), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("speed: got 1.5", {"speed": 1.5}),
        ("criterion: got 'max'", {"criterion": "max"}),
        ("record: got None", {"criterion": "patience"}),
        ("top_n: got None", {"criterion": "top_n"}),
        ("row_ids: got shape", {"row_ids": torch.arange(3)}),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_gate_arguments(
    monkeypatch: pytest.MonkeyPatch, backend: str, message: str, arguments: dict[str, Any]
) -> None:
    monkeypatch.setattr(_student_head_weights, "fold", lambda head: pytest.fail("worked before checking"))
    with fk.backend(backend), pytest.raises(ValueError, match=message):
        fk.student_head_exit(torch.randn(2, 5, 48, device=DEVICE), random_head(), **{"speed": 0.5, **arguments})


@pytest.mark.parametrize("labels", [1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_class_cannot_exit(backend: str, labels: int) -> None:
    with fk.backend(backend), pytest.raises(ValueError, match="at least 2"):
        fk.student_head_exit(torch.randn(2, 5, 48, device=DEVICE), random_head(labels=labels), 0.5)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_both_ops_wait_for_nothing_and_replay_from_a_graph(layout: str, dtype: torch.dtype) -> None:
    head, lengths = random_head(dtype=dtype), torch.tensor([7, 1, 70, 64, 3], device=DEVICE)
    hidden_states, masks = laid_out(torch.randn(5, 70, 48, device=DEVICE).to(dtype), lengths, layout)

    def both() -> tuple[Tensor, fk.ExitGateOutput]:
        return fk.student_head(hidden_states, head, **masks), fk.student_head_exit(hidden_states, head, 0.6, **masks)

    both()  # folds the head and compiles the kernels, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits, exits = both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(3):
        hidden_states.copy_(torch.randn_like(hidden_states))
        expected_logits, expected_exits = both()
        graph.replay()
        assert torch.equal(logits, expected_logits)
        assert exits.kept().tolist() == expected_exits.kept().tolist()
        assert torch.equal(exits.uncertainty, expected_exits.uncertainty)


# Machine code

_POINTERS = {torch.float32: "*fp32:16", torch.bfloat16: "*bf16:16", torch.float16: "*fp16:16"}
_LAYOUT_ARGUMENTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "lengths": {"lengths": "*i64:16"},
    "mask": {"attention_mask": "*i64:16", "stride_mask_batch": "i32:16"},
    "packed": {"cu_seqlens": "*i32:16"},
}
_FLOAT32 = ("query_key", "query_bias", "mix", "mix_bias", "classifier", "classifier_bias", "scratch", "logits")
_RECORD = {
    "exit_logits": "*fp32:16",
    "exit_uncertainty": "*fp32:16",
    "exit_layer": "*i32:16",
    "history": "*i32:16",
    "row_ids": "*i64:16",
}
_GATE = {
    "uncertainty": "*fp32:16",
    "stays": "*i8:16",
    **dict.fromkeys(("survivors", "count"), "*i32:16"),
}


def _specification(
    dtype: torch.dtype,
    layout: str,
    criterion: str | None,
    *,
    record: bool = False,
    per_row: bool = False,
    hidden: int = 768,
    width: int = 128,
    labels: int = 4,
    heads: int = 2,
    batch: int = 256,
    limits: GpuLimits = GpuLimits(),  # noqa: B008
) -> KernelSpec:
    """The kernel as its launcher would specialise it."""
    config = StudentHeadConfig.choose(dtype, hidden, width, labels, batch, 128, limits)
    size = "i32:16" if hidden % 16 == 0 else "i32"
    arguments = {
        **dict.fromkeys(_FLOAT32, "*fp32:16"),
        **dict.fromkeys(("hidden_states", "narrow_weight", "narrow_bias"), _POINTERS[dtype]),
        **dict.fromkeys(("lengths", "attention_mask", "cu_seqlens"), None),
        **dict.fromkeys(("hidden", "stride_batch", "stride_token"), size),
        **dict.fromkeys(("tokens", "num_labels", "batch", "capacity", "layer", "top_n", "stride_mask_batch"), "i32"),
        "stride_mask_token": 1,
        "speed": "fp32",
        "scale": "fp32",
        "speeds": "*fp32:16" if per_row else None,
        **(_GATE if criterion else dict.fromkeys(_GATE, None)),
        "tickets": "*i32:16" if criterion or config.splits > 1 else None,
        **(_RECORD if record else dict.fromkeys(_RECORD, None)),
        "CRITERION": criterion,
        "EVEN_HIDDEN": hidden % config.block_hidden == 0,
        "WIDEN": False,
        "HEADS": heads,
        "WIDTH": width,
        **config.constants(),
        **_LAYOUT_ARGUMENTS[layout],
    }
    return KernelSpec("fastkd_kernels.ops.student_head:_student_head_kernel", arguments, config.options())


def _gated_specifications(limits: GpuLimits) -> list[KernelSpec]:
    """Every dtype x layout; criteria, flags and batch sizes take turns so that each meets all dtypes and layouts."""
    specifications = []
    for number, (dtype, layout) in enumerate((dtype, layout) for dtype in DTYPES for layout in LAYOUTS):
        criterion = fk.CRITERIA[number % len(fk.CRITERIA)]
        record = number % 2 == 0 or criterion == "patience"
        batch = (16, 256)[(number + number // 4) % 2]
        specifications.append(
            _specification(dtype, layout, criterion, record=record, per_row=number % 3 == 0, batch=batch, limits=limits)
        )
    return specifications


LIMITS = [
    ((80, 100, 120), GpuLimits(84, 101_376, wgmma=False)),  # the least of the three
    ((90,), GpuLimits()),
]


@needs_triton
@pytest.mark.parametrize(("capabilities", "limits"), LIMITS)
def test_machine_code_of_the_logits(capabilities: tuple[int, ...], limits: GpuLimits) -> None:
    specifications = [
        _specification(dtype, layout, None, batch=batch, limits=limits)
        for dtype, layout, batch in zip(DTYPES, LAYOUTS[1:], (256, 256, 1), strict=True)
    ]
    for cubin in compile_kernels(specifications, capabilities):
        cubin.assert_no_spills()
        cubin.assert_arithmetic_is_imitated()
        assert_streams_and_multiplies(cubin)
        assert _launched_shared_memory(cubin) <= limits.shared_memory


@needs_triton
@pytest.mark.parametrize(("capabilities", "limits"), LIMITS)
def test_machine_code_with_the_gate(capabilities: tuple[int, ...], limits: GpuLimits) -> None:
    specifications = _gated_specifications(limits)
    for number, capability in enumerate(capabilities):
        # sm_90 has all of them; the others share them, so that each has every dtype and every layout
        shared = [specifications[(number + layout) % 3 * 4 + layout] for layout in range(4)]
        for cubin in compile_kernels(specifications if capability == 90 else shared, [capability]):
            cubin.assert_no_spills()
            cubin.assert_arithmetic_is_imitated()
            if capability == 90:
                assert_streams_and_multiplies(cubin)


def _launched_shared_memory(cubin: Cubin) -> int:
    """In bytes, with what the launch adds to the binary's own."""
    return json.loads(Path(cubin.path).with_suffix(".json").read_text())["shared"]


@needs_triton
def test_machine_code_of_other_sizes() -> None:
    specifications = [
        _specification(torch.bfloat16, "lengths", "top_n", record=True, labels=256),
        _specification(torch.bfloat16, "padded", "margin", labels=5000),
        _specification(torch.float32, "mask", None, hidden=100, labels=300),
        _specification(torch.bfloat16, "packed", "margin", width=256, heads=4),
        _specification(torch.float32, "packed", None, width=256, heads=4),
        _specification(torch.float16, "padded", None, hidden=384, width=16, heads=1),
    ]
    for cubin in compile_kernels(specifications, [90]):
        cubin.assert_no_spills()
        cubin.assert_arithmetic_is_imitated()


def assert_streams_and_multiplies(cubin: Cubin) -> None:
    """Hidden states and weights go to shared memory 16 bytes at a time, and from there to the tensor cores."""
    opcodes = cubin.opcodes()
    copies = [name for name in opcodes if name.startswith("LDGSTS")]
    assert copies, f"nothing is copied asynchronously: {cubin} {opcodes}"
    assert all(name.endswith(".128") for name in copies), f"a copy of less than 16 bytes: {cubin} {opcodes}"
    mnemonic = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}[cubin.capability]
    assert any(name.startswith(mnemonic) for name in opcodes), f"no {mnemonic}: {cubin} {opcodes}"


@needs_triton
def test_float32_sums_over_the_features_stay_out_of_the_tensor_cores() -> None:
    """Their own sums are truncated, which over H features is more than float32 may lose: each step starts from zero."""
    for capabilities, limits in (((80,), LIMITS[0][1]), ((90,), LIMITS[1][1])):
        (cubin,) = compile_kernels([_specification(torch.float32, "padded", None, limits=limits)], capabilities)
        ttgir, ptx = (Path(cubin.path).with_suffix(suffix).read_text() for suffix in (".ttgir", ".ptx"))
        products = re.findall(r"= (?:tt\.dot|ttng\.warp_group_dot) %\S+, %\S+, (%[^\s,]+)", ttgir)
        summed = re.search(r"scf\.for %product\S* = .*?iter_args\((%\w+) = ", ttgir)
        assert summed is not None
        assert len(products) == 3, products
        assert products[0].startswith("%cst"), "the first product of a step is added to something"
        assert summed[1] not in products
        assert re.search(rf"arith\.addf %product\S*, {summed[1]}\b", ttgir), "the sum is not formed by an addition"
        loops = [block for block in re.split(r"^(?=\$L__BB)", ptx, flags=re.MULTILINE) if re.search(_PRODUCT, block)]
        additions = len(re.findall(r"\badd\.(?:rn\.)?f32\b", "".join(loops)))
        tile = cubin.spec.arguments["BLOCK_TOKENS"] * cubin.spec.arguments["WIDTH"]
        assert additions >= tile // (32 * cubin.spec.options["num_warps"]), additions


_PRODUCT = r"\b(?:mma\.sync|wgmma\.mma_async)"


@needs_triton
def test_what_the_h200_runs() -> None:
    """The facts that NOTES-performance.md builds on, of the launches that bench/gpu_report.py measures."""
    specifications = [
        _specification(dtype, "padded", "entropy", batch=batch) for dtype in DTYPES for batch in (32, 256)
    ]
    for cubin in compile_kernels(specifications, [90]):
        cubin.assert_no_spills()
        cubin.assert_arithmetic_is_imitated()
        opcodes, arguments = cubin.opcodes(), cubin.spec.arguments
        threads = cubin.spec.options["num_warps"] * 32
        assert threads * cubin.registers <= 65536, "one program must fit a multiprocessor"
        assert not [name for name in opcodes if name.startswith(("LDL", "STL"))], "registers went to local memory"
        assert sum(count for name, count in opcodes.items() if name.startswith("HGMMA")) >= 1
        assert not [name for name in opcodes if re.match(r"HMMA|IMMA|DMMA", name)], "a slower matrix unit is used"
        # both folded matrices of two attention heads, 16 bytes a thread
        assert opcodes["LDG.E.128"] >= 4 * 128 * 128 * 4 // (16 * threads), opcodes
        narrow_loads = [name for name in opcodes if re.match(r"LDG\.E\.(U8|U16|S8|S16)$", name)]
        assert not narrow_loads, f"features are loaded one by one: {narrow_loads}"
        tickets = sum(count for name, count in opcodes.items() if name.startswith("ATOMG"))
        assert tickets == (2 if arguments["SPLITS"] > 1 else 1), "a ticket of the batch, and one of a split sequence"


# Prepared once, for packed rows on a CPU

PREPARED_DTYPES = [torch.float32, torch.bfloat16]
needs_prepared = pytest.mark.skipif(
    not _extension.has_kernel("student_head_packed", "CPU") or DEVICE.type != "cpu",
    reason="the compiled extension is not built, or tensors are on a GPU",
)


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def check_prepared_head(sizes: tuple[int, int, int, int], lengths: list[int], dtype: torch.dtype) -> None:
    head, hidden_states = random_head(*sizes, dtype=dtype), torch.randn(sum(lengths), sizes[0]).to(dtype)
    logits = fk.PreparedStudentHead(head)(hidden_states, bounds_of(lengths))
    assert_accurate(logits, hidden_states, head, cu_seqlens=bounds_of(lengths))


def check_prepared_heads() -> None:
    """All that an instruction set must compute; run for each of them by test_encoder_layer.py."""
    torch.manual_seed(0)
    for dtype in PREPARED_DTYPES:
        for rows in (1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 130):
            check_prepared_head((64, 32, 3, 2), [rows], dtype)
        check_prepared_head((384, 128, 40, 2), [50, 1, 70, 3, 3, 3, 3, 3, 9], dtype)
        check_prepared_head((100, 64, 3, 4), [67, 20], dtype)
        check_prepared_head((7, 16, 2, 1), [5], dtype)
        check_prepared_head((33, 20, 5, 5), [1, 9, 18], dtype)
        check_prepared_head((64, 256, 300, 8), [3], dtype)


@needs_prepared
def test_error_budget_of_a_prepared_head() -> None:
    check_prepared_heads()


@needs_prepared
@pytest.mark.parametrize("dtype", PREPARED_DTYPES)
def test_a_prepared_head_keeps_its_weights(dtype: torch.dtype) -> None:
    head, hidden_states, cu_seqlens = random_head(dtype=dtype), torch.randn(9, 48).to(dtype), bounds_of([3, 6])
    prepared = fk.PreparedStudentHead(head)
    before = prepared(hidden_states, cu_seqlens)
    for weight, bias in head[:7]:
        weight.zero_()
        bias.zero_()
    assert prepared(hidden_states, cu_seqlens).equal(before)


@needs_prepared
@pytest.mark.parametrize("dtype", PREPARED_DTYPES)
def test_neither_threads_nor_other_rows_change_a_prepared_answer(dtype: torch.dtype) -> None:
    prepared = fk.PreparedStudentHead(random_head(dtype=dtype))
    lengths = [70, 3, 41, 90, 17, 66, 1, 5, 8, 200]
    hidden_states, cu_seqlens = torch.randn(sum(lengths) + 9, 48).to(dtype), bounds_of(lengths)
    hidden_states[sum(lengths) :] = float("nan")  # rows behind the last sequence belong to none
    parts = hidden_states[: sum(lengths)].split(lengths)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(prepared(hidden_states, cu_seqlens))
            results.append(torch.cat([prepared(part, bounds_of([len(part)])) for part in parts]))
    finally:
        torch.set_num_threads(before)
    assert all(result.equal(results[0]) for result in results)
    hidden_states[71] = float("nan")  # of sequence 1
    assert prepared(hidden_states, cu_seqlens).isnan().any(1).tolist() == [n == 1 for n in range(10)]


@needs_prepared
def test_a_prepared_head_of_no_sequences() -> None:
    prepared = fk.PreparedStudentHead(random_head(labels=5))
    assert prepared(torch.empty(0, 48), bounds_of([])).shape == (0, 5)


@needs_prepared
def test_a_prepared_head_of_float16_answers_as_the_head_does() -> None:
    head, hidden_states, cu_seqlens = random_head(dtype=torch.float16), torch.randn(9, 48).half(), bounds_of([3, 6])
    expected = fk.student_head(hidden_states, head, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(fk.PreparedStudentHead(head)(hidden_states, cu_seqlens), expected, rtol=1e-5, atol=1e-5)


def test_no_prepared_head_of_float64() -> None:
    with pytest.raises(TypeError, match=r"head: got torch\.float64, expected torch\.float32, torch\.bfloat16 or"):
        fk.PreparedStudentHead(random_head(dtype=torch.float64))


@needs_prepared
@pytest.mark.parametrize("dtype", PREPARED_DTYPES)
def test_opcheck_of_the_prepared_head(dtype: torch.dtype) -> None:
    weights = ops.packed_head(fold(random_head(dtype=dtype)))
    arguments = (torch.randn(9, 48).to(dtype), *weights, bounds_of([3, 5]))
    torch.library.opcheck(torch.ops.fastkd_kernels.student_head_packed.default, arguments)
