"""`fastkd tune`: length of distillation, temperatures and speed for one's own data, in stated minutes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastkd.commands.calibrate import calibrate
from fastkd.commands.config import Config, write_config
from fastkd.commands.options import (
    BatchSize,
    Bf16,
    DataOption,
    DevFile,
    Json,
    LabelColumn,
    LabelsAreOption,
    MaxLength,
    Overwrite,
    PairColumn,
    Resume,
    Seed,
    TextColumn,
    TrainFile,
    TrainRows,
    carried,
    parse_share,
    quoted,
    row_reading,
)
from fastkd.commands.screen import Screen, quality, quieten, screen_for, share, strong

if TYPE_CHECKING:
    from rich.table import Table

    from fastkd.training.tuning import Choice, Trial, TuneResult


def tune(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="Folder of a fine-tuned model.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the best model.")],
    data: DataOption = None,
    train: TrainFile = None,
    dev: DevFile = None,
    minutes: Annotated[float, typer.Option(help="Time budget for all trainings and their evaluation.")] = 10.0,
    max_drop: Annotated[
        str,
        typer.Option(
            help="Share of dev rows whose answer may differ from the full model's; for a regression, loss of "
            "correlation. The fastest speed within it wins."
        ),
    ] = "1%",
    speedup: Annotated[
        float | None,
        typer.Option(help="Instead of --max-drop: the best accuracy on dev rows at this many times fewer operations."),
    ] = None,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    labels_are: LabelsAreOption = None,
    train_rows: TrainRows = None,
    batch_size: BatchSize = 32,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of the heads; default: as fastkd distill.")
    ] = None,
    train_backbone: Annotated[
        bool, typer.Option("--train-backbone", help="Train the encoder too, as fastkd distill does with this option.")
    ] = False,
    max_length: MaxLength = None,
    bf16: Bf16 = None,
    seed: Seed = 42,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Step 2, tuned for you: training length, head temperatures and a speed, within a time budget.

    Distils several times from the same weights, each time about three times as
    long, fits a temperature for each head on the dev rows, and takes the speed
    that is best there. The output folder always has the best model so far, with
    that speed as its default. --resume continues an interrupted run. The dev rows
    chose the model, so calibrate on others.

    [bold]Examples[/]

    \b
      [cyan]fastkd tune tuned --data data -o model --minutes 10[/]
      [cyan]fastkd tune tuned --train unlabelled.jsonl --dev dev.tsv -o model --speedup 4[/]
    """
    with screen_for(as_json, reads=(checkpoint, data, train, dev)) as screen:
        quieten()

        from fastkd.commands.inputs import load_splits, tell_duplicates
        from fastkd.model.loading import load_model
        from fastkd.model.tokenizers import set_length
        from fastkd.training import tuning
        from fastkd.training.self_distillation import DistillOptions

        drop = parse_share(max_drop, "--max-drop")
        model, tokenizer = load_model(checkpoint, "cpu")
        folder = load_splits(
            data, train, dev, row_reading(text_column, pair_column, label_column, labels_are), model=model
        )
        if folder.dev is None:
            raise ValueError("--dev: tuning chooses by dev rows, and there are none; name some with --train and --dev")
        tell_duplicates(screen, folder)
        given: dict[str, Any] = {} if learning_rate is None else {"learning_rate": learning_rate}
        training = DistillOptions(
            batch_size=batch_size, max_length=set_length(model, tokenizer, max_length), bf16=bf16, seed=seed,
            train_backbone=train_backbone, **given,
        )  # fmt: skip
        options = tuning.TuneOptions(
            minutes=minutes, max_drop=drop, speedup=speedup, training=training, resume=resume, overwrite=overwrite
        )
        rows = folder.train if train_rows is None else folder.train.sample(train_rows, seed)
        lost = "of correlation lost" if model.config.num_labels == 1 else "changed"
        try:
            done = tuning.tune(
                model, rows, folder.dev, output, options, tokenizer, screen, lambda trial: _tell(screen, trial, lost)
            )
        except KeyboardInterrupt:
            if (output / tuning.TUNING_FILE).is_file():
                screen.say(f"the best model so far is {strong(output)}; --resume goes on")
            raise
        write_config(context, done.output_dir)
        screen.out.print(_table(done, f"{len(folder.dev)} dev rows", lost.split()[-1]))
        trial, best = done.best
        measure = "correlation" if model.config.num_labels == 1 else "accuracy"
        of_full = "" if best.quality is None else f", {measure} {_quality(model, best)} of {_full(model, trial)}"
        screen.out.print(f"{done.reason}; kept {trial.steps} steps, speed {best.speed:g}: {best.speedup:.2f}x{of_full}")
        if speedup is not None and best.speedup < speedup:
            screen.out.print(
                f"[bold yellow]slower than wanted:[/] no speed of any training reached {speedup:g}x; kept is the "
                "fastest"
            )
        screen.out.print(f"model: {strong(done.output_dir)}, which runs at speed {best.speed:g} by default")
        # the test rows of a folder are unseen
        unseen = "UNSEEN" if data is None or folder.test is None else quoted(data)
        again = carried(context, calibrate, without=["data", "seed"])
        screen.next_step(f"fastkd calibrate {quoted(output)} --data {unseen}{again} --set-default")
        screen.result({"model": str(done.output_dir)} | done.to_dict())


def _quality(model: Any, choice: Choice) -> str:
    is_regression = model.config.num_labels == 1
    return quality(None if is_regression else choice.quality, choice.quality if is_regression else None)


def _full(model: Any, trial: Trial) -> str:
    is_regression = model.config.num_labels == 1
    return quality(None if is_regression else trial.full_quality, trial.full_quality if is_regression else None)


def _tell(screen: Screen, trial: Trial, lost: str) -> None:
    """One line a training, for log files too."""
    shown = max(trial.choices, key=lambda choice: choice.speedup) if trial.kept is None else trial.choices[trial.kept]
    verdict = "no better" if trial.kept is None else "best so far"
    cut = ", cut by the budget" if trial.is_cut else ""
    screen.say(
        f"{trial.steps} steps in {trial.seconds:.0f} s{cut}: speed {shown.speed:g}, {shown.speedup:.2f}x, "
        f"{share(shown.changed) if lost == 'changed' else f'{shown.changed:.4f}'} {lost}; {verdict}"
    )


def _table(done: TuneResult, rows: str, lost: str) -> Table:
    from rich.table import Table

    table = Table(title=f"Tried on {rows}", title_justify="left")
    for heading in ("steps", "epochs", "seconds", "temperatures", "speed", "layers", "FLOPs", lost, "quality", ""):
        table.add_column(heading, justify="left" if heading in ("temperatures", "") else "right", no_wrap=True)
    best = done.best[0]
    for trial in done.trials:
        for number, choice in enumerate(trial.choices):
            first = (f"{trial.steps}{'*' if trial.is_cut else ''}", f"{trial.epochs:.3g}", f"{trial.seconds:.0f}")
            table.add_row(
                *(first if number == 0 else ("", "", "")),
                "-" if choice.temperatures is None else " ".join(f"{value:.2f}" for value in choice.temperatures),
                f"{choice.speed:g}", f"{choice.average_layers:.2f}", f"{choice.speedup:.2f}x", f"{choice.changed:.4f}",
                "-" if choice.quality is None else f"{choice.quality:.4f}",
                "kept" if trial is best and trial.kept == number else "",
            )  # fmt: skip
    if any(trial.is_cut for trial in done.trials):
        table.caption = "* cut by the budget"
    return table
