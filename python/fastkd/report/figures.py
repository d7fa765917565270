"""Pictures of the speed-accuracy trade-off: figures 3, 4, 6 and 7 of FastBERT (ACL 2020), and what lies behind them.

Every function draws one file, PNG, SVG or PDF by its suffix. Sweeps (`ExitTrace.sweep`) are given by name, so that
several datasets, criteria or models share one plane. A band around a quality says where that of new rows lies with 95 %
confidence; numbers at points are speeds; below each picture stands which rows and which model it shows (`about`).
Colours are those of `fastkd.report.colours`; curves also differ in marker. Files are written under a temporary name and
renamed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from fastkd.data.files import atomic_path
from fastkd.exits.reliability import FEWEST_ROWS
from fastkd.report.colours import CURVES, ink_on, layer_colours
from fastkd.training.log import RECORDED_SPEED

if TYPE_CHECKING:
    from fastkd.exits.reliability import AccuracyByUncertainty, UncertaintyAtLayer
    from fastkd.exits.sweep import Sweep, SweepRow
    from fastkd.inference.latency import LatencyRow
    from fastkd.inference.measurements import BenchmarkRow
    from fastkd.training.log import TrainingPoint

PathLike = str | os.PathLike[str]

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", ":")  # for the eighth curve on
_DPI = 160
_MOST_IN_LEGEND_COLUMN = 12
_MOST_NUMBERS = 8  # above layers side by side
_GREY = "#666666"
_BANDS = "Bands: where new rows like these lie with 95% confidence"
_SPEEDS = "numbers at points: speeds"


def speed_accuracy(sweeps: Mapping[str, Sweep], path: PathLike) -> None:
    """Accuracy against the speed threshold (figure 3a).

    Raises:
        ValueError: `sweeps` is empty, or one of them was measured without labels.
    """
    _save(path, lambda axes: _draw_speed_accuracy(axes, sweeps), _about(sweeps, _BANDS))


def speed_speedup(sweeps: Mapping[str, Sweep], path: PathLike, convention: str = "fastbert") -> None:
    """FLOPs speed-up over the full model against the speed threshold (figure 3b).

    Raises:
        ValueError: `sweeps` is empty.
    """
    _save(path, lambda axes: _draw_speed_speedup(axes, sweeps, convention), _about(sweeps))


def speedup_accuracy(sweeps: Mapping[str, Sweep], path: PathLike, convention: str = "fastbert") -> None:
    """Accuracy against FLOPs speed-up: the trade itself (figure 3c).

    Raises:
        ValueError: `sweeps` is empty, or one of them was measured without labels.
    """
    _save(path, lambda axes: _draw_speedup_accuracy(axes, sweeps, convention), _about(sweeps, _BANDS, _SPEEDS))


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
    _write(figure, path, _about(sweeps, _BANDS, _SPEEDS))


def comparison(sweeps: Mapping[str, Sweep], path: PathLike, convention: str = "fastbert") -> None:
    """Accuracy against FLOPs speed-up, all curves above, and below one panel for each with its band and its speeds.

    Raises:
        ValueError: `sweeps` is empty, or one of them was measured without labels.
    """
    _required(sweeps, labels=True)
    lines = -(-len(sweeps) // 3)
    figure = Figure(figsize=(11, 4.2 + 2.7 * lines), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[4.2, 2.7 * lines])
    upper, lower = parts
    axes = upper.subplots()
    _style(axes)
    for number, (name, sweep) in enumerate(sweeps.items()):
        _trade_curve(axes, number, name, sweep, convention)
    _trade_axes(axes, sweeps, convention, bands=False)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    panels = lower.subplots(lines, 3, squeeze=False, sharex=True, sharey=True).flatten()
    for number, (panel, (name, sweep)) in enumerate(zip(panels, sweeps.items(), strict=False)):
        _style(panel)
        for other in sweeps.values():
            rows = sorted(other, key=lambda row: row.speedup[convention])
            panel.plot(
                [row.speedup[convention] for row in rows], [row.quality or 0.0 for row in rows], color="#D5DAE1",
                linewidth=1, zorder=1.2,
            )  # fmt: skip
        _band(panel, number, [(row.speedup[convention], row.interval) for row in _by_speedup(sweep, convention)], 1)
        _trade_curve(panel, number, name, sweep, convention)
        _trade_axes(panel, sweeps, convention, bands=True)
        panel.set(title=_plain(name), xlabel="", ylabel="")
        panel.tick_params(labelbottom=True)
    for panel in panels[len(sweeps) :]:
        panel.set_axis_off()
    for number, (panel, sweep) in enumerate(zip(panels, sweeps.values(), strict=False)):
        _mark_speeds(panel, [[]] * number + [_trade_points(sweep, convention)])
    _write(figure, path, _about(sweeps, _BANDS, _SPEEDS), lower)


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

    _save(path, draw, _about({sweep.criterion: sweep}), layers)


def exits_by_group(
    groups: Mapping[str, Sequence[int]], layers: int, path: PathLike, title: str, about: str = ""
) -> None:
    """Stacked bars: the share of each group's rows that left after each layer, with the mean layer above.

    Args:
        groups: exit layers (1 = after the first) of the rows of each group, such as the difficulties of a corpus.
        layers: number of layers of the model.
        path: the file.
        title: of the picture.
        about: which rows and which model.

    Raises:
        ValueError: no group, or an empty one.
    """
    if not groups or not all(len(exits) for exits in groups.values()):
        raise ValueError("groups: expected at least one group, each with at least one row")
    shares = [[list(exits).count(layer + 1) / len(exits) for layer in range(layers)] for exits in groups.values()]

    def draw(axes: Axes) -> None:
        _draw_shares(axes, [_plain(name.replace("_", " ")) for name in groups], shares, layers)
        for position, exits in enumerate(groups.values()):
            mean = sum(exits) / len(exits)
            axes.text(position, 1.015, f"mean {mean:.2f}", ha="center", va="bottom", fontsize=9, color=_GREY)
        axes.set_ylim(0, 1.08)
        axes.set(ylabel="rows", title=title)

    _save(path, draw, about, layers)


def wall_clock(rows: Sequence[BenchmarkRow], path: PathLike, about: str = "") -> None:
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
        marked = []
        for number, (name, points) in enumerate(curves.items()):
            points = sorted(points, key=lambda row: row.flops_speedup)
            _curve(axes, number, name, [p.flops_speedup for p in points], [p.speedup for p in points])
            marked.append([(p.flops_speedup, p.speedup, p.speed) for p in points])
        highest = max(max(row.flops_speedup, row.speedup) for row in rows) * 1.06
        axes.plot([0, highest], [0, highest], linestyle="--", color=_GREY, linewidth=1, zorder=1)
        axes.axhline(1, color=_GREY, linewidth=1, zorder=1)
        axes.text(highest * 0.985, 1.03, "full model at its best", ha="right", fontsize=8.5, color=_GREY)
        axes.set(xlim=(0, highest), ylim=(0, highest), xlabel="FLOPs speed-up", ylabel="measured speed-up")
        axes.set_title("Wall-clock beside FLOPs")
        axes.xaxis.set_major_formatter(_TIMES)
        axes.yaxis.set_major_formatter(_TIMES)
        _legend(axes, len(curves))
        _mark_speeds(axes, marked)

    _save(path, draw, _lines(f"{rows[0].rows:,} rows per pass" + (f" of {about}" if about else ""), _SPEEDS))


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
                label=f"{row.dtype}, speed {row.speed:g}", color=CURVES[number % len(CURVES)],
                linestyle=_LINES[number // len(CURVES) % len(_LINES)], linewidth=1.8, zorder=3,
            )  # fmt: skip
        for share in (0.5, 0.9, 0.99):
            axes.axhline(share, color=_GREY, linewidth=0.6, linestyle=":", zorder=1)
        axes.set(xlabel="milliseconds a sentence", ylabel="share of sentences answered by then", ylim=(0, 1.02))
        axes.set_xlim(left=0)
        axes.set_title("One sentence at a time")
        axes.yaxis.set_major_formatter(_PERCENT)
        _legend(axes, len(rows))

    _save(path, draw)


def accuracy_by_uncertainty(heads: Sequence[AccuracyByUncertainty], path: PathLike, about: str = "") -> None:
    """Accuracy over intervals of uncertainty at the bottom, a middle and the top head (figure 4); bars lie behind it.

    Of a regression it is the mean absolute error. The bars are the share of the head's rows in each interval; intervals
    with too few rows are hatched, without a quality.

    Raises:
        ValueError: no heads, or none with an accuracy.
    """
    if not any(value is not None for head in heads for value in head.qualities):
        raise ValueError(
            f"heads: got none with an accuracy; trace rows with labels to draw it, {FEWEST_ROWS} or more in an interval"
        )
    is_regression = any(value is not None for head in heads for value in head.errors)
    shown = [heads[index] for index in sorted({0, (len(heads) - 1) // 2, len(heads) - 1})]
    bounds = [pair[1] for head in shown for pair in head.bounds if pair is not None]
    highest = 1.05 * max(bounds, default=1.0) if is_regression else 1.02
    figure, panels = _panels(len(shown))
    for number, (axes, head) in enumerate(zip(panels, shown, strict=True)):
        _draw_share_of_rows(axes, head.counts, separate=is_regression)
        known = [
            (part, quality, bounds)
            for part, (quality, bounds) in enumerate(zip(head.qualities, head.bounds, strict=True))
            if quality is not None and bounds is not None
        ]
        centres = [(part + 0.5) / len(head.counts) for part, _, _ in known]
        name = "mean absolute error" if is_regression else "accuracy"
        if known:  # an empty curve has no extent, which confuses the layout
            _curve(axes, number, name, centres, [quality for _, quality, _ in known])
        for x, (_, _, (low, high)) in zip(centres, known, strict=True):
            axes.vlines(x, low, high, color=CURVES[number % len(CURVES)], linewidth=1.2, zorder=2.5)
        axes.set(xlabel="uncertainty", ylabel=name, title=f"Head after layer {head.layer}", xlim=(0, 1))
        axes.set_ylim(0, highest)
        if not is_regression:
            axes.yaxis.set_major_formatter(_PERCENT)
    note = f"Bars: share of the rows; lines at points: 95% confidence; hatched: fewer than {FEWEST_ROWS} rows"
    _write(figure, path, _lines(about, note))


def _draw_share_of_rows(axes: Axes, counts: Sequence[int], *, separate: bool) -> None:
    """Bars behind a curve, on an axis of their own where the curve's is no share."""
    bars = axes.twinx() if separate else axes
    if separate:
        bars.set_zorder(axes.get_zorder() - 1)
        axes.patch.set_visible(False)
        bars.spines[["top", "right"]].set_visible(False)
        bars.set(ylim=(0, 1.02), yticks=[])
    parts, total = len(counts), max(sum(counts), 1)
    centres = [(part + 0.5) / parts for part in range(parts)]
    bars.bar(centres, [count / total for count in counts], width=0.9 / parts, color="#D5DAE1")
    for part, count in enumerate(counts):
        if 0 < count < FEWEST_ROWS:
            axes.axvspan(
                part / parts, (part + 1) / parts, facecolor="none", edgecolor="#C9CDD4", hatch="///", linewidth=0
            )


