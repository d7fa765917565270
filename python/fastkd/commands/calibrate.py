"""`fastkd calibrate`: the fastest speed that keeps a guarantee."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

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
    from fastkd.encoders.configuration import EarlyExitConfig
    from fastkd.exits.certificate import Certificate
    from fastkd.exits.rank_calibration import RankCertificate


_OF_SPEEDS = ("guarantee", "criterion", "top_n", "path_trace", "tolerance", "set_default", "limit")
"""Options that say how single rows leave, or which of them are looked at."""


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
    source: Annotated[str, typer.Argument(help="A model folder (with --data), or a trace file.", show_default=False)],
    data: Annotated[
        Path | None, typer.Option(help="Rows that training has not seen: a file, or a folder of splits.")
    ] = None,
    split: Split = "test",
    max_drop: Annotated[
        str | None,
        typer.Option(
            help="Share of rows (--top-k: queries) that may get a different answer; default: 1%; --top-k: 5%."
        ),
    ] = None,
    confidence: Annotated[str, typer.Option(help="Confidence that this holds for new rows.")] = "95%",
    guarantee: Annotated[
        Guarantee,
        typer.Option(
            help="What to keep. consistency: the full model's answers, no labels needed; accuracy: its right answers."
        ),
    ] = Guarantee.consistency,
    method: Annotated[
        Method,
        typer.Option(
            help="How it holds. fixed-sequence: with confidence; conformal: on average; empirical: measured only.",
        ),
    ] = Method.fixed_sequence,
    criterion: Annotated[
        Criterion | None,
        criterion_option(
            "How certainty is measured; choose it on other rows. Default: entropy, or agreement for regression."
        ),
    ] = None,
    top_n: TopN = None,
    path_trace: Annotated[
        Path | None, typer.Option(help="Trace of other rows, from which each head learns its own threshold.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the certificate to this JSON file.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="For regression: answers that differ by at most this count as the same.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="With a trace file: the model folder that gets the certificate.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Certify the top K of a ranking; rows are pairs of query and document."),
    ] = None,
    recall: Annotated[
        str, typer.Option(help="With --top-k: the share of the full model's top K that a query must get.")
    ] = "100%",
    label: Annotated[
        str | None,
        typer.Option(help="With --top-k: the class whose probability ranks the documents; not for a regression."),
    ] = None,
    set_default: Annotated[bool, typer.Option("--set-default", help="Make this the model's default speed.")] = False,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    labels_are: LabelsAreOption = None,
    allow_seen: Annotated[
        bool, typer.Option("--allow-seen", help="Certify even if training has seen more than 1% of the rows.")
    ] = False,
    limit: Limit = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = 32,
    seed: DrawSeed = 0,
    dtype: DtypeOption = Dtype.fp32,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find the fastest speed that keeps a guarantee, and certify it.

    By default: with 95% confidence, at most 1% of new rows get an answer that
    differs from the full model's. The bound is exact for rows drawn like these
    and needs at least 299 rows. The certificate goes into the model's
    config.json.

    With --top-k, for a reranker: how early documents may leave so that the top
    K is the full model's in 95% of queries. The first text of a pair is the
    query; give each query all of its documents. It needs at least 118 queries.

    [bold]Examples[/]

    \b
      [cyan]fastkd calibrate model --data data/test.tsv[/]
      [cyan]fastkd calibrate model --data new.tsv --max-drop 0.5% --set-default[/]
      [cyan]fastkd calibrate reranker --data pairs.tsv --top-k 10[/]
    """
    with screen_for(as_json, reads=(source, data, path_trace), output=output) as screen:
        quieten()

        from fastkd.commands.inputs import TraceOptions, load_or_make_trace
        from fastkd.data.files import write_json
        from fastkd.exits import calibration
        from fastkd.exits.fingerprints import model_fingerprint
        from fastkd.exits.rank_calibration import calibrate_ranking
        from fastkd.exits.threshold_path import threshold_path
        from fastkd.exits.trace import ExitTrace
        from fastkd.model.loading import load_config, load_model

        if top_k is not None:
            _refuse_given(context, _OF_SPEEDS, "but with --top-k documents leave by their scores; leave it out")
        else:
            _refuse_given(context, ("recall", "label"), "but it is for rankings; pass --top-k too")
        drop = parse_share(max_drop or ("1%" if top_k is None else "5%"), "--max-drop")
        sure = parse_share(confidence, "--confidence")
        config = None if model is None else load_config(str(model))
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
        folder = Path(source) if Path(source).is_dir() else model
        with screen.warnings():
            if top_k is not None:
                config = config or (None if folder is None else load_config(str(folder)))
                certificate: Certificate | RankCertificate = calibrate_ranking(
                    trace, top_k, drop, sure, recall=1.0 if recall == "100%" else parse_share(recall, "--recall"),
                    method=method.value, label=_class_number(config, label), allow_seen=allow_seen,
                )  # fmt: skip
            else:
                certificate = calibration.calibrate(
                    trace, drop, sure, guarantee=guarantee.value, method=method.value, criterion=chosen, top_n=top_n,
                    path=path, tolerance=tolerance, allow_seen=allow_seen,
                )  # fmt: skip
        if folder is not None:
            weights = trace.source.model
            if folder != Path(source):
                weights = model_fingerprint(load_model(str(folder), "cpu", trace.source.dtype or None)[0])
            certificate.save(folder, weights, set_default=set_default)
        if output is not None:
            write_json(output, certificate.to_dict())
        _report(screen, certificate, folder, trace.num_layers, set_default, carried(context, predict))


