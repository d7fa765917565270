"""`fastkd distill`: the other heads learn from the last one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastkd.commands.config import Config, write_config
from fastkd.commands.options import (
    BatchSize,
    Bf16,
    DataOption,
    DevFile,
    Fsdp,
    Json,
    LabelColumn,
    LabelsAreOption,
    MaxLength,
    MaxSteps,
    Overwrite,
    PairColumn,
    Parity,
    Resume,
    Seed,
    TextColumn,
    TrainFile,
    TrainRows,
    carried,
    quoted,
    row_reading,
    training_options,
)
from fastkd.commands.screen import quieten, screen_for, show_training
from fastkd.commands.sweep import sweep


def distill(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="Folder of a fine-tuned model.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the finished model.")],
    data: DataOption = None,
    train: TrainFile = None,
    dev: DevFile = None,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    labels_are: LabelsAreOption = None,
    train_rows: TrainRows = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the training rows; default: 3, or as many as --min-steps needs.")
    ] = None,
    min_steps: Annotated[
        int,
        typer.Option(min=0, help="Take at least this many steps if --epochs is not given."),
    ] = 600,
    max_steps: MaxSteps = None,
    augmented_copies: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Copies of each row with some words replaced; default: up to 9 where rows are few; 0 with --epochs "
            "or --train-backbone.",
        ),
    ] = None,
    augmentation_rate: Annotated[float, typer.Option(help="Share of the words of a copy that are replaced.")] = 0.15,
    batch_size: BatchSize = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the heads.")] = 1e-3,
    temperature: Annotated[float, typer.Option(help="Soften the answers of both sides by this factor.")] = 1.0,
    direction: Annotated[
        str, typer.Option(help="forward: KL(last head || exit head); reverse: KL(exit head || last head).")
    ] = "forward",
    train_backbone: Annotated[
        bool,
        typer.Option(
            "--train-backbone",
            help="Train the encoder too: early heads get better, a few answers of the full model change, and it takes "
            "several times as long.",
        ),
    ] = False,
    backbone_learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate of the encoder with --train-backbone.")
    ] = 5e-5,
    learned_exit: Annotated[
        bool, typer.Option("--learned-exit", help="Also learn when to leave, for the criterion learned.")
    ] = False,
    head_temperatures: Annotated[
        str,
        typer.Option(
            help="Match each head's certainty on the dev rows to the last head's 'answers' or 'probabilities'; 'none': "
            "leave it."
        ),
    ] = "answers",
    states_gib: Annotated[
        float,
        typer.Option(
            min=0,
            help="Memory in GiB for the hidden states of the training rows, and of the dev rows; 0 recomputes them.",
        ),
    ] = 4.0,
    max_length: MaxLength = None,
    parity: Parity = None,
    bf16: Bf16 = None,
    seed: Seed = 42,
    fsdp: Fsdp = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Step 2: the other heads learn to answer like the last one; the rest is frozen.

    It needs no labels, so any text of the same kind helps. Afterwards rows can
    leave the model early. With --train-backbone the encoder learns along to give
    the same answers from lower layers.

    To train on several processes (a GPU each, or on the CPU), run torchrun
    --nproc-per-node 2 -m fastkd distill ... with the batch size per process.
    accelerate launch needs --multi_gpu; with --cpu it starts one process.

    [bold]Examples[/]

    \b
      [cyan]fastkd distill tuned --data data -o model[/]
      [cyan]fastkd distill tuned --train unlabelled.jsonl --dev dev.tsv -o model[/]
    """
    with screen_for(as_json, reads=(checkpoint, data, train, dev)) as screen:
        quieten()

        from fastkd.commands.inputs import load_splits, tell_duplicates
        from fastkd.model.loading import load_model
        from fastkd.model.tokenizers import set_length
        from fastkd.training import self_distillation
        from fastkd.training.progress import training_progress

        model, tokenizer = load_model(checkpoint, "cpu")
        folder = load_splits(
            data, train, dev, row_reading(text_column, pair_column, label_column, labels_are), model=model
        )
        tell_duplicates(screen, folder)
        limit = set_length(model, tokenizer, max_length)
        chosen = {
            "epochs": epochs, "min_steps": min_steps, "max_steps": max_steps, "batch_size": batch_size,
            "augmented_copies": augmented_copies, "augmentation_rate": augmentation_rate,
            "learning_rate": learning_rate, "temperature": temperature, "direction": direction,
            "train_backbone": train_backbone, "backbone_learning_rate": backbone_learning_rate,
            "learned_exit": learned_exit, "head_temperatures": head_temperatures, "states_gib": states_gib,
            "bf16": bf16, "seed": seed, "fsdp": fsdp, "resume": resume, "overwrite": overwrite,
        }  # fmt: skip
        options = training_options(self_distillation.DistillOptions, parity, context, chosen, limit)
        rows = folder.train if train_rows is None else folder.train.sample(train_rows, seed)
        with training_progress(screen, "distilling") as callback:
            done = self_distillation.distill(model, rows, folder.dev, output, options, tokenizer, [callback])
        if screen.is_first:
            write_config(context, done.output_dir)
        show_training(screen, done)
        target = f"{quoted(data)} --split dev" if data and folder.dev is not None else quoted(dev or data or train)
        screen.next_step(
            f"fastkd sweep {quoted(output)} --data {target}{carried(context, sweep, without=['data', 'seed'])}"
        )
