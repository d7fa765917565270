"""Pictures: valid PNGs that show what they are given, whole or absent."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fastkd.exits.reliability import AccuracyByUncertainty, UncertaintyAtLayer
from fastkd.exits.sweep import Sweep, SweepRow
from fastkd.inference.measurements import BenchmarkRow
from fastkd.report import figures
from fastkd.training.log import TrainingPoint


def sweep(steepness: float = 5.0, rows: int = 11, labelled: bool = True) -> Sweep:
    made = []
    for index in range(rows):
        speed = index / max(rows - 1, 1)
        layers = 1 + 5 * math.exp(-steepness * speed)
        exits = [round(1000 * math.exp(-abs(layer + 1 - layers))) for layer in range(6)]
        accuracy = 0.9 - 0.03 * speed**2 if labelled else None
        made.append(SweepRow(speed, accuracy, layers, exits, {"fastbert": layers * 1e8}, {"fastbert": 6 / layers}))
    return Sweep(made, "entropy", None, 64)


def benchmark_rows() -> list[BenchmarkRow]:
    shared: dict[str, Any] = {
        "device": "cpu", "rows": 64, "accuracy": 0.9, "full_accuracy": 0.9, "average_layers": 2.0,
        "flops_speedups": {}, "seconds_p20": 1.0, "seconds_p80": 1.0, "full_seconds": 1.0, "full_engine": "fastkd",
    }  # fmt: skip
    return [
        BenchmarkRow(
            dtype=dtype, batch_size=size, speed=speed, flops_speedup=speedup, seconds=1 / speedup,
            speedup=0.8 * speedup, **shared,
        )
        for dtype in ("fp32", "bf16")
        for size in (None, 1, 32)
        for speed, speedup in ((0.1, 1.2), (0.5, 4.1))
    ]  # fmt: skip


HEADS = [AccuracyByUncertainty(layer, [60, 30, 0, 10], [0.95, 0.8, None, 0.4]) for layer in (1, 2, 3, 4)]
REACHED = [
    UncertaintyAtLayer(1, 100, [50, 30, 20]),
    UncertaintyAtLayer(2, 50, [10, 20, 20]),
    UncertaintyAtLayer(3, 0, [0, 0, 0]),
]
POINTS = [
    TrainingPoint("finetune", 1, 0.8, None, 1.0),
    TrainingPoint("finetune", 2, 0.9, None, 1.0),
    TrainingPoint("distill", 3, 0.9, 0.7, 0.4, {1: 0.6, 2: 0.9}),
    TrainingPoint("distill", 4, 0.9, 0.85, 0.2, {1: 0.7, 2: 0.9}),
]

PICTURES: dict[str, Callable[[Path], None]] = {
    "speed_accuracy": lambda path: figures.speed_accuracy({"entropy": sweep(), "margin": sweep(2)}, path),
    "speed_speedup": lambda path: figures.speed_speedup({"entropy": sweep(), "margin": sweep(2)}, path),
    "speedup_accuracy": lambda path: figures.speedup_accuracy({"entropy": sweep(), "margin": sweep(2)}, path),
    "figure3": lambda path: figures.figure3({"one": sweep()}, path),
    "exits_per_layer": lambda path: figures.exits_per_layer(sweep(), path),
    "many speeds": lambda path: figures.exits_per_layer(sweep(rows=101), path),
    "exits_by_group": lambda path: figures.exits_by_group({"plain": [1, 1, 2], "hard": [6, 5]}, 6, path, "title"),
    "accuracy_by_uncertainty": lambda path: figures.accuracy_by_uncertainty(HEADS, path),
    "uncertainty_per_layer": lambda path: figures.uncertainty_per_layer({0.0: REACHED, 0.5: REACHED[:2]}, path),
    "training": lambda path: figures.training(POINTS, path),
    "wall_clock": lambda path: figures.wall_clock(benchmark_rows(), path),
}


@pytest.mark.parametrize("name", PICTURES)
def test_picture_is_a_png_with_content(name: str, tmp_path: Path) -> None:
    path = tmp_path / "made" / "picture.png"
    PICTURES[name](path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = numpy.asarray(image.convert("RGB")).reshape(-1, 3)
        assert min(image.size) >= 600
    background = (pixels == 255).all(axis=1).mean()
    assert 0.2 < background < 0.99
    # curves and bars, not only black text on white: pixels whose channels differ clearly
    assert (pixels.max(axis=1).astype(int) - pixels.min(axis=1) > 60).sum() > 500
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


def test_pictures_show_their_data(tmp_path: Path) -> None:
    figures.speed_accuracy({"a": sweep(5)}, tmp_path / "a.png")
    figures.speed_accuracy({"a": sweep(5), "b": sweep(1)}, tmp_path / "b.png")
    figures.speed_speedup({"a": sweep(5)}, tmp_path / "c.png")
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in "abc"}) == 3


def test_a_correlation_is_a_number_that_may_be_negative() -> None:
    rows = [dataclasses.replace(row, accuracy=None, pearson=-0.9 * row.speed) for row in sweep()]
    sweeps = {"agreement": Sweep(rows, "agreement", None, 64)}
    axes = Figure().subplots()
    for draw in (partial(figures._draw_speedup_accuracy, convention="fastbert"), figures._draw_speed_accuracy):
        draw(axes, sweeps)
        bottom, top = axes.get_ylim()
        assert bottom < -0.9
        assert top > 0
        assert axes.get_title().endswith("Pearson correlation")
        axes.figure.canvas.draw()
        assert not any("%" in label.get_text() for label in axes.get_yticklabels())


def test_sweep_without_labels_has_no_accuracy_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'mine' has no accuracy; trace rows with labels"):
        figures.speed_accuracy({"mine": sweep(labelled=False)}, tmp_path / "a.png")
    figures.speed_speedup({"mine": sweep(labelled=False)}, tmp_path / "b.png")
    assert [file.name for file in tmp_path.iterdir()] == ["b.png"]


def test_wall_clock_names_the_stream_first(tmp_path: Path) -> None:
    figures.wall_clock(benchmark_rows(), tmp_path / "a.svg")
    found = re.findall("<!-- ((?:fp32|bf16), .*?) -->", (tmp_path / "a.svg").read_text(encoding="utf-8"))
    forms = ("stream", "batch 1", "batch 32")
    assert found == [f"{dtype}, {form}" for dtype in ("fp32", "bf16") for form in forms]


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    for draw in (figures.speed_accuracy, figures.speed_speedup, figures.speedup_accuracy, figures.figure3):
        with pytest.raises(ValueError, match="sweeps: got none"):
            draw({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="sweep: got no rows"):
        figures.exits_per_layer(Sweep([], "entropy", None, 64), tmp_path / "a.png")
    with pytest.raises(ValueError, match="groups"):
        figures.exits_by_group({"empty": []}, 6, tmp_path / "a.png", "title")
    with pytest.raises(ValueError, match="rows: got none"):
        figures.wall_clock([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="heads: got none with an accuracy"):
        figures.accuracy_by_uncertainty([AccuracyByUncertainty(1, [3], [None])], tmp_path / "a.png")
    with pytest.raises(ValueError, match="reached: got no speeds"):
        figures.uncertainty_per_layer({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="points: got none"):
        figures.training([], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")])
def test_the_suffix_is_the_format(tmp_path: Path, suffix: str, start: bytes) -> None:
    figures.training(POINTS, tmp_path / f"a.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes().startswith(start)


def test_failed_drawing_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    figures.exits_per_layer(sweep(), path)
    before = path.read_bytes()

    def fail(self: Any, file: Path, **options: Any) -> None:
        Path(file).write_bytes(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(figures.Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        figures.exits_per_layer(sweep(2), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]
