"""Pictures of the speed-accuracy trade-off: figures 3, 4, 6 and 7 of FastBERT (ACL 2020), and what lies behind them.

Every function draws one file, PNG, SVG or PDF by its suffix. Sweeps (`ExitTrace.sweep`) are given by name, so that
several datasets, criteria or models share one plane. Colours are Okabe and Ito's, which colour-blind readers can tell
apart; curves also differ in marker. Files are written under a temporary name and renamed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastkd.data.files import atomic_path
from fastkd.training.log import RECORDED_SPEED

if TYPE_CHECKING:
    from fastkd.exits.reliability import AccuracyByUncertainty, UncertaintyAtLayer
    from fastkd.exits.sweep import Sweep, SweepRow
    from fastkd.inference.latency import LatencyRow
    from fastkd.inference.measurements import BenchmarkRow
    from fastkd.training.log import TrainingPoint

PathLike = str | os.PathLike[str]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", ":")  # for the eighth curve on
_DPI = 160
_GREY = "#666666"


def speed_accuracy(sweeps: Mapping[str, Sweep], path: PathLike) -> None:
    """Accuracy against the speed threshold (figure 3a).

    Raises:
        ValueError: `sweeps` is empty, or one of them was measured without labels.
    """
    _save(path, lambda axes: _draw_speed_accuracy(axes, sweeps))


def speed_speedup(sweeps: Mapping[str, Sweep], path: PathLike, convention: str = "fastbert") -> None:
    """FLOPs speed-up over the full model against the speed threshold (figure 3b).

    Raises:
        ValueError: `sweeps` is empty.
    """
    _save(path, lambda axes: _draw_speed_speedup(axes, sweeps, convention))


def speedup_accuracy(sweeps: Mapping[str, Sweep], path: PathLike, convention: str = "fastbert") -> None:
    """Accuracy against FLOPs speed-up: the trade itself (figure 3c).

    Raises:
        ValueError: `sweeps` is empty, or one of them was measured without labels.
    """
    _save(path, lambda axes: _draw_speedup_accuracy(axes, sweeps, convention))


def figure3(sweeps: Mapping[str, Sweep], path: PathLike, convention: str = "fastbert") -> None:
    """The three pictures side by side.

    Raises:
        ValueError: `sweeps` is empty, or one of them was measured without labels.
    """
    figure = Figure(figsize=(14.4, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes in (left, middle, right):
        _style(axes)
    _draw_speed_accuracy(left, sweeps)
    _draw_speed_speedup(middle, sweeps, convention)
    _draw_speedup_accuracy(right, sweeps, convention)
    _write(figure, path)


def exits_per_layer(sweep: Sweep, path: PathLike) -> None:
    """Stacked bars: the share of rows that left after each layer, one bar for each speed.

    Raises:
        ValueError: the sweep has no rows.
    """
    rows = _shown_speeds(_required_rows(sweep))
    layers = len(rows[0].exits_per_layer)
    shares = [[count / max(sum(row.exits_per_layer), 1) for count in row.exits_per_layer] for row in rows]

    def draw(axes: Axes) -> None:
        _draw_shares(axes, [f"{row.speed:g}" for row in rows], shares, layers)
        axes.set(xlabel="speed (uncertainty up to which a row may leave)", ylabel="rows", title="Where rows leave")

    _save(path, draw)


def exits_by_group(groups: Mapping[str, Sequence[int]], layers: int, path: PathLike, title: str) -> None:
    """Stacked bars: the share of each group's rows that left after each layer, with the mean layer above.

    Args:
        groups: exit layers (1 = after the first) of the rows of each group, such as the difficulties of a corpus.
        layers: number of layers of the model.
        path: the file.
        title: of the picture.

    Raises:
        ValueError: no group, or an empty one.
    """
    if not groups or not all(len(exits) for exits in groups.values()):
        raise ValueError("groups: expected at least one group, each with at least one row")
    shares = [[list(exits).count(layer + 1) / len(exits) for layer in range(layers)] for exits in groups.values()]

    def draw(axes: Axes) -> None:
        _draw_shares(axes, [name.replace("_", " ") for name in groups], shares, layers)
        for position, exits in enumerate(groups.values()):
            mean = sum(exits) / len(exits)
            axes.text(position, 1.015, f"mean {mean:.2f}", ha="center", va="bottom", fontsize=9, color=_GREY)
        axes.set_ylim(0, 1.08)
        axes.set(ylabel="rows", title=title)

    _save(path, draw)


def wall_clock(rows: Sequence[BenchmarkRow], path: PathLike) -> None:
    """Measured speed-up against FLOPs speed-up, one curve for each dtype, as a stream and at each batch size.

    The dashed diagonal is where FLOPs would turn into time without loss; below 1x early exit costs time.

    Raises:
        ValueError: `rows` is empty.
    """
    if not rows:
        raise ValueError("rows: got none; run the benchmark first")
    curves: dict[str, list[BenchmarkRow]] = {}
    for row in rows:
        curves.setdefault(f"{row.dtype}, {row.form}", []).append(row)

    def draw(axes: Axes) -> None:
        for number, (name, points) in enumerate(curves.items()):
            points = sorted(points, key=lambda row: row.flops_speedup)
            _curve(axes, number, name, [p.flops_speedup for p in points], [p.speedup for p in points])
        highest = max(max(row.flops_speedup, row.speedup) for row in rows) * 1.06
        axes.plot([0, highest], [0, highest], linestyle="--", color=_GREY, linewidth=1, zorder=1)
        axes.axhline(1, color=_GREY, linewidth=1, zorder=1)
        axes.text(highest * 0.985, 1.03, "full model at its best", ha="right", fontsize=8.5, color=_GREY)
        axes.set(xlim=(0, highest), ylim=(0, highest), xlabel="FLOPs speed-up", ylabel="measured speed-up")
        axes.set_title("Wall-clock beside FLOPs")
        axes.xaxis.set_major_formatter(_TIMES)
        axes.yaxis.set_major_formatter(_TIMES)
        _legend(axes, len(curves))

    _save(path, draw)


def latency(rows: Sequence[LatencyRow], path: PathLike) -> None:
    """Milliseconds of the share of sentences that were answered by then, one curve for each dtype and speed.

    Raises:
        ValueError: `rows` is empty.
    """
    if not rows:
        raise ValueError("rows: got none; measure the latency first")

    def draw(axes: Axes) -> None:
        for number, row in enumerate(rows):
            # the slowest call would set the scale for all others
            shown = range(0, len(row.quantiles) - 1)
            axes.plot(
                [row.quantiles[place] for place in shown], [place / 100 for place in shown],
                label=f"{row.dtype}, speed {row.speed:g}", color=_COLOURS[number % len(_COLOURS)],
                linestyle=_LINES[number // len(_COLOURS) % len(_LINES)], linewidth=1.8, zorder=3,
            )  # fmt: skip
        for share in (0.5, 0.9, 0.99):
            axes.axhline(share, color=_GREY, linewidth=0.6, linestyle=":", zorder=1)
        axes.set(xlabel="milliseconds a sentence", ylabel="share of sentences answered by then", ylim=(0, 1.02))
        axes.set_xlim(left=0)
        axes.set_title("One sentence at a time")
        axes.yaxis.set_major_formatter(_PERCENT)
        _legend(axes, len(rows))

    _save(path, draw)


def accuracy_by_uncertainty(heads: Sequence[AccuracyByUncertainty], path: PathLike) -> None:
    """Accuracy over intervals of uncertainty at the bottom, a middle and the top head (figure 4); bars lie behind it.

    The bars are the share of the head's rows in each interval.

    Raises:
        ValueError: no heads, or none with an accuracy.
    """
    if not any(value is not None for head in heads for value in head.accuracies):
        raise ValueError("heads: got none with an accuracy; trace rows with labels to draw it")
    shown = [heads[index] for index in sorted({0, (len(heads) - 1) // 2, len(heads) - 1})]
    figure, panels = _panels(len(shown))
    for number, (axes, head) in enumerate(zip(panels, shown, strict=True)):
        parts = len(head.counts)
        centres = [(part + 0.5) / parts for part in range(parts)]
        total = max(sum(head.counts), 1)
        axes.bar(centres, [count / total for count in head.counts], width=0.9 / parts, color="#D5DAE1", label="rows")
        known = [(x, y) for x, y in zip(centres, head.accuracies, strict=True) if y is not None]
        _curve(axes, number, "accuracy", [x for x, _ in known], [y for _, y in known])
        axes.set(xlabel="uncertainty", title=f"Head after layer {head.layer}", xlim=(0, 1), ylim=(0, 1.02))
        axes.yaxis.set_major_formatter(_PERCENT)
    panels[0].legend(frameon=False, fontsize=9)
    _write(figure, path)


def uncertainty_per_layer(reached: Mapping[float, Sequence[UncertaintyAtLayer]], path: PathLike) -> None:
    """The uncertainty of the rows that reach each layer, one panel for each speed (figure 6).

    Below the dashed line rows leave; above each layer stands the share of all rows that reach it.

    Raises:
        ValueError: no speeds.
    """
    if not reached:
        raise ValueError("reached: got no speeds, expected at least one")
    figure, panels = _panels(len(reached))
    for axes, (speed, heads) in zip(panels, reached.items(), strict=True):
        for position, head in enumerate(heads):
            _draw_violin(axes, position, head.counts)
            share = head.rows / max(heads[0].rows, 1)
            axes.text(position, 1.02, f"{100 * share:.0f}%", ha="center", va="bottom", fontsize=8, color=_GREY)
        axes.axhline(speed, color=_COLOURS[1], linestyle="--", linewidth=1.2)
        axes.set_xticks(range(len(heads)), [str(head.layer) for head in heads])
        axes.set(xlabel="layer", ylabel="uncertainty", ylim=(0, 1.1), title=f"Speed {speed:g}")
    _write(figure, path)


def training(points: Sequence[TrainingPoint], path: PathLike) -> None:
    """Accuracy and FLOPs on the dev rows over fine-tuning and self-distillation (figure 7).

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("points: got none; train with dev rows, so that something is evaluated")
    figure = Figure(figsize=(6.8, 5.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for axes in (upper, lower):
        _style(axes)
    epochs = [point.epoch for point in points]
    _curve(upper, 0, "full model", epochs, [point.accuracy for point in points])
    if any(point.accuracy_at_speed is not None for point in points):
        _curve(upper, 1, f"at speed {RECORDED_SPEED:g}", epochs, [point.accuracy_at_speed for point in points])
    for axes in (upper, lower):
        tuned = [point.epoch for point in points if point.stage == "finetune"]
        if tuned and len(tuned) < len(points):
            axes.axvline(tuned[-1], color=_GREY, linestyle="--", linewidth=1)
    known = [(point.epoch, point.flops_share) for point in points if point.flops_share is not None]
    _curve(lower, 2, "FLOPs", [x for x, _ in known], [y for _, y in known])
    upper.set(ylabel="accuracy", title="Fine-tuning, then self-distillation")
    upper.yaxis.set_major_formatter(_PERCENT)
    upper.legend(frameon=False, fontsize=9)
    lower.set(xlabel="epoch", ylabel="FLOPs", ylim=(0, 1.08))
    lower.yaxis.set_major_formatter(_PERCENT)
    _write(figure, path)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * count, 3.8), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        _style(axes)
    return figure, panels


def _draw_violin(axes: Axes, position: int, counts: Sequence[int]) -> None:
    widest = max(counts)
    if not widest:
        return
    centres = [(part + 0.5) / len(counts) for part in range(len(counts))]
    widths = [0.42 * count / widest for count in counts]
    left, right = [position - width for width in widths], [position + width for width in widths]
    axes.fill_betweenx(centres, left, right, color=_COLOURS[0], alpha=0.75, linewidth=0)


_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")
_TIMES = FuncFormatter(lambda value, _: f"{value:g}x")


def _draw_speed_accuracy(axes: Axes, sweeps: Mapping[str, Sweep]) -> None:
    for number, (name, sweep) in enumerate(_required(sweeps, labels=True).items()):
        _curve(axes, number, name, [row.speed for row in sweep], [row.quality for row in sweep])
    axes.set(xlabel="speed", ylabel=_quality(sweeps), title=f"Speed and {_quality(sweeps)}", xlim=(-0.02, 1.02))
    _quality_axis(axes, sweeps)
    _legend(axes, len(sweeps))


def _draw_speed_speedup(axes: Axes, sweeps: Mapping[str, Sweep], convention: str) -> None:
    for number, (name, sweep) in enumerate(_required(sweeps).items()):
        _curve(axes, number, name, [row.speed for row in sweep], [row.speedup[convention] for row in sweep])
    axes.set(xlabel="speed", ylabel=f"FLOPs speed-up ({convention})", title="Speed and speed-up", xlim=(-0.02, 1.02))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_TIMES)
    _legend(axes, len(sweeps))


