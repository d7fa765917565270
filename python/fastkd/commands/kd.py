"""`fastkd kd`: a student learns from a teacher."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from fastkd.commands.config import Config, write_config
from fastkd.commands.options import (
    Bf16,
    DataOption,
    DevFile,
    Epochs,
    Fsdp,
    Json,
    LabelColumn,
    LabelNames,
    LabelsAreOption,
    MaxLength,
    MaxSteps,
    NumLabels,
    Overwrite,
    PairColumn,
    Resume,
    Seed,
    TextColumn,
    TrainFile,
    TrainRows,
    carried,
    quoted,
    row_reading,
    words,
)
from fastkd.commands.screen import quieten, screen_for, strong
from fastkd.data.yaml_text import load_yaml
from fastkd.kd.catalogue import CATALOGUE


def kd(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the finished student.")],
    teacher: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a fine-tuned classifier; not needed with --method none."),
    ] = None,
    student: Annotated[
        str,
        typer.Option(
            help="layers:3 (evenly spaced layers of the teacher), layers:3:first, layers:0,2,4, bilstm, gated-cnn, "
            "the folder of any encoder, or minilm for the packaged one."
        ),
    ] = "layers:3",
    method: Annotated[
        str,
        typer.Option(help=f"{', '.join(CATALOGUE)}; the docs explain each."),
    ] = "universal-il",
    argument: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Set an argument of the method's loss, as in kd_weight=0.5; repeatable.",
        ),
    ] = None,
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
    regression: Annotated[bool, typer.Option(help="Labels are numbers; with a teacher this is automatic.")] = False,
    metric: Annotated[
        str | None,
        typer.Option(help="Choose the best weights on the dev rows by accuracy, f1, matthews, pearson or spearman."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Keep the teacher's answers in this folder for later runs; default: for this run only."),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Run the teacher in every step, without a cache.")
    ] = False,
    assistants: Annotated[
        str | None,
        typer.Option(help="For takd: the models between teacher and student, as in layers:5,layers:4; default: one."),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(help="How to pool the tokens of a layer: cls, mean, max or last; default: the method's."),
    ] = None,
    teacher_layers: Annotated[
        str | None,
        typer.Option(help="Path of the teacher's list of layers, as in encoder.layers; default: found automatically."),
    ] = None,
    student_layers: Annotated[
        str | None,
        typer.Option(
            help="The same for the student; default: the teacher's if the student is cut from it, else found."
        ),
    ] = None,
    freeze_embeddings: Annotated[
        bool, typer.Option("--freeze-embeddings", help="Do not train word embeddings.")
    ] = False,
    epochs: Epochs = 3.0,
    max_steps: MaxSteps = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the student's body.")] = 5e-5,
    head_factor: Annotated[float, typer.Option(help="Factor on the learning rate of new parts.")] = 10.0,
    max_length: MaxLength = None,
    bf16: Bf16 = None,
    seed: Seed = 42,
    fsdp: Fsdp = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Distil a teacher into a smaller model, by Universal-KD or any rival.

    The student is a plain checkpoint: AutoModelForSequenceClassification and
    pipeline load it. The teacher answers each row once. --resume continues a
    killed run and reaches the same weights.

    To train on several processes (a GPU each, or on the CPU), run torchrun
    --nproc-per-node 2 -m fastkd kd ... with the batch size per process.
    accelerate launch needs --multi_gpu; with --cpu it starts one process.

    [bold]Examples[/]

    \b
      [cyan]fastkd kd --method none --student minilm --data data -o teacher[/]
      [cyan]fastkd kd --teacher teacher --student layers:3 --data data -o student[/]
      [cyan]fastkd kd --method kd --teacher teacher --student bilstm --data data -o small[/]
      [cyan]fastkd kd --teacher teacher --data data --set attn_scale=rsqrt_c -o second[/]
    """
    with screen_for(as_json, reads=(teacher, student, data, train, dev)) as screen:
        arguments = parsed_arguments(argument or [])
        if cache is not None and no_cache:
            raise ValueError("--no-cache: got --cache too; give one of them")

        quieten()

        from fastkd.commands.inputs import load_splits, tell_duplicates
        from fastkd.kd.methods import method_of
        from fastkd.kd.options import KDOptions
        from fastkd.kd.students import is_made_of_teacher
        from fastkd.kd.teacher import Teacher
        from fastkd.kd.trainer import KDTrainer
        from fastkd.model.checkpoints import checkpoint_path
        from fastkd.training.progress import progress_callback

        pool = pool or method_of(method).pool
        loaded = None if teacher is None else Teacher.load(checkpoint_path(teacher), pool, teacher_layers)
        if regression:
            num_labels = 1
        folder = load_splits(
            data, train, dev, row_reading(text_column, pair_column, label_column, labels_are), num_labels=num_labels,
            label_names=None if labels is None else words(labels), model=None if loaded is None else loaded.model,
        )  # fmt: skip
        tell_duplicates(screen, folder)
        name = student if is_made_of_teacher(student) else checkpoint_path(student)
        options: dict[str, Any] = {
            "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size, "learning_rate": learning_rate,
            "head_learning_rate_factor": head_factor, "bf16": bf16, "seed": seed, "progress": False, "pool": pool,
            "fsdp": fsdp, "resume": resume, "overwrite": overwrite, "arguments": arguments,
            "freeze_embeddings": freeze_embeddings, "student_layers": student_layers,
            "metric": () if metric is None else tuple(words(metric)),
            "assistants": () if assistants is None else specs_of_students(assistants),
        }  # fmt: skip
        trainer = KDTrainer(
            loaded, name, method, KDOptions(**options), cache=cache if cache is not None else not no_cache
        )
        trainer.set_length(max_length)
        rows = folder.train if train_rows is None else folder.train.sample(train_rows, seed)
        with screen.progress("distilling", None) as update:
            done = trainer.train(
                rows, folder.dev, output, [progress_callback(update, "distilling")],
                on_teacher=lambda answered, total: update(answered, "asking the teacher", total),
            )  # fmt: skip
        if screen.is_first:
            write_config(context, done.output_dir)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in done.metrics.items() if name != "score")
        screen.out.print(f"{done.steps} steps in {done.seconds:.0f} s; {shown or 'no dev rows, so nothing evaluated'}")
        screen.out.print(f"student: {strong(done.output_dir)}")
        screen.next_step(
            f"fastkd kd --teacher {quoted(output)}{carried(context, kd)} -o smaller"
            if method == "none"
            else "fastkd kd-table GRID.yaml -o table"
        )
        screen.result(
            {"student": str(done.output_dir), "method": method, "steps": done.steps, "metrics": done.metrics}
            | {"seconds": round(done.seconds, 2), "train_loss": done.train_loss}
        )


def specs_of_students(text: str) -> tuple[str, ...]:
    """The specs between the commas of a text; a comma before a digit is in a list of layers, as in layers:0,2,4."""
    return tuple(spec.strip() for spec in re.split(r",(?!\s*\d)", text) if spec.strip())


def parsed_arguments(texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs, values as YAML reads them.

    Raises:
        ValueError: a text of another form.
    """
    arguments = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name.strip():
            raise ValueError(f"--set: got {text!r}, expected NAME=VALUE, as in kd_weight=0.5")
        arguments[name.strip()] = load_yaml(value)
    return arguments
