"""Threshold paths: each head keeps its share of failures, and a calibration may run along them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_up_traces import certain_trace, part_of, population
from tiny_models import one_thread  # noqa: F401  # a fixture

import fastkd


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
                # isotonic regression keeps the mean of every lower set, so the share of the rows that leave is below
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
