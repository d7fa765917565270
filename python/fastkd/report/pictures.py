"""The figures of the page as files for papers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastkd.exits.reliability import accuracy_by_uncertainty, uncertainty_per_layer
from fastkd.inference.measurements import Benchmark
from fastkd.report import figures
from fastkd.report.results import file_suffixes
from fastkd.report.sources import Source, measured_with
from fastkd.training.log import training_curve

FORMATS = ("png", "svg", "pdf")
SWEPT_SPEEDS = [step / 20 for step in range(21)]
SHOWN_SPEEDS = (0.0, 0.3, 0.5, 0.8)
"""Of figure 6, as in the paper."""


def write_pictures(
    curves: Mapping[str, tuple[Source, str]], folder: Path, form: str = "png", top_n: int | None = None
) -> list[Path]:
    """Write FastBERT's figures 3, 4, 6 and 7 and the measured speed-ups, as far as there is data for them.

    Args:
        curves: by name, a source and the criterion that decides which rows leave.
        folder: made where it is missing.
        form: "png", "svg" or "pdf".
        top_n: classes that the "top_n" criterion looks at.

    Returns:
        The files written.

    Raises:
        ValueError: an unknown form, no curves, or as `fastkd_kernels.exit_gate`.
    """
    if form not in FORMATS:
        raise ValueError(f"format: got {form!r}, expected one of {', '.join(FORMATS)}")
    files: list[Path] = []

    def path(stem: str) -> Path:
        files.append(folder / f"{stem}.{form}")
        return files[-1]

    sweeps = {
        name: source.trace.sweep(SWEPT_SPEEDS, criterion, top_n if criterion == "top_n" else None)
        for name, (source, criterion) in curves.items()
    }
    is_labelled = all(source.trace.labels is not None for source, _ in curves.values())
    if is_labelled:
        figures.figure3(sweeps, path("figure3"))
    else:
        figures.speed_speedup(sweeps, path("speed_speedup"))
    suffixes = file_suffixes(curves)
    for name, (source, criterion) in curves.items():
        suffix = suffixes[name]
        trace, chosen_top_n = source.trace, top_n if criterion == "top_n" else None
        uncertainties = trace.uncertainties(criterion, chosen_top_n)
        heads = accuracy_by_uncertainty(trace, uncertainties)
        if any(value is not None for head in heads for value in head.qualities):
            figures.accuracy_by_uncertainty(heads, path(f"figure4{suffix}"), trace.about)
        left = {speed: trace.answers(speed, criterion, chosen_top_n).exit_layer for speed in SHOWN_SPEEDS}
        reached = {
            speed: uncertainty_per_layer(trace, uncertainties, layers, bins=50) for speed, layers in left.items()
        }
        figures.uncertainty_per_layer(reached, path(f"figure6{suffix}"), trace.about)
        points = training_curve(source.logs)
        if points:
            figures.training(points, path(f"figure7{suffix}"), trace.about)
        if source.benchmark is not None and measured_with(source.benchmark) == criterion:
            figures.wall_clock(Benchmark.from_dict(source.benchmark).rows, path(f"wall_clock{suffix}"), trace.about)
    return files
