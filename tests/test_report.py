"""The report: its numbers are those of the sweep, whatever is missing, and they reach the page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import torch
from report_sources import LOGS, benchmark, certificate, corpus_rows, made_up_trace, report_folder
from tiny_models import CRITERIA, early_exit_model, random_batch
from typer.testing import CliRunner

from fastkd.commands import app
from fastkd.exits.trace import ExitTrace, TraceSource
from fastkd.inference.measurements import Benchmark
from fastkd.report import Source, read_source, write_page, write_pictures
from fastkd.report.content import EXAMPLES, SPEEDS, page_content
from fastkd.report.results import file_suffixes, write_sweeps
from fastkd.report.sources import Extras
from fastkd.training.log import read_log, training_curve


@pytest.fixture(scope="module")
def rows() -> Any:
    return corpus_rows()


@pytest.fixture(scope="module")
def source(rows: Any) -> Source:
    return Source("corpus", made_up_trace(rows), benchmark().to_dict(), LOGS, certificate(), rows, rows.label_names)


def succeeded(*arguments: object) -> Any:
    result = CliRunner().invoke(app.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app.app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output + repr(result.exception)
    return " ".join(result.output.split())


def embedded(page: Path) -> dict[str, Any]:
    """The numbers in a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_counts_rows_whose_uncertainty_is_nan(rows: Any) -> None:
    trace = made_up_trace(rows)
    trace.logits[0, 0] = torch.nan
    content = page_content({"broken": (Source("broken", trace, examples=rows), "entropy")}, "t", 0.5)
    assert content["curves"][0]["arrivals"][100][0][0] == len(trace)


# The training log


def test_training_curve_counts_epochs_through() -> None:
    points = training_curve(list(reversed(LOGS)))
    assert [(point.stage, point.epoch) for point in points] == [
        ("finetune", 1), ("finetune", 2), ("distill", 3), ("distill", 4),
    ]  # fmt: skip
    assert [point.flops_share for point in points] == [1, 1, 0.6, 0.2]
    assert [point.accuracy for point in points] == [0.8, 0.9, 0.9, 0.9]
    assert [point.accuracy_at_speed for point in points] == [None, None, 0.85, 0.89]
    assert points[-1].accuracy_by_layer == {1: 0.8, 6: 0.9}


def test_log_without_what_newer_versions_record() -> None:
    old = json.loads(json.dumps(LOGS[1]))
    for entry in old["log_history"]:
        for name in [name for name in entry if "speed" in name]:
            del entry[name]
    assert [point.flops_share for point in training_curve([old])] == [None, None]


