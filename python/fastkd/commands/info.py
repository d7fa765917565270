"""`fastkd info`: what a model folder holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from fastkd.commands.calibrate import print_certificate
from fastkd.commands.options import (
    Json,
    quoted,
)
from fastkd.commands.screen import quieten, screen_for

if TYPE_CHECKING:
    from fastkd.encoders.configuration import EarlyExitConfig


def info(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a model trained by fastkd.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show what a model is, its default speed and its certificate.

    It reads only the configuration and a few bytes of the weights, so it
    answers at once.

    [bold]Examples[/]

    \b
      [cyan]fastkd info model[/]
      [cyan]fastkd info model --json[/]
    """
    with screen_for(as_json) as screen:
        quieten()

        from fastkd.exits.certificate import Certificate
        from fastkd.model.loading import load_config
        from fastkd.model.pretrained import local_folder, weights_fingerprint

        config = load_config(checkpoint)
        certificate = Certificate.of(config)
        facts = _facts(config)
        for name, value in facts.items():
            screen.out.print(f"{name.replace('_', ' '):<16}{escape(_text(value))}", soft_wrap=True)
        screen.out.print()
        if certificate is None:
            screen.out.print("certificate     none")
            screen.next_step(f"fastkd calibrate {quoted(checkpoint)} --data DATA")
        else:
            screen.out.print("[bold]certificate[/]")
            print_certificate(screen, certificate, config.num_hidden_layers)
        mismatches = [] if certificate is None else certificate.mismatches(config, config.weights_dtype)
        folder = local_folder(checkpoint, {})
        fingerprint = None if folder is None else weights_fingerprint(folder, {})
        is_described = None
        if None not in (fingerprint, config.weights_fingerprint):
            is_described = fingerprint == config.weights_fingerprint
        if is_described is False:
            screen.out.print(
                "[bold yellow]void:[/] the weights have changed since: training, speed and certificate above are "
                "for other weights; distil and calibrate again: "
                f"fastkd distill {escape(quoted(checkpoint))} --data DATA",
                soft_wrap=True,
            )
        for sentence in mismatches:
            screen.out.print(f"[bold yellow]not the default:[/] {sentence}", soft_wrap=True)
        screen.result(
            facts | {"certificate": config.certificate, "mismatches": mismatches, "weights_as_described": is_described}
        )


def _facts(config: EarlyExitConfig) -> dict[str, Any]:
    return {
        "encoder": config.backbone.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.head,
        "heads_after": config.exit_layers,
        "dtype": config.weights_dtype,
        "labels": [str(name) for name in (config.id2label or {}).values()],
        "exits_trained": config.exits_trained,
        "default_speed": config.speed,
        "criterion": config.criterion,
        "top_n": config.top_n,
    }


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value}"
