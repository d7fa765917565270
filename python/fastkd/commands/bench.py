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
from fastkd.commands.screen import benchmark_table, latency_table, quieten, screen_for, show_written


def bench(
    checkpoint: Checkpoint,
    data: Annotated[
        Path | None,
        typer.Argument(
            help="A .tsv, .csv, .jsonl or .parquet file, or a folder of splits; optional with --latency, "
            "which then uses texts that come with fastkd.",
            show_default=False,
        ),
    ] = None,
    split: Split = "test",
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    labels_are: LabelsAreOption = None,
    speeds: Annotated[
        str, typer.Option(help="Speeds above 0 to measure; the full model is always measured.")
    ] = "0.1,0.3,0.5,0.8",
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes, as in 1,8,32.")] = "1,8,32",
    dtypes: Annotated[str, typer.Option(help="Dtypes to measure: some of fp32, bf16, fp16, int8.")] = "fp32,bf16",
    criterion: OneCriterion = None,
    top_n: TopN = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rows per pass, drawn at random; default: 512, or 1000 with --latency.", show_default=False
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Number of interleaved passes; the median counts.")] = 5,
    max_length: MaxLength = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads; default: torch's choice.")] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Time single sentences instead, one call each: p50, p90 and p99.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON, CSV and picture.")] = Path("bench"),
    seed: DrawSeed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure seconds beside FLOPs, against the full model at its best.

    It first times a stream, as fastkd predict runs it: rows in input order,
    without padding. Then it times batches sorted by length. Both models get the
    same rows, dtype and device, in interleaved passes. The full model is ours at
    speed 0 or that of transformers, whichever is faster: for batches in the same
    batches, for the stream in any batches or as a stream. The table says where
    early exit loses.

    With --latency each sentence is a call of its own, as behind a server, at
    speed 0 and each of --speeds. It shows the time within which half, nine
    tenths and 99 of 100 calls finish, and the share of Python in a call. New
    lengths count like any other, so p99 / p50 shows whether the first call of a
    length is slow.

    [bold]Examples[/]

    \b
      [cyan]fastkd bench model data/test.tsv[/]
      [cyan]fastkd bench model data --batch-sizes 32,128 --dtypes bf16 --device cuda[/]
      [cyan]fastkd bench model --latency --speeds 0.3,0.5 --dtypes fp32,bf16,int8[/]
    """
    with screen_for(as_json, reads=(checkpoint, data)) as screen:
        quieten()

        import torch

        from fastkd.commands.inputs import load_data
        from fastkd.inference.benchmark import benchmark_rows, passes
        from fastkd.inference.latency import SENTENCES, built_in_texts, measure_latency
        from fastkd.model.loading import load_model
        from fastkd.model.tracing import data_name
        from fastkd.report.results import write_benchmark, write_latency
        from fastkd.training.progress import counted

        if data is None and not latency:
            raise ValueError(
                "data: got none; name a file or a folder of splits, or measure single calls with --latency"
            )
        chosen, sizes, kinds = parse_speeds(speeds), whole_numbers(batch_sizes, "--batch-sizes"), words(dtypes)
        if threads is not None:
            torch.set_num_threads(threads)
        model, tokenizer = load_model(checkpoint, device)
        count = rows or (SENTENCES if latency else _ROWS)
        if data is None:
            table = built_in_texts(count)
        else:
            reading = row_reading(text_column, pair_column, label_column, labels_are)
            table = load_data(data, split, model, reading).sample(count, seed)
        if latency:
            with counted(screen, "measuring", len(table)) as on_progress:
                called = measure_latency(
                    model, tokenizer, table, max_length=max_length, speeds=sorted({0.0, *chosen}), dtypes=kinds,
                    criterion=criterion and criterion.value, top_n=top_n, on_progress=on_progress,
                )  # fmt: skip
            files = write_latency(called, output)
            screen.out.print(latency_table(called, screen.is_narrow))
            show_written(screen, output, files)
            screen.result(called.to_dict() | {"files": [str(path) for path in files]})
            return
        with counted(screen, "measuring", passes(chosen, sizes, kinds, repeats)) as on_progress:
            measured = benchmark_rows(
                model, tokenizer, table, max_length=max_length, speeds=chosen, batch_sizes=sizes, dtypes=kinds,
                criterion=criterion and criterion.value, top_n=top_n, repeats=repeats, on_progress=on_progress,
            )  # fmt: skip
        files = write_benchmark(measured, output, f"{data_name(table.source)}; model {Path(checkpoint).name}")
        screen.out.print(benchmark_table(measured, screen.is_narrow))
        show_written(screen, output, files)
        screen.result(measured.to_dict() | {"files": [str(path) for path in files]})


_ROWS = 512
"""Of a pass where nothing else is asked for."""
