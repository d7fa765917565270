"""Guarantees: exact bounds, and how often they hold over simulated draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from made_up_traces import population
from scipy.stats import binomtest
from tiny_models import one_thread  # noqa: F401  # a fixture

from fastkd.exits.calibration import SPEEDS
from fastkd.exits.guarantees import binomial_interval, binomial_upper_bound, failure_bounds, holding, smallest_sample

DRAWS = 1000


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
