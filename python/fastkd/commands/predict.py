"""`fastkd predict`: answers for files and pipes."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
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
        str,
        typer.Argument(
            metavar="INPUT",
            help="A .tsv, .csv, .jsonl, .parquet or .txt file, or a folder of .parquet or .jsonl; - reads a pipe.",
        ),
    ] = "-",
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="A .tsv or .jsonl file; for an input folder, another folder; - writes to the screen."
        ),
    ] = "-",
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    speed: Annotated[
        float | None,
        typer.Option(help="Speed from 0 (the full model) to 1 (leave at once); default: the model's."),
    ] = None,
    criterion: OneCriterion = None,
    top_n: TopN = None,
    exit_layers: Annotated[
        str | None,
        typer.Option(help="Let rows leave only after these layers, as in 2,4; default: all that have a head."),
    ] = None,
    input_format: Annotated[
        str | None,
        typer.Option("--format", help="tsv, csv, jsonl, parquet or text; default: by suffix, or by the first line."),
    ] = None,
    output_format: Annotated[str | None, typer.Option(help="tsv or jsonl; default: by suffix, else tsv.")] = None,
    bad_rows: Annotated[
        str, typer.Option(help="mark: answer the other rows and say what is wrong; stop: write nothing.")
    ] = "mark",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Run padded batches of this many rows; default: the stream engine."),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Read and sort this many rows by length at a time.")] = 1024,
    max_length: MaxLength = None,
    monitor: Annotated[
        str | None,
        typer.Option(
            help="Also run this share of the rows (0.01, 1%) to full depth, and report how often answers agree."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="For a folder: local (this process) or ray (pip install 'fastkd-kernels[ray]').")
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Workers of --engine ray; default: one per GPU, or without GPUs one per CPU."),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Address of a Ray cluster, or auto for a running one; default: start one on this machine."),
    ] = None,
    key: Annotated[str | None, typer.Option(help="For a folder: copy this column into the answers.")] = None,
    block_rows: Annotated[
        int, typer.Option(min=1, help="For a folder: rows per part that is answered and written.")
    ] = 16_384,
    dtype: DtypeOption = Dtype.fp32,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Answer every row of a file or pipe: label, probability, exit layer.

    Tables need a header with text_a (and text_b for pairs) or the columns that
    you name; JSONL needs the same keys; text files have one sentence per line.
    Answers come in input order. Memory is bounded, so the input may have any
    size; rows that stay wait at their layer for company. A bad row keeps its
    place, with the reason in the error column, and makes the exit code 1. Ctrl-C
    and SIGTERM keep the answers so far beside the output.

    A folder of .parquet or .jsonl files becomes a folder of the same kind, with
    one answer per row, in input order. Run the same command again to continue
    after the last finished part. --engine ray uses many processes or machines.

    [bold]Examples[/]

    \b
      [cyan]fastkd predict model reviews.tsv -o answers.tsv --speed 0.5[/]
      [cyan]echo "The choir sang the closing chorus." | fastkd predict model --speed 0.5[/]
      [cyan]zcat rows.jsonl.gz | fastkd predict model --output-format jsonl | gzip > a.gz[/]
      [cyan]fastkd predict model reviews/ -o answers/ --key id --engine ray --workers 8[/]
    """
    from_json = "jsonl" if as_json and output == "-" else None
    with screen_for(as_json, reads=(checkpoint, source)) as screen:
        quieten()

        from fastkd.exits.rule import check_speed
        from fastkd.inference.predict import check_files, predict_file
        from fastkd.model.loading import load_model

        if speed is not None:
            check_speed(speed)
        if Path(source).is_dir() or engine != "local":
            _check_folder_options(output, input_format, output_format, bad_rows, monitor)
            from fastkd.inference.folders import Answering

            options: dict[str, Any] = {
                "speed": speed, "criterion": criterion and criterion.value, "top_n": top_n,
                "exit_layers": layer_numbers(exit_layers), "batch_size": batch_size, "max_length": max_length,
                "window": window,
            }  # fmt: skip
            answering = Answering(checkpoint, output, device, dtype.value, text_column, pair_column, key, options)
            _predict_folder(
                screen, answering, source, engine=engine, workers=workers, address=ray_address, block_rows=block_rows
            )
            return
        watched_share = None if monitor is None else parse_share(monitor, "--monitor")
        check_files(source, output, input_format, output_format or from_json, bad_rows)
        model, tokenizer = load_model(checkpoint, device, dtype.value, on_choice=screen.say)
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


def _check_folder_options(
    output: str, input_format: str | None, output_format: str | None, bad_rows: str, monitor: str | None
) -> None:
    """Raise ValueError for what goes with one file only."""
    if output == "-":
        raise ValueError("output: got none; the answers to a folder go into a folder; name one with --output")
    given = {"--format": input_format, "--output-format": output_format, "--monitor": monitor}
    given["--bad-rows stop"] = bad_rows if bad_rows != "mark" else None
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: works for one file, but the input is a folder; leave it out")


def _predict_folder(screen: Screen, answering: Any, source: str, **how: Any) -> None:
    from fastkd.inference.folders import predict_folder

    answered = 0
    started = time.perf_counter()
    with (
        screen.progress("rows answered", None) as update,
        screen.warnings(),
        contextlib.redirect_stdout(screen.stdout),
    ):

        def tell(done: dict[str, Any]) -> None:
            nonlocal answered
            answered += done["rows"]
            update(answered, "")

        summary = predict_folder(answering, source, on_block=tell, **how)
    seconds = time.perf_counter() - started
    found = f"; {summary.found} of {summary.blocks} blocks were there already" if summary.found else ""
    screen.say(f"{summary.rows} rows in {seconds:.1f} s ({summary.rows / max(seconds, 1e-9):.0f} rows/s){found}")
    if summary.bad_rows:
        screen.say(f"[bold red]{summary.bad_rows} rows without an answer[/]; _fastkd/bad-rows-*.jsonl lists them")
    screen.result(summary.to_dict() | {"seconds": round(seconds, 3), "output": answering.output})
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
