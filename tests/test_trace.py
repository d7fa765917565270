"""Exit traces: one recorded pass gives the answers of every speed and criterion, and what they cost."""

from __future__ import annotations

import csv
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_traces import certain_trace, part_of, population
from safetensors.torch import save_file
from tiny_models import (
    CONFIGS,
    CRITERIA,
    LAYERS,
    clear_speed,
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    random_batch,
)
from torch import Tensor

import fastkd
import fastkd_kernels as fk
from fastkd.exits.flops import CONVENTIONS, FlopsShape
from fastkd.exits.trace import TraceSource
from fastkd.model.tracing import data_name


def batches_with_labels(family: str = "bert", num_labels: int = 3) -> list[dict[str, Tensor]]:
    batches = [random_batch(family, rows=7, seed=1), random_batch(family, rows=5, longest=16, seed=2)]
    return [{**batch, "labels": torch.arange(len(batch["input_ids"])) % num_labels} for batch in batches]


def made_up_trace(
    rows: int = 500, num_labels: int = 4, exit_layers: tuple[int, ...] = (1, 2, 3, 4)
) -> fastkd.ExitTrace:
    torch.manual_seed(3)
    return fastkd.ExitTrace(
        logits=3 * torch.randn(rows, len(exit_layers), num_labels),
        labels=torch.randint(0, num_labels, (rows,)),
        lengths=torch.full((rows,), 9, dtype=torch.int32),
        exit_layers=list(exit_layers),
        max_length=12,
        shape=FlopsShape.of(early_exit_model(num_labels=num_labels).config),
    )


