"""Intervals of a quality: against scipy's, and by how often they hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from fastkd.exits.intervals import correlation_interval, mean_interval, share_interval


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (1, 7), (89, 100), (6840, 7600)])
def test_a_share_has_wilsons_interval(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert share_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_no_rows_say_nothing() -> None:
    assert share_interval(0, 0) == (0.0, 1.0)
    assert mean_interval(np.array([3.0])) == (-math.inf, math.inf)
    constant, varied = np.ones(40), np.arange(40.0)
    assert correlation_interval(constant, varied) is None
    assert correlation_interval(varied, constant) is None
    assert correlation_interval(np.where(varied == 3, np.nan, varied), varied) is None


def test_the_interval_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = mean_interval(values)
    assert (low + high) / 2 == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std(ddof=1) / 20, rel=1e-4)


def test_intervals_of_a_correlation_hold_as_often_as_they_say() -> None:
    generator, true, held = np.random.default_rng(1), 0.8, 0
    for _ in range(200):
        x = generator.normal(size=120)
        y = true * x + math.sqrt(1 - true**2) * generator.normal(size=120)
        interval = correlation_interval(x, 3 * y + 40)
        assert interval is not None
        held += interval[0] <= true <= interval[1]
    # 95 % of 200 are 190; a bootstrap of 120 rows holds a little less often, and three standard errors are 9 more
    assert 178 <= held <= 199


def test_intervals_of_a_correlation_are_the_same_every_time() -> None:
    x = np.random.default_rng(2).normal(size=60)
    y = x + np.random.default_rng(3).normal(size=60)
    assert correlation_interval(x, y) == correlation_interval(x, y)
    assert correlation_interval(x, 7 * y - 2) == pytest.approx(correlation_interval(x, y))
