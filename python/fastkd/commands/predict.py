"""`fastkd predict`: answers for files and pipes."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from fastkd.commands.options import (
    Checkpoint,
    Device,
    Dtype,
    DtypeOption,
    Json,
    MaxLength,
    OneCriterion,
    PairColumn,
    TextColumn,
    TopN,
    layer_numbers,
    parse_share,
)
from fastkd.commands.screen import Screen, quieten, screen_for


def predict(
    checkpoint: Checkpoint,
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="A .tsv, .csv, .jsonl, .parquet or .txt file; - reads a pipe.")
    ] = "-",
    output: Annotated[str, typer.Option("--output", "-o", help="A .tsv or .jsonl file; - writes to the screen.")] = "-",
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    speed: Annotated[
        float | None, typer.Option(help="0 (the full model) to 1 (leave at once); default: what the model says.")
    ] = None,
    criterion: OneCriterion = None,
    top_n: TopN = None,
    exit_layers: Annotated[
        str | None, typer.Option(help="Decide after these layers only, as in 2,4; default: all that have a head.")
    ] = None,
    input_format: Annotated[
        str | None,
        typer.Option("--format", help="tsv, csv, jsonl, parquet or text; default: by suffix, or by the first line."),
    ] = None,
    output_format: Annotated[str | None, typer.Option(help="tsv or jsonl; default: by suffix, else tsv.")] = None,
    bad_rows: Annotated[
        str, typer.Option(help="mark: answer the others and say what is wrong; stop: write nothing at all.")
    ] = "mark",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows padded to one batch; default: the stream engine gathers tokens.")
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Rows read and sorted by length together.")] = 1024,
    max_length: MaxLength = None,
    monitor: Annotated[
        str | None,
        typer.Option(help="Run this share of the rows (0.01, 1%) to full depth too, and report how often they agree."),
    ] = None,
    dtype: DtypeOption = Dtype.fp32,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Answer every row of a file or pipe: label, probability, exit layer.

    Tables need a header with text_a (and text_b for pairs) or the columns that
    you name, JSONL the same keys, text one sentence a line. Answers come in input order. Any size: memory is
    bounded, and rows that stay wait at their layer for company. A row that
    cannot be answered keeps its place, says why in the error column, and makes
    the exit code 1. Ctrl-C and SIGTERM keep the answers so far beside the output.

    [bold]Examples[/]

    \b
      [cyan]fastkd predict model reviews.tsv -o answers.tsv --speed 0.5[/]
      [cyan]echo "The choir sang the closing chorus." | fastkd predict model --speed 0.5[/]
      [cyan]zcat rows.jsonl.gz | fastkd predict model --output-format jsonl | gzip > a.gz[/]
    """
    from_json = "jsonl" if as_json and output == "-" else None
    with screen_for(as_json, reads=(checkpoint, source)) as screen:
        quieten()

        from fastkd.exits.rule import check_speed
        from fastkd.inference.predict import check_files, predict_file
        from fastkd.model.loading import load_model

        if speed is not None:
            check_speed(speed)
        watched_share = None if monitor is None else parse_share(monitor, "--monitor")
        check_files(source, output, input_format, output_format or from_json, bad_rows)
        model, tokenizer = load_model(checkpoint, device, dtype.value)
        exits: dict[str, Any] = {
            "speed": speed,
            "criterion": criterion and criterion.value,
            "top_n": top_n,
            "exit_layers": layer_numbers(exit_layers),
        }
        drift = None
        if watched_share is not None:
            from fastkd.exits.drift import DriftMonitor

            with screen.warnings():
                drift = DriftMonitor(model, watched_share, **exits)
        with (
            screen.progress("rows answered", None) as update,
            screen.warnings(),
            contextlib.redirect_stdout(screen.stdout),
        ):
            summary = predict_file(
                model, tokenizer, source, output,
                input_format=input_format, text_a=text_column, text_b=pair_column,
                output_format=output_format or from_json, bad_rows=bad_rows,
                on_progress=lambda rows: update(rows, ""),
                batch_size=batch_size, window=window, max_length=max_length,
                **(exits if drift is None else {"monitor": drift}),
            )  # fmt: skip
        _show_predictions(screen, summary, model.num_layers, output)
        found = {}
        if drift is not None:
            report = drift.report()
            found = {"drift": report.to_dict()}
            screen.say(f"[bold red]{report}[/]" if report.has_drifted else str(report))
        if output != "-":
            screen.result(summary.to_dict() | {"output": output} | found)
        if summary.bad_rows:
            raise typer.Exit(1)


def _show_predictions(screen: Screen, summary: Any, layers: int, output: str) -> None:
    rate = summary.rows / max(summary.seconds, 1e-9)
    average = "" if summary.average_layers is None else f", {summary.average_layers:.2f} of {layers} layers on average"
    rows = "1 row" if summary.rows == 1 else f"{summary.rows} rows"
    screen.say(f"{rows} in {summary.seconds:.1f} s ({rate:.0f} rows/s){average}")
    for sentence in summary.texts.sentences():
        screen.say(f"[bold yellow]warning:[/] {sentence}")
    if not summary.bad_rows:
        return
    screen.say(f"[bold red]{summary.bad_rows} rows without an answer[/]; the error column says why:")
    for problem in summary.problems:
        screen.err.print(f"  {problem}", markup=False)
    if summary.bad_rows > len(summary.problems):
        screen.say(f"  and {summary.bad_rows - len(summary.problems)} more")
