"""Scores of a classifier or regressor as GLUE reports them, of logits [n, C] and labels [n] in numpy.

C = 1 is regression. Where a correlation is not defined, because one side does not vary, it is 0, as GLUE counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy


def accuracy(logits: numpy.ndarray, labels: numpy.ndarray) -> float:
    """The share of rows whose highest logit is the label's."""
    return float((logits.argmax(-1) == labels).mean())


def f1(logits: numpy.ndarray, labels: numpy.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1 (MRPC, QQP); the mean over the classes where there are more."""
    predicted = logits.argmax(-1)
    classes = [1] if logits.shape[-1] == 2 else range(logits.shape[-1])
    return float(numpy.mean([_f1_of(predicted == label, labels == label) for label in classes]))


def _f1_of(predicted: numpy.ndarray, true: numpy.ndarray) -> float:
    marked = predicted.sum() + true.sum()
    return float(2 * (predicted & true).sum() / marked) if marked else 0.0


def matthews(logits: numpy.ndarray, labels: numpy.ndarray) -> float:
    """Matthews correlation (CoLA); of more classes, the correlation of the one-hot matrices (Gorodkin, 2004)."""
    classes = numpy.arange(logits.shape[-1])
    predicted = (logits.argmax(-1)[:, None] == classes).astype(float)
    true = (labels[:, None] == classes).astype(float)
    predicted, true = predicted - predicted.mean(0), true - true.mean(0)
    scale = numpy.sqrt((predicted**2).sum() * (true**2).sum())
    return float((predicted * true).sum() / scale) if scale else 0.0


def pearson(logits: numpy.ndarray, labels: numpy.ndarray) -> float:
    """Linear correlation of scores and labels (STS-B)."""
    return correlation(logits.squeeze(-1).astype(float), labels.astype(float))


def spearman(logits: numpy.ndarray, labels: numpy.ndarray) -> float:
    """Correlation of the ranks of scores and labels (STS-B); equal values share the mean of their ranks."""
    return correlation(_ranks(logits.squeeze(-1)), _ranks(labels))


def correlation(first: numpy.ndarray, second: numpy.ndarray) -> float:
    """Pearson's; 0 where one side is constant."""
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(numpy.corrcoef(first, second)[0, 1])


def _ranks(values: numpy.ndarray) -> numpy.ndarray:
    _, inverse, counts = numpy.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse.reshape(-1)]


def head_scores(logits: numpy.ndarray, labels: numpy.ndarray) -> dict[str, float]:
    """What the log of an early-exit model says about a head: accuracy, for C = 1 Pearson's correlation and `mse`."""
    if logits.shape[-1] > 1:
        return {"accuracy": accuracy(logits, labels)}
    predicted = logits.squeeze(-1)
    return {"pearson": correlation(predicted, labels), "mse": float(((predicted - labels) ** 2).mean())}


Metric = Callable[[numpy.ndarray, numpy.ndarray], float]
CLASSIFICATION: dict[str, Metric] = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
REGRESSION: dict[str, Metric] = {"pearson": pearson, "spearman": spearman}


def scores(logits: numpy.ndarray, labels: numpy.ndarray) -> dict[str, float]:
    """Every metric that fits: those of `REGRESSION` for C = 1, else those of `CLASSIFICATION`."""
    fitting = REGRESSION if logits.shape[-1] == 1 else CLASSIFICATION
    return {name: metric(logits, labels) for name, metric in fitting.items()}


def check_names(names: Sequence[str], num_labels: int) -> None:
    """Raise ValueError unless every name is a metric of rows with so many labels."""
    fitting = REGRESSION if num_labels == 1 else CLASSIFICATION
    wrong = [name for name in names if name not in fitting]
    if wrong or not names:
        kind = "regression" if num_labels == 1 else f"{num_labels} classes"
        raise ValueError(
            f"metric: got {', '.join(wrong) or 'nothing'}, expected some of {', '.join(fitting)} for {kind}"
        )
