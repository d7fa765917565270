"""`fastkd demo`: the whole story in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastkd.commands.options import (
    Device,
    Json,
    LabelColumn,
    LabelsAreOption,
    LayerList,
    PairColumn,
    TextColumn,
    parse_speeds,
    row_reading,
    whole_numbers,
    words,
)
from fastkd.commands.screen import quieten, screen_for


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for model, tables and pictures.")] = Path(
        "demo-output"
    ),
    data: Annotated[
        Path | None, typer.Option(help="Folder with train, test and, optionally, dev; default: a generated corpus.")
    ] = None,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    labels_are: LabelsAreOption = None,
    checkpoint: Annotated[
        str, typer.Option(help="Start from this checkpoint instead of the packaged MiniLM.")
    ] = "minilm",
    layers: LayerList = None,
    train_rows: Annotated[int | None, typer.Option(min=1, help="Train on at most this many rows.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Cut texts after this many tokens.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Epochs of fine-tuning.")] = None,
    distill_epochs: Annotated[float | None, typer.Option(help="Epochs of self-distillation.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows per training step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate of the backbone.")] = None,
    distill_learning_rate: Annotated[float | None, typer.Option(help="Learning rate of the early heads.")] = None,
    speeds: Annotated[
        str | None, typer.Option(help="Speeds of the sweep, such as 0,0.1,0.5, or a range first:last:step.")
    ] = None,
    bench_speeds: Annotated[str | None, typer.Option(help="Speeds to measure in seconds, as in 0.1,0.5.")] = None,
    bench_rows: Annotated[int | None, typer.Option(min=1, help="Rows per measured pass.")] = None,
    bench_repeats: Annotated[
        int | None, typer.Option(min=1, help="Number of interleaved passes; the median counts.")
    ] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Batch sizes to measure, as in 1,8,32.")] = None,
    dtypes: Annotated[str | None, typer.Option(help="Dtypes to measure: some of fp32, bf16, fp16, int8.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the corpus, the rows and the weights.")] = None,
    device: Device = "auto",
    start_over: Annotated[bool, typer.Option("--start-over", help="Discard the output of an earlier demo.")] = False,
    as_json: Json = False,
) -> None:
    """See it all: train, distil, sweep, measure, and get a model to use.

    Without --data it uses a generated corpus of easy to hard rows and takes
    about three minutes of processor time. With --data it uses your own
    files, at most 12,000 training rows of 64 tokens. To continue an interrupted
    demo, run it again.

    [bold]Examples[/]

    \b
      [cyan]fastkd demo[/]
      [cyan]fastkd demo --data data/ag_news -o ag_news-output[/]
      [cyan]fastkd demo --train-rows 2000 --bench-rows 64 -o quick[/]
    """
    with screen_for(as_json, reads=(data,)) as screen:
        quieten()

        from fastkd.commands.demo_story import demo_options, run_demo

        given: dict[str, Any] = {
            "checkpoint": checkpoint, "layers": layers, "train_rows": train_rows, "max_length": max_length,
            "epochs": epochs, "distill_epochs": distill_epochs, "batch_size": batch_size, "seed": seed,
            "learning_rate": learning_rate, "distill_learning_rate": distill_learning_rate,
            "bench_rows": bench_rows, "bench_repeats": bench_repeats, "device": device,
            "speeds": speeds and tuple(parse_speeds(speeds)),
            "bench_speeds": bench_speeds and tuple(parse_speeds(bench_speeds)),
            "batch_sizes": batch_sizes and tuple(whole_numbers(batch_sizes, "--batch-sizes")),
            "dtypes": dtypes and tuple(words(dtypes)),
        }  # fmt: skip
        chosen = {name: value for name, value in given.items() if value is not None}
        reading = row_reading(text_column, pair_column, label_column, labels_are).given()
        result = run_demo(screen, output, data, demo_options(data, chosen), start_over=start_over, reading=reading)
        screen.result(result.to_dict())
