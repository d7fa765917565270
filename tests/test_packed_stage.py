"""A stage in one call is its ops one after the other, and a run is its stages, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from launches import OpNames
from test_encoder_layer import bounds, weights
from torch import Tensor

import fastkd_kernels as fk
from fastkd_kernels import _eager, _extension

pytestmark = [
    pytest.mark.skipif(
        fk.encoder_layer_instructions() is None, reason="the compiled extension has no kernel of encoder_layers_"
    ),
    pytest.mark.skipif(not _eager.available, reason="this torch has no exchange of tensors with the extension"),
]

HIDDEN, CLASSES = 48, 3
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}


def head(dtype: torch.dtype, classes: int = CLASSES) -> fk.PreparedStudentHead:
    def affine(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        return torch.randn(rows, columns).to(dtype) / columns**0.5, torch.randn(rows).to(dtype)

    sizes = [(32, HIDDEN), *[(32, 32)] * 5, (classes, 32)]
    return fk.PreparedStudentHead(fk.StudentHeadWeights(*(affine(*size) for size in sizes)))


def layers(kind: str, count: int = 2, rotary: bool = False) -> list[fk.PackedEncoderLayer]:
    angles = torch.randn(30, 8)
    table = torch.stack([angles.cos(), angles.sin()]) if rotary else None
    form = fk.EncoderLayerForm(3)
    return [
        fk.pack_encoder_layer(weights(HIDDEN, 80, HIDDEN, KINDS[kind]), form, int8=kind == "int8", rotary=table)
        for _ in range(count)
    ]


def embedding(dtype: torch.dtype) -> fk.PreparedEmbedding:
    tables = [torch.randn(rows, HIDDEN).to(dtype) for rows in (50, 30)]
    return fk.PreparedEmbedding(tables, torch.randn(HIDDEN).to(dtype), torch.randn(HIDDEN).to(dtype), 1e-5)


def indices(lengths: Sequence[int]) -> list[Tensor]:
    tokens = sum(lengths)
    return [torch.randint(0, 50, (tokens,)), torch.cat([torch.arange(length) for length in lengths])]


def one_by_one(monkeypatch: pytest.MonkeyPatch, stage: fk.PreparedStage, *arguments: Any, **options: Any) -> Any:
    with monkeypatch.context() as patched:
        patched.setattr(_eager, "is_unwatched", lambda: False)
        return stage(*arguments, **options)


def assert_same(result: fk.StageOutput, expected: fk.StageOutput) -> None:
    for one, other in zip(result[:3], expected[:3], strict=True):
        assert one.dtype == other.dtype
        assert one.equal(other)
    assert result.staying == expected.staying


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("embeds", [True, False])
@pytest.mark.parametrize("lengths", [[1], [5], [3, 17, 1, 9]], ids=str)
@pytest.mark.parametrize(
    ("criterion", "top_n"), [("entropy", None), ("max_prob", None), ("margin", None), ("top_n", 2)]
)
def test_is_its_ops(
    kind: str, embeds: bool, lengths: list[int], criterion: str, top_n: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    dtype, tokens = KINDS[kind], sum(lengths)
    stage = fk.PreparedStage(layers(kind), head(dtype), embedding(dtype) if embeds else None)
    rows = indices(lengths) if embeds else torch.randn(tokens, HIDDEN).to(dtype)
    for speed in (0.0, 0.6, 1.0, torch.rand(len(lengths))):
        options = {"criterion": criterion, "top_n": top_n}
        result = stage(rows, bounds(lengths), speed, **options)
        assert_same(result, one_by_one(monkeypatch, stage, rows, bounds(lengths), speed, **options))
        assert result.logits.shape == (len(lengths), CLASSES)
        assert result.hidden_states.shape == (tokens, HIDDEN)


@pytest.mark.parametrize("criterion", fk.CRITERIA)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_records_what_leaves(criterion: str, id_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    lengths, ids = [3, 17, 1, 9], torch.tensor([4, 0, 2, 5], dtype=id_dtype)
    stage = fk.PreparedStage(layers("float32", rotary=True), head(torch.float32))
    rows = torch.randn(sum(lengths), HIDDEN)
    records = [fk.ExitRecord.allocate(6, CLASSES) for _ in range(2)]
    for layer in (2, 4):
        options = {"criterion": criterion, "row_ids": ids, "top_n": 2, "layer": layer}
        versions = records[0].logits._version
        result = stage(rows, bounds(lengths), 0.6, record=records[0], **options)
        expected = one_by_one(monkeypatch, stage, rows, bounds(lengths), 0.6, record=records[1], **options)
        assert_same(result, expected)
        assert records[0].logits._version > versions
        for name in ("logits", "uncertainty", "exit_layer", "history"):
            assert getattr(records[0], name).equal(getattr(records[1], name))


def test_rows_behind_the_last_sequence_are_zero() -> None:
    stage = fk.PreparedStage(layers("float32"), head(torch.float32))
    rows = torch.randn(9, HIDDEN)
    result = stage(rows, bounds([4, 2]), 0.5)
    assert result.hidden_states[6:].eq(0).all()
    assert result.hidden_states[:6].equal(stage(rows[:6], bounds([4, 2]), 0.5).hidden_states)


def test_who_watches_ops_sees_them() -> None:
    stage = fk.PreparedStage(layers("float32"), head(torch.float32))
    with OpNames() as seen:
        stage(torch.randn(4, HIDDEN), bounds([4]), 0.5)
    assert any("encoder_layers_" in name for name in seen.names)


def test_a_profiler_sees_it() -> None:
    stage, rows = fk.PreparedStage(layers("float32"), head(torch.float32)), torch.randn(4, HIDDEN)
    assert stage.is_direct
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        stage(rows, bounds([4]), 0.5)
    assert "fastkd_kernels::packed_stage" in {event.key for event in profiler.key_averages()}


def test_a_gradient_that_is_wanted_is_refused() -> None:
    stage, rows = fk.PreparedStage(layers("float32"), head(torch.float32)), torch.randn(4, HIDDEN, requires_grad=True)
    with pytest.raises(ValueError, match="a gradient is recorded"):
        stage(rows, bounds([4]), 0.5)
    with torch.no_grad():
        assert stage(rows, bounds([4]), 0.5).logits.isfinite().all()


def test_heads_of_another_dtype_are_asked_by_themselves() -> None:
    stage = fk.PreparedStage(layers("float32"), head(torch.bfloat16))
    assert not stage.is_direct
    assert stage(torch.randn(4, HIDDEN), bounds([4]), 0.5).logits.shape == (1, CLASSES)


BAD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "another width": ((torch.randn(4, 32), bounds([4]), 0.5), ValueError, "width"),
    "another dtype": ((torch.randn(4, HIDDEN).double(), bounds([4]), 0.5), ValueError, "float32 or bfloat16"),
    "bfloat16 rows": (
        (torch.randn(4, HIDDEN).bfloat16(), bounds([4]), 0.5),
        ValueError,
        "another width or dtype than hidden_states",
    ),
    "a vector": ((torch.randn(HIDDEN), bounds([4]), 0.5), ValueError, "hidden_states"),
    "strided rows": ((torch.randn(HIDDEN, 4).t(), bounds([4]), 0.5), ValueError, "contiguous"),
    "bounds beyond the rows": ((torch.randn(4, HIDDEN), bounds([5]), 0.5), ValueError, "cu_seqlens"),
    "bounds that fall": ((torch.randn(4, HIDDEN), torch.tensor([0, 3, 2]).int(), 0.5), ValueError, "never decrease"),
    "an empty sequence": (
        (torch.randn(4, HIDDEN), torch.tensor([0, 2, 2]).int(), 0.5),
        ValueError,
        "values that increase",
    ),
    "long bounds": ((torch.randn(4, HIDDEN), bounds([4]).long(), 0.5), ValueError, "cu_seqlens"),
    "no bounds": ((torch.randn(4, HIDDEN), torch.empty(0).int(), 0.5), ValueError, "cu_seqlens"),
    "a speed above 1": ((torch.randn(4, HIDDEN), bounds([4]), 1.5), ValueError, "speed"),
    "a speed of no number": ((torch.randn(4, HIDDEN), bounds([4]), float("nan")), ValueError, "speed"),
    "speeds of other rows": ((torch.randn(4, HIDDEN), bounds([4]), torch.rand(2)), ValueError, "speeds"),
    "an unknown criterion": ((torch.randn(4, HIDDEN), bounds([4]), 0.5, "doubt"), ValueError, "criterion"),
    "patience without a record": ((torch.randn(4, HIDDEN), bounds([4]), 0.5, "patience"), ValueError, "record"),
    "top_n without a number": ((torch.randn(4, HIDDEN), bounds([4]), 0.5, "top_n"), ValueError, "top_n"),
    "indices without an embedding": (([torch.zeros(4).long()], bounds([4]), 0.5), TypeError, "no embedding"),
}


@pytest.mark.parametrize(("arguments", "error", "words"), BAD.values(), ids=BAD)
def test_bad_arguments_raise(arguments: tuple[Any, ...], error: type[Exception], words: str) -> None:
    stage = fk.PreparedStage(layers("float32"), head(torch.float32))
    with pytest.raises(error, match=words):
        stage(*arguments)


def test_bad_indices_raise() -> None:
    stage = fk.PreparedStage(layers("float32"), head(torch.float32), embedding(torch.float32))
    with pytest.raises(IndexError, match=r"indices\[0\]\[1\]: got 50, expected 0 to 49"):
        stage([torch.tensor([3, 50]), torch.tensor([0, 1])], bounds([2]), 0.5)
    with pytest.raises(ValueError, match="one tensor for each table"):
        stage([torch.tensor([3, 5])], bounds([2]), 0.5)
    with pytest.raises(TypeError, match="expected one tensor of indices for each"):
        stage(torch.randn(2, HIDDEN), bounds([2]), 0.5)


def test_bad_records_raise() -> None:
    stage, rows = fk.PreparedStage(layers("float32"), head(torch.float32)), torch.randn(4, HIDDEN)
    record = fk.ExitRecord.allocate(2, CLASSES)
    with pytest.raises(ValueError, match="layer: got None"):
        stage(rows, bounds([4]), 0.5, record=record)
    with pytest.raises(ValueError, match="row_ids"):
        stage(rows, bounds([4]), 0.5, record=record, row_ids=torch.tensor([2]), layer=1)
    with pytest.raises(ValueError, match=r"record\.logits"):
        stage(rows, bounds([4]), 0.5, record=fk.ExitRecord.allocate(2, CLASSES + 1), layer=1)


def test_needs_layers() -> None:
    with pytest.raises(ValueError, match=r"^layers: got none"):
        fk.PreparedStage([], head(torch.float32))


def run_of(
    kind: str = "float32",
    embeds: bool = False,
    thresholds: Sequence[float] = (0.7, 0.6),
    criterion: str = "entropy",
    top_n: int | None = None,
) -> fk.PreparedRun:
    dtype = KINDS[kind]
    stages = [
        fk.PreparedStage(layers(kind, count), head(dtype), embedding(dtype) if embeds and number == 0 else None)
        for number, count in enumerate((1, 2, 1)[: len(thresholds) + 1])
    ]
    return fk.PreparedRun(stages, (1, 3, 4)[: len(stages)], thresholds, criterion, top_n)


def assert_runs_as_its_stages(
    monkeypatch: pytest.MonkeyPatch, run: fk.PreparedRun, rows: Any, lengths: Sequence[int]
) -> fk.RunOutput:
    result = run(rows, bounds(lengths))
    with monkeypatch.context() as patched:
        patched.setattr(_eager, "is_unwatched", lambda: False)
        expected = run(rows, bounds(lengths))
    for one, other in zip(result[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert result.has_nan == expected.has_nan
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("embeds", [True, False])
@pytest.mark.parametrize(
    ("criterion", "top_n"), [("entropy", None), ("max_prob", None), ("margin", None), ("top_n", 2), ("patience", None)]
)
def test_a_run_is_its_stages(
    kind: str, embeds: bool, criterion: str, top_n: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    left: set[int] = set()
    for thresholds in ((0.0, 0.0), (0.4, 0.9), (0.7, 0.0), (0.0, 1.0), (1.0, 0.0)):
        run = run_of(kind, embeds, thresholds, criterion, top_n)
        for lengths in ([1], [3, 17, 1, 9], [7] * 40):
            rows = indices(lengths) if embeds else torch.randn(sum(lengths), HIDDEN).to(KINDS[kind])
            result = assert_runs_as_its_stages(monkeypatch, run, rows, lengths)
            assert not result.has_nan
            left.update(result.exit_layer.tolist())
    assert left == {1, 3, 4}


def test_a_run_of_one_stage_answers_every_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(thresholds=())
    result = assert_runs_as_its_stages(monkeypatch, run, torch.randn(9, HIDDEN), [4, 5])
    assert result.exit_layer.tolist() == [1, 1]


def test_a_run_reads_no_rows_behind_the_last_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    run, rows = run_of(), torch.randn(12, HIDDEN)
    with_others = assert_runs_as_its_stages(monkeypatch, run, rows, [4, 5])
    assert with_others.logits.equal(run(rows[:9], bounds([4, 5])).logits)


def test_a_run_of_no_sequence_answers_nothing() -> None:
    result = run_of()(torch.randn(3, HIDDEN), bounds([]))
    assert result.logits.shape == (0, CLASSES)
    assert result.exit_layer.shape == (0,)


def test_a_run_tells_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence whose logits are NaN is never answered early, and the others are as they were."""
    lengths, run = [4, 5], run_of(thresholds=(1.0, 1.0))
    rows = torch.randn(9, HIDDEN)
    before = run(rows, bounds(lengths))
    rows[4] = torch.nan
    result = assert_runs_as_its_stages(monkeypatch, run, rows, lengths)
    assert result.has_nan
    assert result.exit_layer.tolist() == [1, 4]
    assert result.logits[0].equal(before.logits[0])
    assert result.logits[1].isnan().all()