def _draw_speedup_accuracy(axes: Axes, sweeps: Mapping[str, Sweep], convention: str) -> None:
    for number, (name, sweep) in enumerate(_required(sweeps, labels=True).items()):
        points = sorted((row.speedup[convention], row.quality) for row in sweep)
        _curve(axes, number, name, [x for x, _ in points], [y for _, y in points])
    axes.set(xlabel=f"FLOPs speed-up ({convention})", ylabel=_quality(sweeps), title=f"Speed-up and {_quality(sweeps)}")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_TIMES)
    _quality_axis(axes, sweeps)
    _legend(axes, len(sweeps))


def _draw_shares(axes: Axes, names: Sequence[str], shares: Sequence[Sequence[float]], layers: int) -> None:
    colours = colormaps["cividis_r"]
    bottoms = [0.0] * len(names)
    for layer in range(layers):
        heights = [share[layer] for share in shares]
        position = layer / max(layers - 1, 1)
        bars = axes.bar(
            range(len(names)), heights, bottom=bottoms, width=0.8, color=colours(position), label=f"layer {layer + 1}"
        )
        for bar, height in zip(bars, heights, strict=True):
            if height >= 0.06:
                middle = bar.get_y() + height / 2
                text_colour = "white" if position > 0.5 else "black"
                axes.text(
                    bar.get_x() + bar.get_width() / 2, middle, f"{100 * height:.0f}%",
                    ha="center", va="center", fontsize=8, color=text_colour,
                )  # fmt: skip
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.grid(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)


