"""Option types that several commands share, and how their texts are read."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastkd.exits.catalogue import CRITERIA

if TYPE_CHECKING:

    class Criterion(str, Enum):
        """When a row is certain enough; the members are the names of `fastkd.exits.catalogue.CRITERIA`."""

else:
    Criterion = Enum("Criterion", {name: name for name in CRITERIA}, type=str)

_EVERY_CRITERION = "; ".join(f"{name}: {criterion.summary}" for name, criterion in CRITERIA.items())


class Dtype(str, Enum):
    """The precision of the weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"
    auto = "auto"


class LabelsAre(str, Enum):
    """How numbers in the label column are meant."""

    names = "names"
    indices = "indices"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on standard output and nothing else.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1; auto takes a GPU if there is one.")]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        help="Precision of the weights. int8 quantises the layers' matrix products (CPU only; a model saved in int8 "
        "stays int8); auto takes the precision of the certificate, else measures fp32 and bf16 at the start, takes the "
        "faster one and says so.",
    ),
]
Checkpoint = Annotated[str, typer.Argument(help="Folder of a model trained by fastkd.", show_default=False)]
Seed = Annotated[int, typer.Option(help="The same seed gives the same weights.")]
DrawSeed = Annotated[int, typer.Option("--seed", help="The same seed draws the same rows.")]
MaxLength = Annotated[
    int | None, typer.Option(min=8, help="Cut texts after this many tokens; default: as in training.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per batch.")]
LayerList = Annotated[
    str | None,
    typer.Option(
        "--layers", help="Path of the encoder's list of layers, as in encoder.layers; default: found automatically."
    ),
]
Split = Annotated[str, typer.Option(help="Which split of a data folder.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use at most this many rows, drawn at random.")]


def criterion_option(help_text: str) -> Any:
    """The option --criterion: `help_text`, then every criterion and what it measures."""
    return typer.Option("--criterion", help=f"{help_text} {_EVERY_CRITERION}.")


