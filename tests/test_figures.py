"""Pictures: valid PNGs that show what they are given, whole or absent."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from functools import partial
from itertools import combinations
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
        interval = None if accuracy is None else (accuracy - 0.02, accuracy + 0.01)
        costs = {"fastbert": layers * 1e8}, {"fastbert": 6 / layers}
        made.append(SweepRow(speed, accuracy, layers, exits, *costs, interval=interval))
    return Sweep(made, "entropy", None, 64, "news/test.tsv, 1,000 rows; model tuned, 6 layers")


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


HEADS = [
    AccuracyByUncertainty(
        layer, [60, 30, 0, 10], [0.95, 0.8, None, None], [None] * 4, [(0.9, 0.97), (0.6, 0.9), None, None]
    )
    for layer in (1, 2, 3, 4)
]
ERRORS = [
    AccuracyByUncertainty(1, [60, 30, 0, 10], [None] * 4, [0.5, 1.8, None, None], [(0.4, 0.6), (1.5, 2.1), None, None])
]
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
    "error_by_uncertainty": lambda path: figures.accuracy_by_uncertainty(ERRORS, path),
    "comparison": lambda path: figures.comparison(
        {f"{steepness}": sweep(steepness) for steepness in range(1, 9)}, path
    ),
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


@pytest.mark.slow
def test_pictures_say_what_they_show(tmp_path: Path) -> None:
    about = "news/test.tsv, 1,000 rows; model tuned, 6 layers"
    for name, draw in PICTURES.items():
        if name in (
            "exits_by_group",
            "accuracy_by_uncertainty",
            "error_by_uncertainty",
            "uncertainty_per_layer",
            "training",
        ):
            continue
        draw(tmp_path / "a.svg")
        told = (tmp_path / "a.svg").read_text(encoding="utf-8")
        assert about in told or name == "wall_clock", name
        bands = "95% confidence" in told
        assert bands == (name in ("speed_accuracy", "speedup_accuracy", "figure3", "comparison")), name
    figures.accuracy_by_uncertainty(HEADS, tmp_path / "a.svg", about)
    assert about in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_the_speeds_stand_at_their_points() -> None:
    axes = Figure().subplots()
    made = sweep(1.5)
    figures._draw_speedup_accuracy(axes, {"entropy": made}, "fastbert")
    marks = {text.get_text(): text.xy for text in axes.texts}  # type: ignore[attr-defined]
    assert {"0", "0.3", "0.5", "0.8", "1"} <= set(marks)
    for row in made:
        if f"{row.speed:g}" in marks:
            assert marks[f"{row.speed:g}"] == (row.speedup["fastbert"], row.accuracy)


def test_speeds_leave_each_other_room() -> None:
    axes = Figure().subplots()
    figures._draw_speedup_accuracy(axes, {name: sweep(1.5, rows=101) for name in ("a", "b")}, "fastbert")
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) > 5
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))


def test_speeds_of_perfect_answers_stay_below_the_title() -> None:
    axes = Figure().subplots()
    rows = [dataclasses.replace(row, accuracy=1.0, interval=(0.9, 1.0)) for row in sweep(1.5)]
    figures._draw_speedup_accuracy(axes, {"entropy": Sweep(rows, "entropy", None, 64)}, "fastbert")
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) > 3
    assert all(box.y1 <= axes.bbox.y1 for box in boxes)


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    names = ["_dev", "$usd_1$", r"$\frac$"]
    shown = {name: dataclasses.replace(sweep(), about=f"{name}/test.tsv, 9 rows") for name in names}
    for draw in (figures.figure3, figures.comparison):
        draw(shown, tmp_path / "a.svg")
        told = (tmp_path / "a.svg").read_text(encoding="utf-8")
        assert all(f"{name}: {name}/test.tsv, 9 rows" in told for name in names)
    axes = Figure().subplots()
    figures._draw_speed_accuracy(axes, shown)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text().strip().replace("\\$", "$") for text in legend.get_texts()] == names
    figures.exits_by_group({"$a$": [1], r"$\b$": [2]}, 2, tmp_path / "b.svg", "title")


def test_a_band_reaches_to_the_bounds() -> None:
    axes = Figure().subplots()
    figures._draw_speed_accuracy(axes, {"entropy": sweep()})
    (band,) = axes.collections
    reached = band.get_paths()[0].vertices[:, 1]
    assert reached.min() == pytest.approx(0.87 - 0.02)
    assert reached.max() == pytest.approx(0.9 + 0.01)
    assert axes.get_ylim()[0] < reached.min() < reached.max() < axes.get_ylim()[1]


def test_intervals_of_few_rows_are_hatched() -> None:
    axes = Figure().subplots()
    figures._draw_share_of_rows(axes, [60, 19, 0, 20], separate=False)
    # a rectangle, and with matplotlib 3.8 another shape
    boxes = [patch.get_extents() for patch in axes.patches if patch.get_hatch()]
    assert [box.transformed(axes.transData.inverted()).x0 for box in boxes] == pytest.approx([0.25])


def test_distributions_of_few_rows_are_hatched() -> None:
    for counts, is_hatched in (([9, 10], True), ([10, 10], False)):
        axes = Figure().subplots()
        figures._draw_violin(axes, 0, counts)
        (drawn,) = axes.collections
        assert bool(drawn.get_hatch()) == is_hatched


def test_all_layers_of_a_deep_model_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [dataclasses.replace(row, exits_per_layer=[1] * 24) for row in sweep()]
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "_write", lambda figure, *_: drawn.append(figure))
    figures.exits_per_layer(Sweep(rows, "entropy", None, 64), tmp_path / "a.png")
    figure = drawn[0]
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 24
    box = legend.get_window_extent()
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert axes.bbox.width > figure.bbox.width / 2
    figures.uncertainty_per_layer({0.0: [UncertaintyAtLayer(layer, 9, [3, 6]) for layer in range(1, 25)]}, "b.png")
    drawn[1].draw_without_rendering()
    boxes = [text.get_window_extent() for text in drawn[1].axes[0].texts]
    assert len(boxes) == 8
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))


def test_a_slower_speed_is_shaded() -> None:
    for steepness, is_slower in ((5.0, False), (-1.0, True)):
        axes = Figure().subplots()
        figures._draw_speed_speedup(axes, {"a": sweep(steepness)}, "fastbert")
        texts = [text.get_text() for text in axes.texts]
        assert ("slower than the full model" in texts) == is_slower


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
        figures.accuracy_by_uncertainty([AccuracyByUncertainty(1, [3], [None], [None], [None])], tmp_path / "a.png")
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
