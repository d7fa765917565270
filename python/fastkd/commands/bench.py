"""`fastkd bench`: measured seconds beside FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastkd.commands.options import (
    Checkpoint,
    Device,
    DrawSeed,
    Json,
    LabelColumn,
    LabelsAreOption,
    MaxLength,
    OneCriterion,
    PairColumn,
    Split,
    TextColumn,
    TopN,
    parse_speeds,
    row_reading,
    whole_numbers,
    words,
)
from fastkd.commands.screen import benchmark_table, quieten, screen_for, show_written


def bench(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Argument(help="A .tsv, .csv, .jsonl or .parquet file, or a folder of splits.")],
    split: Split = "test",
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    labels_are: LabelsAreOption = None,
    speeds: Annotated[
        str, typer.Option(help="Numbers above 0; the full model is always measured.")
    ] = "0.1,0.3,0.5,0.8",
    batch_sizes: Annotated[str, typer.Option(help="Rows a batch.")] = "1,8,32",
    dtypes: Annotated[str, typer.Option(help="Some of fp32, bf16, fp16.")] = "fp32,bf16",
    criterion: OneCriterion = None,
    top_n: TopN = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a pass, drawn at random.")] = 512,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved passes; their median counts.")] = 5,
    max_length: MaxLength = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Processor threads; default: as many as torch takes.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON, CSV and picture.")] = Path("bench"),
    seed: DrawSeed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measured seconds beside FLOPs, against the full model at its best.

    First as a stream, which is what fastkd predict runs: rows in their order,
    nothing padded. Then in batches sorted by length. Both models get the same
    rows, dtype and device, in interleaved passes; the full model is ours at
    speed 0 or that of transformers, in the same batches, and for the stream in
    any batches or as a stream: whichever is fastest. Where early exit loses,
    the table says so.

    [bold]Examples[/]

    \b
      [cyan]fastkd bench model data/test.tsv[/]
      [cyan]fastkd bench model data --batch-sizes 32,128 --dtypes bf16 --device cuda[/]
    """
    with screen_for(as_json, reads=(checkpoint, data)) as screen:
        quieten()

        import torch

        from fastkd.commands.inputs import load_data
        from fastkd.inference.benchmark import benchmark_rows, passes
        from fastkd.model.loading import load_model
        from fastkd.report.results import write_benchmark
        from fastkd.training.progress import counted

        chosen, sizes, kinds = parse_speeds(speeds), whole_numbers(batch_sizes, "--batch-sizes"), words(dtypes)
        if threads is not None:
            torch.set_num_threads(threads)
        model, tokenizer = load_model(checkpoint, device)
        reading = row_reading(text_column, pair_column, label_column, labels_are)
        table = load_data(data, split, model, reading).sample(rows, seed)
        with counted(screen, "measuring", passes(chosen, sizes, kinds, repeats)) as on_progress:
            measured = benchmark_rows(
                model, tokenizer, table, max_length=max_length, speeds=chosen, batch_sizes=sizes, dtypes=kinds,
                criterion=criterion and criterion.value, top_n=top_n, repeats=repeats, on_progress=on_progress,
            )  # fmt: skip
        files = write_benchmark(measured, output)
        screen.out.print(benchmark_table(measured, screen.is_narrow))
        show_written(screen, output, files)
        screen.result(measured.to_dict() | {"files": [str(path) for path in files]})
