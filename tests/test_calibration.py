"""Calibration: it chooses the speed that was simulated, and refuses where these rows cannot vouch for one."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import numpy as np
import torch
from made_up_traces import certain_trace, part_of, population
from tiny_models import (
    WORDS,
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    tokenizer_of,
)
from typer.testing import CliRunner

import fastkd
from fastkd.commands import app
from fastkd.data.rows import load_rows
from fastkd.exits.calibration import SPEEDS, CalibrationError
from fastkd.exits.certificate import CalibrationWarning, Certificate
from fastkd.exits.fingerprints import model_fingerprint
from fastkd.exits.guarantees import binomial_upper_bound, failure_bounds, holding
from fastkd.model import loading


@pytest.mark.parametrize("method", ["fixed-sequence", "conformal"])
@pytest.mark.parametrize("guarantee", ["consistency", "accuracy"])
def test_calibrate_is_what_was_simulated(guarantee: str, method: str) -> None:
    everyone = population(rows=4000)
    generator = np.random.default_rng(2)
    for _ in range(5):
        trace = part_of(everyone, generator.integers(len(everyone), size=500))
        certificate = fastkd.calibrate(trace, 0.04, 0.9, guarantee=guarantee, method=method)
        full = trace.answers(0.0).prediction.tolist()
        assert trace.labels is not None
        labels, counts, ever = trace.labels.tolist(), [], set()
        for speed in SPEEDS:
            early = trace.answers(speed).prediction.tolist()
            lost = {
                row
                for row in range(500)
                if (early[row] != full[row] if guarantee == "consistency" else full[row] == labels[row] != early[row])
            }
            ever |= lost
            counts.append(len(ever if method == "conformal" else lost))
        allowed = holding(np.array(counts), 500, 0.04, 0.9, method)
        last = int(allowed.nonzero()[0][-1])
        assert certificate.position <= SPEEDS[last], "the slowest of those that save as much"
        exits = trace.answers(certificate.speed).exit_layer
        assert torch.equal(exits, trace.answers(SPEEDS[last]).exit_layer)
        assert (certificate.failures, certificate.n) == (counts[last], 500)
        assert certificate.bound == failure_bounds(np.array(counts[last]), 500, 0.9, method) <= 0.04


def test_certificate_says_what_the_sweep_measures() -> None:
    trace = part_of(population(), range(3000))
    certificate = fastkd.calibrate(trace, 0.02, criterion="margin", seq_len=33)
    assert isinstance(certificate.speed, float)
    row = trace.sweep([certificate.speed], "margin", seq_len=33)[0]
    full = trace.sweep([0.0])[0]
    assert certificate.speedup == row.speedup["fastbert"] > 1
    assert (certificate.average_layers, certificate.accuracy) == (row.average_layers, row.accuracy)
    assert certificate.full_accuracy == full.accuracy
    early, whole = trace.answers(certificate.speed, "margin").prediction, trace.answers(0.0, "margin").prediction
    assert certificate.disagreements == certificate.failures == int((early != whole).sum())
    assert certificate.agreement == 0.98
    assert (certificate.data, certificate.model, certificate.seq_len) == ("part", "m" * 64, 33)
    assert f"{certificate.failures} of 3,000 did" in str(certificate)
    accuracy = fastkd.calibrate(trace, 0.02, guarantee="accuracy")
    assert accuracy.disagreements > accuracy.failures
    expected = 1 - binomial_upper_bound(accuracy.disagreements, 3000, 0.95)
    assert accuracy.agreement == pytest.approx(float(expected))


def test_labels_are_needed_for_accuracy_only() -> None:
    trace = replace(part_of(population(), range(500)), labels=None)
    certificate = fastkd.calibrate(trace, 0.05)
    assert certificate.accuracy is certificate.full_accuracy is None
    with pytest.raises(ValueError, match="no labels"):
        fastkd.calibrate(trace, 0.05, guarantee="accuracy")


def test_too_few_rows_are_refused_with_the_number_needed() -> None:
    assert fastkd.calibrate(certain_trace(299)).failures == 0
    with pytest.raises(CalibrationError, match=r"got 298 rows, but at most 1% .* 95% confidence takes at least 299"):
        fastkd.calibrate(certain_trace(298))
    with pytest.raises(CalibrationError, match="takes at least 99"):
        fastkd.calibrate(certain_trace(98), method="conformal")


def test_too_many_failures_say_what_would_help() -> None:
    with pytest.raises(CalibrationError, match="at that rate about") as error:
        fastkd.calibrate(certain_trace(500, failing=2))
    needed = int(str(error.value).split("about ")[1].split(" rows")[0].replace(",", ""))
    assert fastkd.calibrate(certain_trace(needed, failing=math.ceil(needed * 2 / 500))).bound <= 0.01
    with pytest.raises(CalibrationError, match="20 of 500 rows fail, more than 1%"):
        fastkd.calibrate(certain_trace(500, failing=20))


def test_a_speed_that_saves_nothing_is_no_answer() -> None:
    trace = part_of(population(), range(1000))
    uncertain = replace(trace, logits=0.01 * trace.logits)
    with pytest.raises(CalibrationError, match="the full model is the faster one"):
        fastkd.calibrate(uncertain, speeds=[0.1, 0.2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": 0.0}, "max_drop: got 0.0"),
        ({"max_drop": 1}, "max_drop: got 1"),
        ({"confidence": 95}, "confidence: got 95"),
        ({"method": "hope"}, "method: got 'hope'"),
        ({"guarantee": "f1"}, "guarantee: got 'f1'"),
        ({"criterion": "vibes"}, "criterion: got 'vibes'"),
        ({"criterion": "top_n"}, "top_n: got None"),
        ({"speeds": []}, "speeds: got"),
        ({"speeds": [0.0, 0.5]}, "speeds: got"),
        ({"tolerance": 0.1}, "tolerance: got 0.1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastkd.calibrate(certain_trace(400), **options)


def test_rows_that_training_has_seen_are_named() -> None:
    trace = certain_trace(400)
    seen = replace(trace, source=replace(trace.source, training_data={"finetune dev": trace.source.data}))
    with pytest.raises(CalibrationError, match=r"400 of these 400 rows .*finetune dev rows.*allow_seen=True"):
        fastkd.calibrate(seen)
    with pytest.warns(CalibrationWarning, match="400 were finetune dev rows"):
        assert fastkd.calibrate(seen, allow_seen=True).seen_as == "finetune dev"
    with pytest.warns(CalibrationWarning, match="guarantees nothing"):
        fastkd.calibrate(trace, method="empirical")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastkd.calibrate(trace).seen_as is None


# The command line


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app.app, [str(argument) for argument in arguments])


def succeeded(*arguments: object) -> Any:
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 sentences with labels."""
    generator = torch.Generator().manual_seed(8)
    words = torch.randint(len(WORDS), (500, 6), generator=generator).tolist()
    lines = [f"{number % 3}\t{' '.join(WORDS[word] for word in row)}" for number, row in enumerate(words)]
    path = tmp_path_factory.mktemp("rows") / "rows.tsv"
    path.write_text("\n".join(["label\ttext_a", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model folder whose early heads agree with the last one rather often."""
    early_exit_model().save_pretrained(tmp_path / "model")
    tokenizer_of("bert").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_calibrate_writes_what_info_prints(saved: Path, rows: Path) -> None:
    assert "certificate     none" in succeeded("info", saved).stdout
    result = succeeded("calibrate", saved, "--data", rows, "--max-drop", "60%", "--confidence", 0.9)
    assert "with 90% confidence at most 60% of rows get a different answer" in result.stdout
    info = succeeded("info", saved).stdout
    for line in result.stdout.splitlines()[:4]:
        assert line in info
    assert "default speed   0.0" in info
    found = json.loads(succeeded("info", saved, "--json").stdout)
    assert found["certificate"]["n"] == 500
    assert found["default_speed"] == 0.0
    assert found["certificate"] == Certificate.of(loading.load_config(str(saved))).to_dict()  # type: ignore[union-attr]
    assert (found["dtype"], found["mismatches"]) == ("float32", [])


def test_info_tells_where_the_default_is_not_what_was_certified(saved: Path, rows: Path) -> None:
    options = ("--max-drop", "60%", "--set-default", "--dtype", "bf16")
    found = json.loads(succeeded("calibrate", saved, "--data", rows, *options, "--json").stdout)
    assert found["dtype"] == "bfloat16"
    assert "not the default: it is for dtype bfloat16, but float32 is in use" in succeeded("info", saved).stdout
    sentences = json.loads(succeeded("info", saved, "--json").stdout)["mismatches"]
    assert sentences == ["it is for dtype bfloat16, but float32 is in use"]


def test_a_trace_in_another_dtype_certifies_its_folder(saved: Path, rows: Path, tmp_path: Path) -> None:
    trace = tmp_path / "bf16.safetensors"
    succeeded("trace", saved, rows, "-o", trace, "--dtype", "bf16")
    assert fastkd.ExitTrace.load(trace).source.dtype == "bfloat16"
    succeeded("calibrate", trace, "--max-drop", 0.6, "--model", saved)
    model, _ = loading.load_model(str(saved), "cpu", "bf16")
    certificate = Certificate.of(model.config)
    assert certificate is not None
    assert certificate.model == model_fingerprint(model)
    assert certificate.mismatches(model.config, model.dtype, certificate.speed) == []


def test_calibrate_a_trace_and_save_into_its_model(saved: Path, rows: Path, tmp_path: Path) -> None:
    trace, other = tmp_path / "trace.safetensors", tmp_path / "other.safetensors"
    succeeded("trace", saved, rows, "-o", trace)
    succeeded("trace", saved, rows, "-o", other, "--limit", 400)
    unsaved = run("calibrate", trace, "--max-drop", 0.6, "--json")
    assert json.loads(unsaved.stdout)["saved"] is None
    assert json.loads((saved / "config.json").read_text(encoding="utf-8"))["certificate"] is None
    options = ("--max-drop", 0.6, "--guarantee", "accuracy", "--criterion", "margin", "--set-default")
    found = json.loads(succeeded("calibrate", trace, *options, "--model", saved, "--json").stdout)
    config = loading.load_config(str(saved))
    assert (config.speed, config.criterion) == (found["speed"], "margin")
    shared = run("calibrate", trace, "--max-drop", 0.6, "--path-trace", other)
    assert shared.exit_code == 2, "a sample of these rows is still these rows"
    assert "learned from the rows of this trace" in " ".join(shared.output.split())


def test_calibrate_refuses_and_warns(saved: Path, rows: Path) -> None:
    few = run("calibrate", saved, "--data", rows, "--limit", 100)
    assert few.exit_code == 2
    assert "at least 299" in " ".join(few.output.split())
    bad = run("calibrate", saved, "--data", rows, "--max-drop", "much")
    assert bad.exit_code == 2
    assert "--max-drop: got 'much', expected a share" in " ".join(bad.output.split())
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    config["training_data"] = {"finetune dev": load_rows(rows, num_labels=3).digest()}
    (saved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused = run("calibrate", saved, "--data", rows, "--max-drop", 0.6, "--limit", 450)
    assert refused.exit_code == 2
    assert "(450 were finetune dev rows)" in " ".join(refused.output.split())
    warned = succeeded("calibrate", saved, "--data", rows, "--max-drop", 0.6, "--limit", 450, "--allow-seen")
    assert "(450 were finetune dev rows)" in " ".join(warned.stderr.split())
    assert "void: these were the finetune dev rows" in succeeded("info", saved).stdout
