"""Calibration: exact bounds, guarantees over simulated draws, and certificates that stay with their weights."""

from __future__ import annotations

import itertools
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
from scipy.stats import binomtest
from tiny_models import (
    CONFIGS,
    WORDS,
    clear_speed,
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    random_batch,
    tokenizer_of,
)
from torch import Tensor
from typer.testing import CliRunner

import fastkd
from fastkd.commands import app, steps
from fastkd.data.rows import load_rows
from fastkd.exits.calibration import SPEEDS, CalibrationError
from fastkd.exits.certificate import CalibrationWarning, Certificate, warn_if_uncertified
from fastkd.exits.fingerprints import model_fingerprint
from fastkd.exits.flops import FlopsShape
from fastkd.exits.guarantees import binomial_interval, binomial_upper_bound, failure_bounds, holding, smallest_sample
from fastkd.exits.trace import TraceSource

DRAWS = 1000


def population(rows: int = 20_000, num_labels: int = 3, seed: int = 0) -> fastkd.ExitTrace:
    """Four heads that come nearer to the last one's answer from layer to layer, and sometimes better it."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(0, num_labels, (rows,), generator=generator)
    difficulty = torch.rand(rows, 1, generator=generator)
    full = 4 * torch.nn.functional.one_hot(labels, num_labels) * (1 - 0.7 * difficulty) + 1.3 * difficulty * noise(
        rows, num_labels
    )
    heads = [full + scale * difficulty * noise(rows, num_labels) for scale in (1.6, 0.9, 0.4)]
    return fastkd.ExitTrace(
        logits=torch.stack([*heads, full], dim=1),
        labels=labels,
        lengths=torch.full((rows,), 20, dtype=torch.int32),
        exit_layers=[1, 2, 3, 4],
        max_length=20,
        shape=FlopsShape.of(early_exit_model(num_labels=num_labels).config),
        source=TraceSource(model="m" * 64, data="d" * 64),
    )


def part_of(trace: fastkd.ExitTrace, rows: Any, data: str = "part") -> fastkd.ExitTrace:
    assert trace.labels is not None
    index = torch.as_tensor(rows)
    return replace(
        trace,
        logits=trace.logits[index],
        labels=trace.labels[index],
        lengths=trace.lengths[index],
        source=replace(trace.source, data=data),
    )


def certain_trace(rows: int, failing: int = 0) -> fastkd.ExitTrace:
    """Rows that all leave at the first head at any speed tried; `failing` of them with another answer."""
    logits = torch.tensor([9.0, -9.0, -9.0]).expand(rows, 4, 3).clone()
    logits[:failing, 0] = torch.tensor([-9.0, 9.0, -9.0])
    return replace(part_of(population(rows=rows), range(rows)), logits=logits, labels=torch.zeros(rows).long())


# Bounds


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("n", [1, 7, 299, 5000])
def test_bounds_are_clopper_and_pearsons(n: int, confidence: float) -> None:
    for failures in sorted({0, 1, n // 3, n - 1, n}):
        if not 0 <= failures <= n:
            continue
        test = binomtest(failures, n, alternative="less")
        upper = test.proportion_ci(confidence, method="exact").high
        assert binomial_upper_bound(failures, n, confidence) == pytest.approx(upper, abs=1e-10)
        both = binomtest(failures, n).proportion_ci(confidence, method="exact")
        assert binomial_interval(failures, n, confidence) == pytest.approx((both.low, both.high), abs=1e-10)
    assert binomial_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("max_drop", "confidence", "method", "expected"),
    [
        (0.01, 0.95, "fixed-sequence", 299),
        (0.01, 0.9, "fixed-sequence", 230),
        (0.02, 0.95, "fixed-sequence", 149),
        (0.005, 0.95, "fixed-sequence", 598),
        (0.01, 0.95, "conformal", 99),
        (0.01, 0.95, "empirical", 1),
    ],
)
def test_smallest_sample(max_drop: float, confidence: float, method: str, expected: int) -> None:
    assert smallest_sample(max_drop, confidence, method) == expected
    assert failure_bounds(np.array(0), expected, confidence, method) <= max_drop
    if expected > 1:
        assert failure_bounds(np.array(0), expected - 1, confidence, method) > max_drop


@pytest.mark.parametrize(
    ("max_drop", "confidence", "method", "most"),
    [
        (0.01, 0.95, "fixed-sequence", {408: 0, 872: 3, 2000: 12, 5000: 38, 10000: 83}),
        (0.01, 0.9, "fixed-sequence", {277: 0, 408: 1, 872: 4, 2000: 13, 5000: 40, 10000: 86}),
        (0.02, 0.95, "fixed-sequence", {277: 1, 408: 3, 872: 10, 2000: 29, 5000: 83, 10000: 176}),
        (0.005, 0.95, "fixed-sequence", {872: 0, 2000: 4, 5000: 16, 10000: 38}),
        (0.01, 0.95, "conformal", {277: 1, 408: 3, 872: 7, 2000: 19, 5000: 49, 10000: 99}),
    ],
)
def test_most_failures_that_are_allowed(max_drop: float, confidence: float, method: str, most: dict[int, int]) -> None:
    for n, expected in most.items():
        allowed = failure_bounds(np.arange(n + 1), n, confidence, method) <= max_drop
        assert int(allowed.nonzero()[0][-1]) == expected


def test_speeds_behind_a_failed_one_are_out() -> None:
    counts = np.array([[0, 3, 40, 2], [50, 0, 0, 0]])
    assert holding(counts, 1000, 0.01, 0.95, "fixed-sequence").tolist() == [[True, True, False, False], [False] * 4]
    assert holding(counts, 1000, 0.01, 0.95, "conformal").tolist() == [[True, True, False, False], [False] * 4]
    assert holding(counts, 1000, 0.01, 0.95, "empirical").tolist() == [[True, True, False, True], [False, *[True] * 3]]


# The guarantee


def simulate(method: str, guarantee: str, n: int, max_drop: float, confidence: float) -> tuple[Any, Any]:
    """The population's failure rate and accuracy drop at the speed that each of `DRAWS` calibrations chose."""
    everyone = population()
    full = everyone.answers(0.0).prediction
    failed, drops = [], []
    for speed in SPEEDS:
        early = everyone.answers(speed).prediction
        is_lost = (full == everyone.labels) & (early != everyone.labels)
        failed.append((early != full) if guarantee == "consistency" else is_lost)
        drops.append(((full == everyone.labels).double() - (early == everyone.labels).double()).mean())
    losses = torch.stack(failed, dim=1).numpy()
    if method == "conformal":
        losses = np.maximum.accumulate(losses, axis=1)
    generator = np.random.default_rng(1)
    drawn = generator.integers(len(everyone), size=(DRAWS, n))
    counts = np.stack([losses[rows].sum(axis=0) for rows in drawn])
    allowed = holding(counts, n, max_drop, confidence, method)
    # the fastest allowed speed: leaving earlier is never dearer
    chosen = np.where(allowed.any(axis=1), len(SPEEDS) - 1 - allowed[:, ::-1].argmax(axis=1), -1)
    risk, drop = np.append(losses.mean(axis=0), 0.0), np.append(np.array(drops), 0.0)
    return risk[chosen], drop[chosen]


