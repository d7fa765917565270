"""`fastkd compare`: every exit criterion on the plane of speed-up and quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastkd.commands.options import Json
from fastkd.commands.screen import quality, screen_for, show_written

if TYPE_CHECKING:
    from fastkd.exits.sweep import Sweep

DROPS = (0.001, 0.005, 0.01)
"""Losses of accuracy at which the table looks."""


def compare(
    trace: Annotated[Path, typer.Argument(help="Trace of labelled rows.", show_default=False)],
    reliability: Annotated[
        Path | None,
        typer.Option(
            help="Trace of other rows, from which the criterion performance learns; default: half of the rows."
        ),
    ] = None,
    top_n: Annotated[int, typer.Option(min=2, help="How many classes the top_n criterion reads.")] = 2,
    patience: Annotated[int, typer.Option(min=1, help="Heads in a row that must be certain, for pcee_bert.")] = 2,
    points: Annotated[int, typer.Option(min=2, help="Show at most this many speeds per criterion.")] = 30,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Count FLOPs for this many tokens; default: the longest traced row.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for CSV and picture.")] = Path("compare"),
    as_json: Json = False,
) -> None:
    """Compare every exit criterion on the same rows: table, CSV, picture.

    For several losses of accuracy, the table has the largest speed-up (FLOPs)
    that each criterion reaches on these rows. That is a measurement, not a
    promise: choose a criterion here, and calibrate it on other rows.

    [bold]Examples[/]

    \b
      [cyan]fastkd compare dev.safetensors[/]
      [cyan]fastkd compare test.safetensors --reliability dev.safetensors -o picture[/]
    """
    with screen_for(as_json, reads=(trace, reliability)) as screen:
        from rich.table import Table

        from fastkd.exits import comparison
        from fastkd.exits.trace import ExitTrace
        from fastkd.report.results import write_comparison

        rows = ExitTrace.load(trace)
        if rows.labels is None:
            raise ValueError(f"trace: the rows of {trace} have no labels, so there is no accuracy to compare")
        others = None if reliability is None else ExitTrace.load(reliability)
        swept = comparison.compare(rows, others, top_n=top_n, patience=patience, points=points, seq_len=seq_len)
        files = write_comparison(swept, output)
        first = next(iter(swept.values()))
        full = first[0]
        is_regression = full.pearson is not None
        table = Table(
            title=f"{sum(full.exits_per_layer)} rows, FLOPs at {first.seq_len} tokens, full model "
            f"{quality(full.accuracy, full.pearson)}",
            title_justify="left",
        )
        for heading in ("criterion", *(_heading(drop, is_regression) for drop in DROPS)):
            table.add_column(heading, justify="left" if heading == "criterion" else "right", no_wrap=True)
        best = {name: {f"{drop:g}": _fastest(sweep, drop) for drop in DROPS} for name, sweep in swept.items()}
        for name, found in best.items():
            table.add_row(name, *(f"{value:.2f}x" for value in found.values()))
        screen.out.print(table)
        show_written(screen, output, files)
        screen.next_step("fastkd calibrate MODEL --data DATA --criterion CRITERION")
        screen.result(_result(swept, best, files))


def _heading(drop: float, is_regression: bool) -> str:
    return f"correlation -{drop:g}" if is_regression else f"accuracy -{100 * drop:g}%"


def _fastest(sweep: Sweep, drop: float) -> float:
    """The largest speed-up that loses at most `drop` against speed 0, which comes first."""
    full = sweep[0].quality
    assert full is not None
    return max(row.speedup["fastbert"] for row in sweep if (row.quality or 0.0) >= full - drop)


def _result(swept: dict[str, Sweep], best: dict[str, Any], files: list[Path]) -> dict[str, Any]:
    return {
        "sweeps": {name: [row | {"criterion": name} for row in sweep.to_dicts()] for name, sweep in swept.items()},
        "speedup_at_drop": best,
        "files": [str(path) for path in files],
    }
