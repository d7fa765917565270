"""Says remedies in the words of the command line: messages of the library name Python arguments."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from contextvars import ContextVar

options_of_command: ContextVar[Collection[str]] = ContextVar("options_of_command", default=())
"""The options that the running command has."""

FLAGS = {
    "text_a": "--text-column",
    "text_b": "--pair-column",
    "label": "--label-column",
    "label_names": "--labels",
    "labels_are": "--labels-are",
    "num_labels": "--num-labels",
    "resume": "--resume",
    "overwrite": "--overwrite",
    "pooling": "--pooling",
    "num_attention_heads": "--attention-heads",
    "max_length": "--max-length",
}
"""How the command line calls arguments of the library."""
_ARGUMENT = re.compile(rf"\b({'|'.join(FLAGS)})=(\[[^\]]*\]|'[^']*'|\d+|True|False)?")
_WITH_ALL = "fastkd finetune"
"""The command that has every option about rows."""


def as_flags(message: str) -> str:
    """`message` with the options of the running command in place of Python arguments.

    An option that the command does not have is named together with the command that has it.
    """
    return _ARGUMENT.sub(_flag, message)


def _flag(match: re.Match[str]) -> str:
    name, value = match[1], match[2] or ""
    if value == "False":
        return f"without {FLAGS[name]}" if name != "resume" else "without it"
    words = value.strip("[]'") if value != "True" else ""
    text = " ".join([FLAGS[name], *([shlex.quote(re.sub(r"',\s*'", ",", words))] if words else [])])
    has_options = options_of_command.get()
    return text if not has_options or FLAGS[name] in has_options else f"{text} of {_WITH_ALL}"