def _refuse_given(context: typer.Context, names: Sequence[str], why: str) -> None:
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name != "DEFAULT":
            raise ValueError(f"{parameter.opts[0]}: got {context.params[parameter.name]}, {why}")


def _class_number(config: EarlyExitConfig | None, label: str | None) -> int | None:
    """The number of the class called `label`, or with that number."""
    if label is None:
        return None
    names = {} if config is None else {str(name): int(number) for number, name in (config.id2label or {}).items()}
    if label not in names and not label.isdecimal():
        raise ValueError(f"--label: got {label!r}, expected the number of a class, or one of {', '.join(names)}")
    return names.get(label, int(label) if label.isdecimal() else None)


def _report(
    screen: Screen,
    certificate: Certificate | RankCertificate,
    folder: Path | None,
    layers: int,
    set_default: bool,
    again: str,
) -> None:
    is_ranking = not hasattr(certificate, "speed")
    if is_ranking:
        _print_ranking(screen, cast("RankCertificate", certificate), layers)
    else:
        print_certificate(screen, cast("Certificate", certificate), layers)
    if folder is None:
        screen.say("not saved: name the model with --model MODEL to write the certificate into its config.json")
    else:
        screen.out.print(f"saved in {strong(folder / 'config.json')}", soft_wrap=True)
        value = getattr(certificate, "speed", None)
        speed = f" --speed {value:g}" if isinstance(value, float) and not set_default else ""
        if not is_ranking:
            screen.next_step(f"fastkd predict {quoted(folder)} INPUT{speed}{again} --monitor 1%")
    screen.result(certificate.to_dict() | {"saved": None if folder is None else str(folder)})


def _print_ranking(screen: Screen, certificate: RankCertificate, layers: int) -> None:
    screen.out.print(
        f"{strong(f'top {certificate.top_k}')}: [bold]{certificate.speedup:.2f}x[/] fewer operations at "
        f"{certificate.seq_len} tokens, {certificate.average_layers:.2f} of {layers} layers on average, "
        f"{certificate.documents:.4g} documents per query",
        soft_wrap=True,
    )
    screen.out.print(f"{certificate}", soft_wrap=True)
    screen.out.print(f"half-widths of the heads: {', '.join(f'{width:.4g}' for width in certificate.half_widths)}")
    screen.out.print(f"mean recall of the full model's top {certificate.top_k}: {share(certificate.mean_recall)}")
    if certificate.seen_as is not None:
        screen.out.print(f"[bold yellow]void:[/] these were the {certificate.seen_as} rows of the model")


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
