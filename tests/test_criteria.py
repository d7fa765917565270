"""Criteria beyond the fused gate: learned exits and agreement of consecutive heads, in every engine and on traces."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import (
    CONFIGS,
    LAYERS,
    clear_speed,
    early_exit_model,
    one_thread,  # noqa: F401  # a fixture
    random_batch,
    row_of,
)
from torch import Tensor

import fastkd
import fastkd_kernels as fk
from fastkd.exits import criteria
from fastkd.exits.flops import FlopsShape
from fastkd.exits.rule import ExitRule

AGREEMENT = ExitRule("agreement", None, (1, 2, 3), (1.0, 1.0))


def model_with(criterion: str, head: str = "fastbert", family: str = "bert", **options: Any) -> Any:
    """A random model that can run `criterion`, its heads of differing certainty."""
    if criterion == "agreement":
        return early_exit_model(family, head=head, num_labels=1, **options)
    model = early_exit_model(family, head=head, learned_exit=True, **options)
    torch.manual_seed(3)
    with torch.no_grad():
        model.learned_exit.start()
        torch.nn.init.normal_(model.learned_exit.linear.weight[:, :-1], std=0.3)
    return model


def batches(family: str = "bert") -> list[dict[str, Tensor]]:
    return [random_batch(family, rows=17, seed=1), random_batch(family, rows=9, longest=16, seed=2)]


@pytest.mark.parametrize("engine", ["batch", "packed"])
@pytest.mark.parametrize("head", ["fastbert", "linear"])
@pytest.mark.parametrize("criterion", ["learned", "agreement"])
def test_answers_of_the_model_are_those_of_its_trace(criterion: str, head: str, engine: str) -> None:
    model = model_with(criterion, head, exit_layers=[1, 2, 4])
    trace = model.trace(batches())
    assert (trace.certainty is None) == (criterion == "agreement")
    seen = trace.uncertainties(criterion)[:, :-1]
    assert float(seen.min()) >= 0
    assert float(seen.max()) <= 1
    speed = clear_speed(seen[:, -1])
    for value in (0.0, speed, [0.0, speed], 1.0):
        answers = trace.answers(value, criterion)
        with torch.no_grad():
            outputs = [model(**batch, speed=value, criterion=criterion, engine=engine) for batch in batches()]
        assert torch.equal(answers.exit_layer, torch.cat([output.exit_layer for output in outputs])), value
        logits = torch.cat([output.logits for output in outputs])
        torch.testing.assert_close(answers.logits, logits, rtol=1e-4, atol=1e-5)
        if criterion == "agreement":
            assert torch.equal(answers.prediction, answers.logits[:, 0])
            assert outputs[0].uncertainty is None
        elif value:
            uncertainty = torch.cat([output.uncertainty for output in outputs])
            torch.testing.assert_close(answers.uncertainty, uncertainty, rtol=1e-4, atol=1e-5)
    assert len(set(trace.answers(speed, criterion).exit_layer.tolist())) > 1


@pytest.mark.parametrize("criterion", ["learned", "agreement"])
@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_streams_answer_alike(family: str, criterion: str) -> None:
    model = model_with(criterion, family=family)
    (batch, _) = batches(family)
    trace = model.trace([batch])
    speed = clear_speed(trace.uncertainties(criterion)[:, 1])
    rows = [{name: values[0].tolist() for name, values in row_of(batch, row).items()} for row in range(17)]
    # few tokens a run and few rows ahead, so that slots of the record are used again
    answers = list(model.stream(rows, speed=speed, criterion=criterion, tokens_per_run=20, look_ahead=4))
    expected = trace.answers(speed, criterion)
    assert [answer.exit_layer for answer in answers] == expected.exit_layer.tolist()
    if criterion == "agreement":
        assert [answer.label for answer in answers] == pytest.approx(expected.prediction.tolist(), abs=1e-4)


def test_agreement_against_a_plain_loop() -> None:
    trace = model_with("agreement", exit_layers=[1, 3, 4]).trace(batches())
    for tolerance in (0.01, 0.1, 1.0):
        answers = trace.answers(tolerance / (1 + tolerance))
        for row, logits in enumerate(trace.logits[:, :, 0].tolist()):
            head = next((k for k in (1, 2) if abs(logits[k] - logits[k - 1]) <= tolerance), 2)
            assert answers.exit_layer[row] == (1, 3, 4)[head]
            assert answers.prediction[row] == pytest.approx(logits[head])
            moved = abs(logits[head] - logits[head - 1])
            assert answers.uncertainty[row] == pytest.approx(moved / (1 + moved), abs=1e-6)
    assert set(trace.answers(1.0).exit_layer.tolist()) == {1}


def test_learned_is_one_minus_the_certainty() -> None:
    model = model_with("learned")
    (batch, _) = batches()
    trace = model.trace([batch])
    with torch.no_grad():
        hidden = model.backbone(**batch, output_hidden_states=True).hidden_states[1:]
        weight, bias = model.learned_exit.linear.weight[0], model.learned_exit.linear.bias
        assert weight[-1] != 0
        states = torch.stack([states[:, 0] for states in hidden], 1)
        probabilities = trace.logits.softmax(-1).sort(-1).values
        margin = (probabilities[..., -1] / probabilities[..., -2]).log()
        certainty = torch.sigmoid(states @ weight[:-1] + weight[-1] * margin + bias)
    torch.testing.assert_close(trace.certainty, certainty, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trace.uncertainties("learned"), 1 - certainty, rtol=1e-4, atol=1e-5)


def test_a_new_learned_exit_believes_the_margin() -> None:
    model = early_exit_model(num_labels=2)
    model.add_learned_exit()
    trace = model.trace(batches())
    torch.testing.assert_close(trace.certainty, trace.logits.softmax(-1).amax(-1), rtol=1e-4, atol=1e-5)
    regression = early_exit_model(num_labels=1)
    regression.add_learned_exit()
    assert set(regression.trace(batches()).certainty.flatten().tolist()) == {0.5}


def test_nan_is_never_answered_early() -> None:
    record = fk.ExitRecord.allocate(3, 1)
    logits = torch.tensor([[0.5], [torch.nan], [0.1]])
    assert criteria.decide(logits, AGREEMENT, record=record, layer=1).kept().tolist() == [1]
    left = torch.tensor([1], dtype=torch.int32)
    gate = criteria.decide(torch.tensor([[0.2]]), AGREEMENT, row_ids=left, record=record, layer=2)
    assert math.isnan(gate.uncertainty.item()), "what moved from NaN moved by an unknown distance"
    certainty = torch.tensor([torch.nan, 0.9, 0.1])
    record = fk.ExitRecord.allocate(3, 2)
    rule = ExitRule("learned", None, (1, 2), (0.5,))
    gate = criteria.decide(torch.randn(3, 2), rule, record=record, layer=1, certainty=certainty)
    assert gate.kept().tolist() == [0, 2]
    assert record.exit_layer.tolist() == [0, 1, 0]


def test_a_threshold_for_each_row_keeps_rows_that_left() -> None:
    """The packed engine runs rows that left a little further, at a threshold of 0."""
    record = fk.ExitRecord.allocate(2, 1)
    first = torch.tensor([[0.5], [0.7]])
    criteria.decide(first, AGREEMENT, thresholds=torch.tensor([1.0, 0.0]), record=record, layer=1)
    criteria.decide(first + 0.2, AGREEMENT, thresholds=torch.tensor([0.0, 1.0]), record=record, layer=2)
    assert record.exit_layer.tolist() == [1, 2]
    assert record.logits[:, 0].tolist() == pytest.approx([0.5, 0.9])


def test_defaults_and_refusals() -> None:
    assert fastkd.EarlyExitConfig(CONFIGS["bert"], num_labels=1).criterion == "agreement"
    assert fastkd.EarlyExitConfig(CONFIGS["bert"], num_labels=2).criterion == "entropy"
    with pytest.raises(ValueError, match="'agreement' compares numbers, got 3 classes"):
        fastkd.EarlyExitConfig(CONFIGS["bert"], num_labels=3, criterion="agreement")
    regression, (batch, _) = model_with("agreement"), batches()
    with pytest.raises(ValueError, match="'entropy' needs class probabilities, but this model is a regression"):
        regression(**batch, speed=0.5, criterion="entropy")
    trace = fastkd.ExitTrace(
        torch.zeros(4, 3, 1), None, torch.full((4,), 5), [1, 2, 3], 8, FlopsShape.of(early_exit_model().config)
    )
    with pytest.raises(ValueError, match="'margin' needs class probabilities, but a regression answers with one"):
        trace.sweep([0.5], criterion="margin")
    with torch.no_grad():
        assert regression(**batch, speed=0.5).exit_layer.tolist() != [LAYERS] * 17
        assert regression(**batch, speed=0.0, criterion="entropy").logits.shape == (17, 1)
    plain = early_exit_model()
    for speed in (0.0, 0.5):
        with pytest.raises(ValueError, match="this model has no learned exit"):
            plain(**batch, speed=speed, criterion="learned")
    with pytest.raises(ValueError, match="there is no learned exit"):
        plain.trace([batch]).answers(0.5, "learned")
    with pytest.raises(ValueError, match=r"certainty: got shape \(1, 2\)"):
        fastkd.ExitTrace(
            torch.zeros(1, 1, 2), None, torch.ones(1), [4], 3, plain.trace([batch]).shape, certainty=torch.ones(1, 2)
        )


def test_a_name_that_is_new_has_no_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(criteria.CRITERIA, "new", criteria.CRITERIA["learned"])
    record = fk.ExitRecord.allocate(5, 3)
    with pytest.raises(NotImplementedError, match="criterion: 'new' is in the catalogue; give it a formula"):
        criteria.decide(
            torch.randn(5, 3), ExitRule("new", None, (1, 2), (0.5,)), layer=1, record=record, certainty=torch.rand(5)
        )


def test_learned_exits_are_saved_and_cost_a_little(tmp_path: Any) -> None:
    model = model_with("learned")
    model.save_pretrained(tmp_path)
    again = fastkd.EarlyExitForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again.learned_exit.linear.weight, model.learned_exit.linear.weight)
    trace = model.trace(batches())
    trace.save(tmp_path / "t.safetensors")
    assert torch.equal(fastkd.ExitTrace.load(tmp_path / "t.safetensors").certainty, trace.certainty)
    (row,) = trace.sweep([1.0], "learned")
    (plain,) = trace.sweep([1.0])
    assert row.flops["fastbert"] == plain.flops["fastbert"] + 2 * (32 + 1)


def test_regression_sweeps_have_a_correlation() -> None:
    labelled = [{**batch, "labels": torch.randn(len(batch["input_ids"]))} for batch in batches()]
    trace = model_with("agreement").trace(labelled)
    sweep = trace.sweep([0.0, 0.3])
    assert sweep.criterion == "agreement"
    for row in sweep:
        answers = trace.answers(row.speed).prediction
        expected = torch.corrcoef(torch.stack([answers, trace.labels]))[0, 1].item()
        assert row.accuracy is None
        assert row.quality == row.pearson == pytest.approx(expected, abs=1e-5)
    assert "pearson" in sweep.to_dicts()[0]


def test_regression_is_calibrated_by_tolerance() -> None:
    trace = model_with("agreement").trace([random_batch(rows=500, longest=8)])
    tolerance = 1.5 * trace.logits.std().item()
    certificate = fastkd.calibrate(trace, 0.5, tolerance=tolerance)
    full, early = trace.logits[:, -1, 0], trace.answers(certificate.speed).prediction
    assert certificate.failures == int(((early - full).abs() > tolerance).sum()) == certificate.disagreements
    assert certificate.criterion == "agreement"
    with pytest.raises(ValueError, match="a regression needs the largest difference"):
        fastkd.calibrate(trace, 0.3)
    with pytest.raises(ValueError, match="a regression has no right answers"):
        fastkd.calibrate(trace, 0.3, guarantee="accuracy", tolerance=0.2)
