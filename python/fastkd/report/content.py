"""The numbers of a report: everything the page shows, computed here, so that it shows what `ExitTrace.sweep` gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from typing import Any

from torch import Tensor

from fastkd.exits.flops import flops
from fastkd.exits.reliability import FEWEST_ROWS, accuracy_by_uncertainty, uncertainty_per_layer
from fastkd.exits.trace import ExitAnswers, ExitTrace
from fastkd.report.colours import layer_colours
from fastkd.report.figures import check_one_measure
from fastkd.report.sources import Source, measured_with
from fastkd.training.log import RECORDED_SPEED, training_curve

SPEEDS = [step / 200 for step in range(201)]
"""Where the slider can stand; calibration tries the same speeds."""
CONVENTION = "fastbert"
BINS = 25
INTERVALS = 10
EXAMPLES = 5
LONGEST_TEXT = 280

Curve = dict[str, Any]


def page_content(
    curves: Mapping[str, tuple[Source, str]], title: str, speed: float, top_n: int | None = None
) -> dict[str, Any]:
    """Everything that the page shows, ready for JSON.

    Args:
        curves: by name, a source and the criterion that decides which rows leave.
        title: of the page.
        speed: where the slider stands at first.
        top_n: classes that the "top_n" criterion looks at.

    Raises:
        ValueError: no curves, a regression beside classes, or as `fastkd_kernels.exit_gate`.
    """
    if not curves:
        raise ValueError("curves: got none, expected at least one trace")
    check_one_measure({name: source.trace.is_regression for name, (source, _) in curves.items()})
    return {
        "title": title,
        "date": date.today().isoformat(),
        "speed": speed,
        "speeds": SPEEDS,
        "recordedSpeed": RECORDED_SPEED,
        "fewestRows": FEWEST_ROWS,
        "curves": [
            _curve(name, source, criterion, top_n if criterion == "top_n" else None)
            for name, (source, criterion) in curves.items()
        ],
    }


def _curve(name: str, source: Source, criterion: str, top_n: int | None) -> Curve:
    trace = source.trace
    sweep = trace.sweep(SPEEDS, criterion, top_n)
    uncertainties = trace.uncertainties(criterion, top_n)
    answers = [trace.answers(speed, criterion, top_n) for speed in SPEEDS]
    reached = [uncertainty_per_layer(trace, uncertainties, answer.exit_layer, BINS) for answer in answers]
    return {
        "name": name,
        "about": trace.about,
        "criterion": criterion,
        "rows": len(trace),
        "classes": trace.logits.shape[-1],
        "layers": trace.num_layers,
        "heads": trace.exit_layers,
        "seqLen": sweep.seq_len,
        "fullFlops": flops(trace.shape, sweep.seq_len, convention=CONVENTION),
        "layerColours": {
            "light": layer_colours(trace.num_layers),
            "dark": layer_colours(trace.num_layers, on_black=True),
        },
        "accuracy": [row.accuracy for row in sweep] if trace.has_right_answers else None,
        "correlation": None if sweep[0].pearson is None else [row.pearson for row in sweep],
        "bounds": None if trace.labels is None else [row.interval for row in sweep],
        "averageLayers": [row.average_layers for row in sweep],
        "speedup": [row.speedup[CONVENTION] for row in sweep],
        "exits": [row.exits_per_layer for row in sweep],
        "arrivals": [[[entry.rows, *entry.counts] for entry in heads] for heads in reached],
        "reliability": [asdict(entry) for entry in accuracy_by_uncertainty(trace, uncertainties, INTERVALS)],
        # seconds were measured with one criterion; another one leaves elsewhere
        "benchmark": source.benchmark if measured_with(source.benchmark) == criterion else None,
        "training": [asdict(point) for point in training_curve(source.logs)],
        "certificate": source.certificate,
        "examples": _examples(source, answers),
    }


def _examples(source: Source, answers: Sequence[ExitAnswers]) -> dict[str, Any] | None:
    """The texts that left first and last at every speed; each text is written once."""
    if source.examples is None:
        return None
    chosen = [_first_and_last(answer) for answer in answers]
    shown = sorted({row for first, last in chosen for row in (*first, *last)})
    return {
        "texts": {row: _text(source, row) for row in shown},
        "first": [_entries(answer, first) for answer, (first, _) in zip(answers, chosen, strict=True)],
        "last": [_entries(answer, last) for answer, (_, last) in zip(answers, chosen, strict=True)],
        "labels": _labels(source.trace, shown),
        "labelNames": _label_names(source),
    }


def _first_and_last(answer: ExitAnswers) -> tuple[list[int], list[int]]:
    """Rows of the trace: the surest of the first layer after which rows leave, the least sure of the last."""
    keys = list(
        zip(answer.exit_layer.tolist(), _sortable(answer.uncertainty), range(len(answer.exit_layer)), strict=True)
    )
    order = sorted(keys)
    return [row for _, _, row in order[:EXAMPLES]], [row for _, _, row in order[: -EXAMPLES - 1 : -1]]


def _sortable(uncertainty: Tensor) -> list[float]:
    return uncertainty.nan_to_num(nan=2.0).tolist()


def _entries(answer: ExitAnswers, rows: Sequence[int]) -> list[list[float]]:
    """Row of the trace, layer, uncertainty, predicted class or number."""
    return [
        [row, int(answer.exit_layer[row]), round(float(answer.uncertainty[row]), 4), _answer(answer.prediction[row])]
        for row in rows
    ]


def _answer(prediction: Tensor) -> float:
    return round(float(prediction), 3) if prediction.is_floating_point() else int(prediction)


def _text(source: Source, row: int) -> str:
    assert source.examples is not None
    assert source.trace.rows is not None
    cells: Any = source.examples.dataset[int(source.trace.rows[row])]
    text = " / ".join(str(cells[name]) for name in ("text_a", "text_b") if name in cells)
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT].rsplit(" ", 1)[0] + " …"


def _labels(trace: ExitTrace, rows: Sequence[int]) -> dict[int, float] | None:
    return None if trace.labels is None else {row: _answer(trace.labels[row]) for row in rows}


def _label_names(source: Source) -> list[str]:
    classes = source.trace.logits.shape[-1]
    if classes == 1:
        return []
    named = source.label_names or source.trace.source.label_names
    return list(named or (f"class {index}" for index in range(classes)))
