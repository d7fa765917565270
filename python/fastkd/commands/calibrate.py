"""`fastkd calibrate`: the fastest speed that keeps a guarantee."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastkd.commands.options import (
    BatchSize,
    Criterion,
    Device,
    DrawSeed,
    Dtype,
    DtypeOption,
    Json,
    LabelColumn,
    LabelsAreOption,
    Limit,
    MaxLength,
    PairColumn,
    Split,
    TextColumn,
    TopN,
    carried,
    criterion_option,
    parse_share,
    quoted,
    row_reading,
)
from fastkd.commands.predict import predict
from fastkd.commands.screen import Screen, quieten, screen_for, share, strong

if TYPE_CHECKING:
    from fastkd.exits.certificate import Certificate


class Guarantee(str, Enum):
    """What the speed may cost, see `fastkd.exits.guarantees`."""

    consistency = "consistency"
    accuracy = "accuracy"


class Method(str, Enum):
    """How the speed is chosen, see `fastkd.exits.guarantees`."""

    fixed_sequence = "fixed-sequence"
    conformal = "conformal"
    empirical = "empirical"


def calibrate(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(help="A model folder together with --data, or a trace file.", show_default=False)
    ],
    data: Annotated[
        Path | None, typer.Option(help="Rows that training has not seen: a file, or a folder of splits.")
    ] = None,
    split: Split = "test",
    max_drop: Annotated[str, typer.Option(help="Share of rows that may suffer, as in 0.01 or 1%.")] = "1%",
    confidence: Annotated[str, typer.Option(help="With which that holds for new rows.")] = "95%",
    guarantee: Annotated[
        Guarantee,
        typer.Option(
            help="consistency: the full model's answer, no labels needed; accuracy: a right answer of the full model."
        ),
    ] = Guarantee.consistency,
    method: Annotated[
        Method,
        typer.Option(
            help="fixed-sequence: with confidence; conformal: on average; empirical: measured only.",
        ),
    ] = Method.fixed_sequence,
    criterion: Annotated[
        Criterion | None,
        criterion_option(
            "How certainty is measured; choose it without these rows. Default: entropy, or agreement for regression."
        ),
    ] = None,
    top_n: TopN = None,
    path_trace: Annotated[
        Path | None, typer.Option(help="Trace of other rows, from which each head learns a threshold of its own.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the certificate too.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Regression: up to which difference two answers are the same.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="With a trace file: the model folder that gets the certificate.")
    ] = None,
    set_default: Annotated[
        bool, typer.Option("--set-default", help="The model runs at this speed where it is given none.")
    ] = False,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    labels_are: LabelsAreOption = None,
    allow_seen: Annotated[
        bool, typer.Option("--allow-seen", help="Certify even where training has seen over 1% of the rows.")
    ] = False,
    limit: Limit = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 32,
    seed: DrawSeed = 0,
    dtype: DtypeOption = Dtype.fp32,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """The fastest speed that keeps a guarantee, and a certificate for it.

    By default: with 95% confidence at most 1% of new rows get another answer
    than from the full model. Exact, for rows drawn like these; 299 rows is the
    least. The certificate is written into the model's config.json.

    [bold]Examples[/]

    \b
      [cyan]fastkd calibrate model --data data/test.tsv[/]
      [cyan]fastkd calibrate model --data new.tsv --max-drop 0.5% --set-default[/]
      [cyan]fastkd calibrate test.safetensors --model model --guarantee accuracy[/]
    """
    with screen_for(as_json, reads=(source, data, path_trace), output=output) as screen:
        quieten()

        from fastkd.commands.inputs import TraceOptions, load_or_make_trace
        from fastkd.data.files import write_json
        from fastkd.exits import calibration
        from fastkd.exits.fingerprints import model_fingerprint
        from fastkd.exits.threshold_path import threshold_path
        from fastkd.exits.trace import ExitTrace
        from fastkd.model.loading import load_config, load_model

        drop, sure = parse_share(max_drop, "--max-drop"), parse_share(confidence, "--confidence")
        if model is not None:
            load_config(str(model))
        chosen = None if criterion is None else criterion.value
        path = None
        if path_trace is not None:
            path = threshold_path(
                ExitTrace.load(path_trace), chosen, top_n, guarantee=guarantee.value, tolerance=tolerance
            )
        options = TraceOptions(
            split, limit, max_length, batch_size, seed, device, dtype.value,
            row_reading(text_column, pair_column, label_column, labels_are),
        )  # fmt: skip
        trace = load_or_make_trace(screen, source, data, options)
        with screen.warnings():
            certificate = calibration.calibrate(
                trace, drop, sure, guarantee=guarantee.value, method=method.value, criterion=chosen, top_n=top_n,
                path=path, tolerance=tolerance, allow_seen=allow_seen,
            )  # fmt: skip
        folder = Path(source) if Path(source).is_dir() else model
        if folder is not None:
            weights = trace.source.model
            if folder != Path(source):
                weights = model_fingerprint(load_model(str(folder), "cpu", trace.source.dtype or None)[0])
            certificate.save(folder, weights, set_default=set_default)
        if output is not None:
            write_json(output, certificate.to_dict())
        _report(screen, certificate, folder, trace.num_layers, set_default, carried(context, predict))


def _report(
    screen: Screen, certificate: Certificate, folder: Path | None, layers: int, set_default: bool, again: str
) -> None:
    print_certificate(screen, certificate, layers)
    if folder is None:
        screen.say("not saved: name the model with --model MODEL to write the certificate into its config.json")
    else:
        screen.out.print(f"saved in {strong(folder / 'config.json')}", soft_wrap=True)
        is_number = isinstance(certificate.speed, float)
        speed = "" if set_default or not is_number else f" --speed {certificate.speed:g}"
        screen.next_step(f"fastkd predict {quoted(folder)} INPUT{speed}{again} --monitor 1%")
    screen.result(certificate.to_dict() | {"saved": None if folder is None else str(folder)})


def print_certificate(screen: Screen, certificate: Certificate, layers: int) -> None:
    """The certificate for people."""
    speed = certificate.speed
    name = f"speed {speed:g}" if isinstance(speed, float) else f"place {certificate.position:g} on a threshold path"
    top_n = "" if certificate.top_n is None else f" {certificate.top_n}"
    screen.out.print(
        f"{strong(name)}, {certificate.criterion}{top_n}: [bold]{certificate.speedup:.2f}x[/] fewer operations at "
        f"{certificate.seq_len} tokens, {certificate.average_layers:.2f} of {layers} layers on average",
        soft_wrap=True,
    )
    if not isinstance(speed, float):
        screen.out.print(f"thresholds of the heads: {', '.join(f'{value:.4g}' for value in speed)}", soft_wrap=True)
    screen.out.print(f"{certificate}", soft_wrap=True)
    if certificate.accuracy is not None:
        full = share(certificate.full_accuracy)
        screen.out.print(f"accuracy on these rows {share(certificate.accuracy)}, of the full model {full}")
    if certificate.seen_as is not None:
        screen.out.print(f"[bold yellow]void:[/] these were the {certificate.seen_as} rows of the model")
    screen.out.print(
        f"calibrated {certificate.date} on rows {certificate.data[:19] or 'unknown'}, "
        f"weights {certificate.model[:12] or 'unknown'}",
        soft_wrap=True,
    )
