"""The drift monitor: which rows it watches, what it reports, and how often it cries wolf."""

from __future__ import annotations

import io
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import beta
from tiny_models import (
    WORDS,
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    random_batch,
    tokenizer_of,
)
from typer.testing import CliRunner

import fastkd
from fastkd.commands import app
from fastkd.exits.certificate import CalibrationWarning, Certificate
from fastkd.exits.drift import DriftMonitor, DriftWarning, evidence
from fastkd.exits.guarantees import binomial_interval
from fastkd.inference.predict import predict as predict_rows
from fastkd.inference.row_reader import read_rows

DRAWS = 1000


def certified_model(max_drop: float = 0.6, **options: Any) -> Any:
    model = early_exit_model(**options)
    trace = model.trace([random_batch(rows=400, longest=6, seed=4)])
    fastkd.calibrate(trace, max_drop).apply(model, set_default=True)
    return model


@pytest.mark.parametrize(("failures", "n", "allowed"), [(0, 0, 0.01), (0, 50, 0.01), (7, 120, 0.02), (30, 40, 0.3)])
def test_evidence_is_its_integral(failures: int, n: int, allowed: float) -> None:
    prior = beta(1, 1 / (4 * allowed))

    def integrand(rate: float) -> float:
        log_ratio = failures * math.log(rate / allowed) + (n - failures) * math.log((1 - rate) / (1 - allowed))
        return math.exp(log_ratio) * prior.pdf(rate) / prior.sf(allowed)

    expected, _ = quad(integrand, allowed, 1, limit=400)
    assert float(evidence(failures, n, allowed)) == pytest.approx(math.log(expected), abs=1e-5)