@pytest.mark.parametrize("guarantee", ["consistency", "accuracy"])
def test_the_guarantee_holds_at_its_level(guarantee: str) -> None:
    max_drop, confidence = 0.03, 0.9
    risk, drop = simulate("fixed-sequence", guarantee, 600, max_drop, confidence)
    # three standard deviations of a share of 10% among 1,000 draws
    slack = 3 * math.sqrt(confidence * (1 - confidence) / DRAWS)
    assert (risk > max_drop).mean() <= 1 - confidence + slack
    assert (drop > max_drop).mean() <= 1 - confidence + slack
    assert np.median(risk) > max_drop / 2, "a guarantee that gives everything away would be no use"
    measured, _ = simulate("empirical", guarantee, 600, max_drop, confidence)
    assert (measured > max_drop).mean() > 0.3, "the simulation shows it where there is no guarantee"


@pytest.mark.parametrize("n", [150, 600])
def test_conformal_holds_on_average(n: int) -> None:
    max_drop = 0.03
    risk, _ = simulate("conformal", "consistency", n, max_drop, 0.95)
    assert risk.mean() <= max_drop + 3 * risk.std() / math.sqrt(DRAWS)
    assert (risk > max_drop).mean() > 0.2, "on average is weaker than with confidence"


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


# Refusals


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
    with pytest.warns(CalibrationWarning, match="the finetune dev rows"):
        assert fastkd.calibrate(seen).seen_as == "finetune dev"
    with pytest.warns(CalibrationWarning, match="guarantees nothing"):
        fastkd.calibrate(trace, method="empirical")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastkd.calibrate(trace).seen_as is None


