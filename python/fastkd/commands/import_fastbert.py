"""`fastkd import-fastbert`: checkpoints of the official FastBERT code."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastkd.commands.flags import FLAGS
from fastkd.commands.options import (
    Json,
    Overwrite,
    quoted,
    words,
)
from fastkd.commands.screen import screen_for, strong


class Pooling(str, Enum):
    """Which positions the official heads read, see `fastkd.model.import_fastbert`."""

    first = "first"
    last = "last"
    max = "max"
    mean = "mean"


def import_fastbert(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="The .bin file that run_fastbert.py or the package fastbert saved.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the converted model.")],
    vocab: Annotated[
        Path | None, typer.Option(help="The vocab.txt of its training; without it no tokenizer is saved.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="Names of the classes 0, 1, 2... as in negative,positive.")] = None,
    attention_heads: Annotated[
        int | None, typer.Option(min=1, help="heads_num of its configuration; default: hidden size / 64.")
    ] = None,
    pooling: Annotated[
        Pooling | None, typer.Option(help="--pooling of its training; default: first, the only one that converts.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="--seq_length of its training: texts are cut after it; default: 128.")
    ] = None,
    lower_case: Annotated[
        bool, typer.Option("--lower-case/--cased", help="Lower-case texts or not; the official code does.")
    ] = True,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint of the official FastBERT (UER format).

    The converted model gives the official logits to about 1e-5, and rows leave
    at the same layers. It accounts for UER's layer norm and tokenises as UER
    does (no [SEP] after a single text, pairs cut from the right).

    [bold]Examples[/]

    \b
      [cyan]fastkd import-fastbert fastbert.bin --vocab vocab.txt -o model[/]
      [cyan]fastkd import-fastbert ag_news.bin --vocab vocab.txt -o model --labels world,sports,business,science[/]
    """
    with screen_for(as_json, reads=(checkpoint, vocab)) as screen:
        from fastkd.model import import_fastbert as official

        done = official.import_fastbert(
            checkpoint, output, vocab=vocab, label_names=None if labels is None else words(labels),
            num_attention_heads=attention_heads, pooling=None if pooling is None else pooling.value,
            max_length=max_length, lower_case=lower_case, overwrite=overwrite,
        )  # fmt: skip
        config = done.config
        screen.out.print(
            f"{config.num_hidden_layers} layers, {config.hidden_size} wide, {config.num_classes} classes, a head after "
            f"every layer: {strong(done.folder)}"
        )
        if done.assumed:
            taken = ", ".join(f"{FLAGS[name]} {value}" for name, value in done.assumed.items())
            screen.say(f"the file does not record all of its training; assumed: {taken}, and UER's bert tokenizer")
        if done.has_tokenizer:
            screen.next_step(f"fastkd predict {quoted(done.folder)} INPUT --speed 0.5")
        else:
            screen.say("no tokenizer: commands that read texts need one; convert again with --vocab vocab.txt")
        screen.result(
            {"model": str(done.folder), "num_hidden_layers": config.num_hidden_layers}
            | {"hidden_size": config.hidden_size, "num_labels": config.num_classes}
            | {"input_format": config.input_format, "has_tokenizer": done.has_tokenizer}
            | {"assumed": dict(done.assumed)}
        )