Criteria = Annotated[
    list[Criterion] | None,
    criterion_option("How certainty is measured; repeat it to compare. Default: entropy, or agreement for regression."),
]
OneCriterion = Annotated[Criterion | None, criterion_option("How certainty is measured; default: the model's.")]
TopN = Annotated[int | None, typer.Option(min=2, help="How many classes the top_n criterion reads.")]
DataOption = Annotated[
    Path | None, typer.Option(help="Folder with train and, optionally, dev and test (.tsv, .csv, .jsonl, .parquet).")
]
TextColumn = Annotated[str | None, typer.Option(help="Column of the (first) text; default: text_a, text, sentence...")]
PairColumn = Annotated[str | None, typer.Option(help="Column of the second text; default: text_b, sentence2...")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the label; default: label, labels, class...")]
LabelsAreOption = Annotated[
    LabelsAre | None,
    typer.Option(
        "--labels-are",
        help="Are numbers in the label column names or indices of classes? Default: whichever fits all rows.",
    ),
]
LabelNames = Annotated[
    str | None, typer.Option("--labels", help="Names of the classes 0, 1, 2... as in negative,positive.")
]
NumLabels = Annotated[
    int | None,
    typer.Option(
        min=1, help="Number of classes; default: as many as the rows have (no gaps allowed). 1 makes a regression."
    ),
]
TrainFile = Annotated[Path | None, typer.Option(help="Training rows, instead of --data.")]
DevFile = Annotated[Path | None, typer.Option(help="Rows that choose the best weights, instead of --data.")]
TrainRows = Annotated[int | None, typer.Option(min=1, help="Train on at most this many rows, drawn at random.")]
Epochs = Annotated[float, typer.Option(help="Passes over the training rows.")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Stop after this many steps.")]
Bf16 = Annotated[
    bool | None, typer.Option("--bf16/--no-bf16", help="Compute in bfloat16; default: if the hardware supports it.")
]
Parity = Annotated[
    str | None,
    typer.Option(help="fastbert: train as the official code does, quirks included; options that you give still win."),
]
Fsdp = Annotated[
    bool,
    typer.Option(
        "--fsdp", help="With several processes, each keeps only its share of the weights and the optimizer (FSDP2)."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a killed run of the same command.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the output of an earlier run, unless its folder holds your own files."),
]


@dataclass(frozen=True)
class RowReading:
    """How rows are read, as `fastkd.load_rows` takes it."""

    text_a: str | None = None
    text_b: str | None = None
    label: str | None = None
    labels_are: str | None = None

    def given(self) -> dict[str, str]:
        """What a user named."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def row_reading(
    text_column: str | None, pair_column: str | None, label_column: str | None, labels_are: LabelsAre | None
) -> RowReading:
    return RowReading(text_column, pair_column, label_column, labels_are and labels_are.value)


_CARRIED = (
    "data", "train", "dev", "train_rows", "text_column", "pair_column", "label_column", "labels_are", "max_length",
    "parity", "bf16", "seed", "criterion", "top_n", "dtype", "device",
)  # fmt: skip
"""Options that say which rows, which decision and which arithmetic: what follows a command needs them again."""


def quoted(value: object) -> str:
    """`value` as a shell takes it."""
    return shlex.quote(str(value))


def carried(context: typer.Context, following: Callable[..., None], without: Sequence[str] = ()) -> str:
    """The options that the user gave to this command and that the one which follows needs again.

    They come with a leading space; those in `without` are left out.
    """
    accepted = inspect.signature(following).parameters
    parts: list[str] = []
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in _CARRIED or name not in accepted or name in without:
            continue
        value = context.params[name]
        # a --config file names every option, those at their defaults too
        if (
            source is not None
            and source.name != "DEFAULT"
            and (source.name != "DEFAULT_MAP" or value != parameter.default)
        ):
            parts += _written(parameter, value)
    return "".join(f" {part}" for part in parts)


def _written(parameter: Any, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [parameter.opts[0] if value else parameter.secondary_opts[0]]
    return [parameter.opts[0], quoted(getattr(value, "value", value))]


def parse_speeds(text: str) -> list[float]:
    """Speeds as in "0,0.1,0.5" or "0:1:0.1", ascending and without repeats.

    Raises:
        ValueError: not numbers, or outside [0, 1].
    """
    try:
        if ":" in text:
            start, end, step = (float(part) for part in text.split(":"))
            if step <= 0:
                raise ValueError
            # counting avoids the drift of adding up
            speeds = [round(start + index * step, 10) for index in range(int((end - start) / step + 1e-9) + 1)]
        else:
            speeds = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"speeds: got {text!r}, expected numbers such as 0,0.1,0.5 or a range such as 0:1:0.1"
        ) from None
    outside = [speed for speed in speeds if not 0 <= speed <= 1]
    if outside or not speeds:
        raise ValueError(f"speeds: got {text!r}, expected numbers from 0 (the full model) to 1 (leave at once)")
    return sorted(set(speeds))


def parse_share(text: str, option: str) -> float:
    """A share as in "0.01" or "1%".

    Raises:
        ValueError: neither.
    """
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"{option}: got {text!r}, expected a share such as 0.01 or 1%") from None


def whole_numbers(text: str, option: str) -> list[int]:
    """Numbers as in "1,8,32".

    Raises:
        ValueError: not whole numbers.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: got {text!r}, expected whole numbers such as 1,8,32") from None


def layer_numbers(text: str | None) -> list[int] | None:
    """What --exit-layers names; None where it is not given."""
    return None if text is None else whole_numbers(text, "--exit-layers")


def words(text: str) -> list[str]:
    """Words as in "fp32,bf16"."""
    return [part.strip() for part in text.split(",") if part.strip()]


def source_names(sources: Sequence[str]) -> list[str]:
    """A short name for each source: that of its file or folder, with as many folders before it as tell them apart."""
    paths = [Path(os.path.abspath(source)).parts for source in sources]
    names: list[str] = []
    for shown in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(path[-shown:]).lstrip("/").removesuffix(".safetensors") for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def curve_name(source: str, criterion: str, sources: int, criteria: int) -> str:
    """As much of source and criterion as tells the curves apart."""
    if sources > 1 and criteria > 1:
        return f"{source}, {criterion}"
    return source if sources > 1 else criterion


def is_given(context: typer.Context, parameter: str) -> bool:
    """Whether the user wrote this option down."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name != "DEFAULT"


def training_options(
    kind: Any, parity: str | None, context: typer.Context, chosen: dict[str, Any], max_length: int
) -> Any:
    """Options of the class `kind`; under a parity preset only what the user wrote down wins over it."""
    if parity is None:
        return kind(**chosen, max_length=max_length, progress=False)
    parameters = {"head_learning_rate_factor": "head_factor", "early_stopping_patience": "patience"}
    given = {name: value for name, value in chosen.items() if is_given(context, parameters.get(name, name))}
    return kind.preset(parity, **given, max_length=max_length, progress=False)