def uncertainty_per_layer(
    reached: Mapping[float, Sequence[UncertaintyAtLayer]], path: PathLike, about: str = ""
) -> None:
    """The uncertainty of the rows that reach each layer, one panel for each speed (figure 6).

    Below the dashed line rows leave; above each layer stands the share of all rows that reach it.

    Raises:
        ValueError: no speeds.
    """
    if not reached:
        raise ValueError("reached: got no speeds, expected at least one")
    figure, panels = _panels(len(reached))
    for axes, (speed, heads) in zip(panels, reached.items(), strict=True):
        numbered = range(0, len(heads), -(-len(heads) // _MOST_NUMBERS))
        for position, head in enumerate(heads):
            _draw_violin(axes, position, head.counts)
            if position in numbered:
                share = head.rows / max(heads[0].rows, 1)
                axes.text(position, 1.02, f"{100 * share:.0f}%", ha="center", va="bottom", fontsize=8, color=_GREY)
        axes.axhline(speed, color=CURVES[1], linestyle="--", linewidth=1.2)
        axes.set_xticks(numbered, [str(heads[position].layer) for position in numbered])
        axes.set(xlabel="layer", ylabel="uncertainty", ylim=(0, 1.1), title=f"Speed {speed:g}")
    _write(
        figure,
        path,
        _lines(
            about,
            f"Below the dashed line rows leave; above a layer: who reaches it; hatched: fewer than {FEWEST_ROWS} rows",
        ),
    )


def training(points: Sequence[TrainingPoint], path: PathLike, about: str = "") -> None:
    """Accuracy, or correlation, and FLOPs on the dev rows over fine-tuning and self-distillation (figure 7).

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
    is_regression = any(point.is_regression for point in points)
    measure = "Pearson correlation" if is_regression else "accuracy"
    upper.set(ylabel=f"{measure}, dev", title="Fine-tuning, then self-distillation")
    if not is_regression:
        upper.yaxis.set_major_formatter(_PERCENT)
    upper.legend(frameon=False, fontsize=9)
    lower.set(xlabel="epoch", ylabel="FLOPs", ylim=(0, 1.08))
    lower.yaxis.set_major_formatter(_PERCENT)
    _write(figure, path, about)


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
    if sum(counts) < FEWEST_ROWS:
        axes.fill_betweenx(
            centres, left, right, facecolor="none", edgecolor=CURVES[0], alpha=0.6, hatch="////", linewidth=0
        )
        return
    axes.fill_betweenx(centres, left, right, color=CURVES[0], alpha=0.75, linewidth=0)


_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")
_TIMES = FuncFormatter(lambda value, _: f"{value:g}x")


def _draw_speed_accuracy(axes: Axes, sweeps: Mapping[str, Sweep]) -> None:
    for number, (name, sweep) in enumerate(_required(sweeps, labels=True).items()):
        _band(axes, number, [(row.speed, row.interval) for row in sweep], len(sweeps))
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
    _draw_full_model(axes, sweeps, convention)
    _legend(axes, len(sweeps))


def _draw_speedup_accuracy(axes: Axes, sweeps: Mapping[str, Sweep], convention: str) -> None:
    for number, (name, sweep) in enumerate(_required(sweeps, labels=True).items()):
        rows = _by_speedup(sweep, convention)
        _band(axes, number, [(row.speedup[convention], row.interval) for row in rows], len(sweeps))
        _trade_curve(axes, number, name, sweep, convention)
    _trade_axes(axes, sweeps, convention, bands=True)
    _legend(axes, len(sweeps))
    _mark_speeds(axes, [_trade_points(sweep, convention) for sweep in sweeps.values()])


def _by_speedup(sweep: Sweep, convention: str) -> list[SweepRow]:
    return sorted(sweep, key=lambda row: (row.speedup[convention], row.quality))


def _trade_curve(axes: Axes, number: int, name: str, sweep: Sweep, convention: str) -> None:
    rows = _by_speedup(sweep, convention)
    _curve(axes, number, name, [row.speedup[convention] for row in rows], [row.quality for row in rows])


def _trade_axes(axes: Axes, sweeps: Mapping[str, Sweep], convention: str, *, bands: bool) -> None:
    axes.set(xlabel=f"FLOPs speed-up ({convention})", ylabel=_quality(sweeps), title=f"Speed-up and {_quality(sweeps)}")
    axes.set_xlim(left=_leftmost(sweeps, convention))
    axes.xaxis.set_major_formatter(_TIMES)
    _quality_axis(axes, sweeps, bands=bands)


def _trade_points(sweep: Sweep, convention: str) -> list[tuple[float, float, float]]:
    return [(row.speedup[convention], row.quality or 0.0, row.speed) for row in sweep]


def _leftmost(sweeps: Mapping[str, Sweep], convention: str) -> float:
    """A little below the slowest speed: what lies between it and 0 is empty."""
    speedups = [row.speedup[convention] for sweep in sweeps.values() for row in sweep]
    return max(0.0, min(speedups) - 0.04 * max(speedups))


def _draw_full_model(axes: Axes, sweeps: Mapping[str, Sweep], convention: str) -> None:
    """A line at 1x, and shade below it where a speed is slower than that."""
    axes.axhline(1, color=_GREY, linewidth=1, linestyle="--", zorder=1)
    is_slower = any(sweep.slower_than_full(convention) for sweep in sweeps.values())
    axes.text(0.99, 1.04, "full model", transform=axes.get_yaxis_transform(), ha="right", fontsize=8.5, color=_GREY)
    if is_slower:
        axes.axhspan(0, 1, color="#B3261E", alpha=0.07, linewidth=0, zorder=0)
        axes.text(0.99, 0.9, "slower than the full model", transform=axes.get_yaxis_transform(), ha="right", va="top",
                  fontsize=8.5, color="#B3261E")  # fmt: skip


def _band(axes: Axes, number: int, points: Sequence[tuple[float, tuple[float, float] | None]], curves: int) -> None:
    known = [(x, *interval) for x, interval in points if interval is not None]
    if known:
        x, low, high = zip(*known, strict=True)
        colour = CURVES[number % len(CURVES)]
        # bands of many curves lie on each other
        axes.fill_between(
            x, low, high, color=colour, alpha=0.18 if curves == 1 else 0.3 / curves, linewidth=0, zorder=1.5
        )


def _mark_speeds(axes: Axes, curves: Sequence[Sequence[tuple[float, float, float]]]) -> None:
    """The speed beside points (x, y, speed), as many as stand apart from each other; round speeds first."""
    figure = axes.figure.figure  # the one around all panels; matplotlib 3.8 has no get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # only then it is known where a point lies
    taken: list[Bbox] = []
    candidates = [(number, *point) for number, points in enumerate(curves) for point in points]
    for number, x, y, speed in sorted(candidates, key=lambda point: (_roundness(point[3]), point[0], point[3])):
        left, bottom = axes.transData.transform((x, y))
        text, scale = f"{speed:.2g}", figure.dpi / 72
        # above the highest points stands the title
        is_below = bottom + 12.5 * scale > axes.bbox.y1
        low = bottom - 12.5 * scale if is_below else bottom + 3 * scale
        box = Bbox.from_bounds(left - 2.7 * len(text) * scale, low, 5.4 * len(text) * scale, 9.5 * scale)
        if any(box.overlaps(other) for other in taken):
            continue
        taken.append(box)
        axes.annotate(
            text, (x, y), xytext=(0, -4 if is_below else 4), textcoords="offset points", ha="center",
            va="top" if is_below else "bottom", fontsize=7.5, zorder=4,
            color=CURVES[number % len(CURVES)], path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip


def _roundness(speed: float) -> int:
    """0 for speeds that people name first, 1 for other tenths, 2 for the rest."""
    return 0 if speed in (0, 0.1, 0.3, 0.5, 0.8, 1) else 1 if abs(speed * 10 - round(speed * 10)) < 1e-9 else 2


def _draw_shares(axes: Axes, names: Sequence[str], shares: Sequence[Sequence[float]], layers: int) -> None:
    colours = layer_colours(layers)
    bottoms = [0.0] * len(names)
    for layer in range(layers):
        heights = [share[layer] for share in shares]
        bars = axes.bar(
            range(len(names)), heights, bottom=bottoms, width=0.8, color=colours[layer], label=f"layer {layer + 1}",
            edgecolor="white", linewidth=0.6,
        )  # fmt: skip
        for bar, height in zip(bars, heights, strict=True):
            if height >= 0.06:
                middle = bar.get_y() + height / 2
                axes.text(
                    bar.get_x() + bar.get_width() / 2, middle, f"{100 * height:.0f}%",
                    ha="center", va="center", fontsize=8, color=ink_on(colours[layer]),
                )  # fmt: skip
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.grid(False)
    handles, labels = axes.get_legend_handles_labels()
    # more than a dozen in one column would not fit beside the bars
    axes.legend(
        handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9,
        ncols=-(-layers // _MOST_IN_LEGEND_COLUMN),
    )  # fmt: skip


def _curve(axes: Axes, number: int, name: str, x: Sequence[float], y: Sequence[float | None]) -> None:
    axes.plot(
        x, y,  # type: ignore[arg-type]  # _required has made sure that no value is None
        label=_plain(name), color=CURVES[number % len(CURVES)], linestyle=_LINES[number // len(CURVES) % len(_LINES)],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4.5, linewidth=1.8, markeredgecolor="white", markeredgewidth=0.6, zorder=3, clip_on=False,
    )  # fmt: skip


def _quality_axis(axes: Axes, sweeps: Mapping[str, Sweep], *, bands: bool = True) -> None:
    """A flat curve must look flat: show at least two points of accuracy, or 0.02 of a correlation."""
    values = [
        value
        for sweep in sweeps.values()
        for row in sweep
        for value in (row.quality, *((row.interval or ()) if bands else ()))
        if value is not None
    ]
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


def _about(sweeps: Mapping[str, Sweep], *notes: str) -> str:
    """What stands below a picture: data, rows and model of each curve, once where they are the same, then the notes."""
    abouts = {name: f"{sweep.about}; {sweep.seq_len} tokens" for name, sweep in sweeps.items() if sweep.about}
    if len(set(abouts.values())) == 1:
        criterion = f"; criterion {next(iter(sweeps.values())).criterion}" if len(sweeps) == 1 else ""
        told = [next(iter(abouts.values())) + criterion]
    else:
        told = [f"{name}: {about}" for name, about in abouts.items()]
    drawn = [note for note in notes if note != _BANDS or _has_bands(sweeps)]
    note = "; ".join(drawn)
    return _lines(*told, note[:1].upper() + note[1:])


def _has_bands(sweeps: Mapping[str, Sweep]) -> bool:
    return any(row.interval is not None for sweep in sweeps.values() for row in sweep)


def _lines(*texts: str) -> str:
    return "\n".join(text for text in texts if text)


def _plain(name: str) -> str:
    """A name as matplotlib shows it unchanged: it takes dollars for formulas and hides what begins with "_"."""
    return (f" {name}" if name.startswith("_") else name).replace("$", r"\$")


def _legend(axes: Axes, curves: int) -> None:
    if curves > 1:
        axes.legend(frameon=False, fontsize=9)


def check_one_measure(is_regression: Mapping[str, bool]) -> None:
    """Raise ValueError where some of the curves are of a regression and others of classes: they share no axis."""
    regressions = [name for name, found in is_regression.items() if found]
    if 0 < len(regressions) < len(is_regression):
        classes = [name for name, found in is_regression.items() if not found]
        raise ValueError(
            f"sources: got a regression, {', '.join(regressions)}, beside classes, {', '.join(classes)}; correlations "
            "and accuracies share no axis, so show them apart"
        )


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


def _save(path: PathLike, draw: Callable[[Axes], None], about: str = "", legend_entries: int = 0) -> None:
    further_columns = max(-(-legend_entries // _MOST_IN_LEGEND_COLUMN) - 1, 0)
    figure = Figure(figsize=(6.8 + further_columns, 4.6), layout="constrained")
    axes = figure.subplots()
    _style(axes)
    draw(axes)
    _write(figure, path, about)


def _style(axes: Axes) -> None:
    axes.grid(True, color="#E2E2E2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _write(figure: Figure, path: PathLike, about: str, below: SubFigure | None = None) -> None:
    if about:
        (below or figure).supxlabel(_plain(about), x=0.01, ha="left", fontsize=8.5, color=_GREY)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DPI)
