"""The benchmark: its clockwork, its arithmetic, and that every contestant answers the same rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import early_exit_model, one_thread, random_batch  # noqa: F401  # a fixture
from torch import Tensor

import fastkd
from fastkd.exits.trace import ExitTrace
from fastkd.inference import benchmark
from fastkd.inference.interleaved import interleaved
from fastkd.inference.measurements import Benchmark
from fastkd.inference.predict import WINDOW


def batches_of(size: int, rows: int = 12) -> list[dict[str, Tensor]]:
    """The same rows, in the same order, whatever the batch size."""
    batch = random_batch(rows=rows, longest=9) | {"labels": torch.arange(rows) % 3}
    return [{name: values[start : start + size] for name, values in batch.items()} for start in range(0, rows, size)]


def rows_of(rows: int = 12) -> list[dict[str, Any]]:
    """The rows of `batches_of` as a stream takes them: in their order, without padding."""
    (batch,) = batches_of(rows, rows)
    widths = batch["attention_mask"].sum(-1).tolist()
    columns = {name: batch[name].tolist() for name in ("input_ids", "token_type_ids")}
    return [
        {name: values[row][:width] for name, values in columns.items()}
        | {"labels": batch["labels"][row].item(), "length": width}
        for row, width in enumerate(widths)
    ]


def test_passes_are_interleaved_and_turn() -> None:
    order: list[str] = []
    contestants = {name: (lambda name=name: order.append(name)) for name in "abc"}  # type: ignore[misc]
    seconds, _ = interleaved(contestants, repeats=3)  # type: ignore[arg-type]
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_warm_up_is_not_counted_and_time_is_measured_around_the_pass() -> None:
    ticks = iter(range(1000))
    seconds, answers = interleaved(
        {"a": lambda: next(ticks), "b": lambda: (next(ticks), next(ticks))},  # type: ignore[dict-item, return-value]
        repeats=2,
        clock=lambda: float(next(ticks)),
    )
    # the clock ticks once when started and once when stopped, plus the ticks of the pass itself
    assert seconds == {"a": [2.0, 2.0], "b": [3.0, 3.0]}
    assert set(answers) == {"a", "b"}


def test_every_pass_waits_for_the_device() -> None:
    events: list[str] = []
    interleaved(
        {"a": lambda: events.append("run")},  # type: ignore[dict-item, return-value]
        repeats=1,
        synchronise=lambda: events.append("wait"),
    )
    assert events == ["wait", "run", "wait"] * 2


@pytest.fixture(scope="module")
def measured() -> Benchmark:
    return benchmark.benchmark(
        early_exit_model(), batches_of, rows=rows_of(), speeds=(0.4, 1.0), batch_sizes=(1, 5), dtypes=("fp32", "bf16"),
        repeats=2,
    )  # fmt: skip


def test_one_row_for_each_setting_and_the_stream_first(measured: Benchmark) -> None:
    settings = [(row.dtype, row.batch_size, row.speed) for row in measured.rows]
    assert settings == [(d, b, s) for d in ("fp32", "bf16") for b in (None, 1, 5) for s in (0.4, 1.0)]
    assert all(row.rows == 12 for row in measured.rows)


def test_ratios_are_those_of_the_times(measured: Benchmark) -> None:
    for row in measured.rows:
        assert row.seconds > 0
        assert row.seconds_p20 <= row.seconds <= row.seconds_p80
        assert row.speedup == pytest.approx(row.full_seconds / row.seconds)
        assert row.realised == pytest.approx(row.speedup / row.flops_speedup)
        in_batches = (benchmark.OUR_FULL, benchmark.TRANSFORMERS_FULL)
        if row.batch_size is not None:
            assert row.full_engine in in_batches
            assert row.full_batch_size == row.batch_size
        else:
            assert (row.full_engine, row.full_batch_size) in {
                ("stream", None), *((engine, size) for engine in in_batches for size in (1, 5))
            }  # fmt: skip


def test_baseline_is_the_faster_full_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(contestants: dict[str, benchmark.Contestant], *_: object) -> tuple[dict[str, list[float]], dict]:
        times = {"fastkd": [4.0, 9.0, 4.0], "transformers": [3.0, 3.0, 8.0], "speed 0.5": [2.0, 2.0, 2.0]}
        return times, {name: contestant() for name, contestant in contestants.items()}

    monkeypatch.setattr(benchmark, "interleaved", fake)
    (row,) = benchmark.benchmark(early_exit_model(), batches_of, speeds=[0.5], batch_sizes=[4], dtypes=["fp32"]).rows
    assert (row.full_engine, row.full_seconds, row.seconds, row.speedup) == ("transformers", 3.0, 2.0, 1.5)


@pytest.mark.parametrize(
    ("fastest", "engine", "batch_size", "shown"),
    [
        ("stream", "stream", None, "stream"),
        ("fastkd, batch 12", "fastkd", 12, "fastkd, 12"),
        ("transformers, batch 4", "transformers", 4, "transformers, 4"),
    ],
)
def test_baseline_of_the_stream_is_the_fastest_full_model_of_all(
    fastest: str, engine: str, batch_size: int | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raced: list[list[str]] = []

    def fake(contestants: dict[str, benchmark.Contestant], *_: object) -> tuple[dict[str, list[float]], dict]:
        raced.append(list(contestants))
        times = {name: [3.0] if name == fastest else [6.0] for name in contestants}
        return times, {name: contestant() for name, contestant in contestants.items()}

    monkeypatch.setattr(benchmark, "interleaved", fake)
    streamed, *_ = benchmark.benchmark(
        early_exit_model(), batches_of, rows=rows_of(), speeds=[0.5], batch_sizes=[4, 12], dtypes=["fp32"]
    ).rows
    in_batches = ["fastkd, batch 4", "transformers, batch 4", "fastkd, batch 12", "transformers, batch 12"]
    assert raced == [["stream", *in_batches, "speed 0.5"], *[["fastkd", "transformers", "speed 0.5"]] * 2]
    assert (streamed.full_engine, streamed.full_batch_size, streamed.full_form) == (engine, batch_size, shown)
    assert (streamed.full_seconds, streamed.seconds, streamed.speedup) == (3.0, 6.0, 0.5)


def test_stream_is_run_as_predict_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = early_exit_model(), []
    whole = type(model).stream

    def noted(self: Any, rows: Any, tokenizer: Any = None, **options: Any) -> Any:
        given.append((rows, options))
        return whole(self, rows, tokenizer, **options)

    monkeypatch.setattr(type(model), "stream", noted)
    benchmark.benchmark(
        model, batches_of, rows=rows_of(), speeds=[0.4], batch_sizes=[12], dtypes=["fp32"], criterion="margin",
        repeats=1,
    )  # fmt: skip
    for rows, options in given:
        assert rows == [{name: row[name] for name in ("input_ids", "token_type_ids")} for row in rows_of()]
        assert (options["criterion"] if options["speed"] else "margin", options["look_ahead"]) == ("margin", WINDOW)
    assert sorted(options["speed"] for _, options in given) == [0.0, 0.0, 0.4, 0.4]


def test_stream_answers_and_counts_rows_at_their_own_length(measured: Benchmark) -> None:
    model = early_exit_model()
    for row in measured.rows:
        if row.dtype != "fp32" or row.batch_size is not None:
            continue
        exits, right = [], 0
        full = spent = 0
        for given in rows_of():
            (answer,) = model.stream([given], speed=row.speed)
            assert answer.exit_layer is not None
            exits.append(answer.exit_layer)
            right += (model.config.label2id or {})[str(answer.label)] == given["labels"]
            full += fastkd.flops(model.config, given["length"])
            spent += fastkd.flops(model.config, given["length"], layers=exits[-1], heads=exits[-1])
        assert row.average_layers == pytest.approx(sum(exits) / 12)
        assert row.accuracy == pytest.approx(right / 12)
        assert row.flops_speedup == pytest.approx(full / spent)
        assert row.full_accuracy == pytest.approx(model.trace(batches_of(1)).sweep([0.0])[0].accuracy)


def test_rows_that_a_stream_cannot_answer_are_wrong_and_ran_in_full() -> None:
    model = early_exit_model()
    with torch.no_grad():
        next(model.backbone.parameters()).fill_(float("nan"))
    with pytest.warns(RuntimeWarning, match="NaN"):
        answer = benchmark.stream_pass(model, rows_of(), 0.5)
    assert answer.predictions.tolist() == [-1] * 12
    assert answer.exit_layers is not None
    assert answer.exit_layers.tolist() == [model.num_layers] * 12


def test_answers_and_flops_are_those_of_the_trace(measured: Benchmark) -> None:
    model = early_exit_model()
    trace: ExitTrace = model.trace(batches_of(1))
    for row in measured.rows:
        if row.dtype != "fp32" or row.batch_size != 1:
            continue
        swept = trace.sweep([row.speed])[0]
        assert row.average_layers == pytest.approx(swept.average_layers)
        assert row.accuracy == pytest.approx(swept.accuracy)
        assert row.full_accuracy == pytest.approx(trace.sweep([0.0])[0].accuracy)
        # batches of one have the trace's padded width, so both count the same operations
        assert row.flops_speedup == pytest.approx(swept.speedup["fastbert"])
        assert row.flops_speedups == pytest.approx(swept.speedup)


def test_flops_of_everybody_leaving_at_once(measured: Benchmark) -> None:
    model = early_exit_model()
    full = fastkd.flops(model.config, seq_len=9)
    first = fastkd.flops(model.config, seq_len=9, layers=1, heads=1)
    row = next(row for row in measured.rows if row.speed == 1.0 and row.batch_size is not None)
    assert row.average_layers == 1.0
    assert row.flops_speedup == pytest.approx(full / first)


def test_transformers_own_forward_gives_the_full_model() -> None:
    model = early_exit_model()
    batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches_of(4)]
    theirs, ours = benchmark.transformers_pass(model, batches), benchmark.early_exit_pass(model, batches, 0.0)
    assert torch.equal(theirs.predictions, ours.predictions)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra"])
def test_transformers_own_forward_of_other_families(family: str) -> None:
    model = early_exit_model(family)
    batches = [random_batch(family)]
    theirs, ours = benchmark.transformers_pass(model, batches), benchmark.early_exit_pass(model, batches, 0.0)
    assert torch.equal(theirs.predictions, ours.predictions)


def test_model_is_left_as_it_was() -> None:
    model = early_exit_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    benchmark.benchmark(model, batches_of, speeds=[0.5], batch_sizes=[12], dtypes=["bf16"], repeats=1)
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("streams", [True, False])
def test_progress_is_announced_as_often_as_promised(streams: bool) -> None:
    calls: list[str] = []
    arguments: dict[str, Any] = {"speeds": [0.5], "batch_sizes": [4, 12], "dtypes": ["fp32"], "repeats": 2}
    rows = rows_of() if streams else None
    benchmark.benchmark(early_exit_model(), batches_of, rows=rows, on_progress=calls.append, **arguments)
    assert len(calls) == benchmark.passes(**arguments, stream=streams)
    assert calls[0] == ("fp32, stream, stream" if streams else "fp32, batch 4, fastkd")


def test_rows_without_labels_have_no_accuracy() -> None:
    def unlabelled(size: int) -> Iterable[dict[str, Tensor]]:
        return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches_of(size)]

    bare = [{"input_ids": row["input_ids"]} for row in rows_of()]
    for row in benchmark.benchmark(
        early_exit_model(), unlabelled, rows=bare, speeds=[0.5], batch_sizes=[6], dtypes=["fp32"], repeats=1
    ).rows:
        assert (row.accuracy, row.full_accuracy) == (None, None)


def test_a_regression_has_a_correlation_in_place_of_an_accuracy() -> None:
    model, generator = early_exit_model(num_labels=1), torch.Generator().manual_seed(0)

    def scored(size: int) -> list[dict[str, Tensor]]:
        return [{**batch, "labels": scores[batch["input_ids"].shape[0]]} for batch in batches_of(size)]

    scores = {size: torch.rand(size, generator=generator) for size in (12,)}
    rows = [{**row, "labels": score} for row, score in zip(rows_of(), scores[12].tolist(), strict=True)]
    measured = benchmark.benchmark(model, scored, rows=rows, speeds=[0.9], batch_sizes=[12], dtypes=["fp32"], repeats=1)
    trace = model.trace(scored(12))
    assert len(measured.rows) == 2
    for row in measured.rows:
        assert (row.accuracy, row.full_accuracy) == (None, None)
        assert row.pearson == pytest.approx(trace.sweep([0.9])[0].pearson, abs=1e-4)
        assert row.full_pearson == pytest.approx(trace.sweep([0.0])[0].pearson, abs=1e-4)


def test_files_hold_the_table(measured: Benchmark, tmp_path: Path) -> None:
    measured.to_json(tmp_path / "bench.json")
    measured.to_csv(tmp_path / "bench.csv")
    loaded = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert loaded == measured.to_dict()
    assert loaded["machine"]["gpu_columns"] == "not yet measured"
    with (tmp_path / "bench.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["speedup"]) for row in rows] == [row.speedup for row in measured.rows]
    assert {"realised", "rows_per_second", "flops_speedup_macs", "full_engine"} <= set(rows[0])
    assert [row["batch_size"] for row in rows] == ["stream", "stream", "1", "1", "5", "5"] * 2
    assert [row["batch_size"] for row in loaded["rows"]] == [None, None, 1, 1, 5, 5] * 2
    assert Benchmark.from_dict(loaded) == measured


def test_files_of_older_versions_are_read(measured: Benchmark) -> None:
    in_batches = replace(measured, rows=[row for row in measured.rows if row.batch_size is not None])
    older = in_batches.to_dict()
    for row in older["rows"]:
        del row["full_batch_size"]
    assert Benchmark.from_dict(older) == in_batches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speeds": [0.0]}, "speeds: got"),
        ({"speeds": []}, "speeds: got"),
        ({"speeds": [float("nan")]}, "speeds: got"),
        ({"batch_sizes": [0]}, "batch_sizes: got"),
        ({"dtypes": ["int4"]}, "dtypes: got"),
        ({"repeats": 0}, "repeats: got 0"),
    ],
)
def test_bad_arguments_are_refused_before_work(arguments: dict, message: str) -> None:
    def never(size: int) -> list[dict[str, Tensor]]:
        raise AssertionError("data was read")

    with pytest.raises(ValueError, match=message):
        benchmark.benchmark(early_exit_model(), never, **arguments)


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="gave no batches"):
        benchmark.benchmark(early_exit_model(), lambda size: [], repeats=1)
    with pytest.raises(ValueError, match="rows: got none"):
        benchmark.benchmark(early_exit_model(), batches_of, rows=[], repeats=1)
