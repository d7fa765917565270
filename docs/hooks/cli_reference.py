"""Fills the page cli.md with what the commands say about themselves."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

ROOT = Path(__file__).parents[2]
PAGE, PLACE = "cli.md", "<!-- commands -->"
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
    from fastkd.commands.app import app

    group: Any = get_command(app)
    return "\n".join(_section(name, command) for name, command in group.commands.items())


def _section(name: str, command: Any) -> str:
    with typer.Context(command, info_name=f"fastkd {name}") as context:
        usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"## fastkd {name}", "", f"`fastkd {name} {usage}`", "", _text(command.help or ""), ""]
    if command.epilog:
        lines += [_text(command.epilog), ""]
    lines += ["| option | default | |", "|---|---|---|"]
    lines += [_row(parameter) for parameter in command.params if parameter.name != "help"]
    return "\n".join([*lines, ""])


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        names = (parameter.metavar or parameter.name).upper()
    else:
        names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    default = getattr(parameter.default, "value", parameter.default)
    # a flag that is off by default goes without saying
    shown = "" if default in (None, False) or callable(default) else f"`{default}`"
    text = _MARKUP.sub("", getattr(parameter, "help", None) or "").replace("|", "\\|")
    return f"| `{names}` | {'required' if parameter.required else shown} | {text} |"


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
