"""Metrics against values worked out by hand and against scipy and scikit-learn where they are installed."""

from __future__ import annotations

import numpy
import pytest

from fastkd.training import metrics


def _random(classes: int, rows: int = 200) -> tuple[numpy.ndarray, numpy.ndarray]:
    source = numpy.random.default_rng(classes)
    labels = source.integers(0, classes, rows)
    return source.normal(size=(rows, classes)) + 1.5 * numpy.eye(classes)[labels], labels


def test_classification_by_hand() -> None:
    # predicted 1, 1, 0, 0, 1; right are rows 0, 2, 3
    logits = numpy.array([[0, 1], [0, 1], [1, 0], [1, 0], [0.2, 0.3]])
    labels = numpy.array([1, 0, 0, 0, 0])
    found = metrics.scores(logits, labels)
    assert set(found) == {"accuracy", "f1", "matthews"}
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 1 / (3 + 1))
    assert found["matthews"] == pytest.approx((1 * 2 - 2 * 0) / (3 * 1 * 4 * 2) ** 0.5)


def test_regression_by_hand() -> None:
    logits, labels = numpy.array([[1.0], [2.0], [2.0], [9.0]]), numpy.array([0.0, 1.0, 3.0, 4.0])
    found = metrics.scores(logits, labels)
    assert found["pearson"] == pytest.approx(numpy.corrcoef([1, 2, 2, 9], labels)[0, 1])
    assert found["spearman"] == pytest.approx(numpy.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])


@pytest.mark.parametrize("classes", [2, 3])
def test_against_scikit_learn(classes: int) -> None:
    reference = pytest.importorskip("sklearn.metrics")
    logits, labels = _random(classes)
    predicted = logits.argmax(-1)
    found = metrics.scores(logits, labels)
    average = "binary" if classes == 2 else "macro"
    assert found["f1"] == pytest.approx(reference.f1_score(labels, predicted, average=average))
    assert found["matthews"] == pytest.approx(reference.matthews_corrcoef(labels, predicted))


def test_against_scipy() -> None:
    reference = pytest.importorskip("scipy.stats")
    source = numpy.random.default_rng(0)
    labels = source.integers(0, 6, 100) / 1.0
    logits = (labels + source.normal(size=100)).round(1)[:, None]
    found = metrics.scores(logits, labels)
    assert found["pearson"] == pytest.approx(reference.pearsonr(logits[:, 0], labels)[0])
    assert found["spearman"] == pytest.approx(reference.spearmanr(logits[:, 0], labels)[0])


def test_what_is_undefined_is_0() -> None:
    always_one = numpy.array([[0.0, 1.0]] * 4)
    assert metrics.matthews(always_one, numpy.array([0, 1, 1, 0])) == 0
    assert metrics.f1(always_one[:, ::-1], numpy.array([0, 0, 0, 0])) == 0
    flat = numpy.ones((4, 1))
    assert metrics.pearson(flat, numpy.arange(4)) == metrics.spearman(flat, numpy.arange(4)) == 0


def test_unfit_names_are_refused() -> None:
    metrics.check_names(["accuracy", "f1"], 2)
    with pytest.raises(ValueError, match=r"metric: got pearson, expected some of accuracy, f1, matthews for 2 classes"):
        metrics.check_names(["accuracy", "pearson"], 2)
    with pytest.raises(ValueError, match=r"metric: got nothing, expected some of pearson, spearman for regression"):
        metrics.check_names([], 1)