def _curve(axes: Axes, number: int, name: str, x: Sequence[float], y: Sequence[float | None]) -> None:
    axes.plot(
        x, y,  # type: ignore[arg-type]  # _required has made sure that no value is None
        label=name, color=_COLOURS[number % len(_COLOURS)], linestyle=_LINES[number // len(_COLOURS) % len(_LINES)],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4.5, linewidth=1.8, markeredgecolor="white", markeredgewidth=0.6, zorder=3, clip_on=False,
    )  # fmt: skip


def _quality_axis(axes: Axes, sweeps: Mapping[str, Sweep]) -> None:
    """A flat curve must look flat: show at least two points of accuracy, or 0.02 of a correlation."""
    values = [row.quality for sweep in sweeps.values() for row in sweep if row.quality is not None]
    low, high = min(values), max(values)
    margin = max(0.01 - (high - low) / 2, (high - low) * 0.08)
    lowest = -1.002 if _has_correlation(sweeps) else 0
    axes.set_ylim(max(lowest, low - margin), min(1.002, high + margin))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    if not _has_correlation(sweeps):
        axes.yaxis.set_major_formatter(_PERCENT)


def _quality(sweeps: Mapping[str, Sweep]) -> str:
    return "Pearson correlation" if _has_correlation(sweeps) else "accuracy"


def _has_correlation(sweeps: Mapping[str, Sweep]) -> bool:
    return any(row.pearson is not None for sweep in sweeps.values() for row in sweep)


def _legend(axes: Axes, curves: int) -> None:
    if curves > 1:
        axes.legend(frameon=False, fontsize=9)


def _required(sweeps: Mapping[str, Sweep], labels: bool = False) -> Mapping[str, Sweep]:
    if not sweeps:
        raise ValueError("sweeps: got none; pass at least one named sweep")
    for name, sweep in sweeps.items():
        if labels and any(row.quality is None for row in _required_rows(sweep)):
            raise ValueError(f"sweeps: {name!r} has no accuracy; trace rows with labels to draw it")
    return sweeps


def _required_rows(sweep: Sweep) -> list[SweepRow]:
    rows = list(sweep)
    if not rows:
        raise ValueError("sweep: got no rows; sweep at least one speed")
    return rows


def _shown_speeds(rows: list[SweepRow], most: int = 11) -> list[SweepRow]:
    """Evenly chosen rows, so that bars and their numbers stay readable."""
    if len(rows) <= most:
        return rows
    return [rows[round(index * (len(rows) - 1) / (most - 1))] for index in range(most)]


def _save(path: PathLike, draw: Callable[[Axes], None]) -> None:
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.subplots()
    _style(axes)
    draw(axes)
    _write(figure, path)


def _style(axes: Axes) -> None:
    axes.grid(True, color="#E2E2E2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _write(figure: Figure, path: PathLike) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DPI)