def test_threads_run_at_once() -> None:
    run = run_of()
    given = [torch.randn(sum(lengths), HIDDEN) for lengths in ([3, 9], [30, 1])]
    expected = [run(given[0], bounds([3, 9])), run(given[1], bounds([30, 1]))]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda n: run(given[n % 2], bounds(([3, 9], [30, 1])[n % 2])), range(64))]
    for number, one in enumerate(found):
        assert one.logits.equal(expected[number % 2].logits)
        assert one.exit_layer.equal(expected[number % 2].exit_layer)


def test_a_profiler_sees_a_run() -> None:
    run, rows = run_of(), torch.randn(4, HIDDEN)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run(rows, bounds([4]))
    assert "fastkd_kernels::packed_run" in {event.key for event in profiler.key_averages()}


def test_who_watches_ops_sees_those_of_a_run() -> None:
    run, rows = run_of(), torch.randn(4, HIDDEN)
    with OpNames() as seen:
        run(rows, bounds([4]))
    assert any("encoder_layers_" in name for name in seen.names)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [BAD[name] for name in BAD if len(BAD[name][0]) == 3 and "speed" not in name],
    ids=[name for name in BAD if len(BAD[name][0]) == 3 and "speed" not in name],
)
def test_bad_arguments_of_a_run_raise(arguments: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run_of()(*arguments[:2])


def test_a_run_of_what_does_not_fit_is_refused() -> None:
    stage, embeds = fk.PreparedStage(layers("float32"), head(torch.float32)), embedding(torch.float32)
    with pytest.raises(ValueError, match=r"^stages: got none"):
        fk.PreparedRun([], [], [])
    with pytest.raises(ValueError, match=r"^stages\[1\]: does not run as one call"):
        fk.PreparedRun([stage, fk.PreparedStage(layers("float32"), head(torch.bfloat16))], [2, 4], [0.5])
    with pytest.raises(ValueError, match=r"^stages\[1\]: has an embedding"):
        fk.PreparedRun([stage, fk.PreparedStage(layers("float32"), head(torch.float32), embeds)], [2, 4], [0.5])
    with pytest.raises(ValueError, match=r"^exit_layers: got 1 for 2 stages"):
        fk.PreparedRun([stage, stage], [2], [0.5])
    with pytest.raises(ValueError, match=r"^thresholds: got 2 for 2 stages"):
        fk.PreparedRun([stage, stage], [2, 4], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"^criterion: got 'doubt'"):
        fk.PreparedRun([stage], [2], [], "doubt")
    other = fk.PreparedStage(layers("float32"), head(torch.float32, CLASSES + 1))
    with pytest.raises(ValueError, match="the same number of classes"):
        fk.PreparedRun([stage, other], [2, 4], [0.5])(torch.randn(4, HIDDEN), bounds([4]))
    with pytest.raises(ValueError, match="speed: expected 0 to 1"):
        fk.PreparedRun([stage, stage], [2, 4], [1.5])(torch.randn(4, HIDDEN), bounds([4]))
    with pytest.raises(ValueError, match="a gradient is recorded"):
        run_of()(torch.randn(4, HIDDEN, requires_grad=True), bounds([4]))


def test_another_number_of_arguments_is_an_error() -> None:
    extension = _extension.extension
    assert extension is not None
    cu_seqlens, record = bounds([1]), None
    for given in [(), (None,) * 7, (torch.zeros(1), ([], [], ()), cu_seqlens, 0.5, 0, 0, record)]:
        with pytest.raises(TypeError, match=r"^packed_stage: expected rows"):
            extension.packed_stage(*given)
    for given in [(), (None,) * 7, (torch.zeros(1), (([], [], ()),), cu_seqlens, (), (1,), 0, 0)]:
        with pytest.raises(TypeError, match=r"^packed_run: expected rows"):
            extension.packed_run(*given)