@pytest.mark.parametrize(("criterion", "top_n"), CRITERIA)
@pytest.mark.parametrize("head", ["fastbert", "linear"])
def test_answers_are_those_of_the_model(head: str, criterion: str, top_n: int | None) -> None:
    model = early_exit_model(head=head, exit_layers=[1, 3, 4])
    batches = batches_with_labels()
    trace = model.trace(batches)
    assert trace.logits.shape == (12, 3, 3)
    gates = trace.answers(1e-9, criterion, top_n)
    mixed = 0.6 if criterion == "patience" else clear_speed(gates.uncertainty)
    for speed in (0.0, mixed, 1.0):
        answers = trace.answers(speed, criterion, top_n)
        with torch.no_grad():
            outputs = [model(**batch, speed=speed, criterion=criterion, top_n=top_n) for batch in batches]
        assert torch.equal(answers.exit_layer, torch.cat([output.exit_layer for output in outputs])), speed
        logits = torch.cat([output.logits for output in outputs])
        torch.testing.assert_close(answers.logits, logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(answers.prediction, logits.argmax(-1))
        torch.testing.assert_close(
            answers.uncertainty, torch.cat([output.uncertainty for output in outputs]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("criterion", "top_n"), CRITERIA)
@pytest.mark.parametrize("speed", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_answers_against_a_plain_loop(criterion: str, top_n: int | None, speed: float) -> None:
    trace = made_up_trace(rows=60, exit_layers=(1, 2, 4))
    answers = trace.answers(speed, criterion, top_n)
    for row in range(60):
        label, repeated = None, 0
        for index, layer in enumerate(trace.exit_layers):
            probabilities = trace.logits[row, index].double().softmax(-1).sort(descending=True).values
            current = int(trace.logits[row, index].argmax())
            repeated = repeated + 1 if current == label else 0
            label = current
            uncertainty = {
                "entropy": lambda p: -(p * p.log()).sum() / math.log(4),
                "max_prob": lambda p: (1 - p[0]) / (1 - 1 / 4),
                "margin": lambda p: 1 - (p[0] - p[1]),
                "top_n": lambda p: -((p[:2] / p[:2].sum()) * (p[:2] / p[:2].sum()).log()).sum() / math.log(2),
                "patience": lambda _, s=repeated: torch.tensor(1 / (1 + s)),
            }[criterion](probabilities)
            if layer == 4 or (speed > 0 and uncertainty <= speed):
                break
        assert answers.exit_layer[row] == layer
        assert answers.prediction[row] == label
        if criterion != "patience" or speed > 0:  # at speed 0 only the last head runs, so nothing can repeat
            assert answers.uncertainty[row] == pytest.approx(float(uncertainty), abs=1e-5)


def test_trace_records_the_data() -> None:
    model = early_exit_model()
    batches = batches_with_labels()
    trace = model.train().trace(batches)
    assert model.training, "the mode is restored"
    assert len(trace) == 12
    assert trace.num_layers == LAYERS
    assert trace.max_length == 16
    assert torch.equal(trace.labels, torch.cat([batch["labels"] for batch in batches]))
    assert torch.equal(trace.lengths, torch.cat([batch["attention_mask"].sum(1) for batch in batches]).int())
    model.eval()
    with torch.no_grad():
        expected = torch.cat([model.all_exit_logits(**batch) for batch in batches])
    assert torch.equal(trace.logits, expected)
    unlabelled = model.trace([{"input_ids": batches[0]["input_ids"]}])
    assert unlabelled.labels is None
    assert unlabelled.lengths.tolist() == [11] * 7
    assert unlabelled.sweep([0.5])[0].accuracy is None


def test_sweep_adds_up() -> None:
    trace = made_up_trace(exit_layers=(1, 3, 4))
    speeds = [0.0, 0.2, 0.5, 0.8, 1.0]
    sweep = trace.sweep(speeds, seq_len=30)
    assert [row.speed for row in sweep] == speeds
    assert sweep.seq_len == 30
    for row in sweep:
        answers = trace.answers(row.speed)
        assert row.exits_per_layer == [int((answers.exit_layer == layer).sum()) for layer in range(1, LAYERS + 1)]
        assert row.exits_per_layer[1] == 0, "no head after layer 2"
        assert row.average_layers == pytest.approx(answers.exit_layer.double().mean().item())
        assert row.accuracy == pytest.approx((answers.prediction == trace.labels).double().mean().item())
        for convention in CONVENTIONS:
            cost = {
                layer: fastkd.flops(trace.shape, 30, layers=layer, heads=heads, convention=convention)
                for layer, heads in ((1, 1), (3, 2), (4, 3))
            }
            full = fastkd.flops(trace.shape, 30, convention=convention)
            cost = cost if row.speed else {4: full}
            expected = sum(cost[layer] for layer in answers.exit_layer.tolist()) / 500
            assert row.flops[convention] == pytest.approx(expected)
            assert row.speedup[convention] == pytest.approx(full / expected)
    costs = [row.flops["fastbert"] for row in sweep.rows[1:]]
    assert costs == sorted(costs, reverse=True)
    assert sweep[0].speedup == dict.fromkeys(CONVENTIONS, 1.0)
    assert sweep[0].exits_per_layer == [0, 0, 0, 500]
    assert trace.sweep([0.5])[0].flops["fastbert"] < sweep[2].flops["fastbert"], "the default is max_length=12"


def test_sweep_reaches_fastberts_ceiling() -> None:
    from transformers import BertConfig

    trace = fastkd.ExitTrace(
        logits=torch.tensor([9.0, -9.0]).expand(3, 12, 2),
        labels=None,
        lengths=torch.full((3,), 128, dtype=torch.int32),
        exit_layers=list(range(1, 13)),
        max_length=128,
        shape=FlopsShape.of(BertConfig()),
    )
    (row,) = trace.sweep([0.5])
    assert row.flops["fastbert"] == 1_853_915_648
    assert row.speedup["fastbert"] == pytest.approx(11.75, abs=0.005)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("family", ["bert", "electra"])
def test_saved_trace_is_the_same_trace(tmp_path: Path, family: str, labelled: bool) -> None:
    batches = batches_with_labels(family)
    if not labelled:
        batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    trace = early_exit_model(family, exit_layers=[2], head="linear").trace(batches)
    if labelled:
        trace = replace(trace, rows=torch.arange(12).flip(0))
    path = tmp_path / "deep" / "dev.safetensors"
    trace.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["dev.safetensors"]
    again = fastkd.ExitTrace.load(path)
    assert torch.equal(again.logits, trace.logits)
    assert torch.equal(again.lengths, trace.lengths)
    assert (again.labels is None) == (again.rows is None) == (not labelled)
    if again.rows is not None:
        assert again.rows.tolist() == list(range(11, -1, -1))
    assert (again.exit_layers, again.max_length, again.shape) == ([2, 4], 16, trace.shape)
    assert again.sweep([0.0, 0.7]).to_dicts() == trace.sweep([0.0, 0.7]).to_dicts()


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dev.safetensors"
    made_up_trace(rows=5).save(path)
    before = path.read_bytes()

    def full_disk(tensors: Any, name: Path, metadata: Any) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("fastkd.data.tensors.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        made_up_trace(rows=6).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_csv_and_dicts(tmp_path: Path) -> None:
    sweep = made_up_trace().sweep([0.0, 0.5], "top_n", 3)
    sweep.to_csv(tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["speed"]) for row in rows] == [0.0, 0.5]
    for row, expected in zip(rows, sweep.to_dicts(), strict=True):
        assert row.keys() == expected.keys()
        assert row["criterion"] == "top_n"
        assert int(row["top_n"]) == 3
        for name in ("accuracy", "average_layers", "exits_layer_4", "flops_macs", "speedup_all_matmuls"):
            assert float(row[name]) == pytest.approx(expected[name])


def test_a_sweep_asks_each_gate_once_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = fk.exit_gate

    def counted(logits: Tensor, *args: Any, **kwargs: Any) -> fk.ExitGateOutput:
        calls.append(len(logits))
        return original(logits, *args, **kwargs)

    monkeypatch.setattr(fk, "exit_gate", counted)
    made_up_trace(rows=300).sweep([0.0, 0.5, 0.9])
    # speed 0 asks the last head only; the rows shrink from head to head
    assert len(calls) <= 1 + 4 + 4
    assert calls[:2] == [300, 300]
    assert calls[1:5] == sorted(calls[1:5], reverse=True)


def test_nan_rows_are_never_answered_early() -> None:
    trace = made_up_trace(rows=4)
    trace.logits[1, 0, 2] = torch.nan
    trace.logits[2, 1] = torch.nan
    answers = trace.answers(1.0)
    assert answers.exit_layer.tolist() == [1, 2, 1, 1]


@pytest.mark.parametrize("speed", [-1, 1.01, float("nan")])
def test_bad_speed(speed: float) -> None:
    with pytest.raises(ValueError, match="speed: got"):
        made_up_trace().sweep([0.5, speed])


def test_bad_arguments() -> None:
    trace = made_up_trace()
    with pytest.raises(ValueError, match="speeds: got none"):
        trace.sweep([])
    with pytest.raises(ValueError, match="criterion: got 'vibes'"):
        trace.answers(0.5, "vibes")
    with pytest.raises(ValueError, match="top_n: got None"):
        trace.answers(0.5, "top_n")
    with pytest.raises(ValueError, match=r"logits: got shape \(2, 3, 4\), expected \[n, 2, C\]"):
        fastkd.ExitTrace(torch.zeros(2, 3, 4), None, torch.ones(2), [1, 2], 3, trace.shape)
    with pytest.raises(ValueError, match=r"labels: got shape \(3,\), expected \[2\]"):
        fastkd.ExitTrace(torch.zeros(2, 1, 4), torch.ones(3), torch.ones(2), [4], 3, trace.shape)


def test_bad_batches() -> None:
    model = early_exit_model()
    with pytest.raises(ValueError, match="batches: got none"):
        model.trace([])
    labelled, unlabelled = batches_with_labels()
    del unlabelled["labels"]
    with pytest.raises(ValueError, match="batches: some have labels"):
        model.trace([labelled, unlabelled])


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "dev.safetensors"
    with pytest.raises(FileNotFoundError, match=r"trace: no file .*fastkd trace"):
        fastkd.ExitTrace.load(path)
    made_up_trace(rows=5).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"trace: .* is damaged"):
        fastkd.ExitTrace.load(path)
    save_file({"logits": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"trace: .* has format None"):
        fastkd.ExitTrace.load(path)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_every_backend_gives_the_same_sweep(name: str) -> None:
    expected = made_up_trace().sweep([0.0, 0.4, 0.9]).to_dicts()
    with fk.backend(name):
        try:
            assert made_up_trace().sweep([0.0, 0.4, 0.9]).to_dicts() == expected
        except fk.BackendUnavailableError as error:
            pytest.skip(str(error))


def test_configs_of_all_families_have_a_shape() -> None:
    for config in CONFIGS.values():
        assert FlopsShape.of(config).num_hidden_layers == LAYERS


def test_trace_keeps_its_source(tmp_path: Path) -> None:
    source = TraceSource("weights", "rows", {"finetune dev": "others"})
    trace = replace(certain_trace(5), source=source)
    trace.save(tmp_path / "t.safetensors")
    assert fastkd.ExitTrace.load(tmp_path / "t.safetensors").source == source


@pytest.mark.parametrize("head", ["fastbert", "linear"])
@pytest.mark.parametrize("criterion", ["entropy", "patience"])
def test_a_speed_for_each_head(head: str, criterion: str) -> None:
    model = early_exit_model(head=head)
    batches = [random_batch(rows=30, seed=1), random_batch(rows=9, longest=16, seed=2)]
    trace = model.trace(batches)
    middle = 0.6 if criterion == "patience" else clear_speed(trace.uncertainties()[:, :-1], 0.4)
    for speed in ([middle, 0.0, middle], [0.0, 0.0, middle], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]):
        answers = trace.answers(speed, criterion)
        with torch.no_grad():
            outputs = [model(**batch, speed=speed, criterion=criterion) for batch in batches]
        layers = torch.cat([output.exit_layer for output in outputs])
        assert torch.equal(answers.exit_layer, layers)
        torch.testing.assert_close(
            answers.logits, torch.cat([output.logits for output in outputs]), rtol=1e-4, atol=1e-5
        )
        skipped = {layer for layer, value in zip((1, 2, 3), speed, strict=True) if value == 0}
        assert not skipped & set(layers.tolist())
    same = trace.answers([middle] * 3, criterion)
    assert torch.equal(same.exit_layer, trace.answers(middle, criterion).exit_layer)


def test_a_head_that_is_not_asked_costs_nothing() -> None:
    trace = part_of(population(), range(50))
    row = trace.cost(0.5, [0.0, 1.0, 0.0], trace.answers([0.0, 1.0, 0.0]))
    assert row.exits_per_layer == [0, 50, 0, 0]
    assert row.flops["fastbert"] == fastkd.flops(trace.shape, 20, layers=2, heads=1)
    with pytest.raises(ValueError, match=r"speed: got 2 numbers, expected one, or 3"):
        trace.answers([0.5, 0.5])
    with pytest.raises(ValueError, match=r"speed: got 1\.5"):
        trace.answers([0.5, 0.5, 1.5])
    with pytest.raises(ValueError, match="speed: got 2 numbers"):
        fastkd.EarlyExitConfig(CONFIGS["bert"], speed=[0.1, 0.2])


def test_a_trace_calls_model_and_rows_by_their_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    early_exit_model().save_pretrained(tmp_path / "tuned")
    monkeypatch.chdir(tmp_path / "tuned")
    for place in (".", "../tuned/", tmp_path / "tuned"):
        model = fastkd.EarlyExitForSequenceClassification.from_pretrained(place)
        assert model.trace([random_batch()]).source.model_name == "tuned"
    assert early_exit_model().trace([random_batch()]).source.model_name == ""
    for source in ("../test.tsv", "/test.tsv", "test.tsv"):
        assert data_name(source) == "test.tsv"
    assert data_name("/data/news/test.tsv") == data_name("../../news/test.tsv") == "news/test.tsv"


def test_a_single_row_has_no_correlation_and_no_warning() -> None:
    trace = early_exit_model(num_labels=1).trace([{**random_batch(rows=1), "labels": torch.tensor([2.5])}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [row.pearson for row in trace.sweep([0.0, 1.0])] == [0.0, 0.0]
    assert trace.about == "1 row; model of 4 layers"