# Paths


@pytest.mark.parametrize(("criterion", "top_n"), [("entropy", None), ("margin", None), ("top_n", 2)])
def test_path_keeps_each_heads_share(criterion: str, top_n: int | None) -> None:
    trace = part_of(population(), range(2000))
    path = fastkd.threshold_path(trace, criterion, top_n)
    assert path.at(0.0) == [0.0] * 3
    assert path.at(1.0) == [1.0] * 3
    uncertainty, full = trace.uncertainties(criterion, top_n), trace.logits[:, -1].argmax(-1)
    ascending = [path.at(speed) for speed in np.linspace(0.005, 0.9, 60)]
    for slower, faster in itertools.pairwise(ascending):
        assert all(low <= high for low, high in zip(slower, faster, strict=True))
    for speed in (0.01, 0.05, 0.2):
        for index, threshold in enumerate(path.at(speed)):
            leaves = uncertainty[:, index] <= threshold
            if threshold > 0:
                wrong = trace.logits[leaves, index].argmax(-1) != full[leaves]
                # isotonic regression keeps the mean of every lower set, so the share of those who leave is below
                assert wrong.double().mean() <= speed + 1e-12
    first, *_, last = path.at(0.05)
    assert first < last, "later heads may trust themselves more"


def test_calibration_along_a_path() -> None:
    everyone = population()
    fitted, trace = part_of(everyone, range(3000), "fit"), part_of(everyone, range(3000, 9000), "calibrate")
    path = fastkd.threshold_path(fitted)
    certificate = fastkd.calibrate(trace, 0.02, path=path)
    assert certificate.speed == path.at(certificate.position)
    row = trace.sweep([certificate.position], path=path)[0]
    assert certificate.speedup == row.speedup["fastbert"]
    assert certificate.bound <= 0.02
    assert certificate.failures > 60
    by_labels = fastkd.calibrate(
        trace, 0.02, path=fastkd.threshold_path(fitted, guarantee="accuracy"), guarantee="accuracy"
    )
    assert by_labels.speedup > certificate.speedup
    with pytest.raises(ValueError, match="learned from the rows of this trace"):
        fastkd.calibrate(fitted, 0.02, path=path)
    with pytest.raises(ValueError, match="learned for heads after the layers"):
        fastkd.calibrate(trace, 0.02, path=replace(path, exit_layers=[1, 4]))
    with pytest.raises(ValueError, match="got 'patience'"):
        fastkd.threshold_path(fitted, "patience")


def test_path_survives_ties_and_nan() -> None:
    trace = certain_trace(300, failing=30)
    trace.logits[40:60, 1] = torch.nan
    path = fastkd.threshold_path(trace)
    assert path.at(0.05)[0] == 0.0, "a tie of rows with one failure in ten is one step"
    assert path.at(0.1)[0] > 0
    assert path.at(0.001)[1] > 0