@pytest.mark.parametrize("allowed", [0.01, 0.05])
def test_alarm_keeps_its_level_however_often_one_looks(allowed: float) -> None:
    generator = np.random.default_rng(3)
    looks = np.arange(1, 3001)

    def ever_alarmed(rate: float) -> float:
        failures = (generator.random((DRAWS, len(looks))) < rate).cumsum(axis=1)
        # the same counts come again and again
        pairs, where = np.unique(failures * 10_000 + looks, return_inverse=True)
        alarms = evidence(pairs // 10_000, pairs % 10_000, allowed) >= math.log(20)
        return float(alarms[where].reshape(failures.shape).any(axis=1).mean())

    slack = 3 * math.sqrt(0.05 * 0.95 / DRAWS)
    assert ever_alarmed(allowed) <= 0.05 + slack
    assert ever_alarmed(allowed / 2) <= 0.05
    assert ever_alarmed(3 * allowed) > 0.95, "an alarm that never rings keeps any level"


def test_watched_rows_are_a_matter_of_number_and_seed() -> None:
    model = certified_model()
    monitor = DriftMonitor(model, 0.1)
    numbers = np.arange(100_000)
    watched = monitor.watches(numbers)
    assert abs(watched.mean() - 0.1) < 3 * math.sqrt(0.09 / 100_000)
    assert np.array_equal(monitor.watches(numbers[::-1]), watched[::-1])
    assert np.array_equal(DriftMonitor(model, 0.1).watches(numbers), watched)
    # neighbours are as independent as others
    both = (watched[1:] & watched[:-1]).mean()
    assert abs(both - 0.01) < 4 * math.sqrt(0.01 / 100_000)
    other = DriftMonitor(model, 0.1, seed=1).watches(numbers)
    assert abs((other & watched).mean() - 0.01) < 4 * math.sqrt(0.01 / 100_000)
    assert DriftMonitor(model, 1.0).watches(numbers).all()
    assert (DriftMonitor(model, 0.2).watches(numbers) >= watched).all(), "a larger share watches the same rows too"


def test_monitor_counts_what_differs_and_changes_no_answer() -> None:
    model = certified_model()
    monitor = DriftMonitor(model, 0.3)
    agreements = watched = rows = 0
    for seed, size in enumerate((40, 1, 25)):
        batch = random_batch(rows=size, seed=seed)
        output = monitor(**batch)
        with torch.no_grad():
            early, full = model(**batch), model(**batch, speed=0.0)
        assert torch.equal(output.logits, early.logits)
        assert torch.equal(output.exit_layer, early.exit_layer)
        chosen = monitor.watches(np.arange(rows, rows + size))
        same = (early.logits.argmax(-1) == full.logits.argmax(-1)).numpy()
        rows, watched, agreements = rows + size, watched + chosen.sum(), agreements + (same & chosen).sum()
    report = monitor.report()
    assert (report.rows, report.watched, report.agreements) == (66, watched, agreements)
    assert report.agreement == agreements / watched
    assert (report.low, report.high) == binomial_interval(agreements, watched)
    assert report.promised == pytest.approx(0.4)
    assert f"{agreements} of {watched} watched rows" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["watched"] == watched


def test_drift_warns_once() -> None:
    model = certified_model()
    monitor = DriftMonitor(model, 1.0)
    monitor.record(60, ["a"] * 60, ["a"] * 30 + ["b"] * 30)
    assert not monitor.report().has_drifted
    with pytest.warns(DriftWarning, match="the certificate promises 40.00%, but these rows fall short"):
        monitor.record(200, ["a"] * 200, ["b"] * 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.record(200, ["a"] * 200, ["b"] * 200)
    assert monitor.report().has_drifted


def test_without_a_certificate_for_this_nothing_is_promised() -> None:
    monitors = {"the model has no certificate": DriftMonitor(early_exit_model(), 1.0, speed=0.5)}
    for exits, told in (
        ({"speed": 0.123}, "it is for speed 0."),
        ({"criterion": "margin"}, "it is for criterion entropy, but margin is in use"),
        ({"exit_layers": [2]}, "it is for exit layers 1, 2, 3, 4, but 2, 4 is in use"),
    ):
        with pytest.warns(CalibrationWarning, match=told):
            monitors[told] = DriftMonitor(certified_model(), 1.0, **exits)
    with pytest.warns(CalibrationWarning, match="it is for dtype float32, but bfloat16 is in use"):
        monitors["bfloat16 is in use"] = DriftMonitor(certified_model().bfloat16(), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for told, monitor in monitors.items():
            monitor.record(500, ["a"] * 500, ["b"] * 500)
            report = monitor.report()
            assert report.promised is None
            assert f"nothing is promised: {told}" in str(report) or told in report.mismatches[0]
            assert len(report.mismatches) == (told != "the model has no certificate")
    empty = DriftMonitor(early_exit_model(), 0.01).report()
    assert empty.agreement is None
    assert "none of 0 rows" in str(empty)


def test_predict_says_when_its_answers_are_not_what_was_certified() -> None:
    model, tokenizer = certified_model(), tokenizer_of("bert")
    rows = list(read_rows(io.BytesIO(b"good\nbad\n"), "text"))
    with pytest.warns(CalibrationWarning, match="it is for exit layers 1, 2, 3, 4, but 2, 4 is in use"):
        list(predict_rows(model, tokenizer, rows, exit_layers=[2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CalibrationWarning)
        list(predict_rows(model, tokenizer, rows))
        list(predict_rows(early_exit_model(), tokenizer, rows, exit_layers=[2]))


def test_regression_agrees_within_the_tolerance() -> None:
    model = early_exit_model(num_labels=1)
    trace = model.trace([random_batch(rows=400, longest=6, seed=4)])
    tolerance = 1.5 * trace.logits.std().item()
    fastkd.calibrate(trace, 0.5, tolerance=tolerance).apply(model, set_default=True)
    monitor = DriftMonitor(model, 1.0)
    monitor.record(4, [0.0, 0.0, 0.0, 0.0], [0.0, 0.9 * tolerance, 1.1 * tolerance, None])
    assert (monitor.watched, monitor.agreements) == (4, 2)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_bad_share(share: float) -> None:
    with pytest.raises(ValueError, match="monitor: got"):
        DriftMonitor(early_exit_model(), share)


# In predict


def sentences(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(8)
    return [
        " ".join(WORDS[word] for word in torch.randint(len(WORDS), (6,), generator=generator).tolist())
        for _ in range(count)
    ]


@pytest.mark.parametrize("batch_size", [None, 7])
def test_predict_watches_the_same_rows_with_every_engine(batch_size: int | None, tmp_path: Path) -> None:
    model = certified_model()
    tokenizer = tokenizer_of("bert")
    path = tmp_path / "rows.txt"
    path.write_text("\n".join([*sentences(90), "", *sentences(30)]) + "\n", encoding="utf-8")

    def answers(**options: Any) -> list[Any]:
        with path.open("rb") as stream:
            return list(predict_rows(model, tokenizer, read_rows(stream, "text"), batch_size=batch_size, **options))

    early, full = answers(), answers(speed=0.0)
    monitor = DriftMonitor(model, 0.25)
    assert answers(monitor=monitor) == early
    watched = [row for row in range(121) if monitor.watches(early[row].line) and early[row].label is not None]
    agreements = sum(early[row].label == full[row].label for row in watched)
    report = monitor.report()
    assert (report.rows, report.watched, report.agreements) == (120, len(watched), agreements)
    assert 0 < agreements < len(watched)


def test_predict_command_reports_and_warns(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")
    model = certified_model()
    certificate = Certificate.of(model.config)
    assert certificate is not None
    model.save_pretrained(tmp_path / "model")
    tokenizer_of("bert").save_pretrained(tmp_path / "model")
    source = tmp_path / "rows.txt"
    source.write_text("\n".join(sentences(300)) + "\n", encoding="utf-8")

    def run(*options: object) -> Any:
        arguments = ["predict", tmp_path / "model", source, "-o", tmp_path / "out.tsv", *options]
        return CliRunner().invoke(app.app, [str(argument) for argument in arguments])

    result = run("--monitor", "100%", "--json")
    assert result.exit_code == 0, result.output
    drift = json.loads(result.stdout)["drift"]
    assert (drift["rows"], drift["watched"]) == (300, 300)
    assert drift["promised"] == pytest.approx(0.4)
    assert "watched rows got the full model's answer" in " ".join(result.stderr.split())
    assert "drift" not in json.loads(run("--json").stdout)
    # a promise that these heads cannot keep
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    config["certificate"]["max_drop"] = 0.001
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    warned = run("--monitor", "1")
    assert "warning" in warned.stderr
    assert "calibrate again on rows like these" in " ".join(warned.stderr.split())
    refused = run("--monitor", "2")
    assert refused.exit_code == 2
    assert "monitor: got 2.0" in refused.output
