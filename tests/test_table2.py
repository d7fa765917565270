"""FastBERT's table 2 with seconds: where students start, numbers that are those of the sweep, work that is kept."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import torch
from every_encoder import random_inputs, tiny_config
from tiny_models import early_exit_model, one_thread, random_batch, save_plain_checkpoint  # noqa: F401  # a fixture
from typer.testing import CliRunner

from fastkd.commands import app
from fastkd.commands.screen import Screen
from fastkd.data import corpus
from fastkd.data.rows import load_rows
from fastkd.data.work_folders import claim_folder
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.encoders.layout import TokenLayout
from fastkd.exits.flops import flops
from fastkd.exits.trace import ExitTrace
from fastkd.inference import benchmark
from fastkd.inference.trace_rows import trace_rows
from fastkd.kd.probe import LayerProbe, encoder_layers
from fastkd.model.loading import load_model
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.tables import table2
from fastkd.tables.table2 import Cell, Table2, Table2Options, run_table2, student_of
from fastkd.training.early_exit import TrainingPlan

MODELS = ["full model (4 layers)", "DistilBERT-style (2 layers)", "DistilBERT-style (1 layer)"]
MODELS += ["FastBERT (speed=0.5)", "FastBERT (speed=0.8)"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "topics"
    corpus.write_corpus(folder, rows={"train": 96, "dev": 24, "test": 40})
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Table2Options:
    checkpoint = save_plain_checkpoint(tmp_path_factory.mktemp("plain"), "bert")
    plan = TrainingPlan(checkpoint=str(checkpoint), train_rows=64, max_length=24, epochs=1, distill_epochs=1)
    return Table2Options(
        early_exit=plan, student_layers=(2, 1), student_rows=48, student_epochs=1, speeds=(0.5, 0.8),
        bench_rows=8, bench_repeats=2, batch_size=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(data: Path, options: Table2Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("table")
    run_table2(Screen(as_json=True), {"topics": data}, output, options)
    return output


# Students


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
@pytest.mark.parametrize(("layers", "taken"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 2])])
def test_student_starts_with_evenly_spaced_layers(family: str, layers: int, taken: list[int]) -> None:
    teacher = early_exit_model(family)
    student = student_of(teacher, layers)
    assert (student.num_layers, student.exit_layers) == (layers, [layers])
    for own, number in zip(encoder_layers(student), taken, strict=True):
        expected = encoder_layers(teacher)[number].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in own.state_dict().items())
    for module in ("embeddings", "embeddings_project"):
        if hasattr(teacher.backbone, module):
            expected = getattr(teacher.backbone, module).state_dict()
            given = getattr(student.backbone, module).state_dict()
            assert all(torch.equal(value, expected[name]) for name, value in given.items())
    expected = teacher.last_head.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in student.last_head.state_dict().items())
    # as by hand: these layers of the teacher, then its head
    batch = random_batch(family)
    with torch.no_grad():
        keep = torch.nn.ModuleList([encoder_layers(teacher)[number] for number in taken])
        by_hand = early_exit_model(family)
        list_of = encoder_layers(by_hand)
        for index, layer in enumerate(keep):
            list_of[index].load_state_dict(layer.state_dict())
        hidden = by_hand.backbone(**batch, output_hidden_states=True).hidden_states[layers]
        logits = by_hand.last_head(hidden, TokenLayout(batch["attention_mask"].bool()))
        torch.testing.assert_close(student(**batch, speed=0.0).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "layers", "pool"),
    [("albert", "encoder.albert_layer_groups", "mean"), ("modernbert", None, "cls"), ("deberta-v2", None, "cls")],
)
def test_student_of_any_encoder_is_its_first_layer(family: str, layers: str | None, pool: str) -> None:
    config = EarlyExitConfig(tiny_config(family), layers=layers, pool=pool, num_labels=3)
    teacher = EarlyExitForSequenceClassification(config).eval()
    student = student_of(teacher, 1)
    assert (student.num_layers, student.config.layers, student.config.pool) == (1, layers, pool)
    assert LayerProbe(student)(**random_inputs(99)).hidden_states.requires_grad
    teacher.heads.after(1).load_state_dict(teacher.last_head.state_dict())
    batch = random_inputs(99)
    with torch.no_grad():
        expected = teacher.all_exit_logits(**batch)[:, 0]
        torch.testing.assert_close(student(**batch, engine="batch").logits, expected, rtol=0, atol=0)


def test_student_shares_nothing_with_its_teacher() -> None:
    teacher = early_exit_model()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = student_of(teacher, 2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.config.backbone.num_hidden_layers == 4


@pytest.mark.parametrize("layers", [0, 4, 7])
def test_student_must_be_shallower(layers: int) -> None:
    with pytest.raises(ValueError, match=f"layers: got {layers}, expected 1 to 3"):
        student_of(early_exit_model(), layers)


# The table


@pytest.mark.slow
def test_numbers_are_those_of_the_sweep(finished: Path, data: Path, options: Table2Options) -> None:
    rows = {row["model"]: row for row in csv.DictReader((finished / "table2.csv").open(encoding="utf-8"))}
    assert list(rows) == MODELS
    test = load_rows(data / "test.tsv")

    def trace_of(folder: str) -> ExitTrace:
        model, tokenizer = load_model(str(finished / "topics" / folder), "cpu")
        return trace_rows(model, tokenizer, test, max_length=24)

    full = trace_of("model")
    expected = dict(zip([MODELS[0], *MODELS[3:]], full.sweep([0.0, *options.speeds]), strict=True))
    for name, folder in zip(MODELS[1:3], ("student-2", "student-1"), strict=True):
        expected[name] = trace_of(folder).sweep([0.0], seq_len=full.max_length)[0]
    for name, row in expected.items():
        assert float(rows[name]["accuracy"]) == row.accuracy
        assert float(rows[name]["flops"]) == row.flops["fastbert"]
        ratio = expected[MODELS[0]].flops["fastbert"] / row.flops["fastbert"]
        assert float(rows[name]["flops_speedup"]) == pytest.approx(ratio)
        assert float(rows[name]["seconds"]) > 0
    assert float(rows[MODELS[0]]["speedup"]) == 1
    for name, layers in zip(MODELS[1:3], (2, 1), strict=True):
        assert float(rows[name]["flops"]) == flops(full.shape, full.max_length, layers=layers, heads=1)


def test_students_learned_from_the_teacher(finished: Path, options: Table2Options) -> None:
    for layers in (2, 1):
        log = json.loads((finished / "topics" / f"student-{layers}" / "trainer_log.json").read_text())
        assert log["options"]["method"] == "distilbert"
        assert log["train"]["rows"] == 48
    assert not list((finished / "topics").glob("*.checkpoints"))


def test_finished_work_is_kept(
    finished: Path, data: Path, options: Table2Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("this was finished")

    monkeypatch.setattr(table2, "KDTrainer", forbidden)
    before = (finished / "table2.csv").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(table2, "_measure", forbidden)
        run_table2(Screen(as_json=True), {"topics": data}, finished, options)
        assert (finished / "table2.csv").read_text() == before
    # another measurement needs no other students
    again = run_table2(Screen(as_json=True), {"topics": data}, finished, replace(options, bench_rows=4))
    assert {cell.timed_rows for cell in again.cells} == {4}
    other = replace(options, student_rows=32, student_epochs=2)
    with pytest.raises(ValueError, match="trained with other epochs, rows; choose another --output"):
        run_table2(Screen(as_json=True), {"topics": data}, finished, other)


def test_bad_input_raises_before_any_work(data: Path, options: Table2Options, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data: got no data sets"):
        run_table2(Screen(as_json=True), {}, tmp_path, options)
    with pytest.raises(ValueError, match=r"speeds: got \(0\.0,\)"):
        replace(options, speeds=(0.0,))
    with pytest.raises(ValueError, match="student_layers: got"):
        replace(options, student_layers=())
    with pytest.raises(ValueError, match="dtype: got 'fp8'"):
        replace(options, dtype="fp8")
    assert not list(tmp_path.iterdir())


def test_markdown_has_models_down_and_data_sets_across() -> None:
    def cell(dataset: str, model: str, accuracy: float, speedup: float) -> Cell:
        return Cell(dataset, model, accuracy, 2.0, 1e9 / speedup, speedup, 0.5 / speedup, speedup, 100, "fastkd")

    facts = {
        "test_rows": 200, "train_rows": 1000, "student_rows": 500, "student_epochs": 3.0, "batch_size": 32,
        "dtype": "fp32", "bench_repeats": 3, "seq_len": 64,
    }  # fmt: skip
    cells = [cell("A", "full", 0.9, 1), cell("A", "fast", 0.89, 4), cell("B", "full", 0.8, 1)]
    machine = benchmark.machine_facts(torch.device("cpu"))
    lines = Table2(cells, {"A": facts, "B": facts}, machine).to_markdown().splitlines()
    assert lines[0] == (
        "| Model | A acc | FLOPs (speed-up) | ms a row (speed-up) | B acc | FLOPs (speed-up) | ms a row (speed-up) |"
    )
    assert lines[2] == "| full | 90.00 | 1000M (1.00x) | 5.00 (1.00x) | 80.00 | 1000M (1.00x) | 5.00 (1.00x) |"
    assert lines[3] == "| fast | 89.00 | 250M (4.00x) | 1.25 (4.00x) |  |  |  |"
    assert "GPU: not yet measured" in lines[5]
    assert "1000 rows the full model and its exits, 500 rows x 3 epochs the students" in lines[6]


def test_command(data: Path, options: Table2Options, finished: Path, tmp_path: Path) -> None:
    claim_folder(tmp_path / "out" / "topics", "demo")
    for name in ("finetuned", "model"):
        # what a demo left is taken as it is
        (tmp_path / "out" / "topics" / name).symlink_to(finished / "topics" / name)
    arguments = [
        "table2", data, "-o", tmp_path / "out", "--students", "1", "--student-rows", 32, "--student-epochs", 1,
        "--max-length", 24, "--speeds", "0.5", "--bench-rows", 4, "--bench-repeats", 1, "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(app.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = json.loads(result.stdout)
    assert [cell["model"] for cell in found["cells"]] == [MODELS[0], MODELS[2], MODELS[3]]
    assert found["datasets"]["topics"]["train_rows"] == 64
    assert (tmp_path / "out" / "table2.md").read_text().startswith("| Model | topics acc |")