def test_wrong_logs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most one of each stage"):
        training_curve([LOGS[0], LOGS[0]])
    with pytest.raises(FileNotFoundError, match=r"no file .*trainer_log\.json"):
        read_log(tmp_path)
    (tmp_path / "trainer_log.json").write_text("{}")
    with pytest.raises(ValueError, match="not a log of finetune or distill"):
        read_log(tmp_path)
    (tmp_path / "trainer_log.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_log(tmp_path)


# The numbers of the page


@pytest.mark.parametrize(("criterion", "top_n"), CRITERIA)
def test_numbers_are_those_of_the_sweep(source: Source, criterion: str, top_n: int | None) -> None:
    (curve,) = page_content({"one": (source, criterion)}, "t", 0.5, top_n)["curves"]
    sweep = source.trace.sweep(SPEEDS, criterion, top_n)
    assert curve["accuracy"] == [row.accuracy for row in sweep]
    assert curve["averageLayers"] == [row.average_layers for row in sweep]
    assert curve["speedup"] == [row.speedup["fastbert"] for row in sweep]
    assert curve["exits"] == [row.exits_per_layer for row in sweep]
    assert curve["fullFlops"] == sweep[0].flops["fastbert"]
    # seconds were measured with entropy: they say nothing about another criterion
    assert (curve["benchmark"] is not None) == (criterion == "entropy")


def test_examples_are_the_first_and_the_last_to_leave(source: Source) -> None:
    (curve,) = page_content({"one": (source, "entropy")}, "t", 0.5)["curves"]
    examples = curve["examples"]
    assert source.examples is not None
    assert source.trace.rows is not None
    for step in (0, 60, 200):
        answers = source.trace.answers(SPEEDS[step])
        keys = sorted(zip(answers.exit_layer.tolist(), answers.uncertainty.tolist(), strict=True))
        assert [tuple(entry[1:3]) for entry in examples["first"][step]] == [
            (layer, pytest.approx(value, abs=1e-4)) for layer, value in keys[:EXAMPLES]
        ]
        assert [entry[1] for entry in examples["last"][step]] == [layer for layer, _ in keys[: -EXAMPLES - 1 : -1]]
        for row, *_, predicted in examples["first"][step] + examples["last"][step]:
            original = source.examples.dataset[int(source.trace.rows[row])]
            assert examples["texts"][row] == original["text_a"]
            assert examples["labels"][row] == original["label"]
            assert predicted == answers.prediction[row]


def test_page_is_one_file_that_asks_for_no_other(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "made" / "report.html"
    write_page({"one": (source, "entropy")}, path, title="A <title> & more", speed=0.333)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    page = path.read_text("utf-8")
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    assert not re.search(r"@import|url\(", page)
    assert "<title>A &lt;title&gt; &amp; more</title>" in page
    assert not re.search(r"<!--[A-Z]+-->", page)
    assert embedded(path)["speed"] == 0.335
    assert path.stat().st_size < 3e6


def test_texts_cannot_break_out_of_the_page(rows: Any, tmp_path: Path) -> None:
    trace = made_up_trace(rows)
    hostile = "</script><script>document.title='broken'</script> <!--PROGRAM--> <img src=x onerror=alert(1)>"
    write_page({hostile: (Source(hostile, trace), "entropy")}, tmp_path / "report.html")
    assert embedded(tmp_path / "report.html")["curves"][0]["name"] == hostile
    assert hostile not in (tmp_path / "report.html").read_text("utf-8")


def test_bare_trace_is_enough(rows: Any, tmp_path: Path) -> None:
    trace = made_up_trace(rows, labelled=False)
    write_page({"bare": (Source("bare", trace), "entropy")}, tmp_path / "report.html")
    (curve,) = embedded(tmp_path / "report.html")["curves"]
    assert [curve[name] for name in ("accuracy", "benchmark", "certificate", "examples")] == [None] * 4
    assert curve["training"] == []


def test_regression_has_a_page_and_figures(tmp_path: Path) -> None:
    labelled = {**random_batch(rows=20), "labels": torch.linspace(0, 5, 20)}
    trace = early_exit_model(num_labels=1).trace([labelled])
    replace(trace, rows=torch.arange(20)).save(tmp_path / "trace.safetensors")
    lines = [f"{label}\ttext {row}" for row, label in enumerate(labelled["labels"].tolist())]
    (tmp_path / "rows.tsv").write_text("\n".join(["label\ttext_a", *lines]) + "\n", encoding="utf-8")
    succeeded(
        "report", tmp_path / "trace.safetensors", "-o", tmp_path / "page.html", "--examples", tmp_path / "rows.tsv",
        "--figures", tmp_path / "figures",
    )  # fmt: skip
    (curve,) = embedded(tmp_path / "page.html")["curves"]
    assert (curve["criterion"], curve["accuracy"]) == ("agreement", None)
    assert curve["correlation"] == [row.pearson for row in trace.sweep(SPEEDS)]
    row, layer, _, answer = curve["examples"]["first"][0][0]
    assert layer == 4, "at speed 0"
    assert answer == pytest.approx(trace.logits[row, -1, 0].item(), abs=1e-3)
    assert curve["examples"]["labels"][str(row)] == pytest.approx(trace.labels[row].item(), abs=1e-3)  # type: ignore[index]
    assert curve["bounds"] == [row.interval and list(row.interval) for row in trace.sweep(SPEEDS)]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {f"figure{number}.png" for number in (3, 4, 6)}


def test_a_regression_has_all_four_figures(tmp_path: Path) -> None:
    labels = torch.rand(200)
    trace = early_exit_model(num_labels=1).trace([{**random_batch(rows=200), "labels": labels}])
    log = {"stage": "distill", "log_history": [{"eval_loss": 1.0, "epoch": 1.0, "eval_pearson_layer_4": 0.8}]}
    source = Source("scores", trace, logs=[log])
    files = write_pictures({"scores": (source, "agreement")}, tmp_path)
    assert [file.stem for file in files] == ["figure3", "figure4", "figure6", "figure7"]
    (curve,) = page_content({"scores": (source, "agreement")}, "t", 0.5)["curves"]
    assert any(error is not None for head in curve["reliability"] for error in head["errors"])
    assert curve["training"][0]["accuracy"] == 0.8


def test_a_regression_and_classes_share_no_chart(rows: Any, tmp_path: Path) -> None:
    scores = early_exit_model(num_labels=1).trace([{**random_batch(rows=30), "labels": torch.rand(30)}])
    scores.save(tmp_path / "scores.safetensors")
    made_up_trace(rows).save(tmp_path / "topics.safetensors")
    for command in (["report", "--figures", tmp_path / "out"], ["sweep"]):
        told = refused(
            *command, "-o", tmp_path / "out", tmp_path / "scores.safetensors", tmp_path / "topics.safetensors"
        )
        assert "got a regression, scores, beside classes, topics; correlations and accuracies share no axis" in told
        assert not (tmp_path / "out").exists()


def test_nothing_to_show_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="curves: got none"):
        write_page({}, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_names_go_from_the_trace_to_the_page(rows: Any, tmp_path: Path) -> None:
    trace = made_up_trace(rows)
    names = list(rows.label_names)
    named = TraceSource(model_name="tuned", data_name="news/test.tsv", label_names=names)
    replace(trace, source=named).save(tmp_path / "trace.safetensors")
    source = read_source(tmp_path / "trace.safetensors", "a")
    (curve,) = page_content({"a": (replace(source, examples=rows), "entropy")}, "t", 0.5)["curves"]
    assert curve["examples"]["labelNames"] == names
    assert curve["about"] == "news/test.tsv, 240 rows; model tuned, 6 layers"
    (curve,) = page_content({"a": (Source("a", trace, examples=rows), "entropy")}, "t", 0.5)["curves"]
    assert curve["examples"]["labelNames"] == [f"class {index}" for index in range(len(names))]
    assert curve["about"] == "240 rows; model of 6 layers"
    replace(trace, source=TraceSource(label_names=["one"])).save(tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="names for 1"):
        ExitTrace.load(tmp_path / "wrong.safetensors")


# Where the parts come from


def test_folder_gives_all_that_lies_beside_its_trace(rows: Any, tmp_path: Path) -> None:
    folder = report_folder(tmp_path / "run", rows)
    found = read_source(folder, "run")
    assert found.benchmark == json.loads((folder / "bench.json").read_text())
    assert [log["stage"] for log in found.logs] == ["finetune", "distill"]
    assert found.certificate == certificate()
    assert found.label_names == list(rows.label_names)
    assert found.examples is not None, "the corpus that a demo generated"
    alone = read_source(folder / "trace.safetensors", "alone")
    assert (alone.benchmark, list(alone.logs), alone.certificate, alone.examples) == (None, [], None, None)


def test_named_files_go_with_a_lone_trace(rows: Any, tmp_path: Path) -> None:
    folder = report_folder(tmp_path / "run", rows)
    extras = Extras(folder / "bench.json", [folder / "model"], folder / "corpus" / "test.tsv", folder / "model")
    found = read_source(folder / "trace.safetensors", "alone", extras)
    assert found.benchmark is not None
    assert [log["stage"] for log in found.logs] == ["distill"]
    assert found.certificate == certificate()
    assert found.examples is not None


def test_examples_must_be_what_was_traced(rows: Any) -> None:
    trace = made_up_trace(rows)
    with pytest.raises(ValueError, match="does not say which rows"):
        Source("a", made_up_trace(rows, numbered=False), examples=rows)
    with pytest.raises(ValueError, match="has 10 rows, but row"):
        Source("a", trace, examples=rows.sample(10))
    with pytest.raises(ValueError, match=r"labels in .* are not those of the trace"):
        Source("a", trace, examples=corpus_rows(seed=99))


def test_certificate_files(tmp_path: Path) -> None:
    from fastkd.report.sources import read_certificate

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="was not calibrated"):
        read_certificate(tmp_path)
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        read_certificate(tmp_path / "other.json")
    (tmp_path / "mine.json").write_text(json.dumps(certificate()))
    assert read_certificate(tmp_path / "mine.json") == certificate()


def test_benchmark_comes_back_from_its_file() -> None:
    measured = benchmark()
    again = Benchmark.from_dict(json.loads(json.dumps(measured.to_dict())))
    assert again == measured
    older = measured.to_dict()
    del older["criterion"]
    assert Benchmark.from_dict(older).criterion == "entropy"


# The command and the pictures


def test_command_writes_page_and_figures(rows: Any, tmp_path: Path) -> None:
    folder = report_folder(tmp_path / "run", rows)
    done = succeeded(
        "report", folder, "-o", tmp_path / "page.html", "--criterion", "entropy", "--criterion", "margin",
        "--figures", tmp_path / "figures", "--format", "svg", "--json",
    )  # fmt: skip
    files = json.loads(done.stdout)["files"]
    assert {Path(file).name for file in files[1:]} == {
        "figure3.svg", "figure4-entropy.svg", "figure6-entropy.svg", "figure7-entropy.svg", "wall_clock-entropy.svg",
        "figure4-margin.svg", "figure6-margin.svg", "figure7-margin.svg",
    }  # fmt: skip
    for file in files[1:]:
        text = Path(file).read_text("utf-8")
        assert text.startswith("<?xml")
        assert text.rstrip().endswith("</svg>")
    assert [curve["name"] for curve in embedded(tmp_path / "page.html")["curves"]] == ["entropy", "margin"]


def test_files_of_every_curve_lie_in_one_folder(rows: Any, tmp_path: Path) -> None:
    names = ["a, entropy", "a/b", "/a/b", "../a.b", "sweep", "..", "b c"]
    assert list(file_suffixes(names).values()) == ["-a-entropy", "-a-b", "-a-b-2", "-a.b", "-sweep", "-", "-b-c"]
    assert file_suffixes(["only/one"]) == {"only/one": ""}
    trace = made_up_trace(rows)
    sweeps = {name: trace.sweep([0.0, 0.5]) for name in ("/a/b", "../sweep")}
    files = write_sweeps(sweeps, tmp_path / "out")
    assert {file.name for file in files} >= {
        "sweep-a-b.csv", "exits_per_layer-a-b.png", "sweep-sweep.csv", "exits_per_layer-sweep.png",
    }  # fmt: skip
    curves = {name: (Source(name, trace), "entropy") for name in sweeps}
    files += write_pictures(curves, tmp_path / "out", "svg")
    assert sorted(files) == sorted((tmp_path / "out").iterdir())


def test_figures_of_an_unlabelled_trace(rows: Any, tmp_path: Path) -> None:
    files = write_pictures({"a": (Source("a", made_up_trace(rows, labelled=False)), "entropy")}, tmp_path, "png")
    assert [file.name for file in files] == ["speed_speedup.png", "figure6.png"]
    with pytest.raises(ValueError, match="format: got 'gif'"):
        write_pictures({}, tmp_path, "gif")


def test_command_refuses_what_it_cannot_use(rows: Any, tmp_path: Path) -> None:
    folder = report_folder(tmp_path / "run", rows)
    assert "no file" in refused("report", tmp_path / "missing.safetensors")
    assert "are for one" in refused("report", folder, folder, "--bench", folder / "bench.json")
    assert "speed: got 7" in refused("report", folder, "--speed", "7", "-o", tmp_path / "a.html")
    (tmp_path / "bench.json").write_text('{"rows": [{"speed": 0.5}]}')
    assert "bench.json has no dtype" in refused("report", folder, "--bench", tmp_path / "bench.json")
    assert not (tmp_path / "a.html").exists()
