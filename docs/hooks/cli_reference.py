"""Fills the page cli.md with what the commands say about themselves."""

from __future__ import annotations

import re
import sys
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

ROOT = Path(__file__).parents[2]
PAGE, PLACE = "cli.md", "<!-- commands -->"
_TYPES = {str: "text", int: "whole number", float: "number", Path: "path"}
_MARKUP = re.compile(r"\[/?(?:bold|cyan|red|dim)?\]")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with every page."""
    if page.file.src_uri != PAGE:
        return markdown
    return markdown.replace(PLACE, reference())


def reference() -> str:
    """One section a command: its help, and a table of its arguments and options."""
    for folder in (ROOT, ROOT / "python"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    from fastkd.commands.app import PANELS, app

    group: Any = get_command(app)
    functions = [function for commands in PANELS.values() for function in commands]
    return "\n".join(
        _section(name, command, typing.get_type_hints(function))
        for (name, command), function in zip(group.commands.items(), functions, strict=True)
    )


def _section(name: str, command: Any, hints: dict[str, Any]) -> str:
    with typer.Context(command, info_name=f"fastkd {name}") as context:
        usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"## fastkd {name}", "", f"`fastkd {name} {usage}`", "", _text(command.help or ""), ""]
    if command.epilog:
        lines += [_text(command.epilog), ""]
    lines += ["| option | type | default | |", "|---|---|---|---|"]
    lines += [_row(parameter, hints[parameter.name]) for parameter in command.params if parameter.name != "help"]
    return "\n".join([*lines, ""])


def _row(parameter: Any, hint: Any) -> str:
    if parameter.param_type_name == "argument":
        names = (parameter.metavar or parameter.name).upper()
    else:
        names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    default = getattr(parameter.default, "value", parameter.default)
    # a flag that is off by default goes without saying
    shown = "" if default in (None, False) or callable(default) else f"`{default}`"
    text = _MARKUP.sub("", getattr(parameter, "help", None) or "").replace("|", "\\|")
    return f"| `{names}` | {_kind(parameter, hint)} | {'required' if parameter.required else shown} | {text} |"


def _kind(parameter: Any, hint: Any) -> str:
    """What follows an option: nothing for a flag, the choices where there are some, else a type and its bounds."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    is_many = typing.get_origin(hint) is list
    if parts:
        return f"{_kind(parameter, parts[0])}; repeatable" if is_many else _kind(parameter, parts[0])
    if hint is bool:
        return "flag"
    if issubclass(hint, Enum):
        return ", ".join(f"`{choice.value}`" for choice in hint)
    limits = getattr(parameter, "type", parameter)
    least, most = getattr(limits, "min", None), getattr(limits, "max", None)
    bounds = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (most is not None)
    return ", ".join([_TYPES[hint], *bounds])


def _text(help_text: str) -> str:
    r"""Paragraphs as they are; what follows a \b, or a list of commands, as a block of code."""
    blocks = []
    for block in help_text.split("\n\n"):
        plain = _MARKUP.sub("", block).replace("\b\n", "").rstrip()
        is_code = block.lstrip("\n").startswith("\b")
        if is_code:
            blocks.append("```text\n" + "\n".join(line.removeprefix("  ") for line in plain.splitlines()) + "\n```")
        else:
            blocks.append(" ".join(plain.split()))
    return "\n\n".join(blocks)