# Certificates


def traced_model(**options: Any) -> tuple[Any, fastkd.ExitTrace]:
    model = early_exit_model(**options)
    trace = model.trace([random_batch(rows=400, longest=6, seed=4)])
    return model, trace


def test_certificate_stays_with_the_model(tmp_path: Path) -> None:
    model, trace = traced_model()
    certificate = fastkd.calibrate(trace, 0.6)
    certificate.apply(model)
    assert (model.config.speed, model.config.criterion) == (0.0, "entropy"), "only where the user asks"
    model.save_pretrained(tmp_path)
    again = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    assert Certificate.of(again.config) == certificate
    assert Certificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate
    assert Certificate.of(early_exit_model().config) is None
    fastkd.calibrate(trace, 0.6, criterion="margin").apply(model, set_default=True)
    assert model.config.criterion == "margin"
    batch = random_batch()
    with torch.no_grad():
        expected = model(**batch, speed=model.config.speed, criterion="margin")
        assert torch.equal(model(**batch).exit_layer, expected.exit_layer)


@pytest.mark.parametrize("with_path", [False, True])
def test_save_touches_nothing_else(tmp_path: Path, with_path: bool) -> None:
    model, trace = traced_model()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    path = fastkd.threshold_path(model.trace([random_batch(rows=300, seed=9)])) if with_path else None
    certificate = fastkd.calibrate(trace, 0.6, path=path)
    certificate.save(tmp_path, model_fingerprint(model), set_default=True)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    config, old = json.loads(after.pop("config.json")), json.loads(before.pop("config.json"))
    assert after == before
    changed = {"certificate", "speed", "criterion", "top_n"}
    assert {name: value for name, value in config.items() if name not in changed} == {
        name: value for name, value in old.items() if name not in changed
    }
    again = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.config.speed == certificate.speed
    batch = random_batch(rows=400, longest=6, seed=4)
    with torch.no_grad():
        answers = again(**batch)
    assert torch.equal(answers.exit_layer, trace.answers(certificate.speed).exit_layer)


def test_what_is_not_as_certified_is_told() -> None:
    model, trace = traced_model()
    certificate = fastkd.calibrate(trace, 0.6, criterion="margin")
    assert (certificate.dtype, certificate.exit_layers) == ("float32", model.exit_layers)

    def told(dtype: torch.dtype = torch.float32, **exits: Any) -> list[str]:
        return certificate.mismatches(model.config, dtype, **{"speed": speed, "criterion": "margin", **exits})

    speed = certificate.speed
    assert told() == told(exit_layers=model.exit_layers) == []
    assert told(torch.bfloat16) == ["it is for dtype float32, in use is bfloat16"]
    assert told(criterion="entropy") == ["it is for criterion margin, in use is entropy"]
    assert told(speed=0.125) == [f"it is for speed {speed}, in use is 0.125"]
    assert told(exit_layers=[2]) == ["it is for exit layers 1, 2, 3, 4, in use is 2, 4"]
    assert told(speed=[speed] * 3) == [f"it is for speed {speed}, in use is {', '.join(3 * [str(speed)])}"]
    assert told(criterion="top_n", top_n=2)[1] == "it is for top_n None, in use is 2"
    assert told(torch.bfloat16, speed=0.0) == [], "the full model gives the full model's answers"
    assert certificate.mismatches(model.config, "float32") == [], "the default is still the full model"
    certificate.apply(model, set_default=True)
    assert certificate.mismatches(model.config, "float32") == []
    assert certificate.mismatches(model.config, "float32", 0.125), "what is given wins over the default"
    unknown = fastkd.calibrate(replace(trace, source=replace(trace.source, dtype="")), 0.6)
    assert unknown.mismatches(model.config, "float32", unknown.speed, "entropy") == [
        "it is for dtype unknown, in use is float32"
    ]


