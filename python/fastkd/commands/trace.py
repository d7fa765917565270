"""`fastkd trace`: what every head says about every row."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastkd.commands.options import (
    BatchSize,
    Checkpoint,
    Device,
    DrawSeed,
    Dtype,
    DtypeOption,
    Json,
    LabelColumn,
    LabelsAreOption,
    Limit,
    MaxLength,
    PairColumn,
    Split,
    TextColumn,
    quoted,
    row_reading,
)
from fastkd.commands.screen import quieten, screen_for, strong


def trace(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Argument(help="A .tsv, .csv, .jsonl or .parquet file, or a folder of splits.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Trace file to write.")] = Path("trace.safetensors"),
    split: Split = "test",
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    labels_are: LabelsAreOption = None,
    limit: Limit = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 32,
    seed: DrawSeed = 0,
    dtype: DtypeOption = Dtype.fp32,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Record every head's answer to every row, in one pass.

    Rows that leave early change nothing for the others, so this one pass
    answers every speed and every criterion.

    [bold]Examples[/]

    \b
      [cyan]fastkd trace model data/test.tsv -o test.safetensors[/]
      [cyan]fastkd trace model data --split dev --limit 2000[/]
    """
    with screen_for(as_json, reads=(checkpoint, data), output=output) as screen:
        quieten()

        from fastkd.commands.inputs import TraceOptions, make_trace

        options = TraceOptions(
            split, limit, max_length, batch_size, seed, device, dtype.value,
            row_reading(text_column, pair_column, label_column, labels_are),
        )  # fmt: skip
        recorded = make_trace(screen, checkpoint, data, options)
        recorded.save(output)
        layers = ", ".join(map(str, recorded.exit_layers))
        screen.out.print(f"{len(recorded)} rows, heads after layers {layers}: {strong(output)}")
        screen.next_step(f"fastkd sweep {quoted(output)}")
        screen.result(
            {"trace": str(output), "rows": len(recorded), "exit_layers": recorded.exit_layers}
            | {"max_length": recorded.max_length, "labelled": recorded.labels is not None}
        )
