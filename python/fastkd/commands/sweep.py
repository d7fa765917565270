"""`fastkd sweep`: accuracy and FLOPs at every speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastkd.commands.options import (
    BatchSize,
    Criteria,
    Device,
    DrawSeed,
    Json,
    LabelColumn,
    LabelsAreOption,
    Limit,
    MaxLength,
    PairColumn,
    Split,
    TextColumn,
    TopN,
    curve_name,
    parse_speeds,
    row_reading,
    source_names,
)
from fastkd.commands.screen import quieten, screen_for, show_written, sweep_table, tell_slower

DEFAULT_SPEEDS = "0:1:0.1"


def sweep(
    sources: Annotated[
        list[str],
        typer.Argument(help="Trace files, or one model folder with --data. Several traces share the pictures."),
    ],
    data: Annotated[Path | None, typer.Option(help="Rows to sweep a model on: a file, or a folder of splits.")] = None,
    split: Split = "test",
    speeds: Annotated[str, typer.Option(help="Speeds such as 0,0.1,0.5, or a range first:last:step.")] = DEFAULT_SPEEDS,
    criterion: Criteria = None,
    top_n: TopN = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Count FLOPs for this many tokens; default: the longest traced row.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for CSV and pictures.")] = Path("sweep"),
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    labels_are: LabelsAreOption = None,
    limit: Limit = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 32,
    seed: DrawSeed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Show accuracy and FLOPs at every speed: table, CSV and FastBERT's figure 3.

    A row leaves at the first head whose uncertainty is at most the speed;
    speed 0 is the full model.

    [bold]Examples[/]

    \b
      [cyan]fastkd sweep trace.safetensors[/]
      [cyan]fastkd sweep trace.safetensors --criterion entropy --criterion margin[/]
      [cyan]fastkd sweep model --data data/test.tsv --speeds 0,0.1,0.3,0.5,0.8[/]
    """
    with screen_for(as_json, reads=(*sources, data)) as screen:
        quieten()

        from fastkd.commands.inputs import TraceOptions, load_or_make_trace
        from fastkd.report.results import write_sweeps

        chosen = parse_speeds(speeds)
        criteria = [item.value for item in criterion or ()]
        options = TraceOptions(
            split, limit, max_length, batch_size, seed, device,
            reading=row_reading(text_column, pair_column, label_column, labels_are),
        )  # fmt: skip
        traces = {
            name: load_or_make_trace(screen, source, data, options)
            for name, source in zip(source_names(sources), sources, strict=True)
        }
        sweeps = {
            curve_name(name, item, len(traces), len(criteria)): recorded.sweep(
                chosen, item, top_n if item == "top_n" else None, seq_len=seq_len
            )
            for name, recorded in traces.items()
            for item in criteria or [recorded.default_criterion]
        }
        files = write_sweeps(sweeps, output)
        for name, table in sweeps.items():
            screen.out.print(sweep_table(table, name, screen.is_narrow))
            tell_slower(screen, name, table)
        show_written(screen, output, files)
        screen.result(
            {
                "sweeps": {name: table.to_dicts() for name, table in sweeps.items()},
                "slower_than_full_model": {name: table.slower_than_full() for name, table in sweeps.items()},
                "files": [str(f) for f in files],
            }
        )