def test_uncertified_calls_warn() -> None:
    model, trace = traced_model()
    assert warn_if_uncertified(model, speed=0.125) == [], "without a certificate there is nothing to tell"
    certificate = fastkd.calibrate(trace, 0.6)
    certificate.apply(model)
    assert warn_if_uncertified(model, speed=certificate.speed) == []
    with pytest.warns(CalibrationWarning, match=r"certificate: it is for speed 0\.\d+, in use is 0.125; nothing is"):
        assert len(warn_if_uncertified(model, speed=0.125)) == 1
    with pytest.warns(CalibrationWarning, match="it is for dtype float32, in use is bfloat16"):
        warn_if_uncertified(model.bfloat16(), speed=certificate.speed)


def test_certificate_of_other_weights_is_refused(tmp_path: Path) -> None:
    model, trace = traced_model()
    certificate = fastkd.calibrate(trace, 0.6)
    with torch.no_grad():
        model.teacher_head.classifier.bias[0] += 1e-3
    with pytest.raises(ValueError, match="it is for other weights"):
        certificate.apply(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is for other weights"):
        certificate.save(tmp_path, model_fingerprint(model))
    unknown = fastkd.calibrate(replace(trace, source=TraceSource()), 0.6)
    with pytest.raises(ValueError, match="does not say which weights"):
        unknown.apply(model)
    with pytest.raises(ValueError, match="fields surprise are missing or unknown"):
        Certificate.from_dict({**certificate.to_dict(), "surprise": 1})


def test_fingerprints_tell_rows_and_weights_apart() -> None:
    model = early_exit_model()
    first, second = random_batch(seed=1), random_batch(seed=2)
    source = model.trace([first]).source
    assert model.trace([first]).source == source
    assert source.data.startswith("tokens:")
    assert model.trace([second]).source.data != source.data
    assert model.trace([second]).source.model == source.model
    assert model.trace([first], "rows").source.data == "rows"
    assert model.bfloat16().trace([first]).source.model != source.model


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
    assert "with 90% confidence at most 60% of rows get another answer" in result.stdout
    info = succeeded("info", saved).stdout
    for line in result.stdout.splitlines()[:4]:
        assert line in info
    assert "default speed   0.0" in info
    found = json.loads(succeeded("info", saved, "--json").stdout)
    assert found["certificate"]["n"] == 500
    assert found["default_speed"] == 0.0
    assert found["certificate"] == Certificate.of(steps.load_config(str(saved))).to_dict()  # type: ignore[union-attr]
    assert (found["dtype"], found["mismatches"]) == ("float32", [])


def test_info_tells_where_the_default_is_not_what_was_certified(saved: Path, rows: Path) -> None:
    options = ("--max-drop", "60%", "--set-default", "--dtype", "bf16")
    found = json.loads(succeeded("calibrate", saved, "--data", rows, *options, "--json").stdout)
    assert found["dtype"] == "bfloat16"
    assert "not the default: it is for dtype bfloat16, in use is float32" in succeeded("info", saved).stdout
    sentences = json.loads(succeeded("info", saved, "--json").stdout)["mismatches"]
    assert sentences == ["it is for dtype bfloat16, in use is float32"]


def test_a_trace_in_another_dtype_certifies_its_folder(saved: Path, rows: Path, tmp_path: Path) -> None:
    trace = tmp_path / "bf16.safetensors"
    succeeded("trace", saved, rows, "-o", trace, "--dtype", "bf16")
    assert fastkd.ExitTrace.load(trace).source.dtype == "bfloat16"
    succeeded("calibrate", trace, "--max-drop", 0.6, "--model", saved)
    model, _ = steps.load_model(str(saved), "cpu", "bf16")
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
    config = steps.load_config(str(saved))
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
    warned = succeeded("calibrate", saved, "--data", rows, "--max-drop", 0.6, "--limit", 450)
    assert "the finetune dev rows" in " ".join(warned.stderr.split())
    assert "void: these were the finetune dev rows" in succeeded("info", saved).stdout
