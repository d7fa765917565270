"""How far the heads' uncertainty can be relied on, in numbers, against plain loops."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import torch
from report_sources import SHAPE, corpus_rows, made_up_trace
from tiny_models import CRITERIA

from fastkd.exits.intervals import share_interval
from fastkd.exits.reliability import FEWEST_ROWS, accuracy_by_uncertainty, uncertainty_per_layer
from fastkd.exits.trace import ExitTrace


@pytest.fixture(scope="module")
def rows() -> Any:
    return corpus_rows()


@pytest.mark.parametrize(("criterion", "top_n"), CRITERIA)
def test_every_head_sees_the_rows_that_have_not_left(rows: Any, criterion: str, top_n: int | None) -> None:
    trace = made_up_trace(rows, exit_layers=(1, 3, 4, 6))
    uncertainties = trace.uncertainties(criterion, top_n)
    for speed in (0.0, 0.2, 0.5, 1.0):
        answers = trace.answers(speed, criterion, top_n)
        # each row's answer carries the uncertainty of the head that gave it
        heads = torch.tensor([trace.exit_layers.index(layer) for layer in answers.exit_layer.tolist()])
        if speed > 0 or criterion != "patience":  # at speed 0 only the last head looks, so nothing repeats
            assert torch.equal(uncertainties[torch.arange(len(trace)), heads], answers.uncertainty)
        found = uncertainty_per_layer(trace, uncertainties, answers.exit_layer, bins=7)
        assert [entry.layer for entry in found] == [1, 3, 4, 6]
        for entry in found:
            assert entry.rows == sum(layer >= entry.layer for layer in answers.exit_layer.tolist()) == sum(entry.counts)


def test_accuracy_by_uncertainty_against_a_plain_loop(rows: Any) -> None:
    trace = made_up_trace(rows)
    uncertainties = trace.uncertainties()
    found = accuracy_by_uncertainty(trace, uncertainties, intervals=8)
    assert trace.labels is not None
    all_known: list[bool] = []
    for index, head in enumerate(found):
        groups: list[list[bool]] = [[] for _ in range(8)]
        for row in range(len(trace)):
            part = min(int(float(uncertainties[row, index]) * 8), 7)
            groups[part].append(bool(trace.logits[row, index].argmax() == trace.labels[row]))
        assert head.counts == [len(group) for group in groups]
        known = [len(group) >= FEWEST_ROWS for group in groups]
        all_known += known
        shares = [sum(group) / len(group) if enough else None for group, enough in zip(groups, known, strict=True)]
        assert head.accuracies == pytest.approx(shares)
        assert head.bounds == [
            share_interval(sum(group), len(group)) if enough else None
            for group, enough in zip(groups, known, strict=True)
        ]
        assert head.errors == [None] * 8
        assert head.qualities == head.accuracies
    assert any(all_known), "the test must see intervals that say something"
    assert not all(all_known), "the test must see some that are too small"


def test_a_regression_has_errors_by_uncertainty() -> None:
    labels = torch.linspace(0, 5, 60)
    answers = torch.stack([labels + 0.5, labels - 0.25, labels + 0.125], dim=1)
    trace = ExitTrace(answers[..., None], labels, torch.full((60,), 9, dtype=torch.int32), [1, 2, 6], 12, SHAPE)
    uncertainties = torch.cat([torch.full((41, 3), 0.1), torch.full((19, 3), 0.9)])
    for head, error in zip(accuracy_by_uncertainty(trace, uncertainties, 4), (0.5, 0.25, 0.125), strict=True):
        assert head.counts == [41, 0, 0, 19]
        assert head.errors == [pytest.approx(error, abs=1e-6), None, None, None]
        assert head.bounds[0] == pytest.approx((error, error), abs=1e-6)
        assert head.qualities == head.errors
        assert head.accuracies == [None] * 4


def test_nan_is_in_no_interval(rows: Any) -> None:
    trace = made_up_trace(rows)
    trace.logits[0, 0] = torch.nan
    assert sum(accuracy_by_uncertainty(trace, trace.uncertainties())[0].counts) == len(trace) - 1
