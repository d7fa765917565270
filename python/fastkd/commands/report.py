"""`fastkd report`: one page, and pictures for papers."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fastkd.commands.options import (
    Criteria,
    Json,
    LabelColumn,
    LabelsAreOption,
    PairColumn,
    TextColumn,
    TopN,
    curve_name,
    row_reading,
    source_names,
)
from fastkd.commands.screen import screen_for, strong


class PictureFormat(str, Enum):
    """How pictures are written."""

    png = "png"
    svg = "svg"
    pdf = "pdf"


def report(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Trace files, or folders with trace.safetensors, such as the output of fastkd demo."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write the page to.")] = Path("report.html"),
    bench: Annotated[Path | None, typer.Option(help="bench.json of fastkd bench.")] = None,
    log: Annotated[
        list[Path] | None, typer.Option(help="trainer_log.json or its model folder; repeat it for each stage.")
    ] = None,
    examples: Annotated[
        Path | None, typer.Option(help="The traced file; the page shows which of its texts left first and last.")
    ] = None,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    labels_are: LabelsAreOption = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Folder of a calibrated model, or a certificate as JSON.")
    ] = None,
    criterion: Criteria = None,
    top_n: TopN = None,
    speed: Annotated[float, typer.Option(help="Where the slider starts.")] = 0.5,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "What speed costs and wins",
    figures: Annotated[Path | None, typer.Option(help="Also write the figures to this folder, for papers.")] = None,
    picture_format: Annotated[
        PictureFormat, typer.Option("--format", help="Format of the files of --figures.")
    ] = PictureFormat.png,
    as_json: Json = False,
) -> None:
    """Write one page that shows what every speed costs and saves.

    A slider moves the speed on all charts: FastBERT's figures 3, 4, 6 and 7,
    seconds beside FLOPs, the texts that left first and last, the certificate.
    The page needs no network. From a folder it also takes what lies beside the
    trace: bench.json, and the logs and the certificate in finetuned and model.

    [bold]Examples[/]

    \b
      [cyan]fastkd report demo-output -o report.html[/]
      [cyan]fastkd report trace.safetensors --bench bench/bench.json --log tuned --log model[/]
      [cyan]fastkd report trace.safetensors --criterion entropy --criterion margin[/]
      [cyan]fastkd report ag_news-output sst2-output --figures paper --format svg[/]
    """
    with screen_for(as_json, reads=(*sources, bench, *(log or []), examples), output=output) as screen:
        from fastkd.exits.rule import check_speed
        from fastkd.report import read_source, write_page, write_pictures
        from fastkd.report.sources import Extras

        check_speed(speed)
        extras = Extras(
            bench, log or [], examples, certificate,
            row_reading(text_column, pair_column, label_column, labels_are).given(),
        )  # fmt: skip
        if extras and len(sources) > 1:
            raise ValueError(
                f"sources: got {len(sources)}, but --bench, --log, --examples and --certificate are for one; pass "
                "folders that contain these files next to their trace"
            )
        found = {
            name: read_source(path, name, extras)
            for name, path in zip(source_names([str(path) for path in sources]), sources, strict=True)
        }
        criteria = [item.value for item in criterion or ()]
        curves = {
            (curve_name(name, item, len(found), len(criteria)) if len(criteria) > 1 else name): (source, item)
            for name, source in found.items()
            for item in criteria or [source.trace.default_criterion]
        }
        write_page(curves, output, title=title, speed=speed, top_n=top_n)
        files = [output]
        screen.out.print(
            f"page: {strong(output)} ({output.stat().st_size / 1e6:.1f} MB, needs no network)", soft_wrap=True
        )
        if figures is not None:
            files += write_pictures(curves, figures, picture_format.value, top_n)
            screen.out.print(
                f"figures: {strong(figures)} ({escape(', '.join(path.name for path in files[1:]))})", soft_wrap=True
            )
        screen.result({"page": str(output), "files": [str(path) for path in files]})
