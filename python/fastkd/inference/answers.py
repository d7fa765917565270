"""Write answers to a file or pipe, as TSV or JSON lines; a file appears under its name only when it is whole."""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastkd.data.files import atomic_path, check_output_file, is_special, told_if_full
from fastkd.data.records import SUFFIXES
from fastkd.inference.row_reader import STANDARD_STREAM


class BadRowError(ValueError):
    """A row cannot be answered and the caller asked to stop there."""


@dataclass(frozen=True)
class Prediction:
    """One answer. `label`, `probability` and `exit_layer` are None where `problem` says why there is none.

    With a regression model `label` is the predicted number and `probability` is None.
    """

    line: int
    label: str | float | None = None
    probability: float | None = None
    exit_layer: int | None = None
    problem: str | None = None


@contextmanager
def output_stream(destination: str) -> Iterator[IO[str]]:
    """Standard output for "-", else the file, which is either whole or absent.

    A pipe or a device gets each answer as it is written. If the writing breaks off, what is written so far stays
    beside the file, as NAME.partial.SUFFIX.

    Warns:
        UserWarning: the file was not finished.
    """
    if destination == STANDARD_STREAM:
        with told_if_full("standard output"):
            yield sys.stdout
            sys.stdout.flush()
        return
    if is_special(destination):
        with told_if_full(destination), open(destination, "w", encoding="utf-8", newline="\n") as special:
            yield special
        return
    with atomic_path(destination) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        try:
            yield stream
        except BadRowError:
            raise  # the caller asked for everything or nothing
        except BaseException:
            stream.flush()
            partial = _partial(destination)
            check_output_file(partial)
            temporary.replace(partial)
            warnings.warn(f"{destination} was not finished: the answers so far are in {partial}", stacklevel=3)
            raise


_ONE_FIELD = str.maketrans("\t\n\r", "   ")


def _partial(destination: str) -> Path:
    path = Path(destination)
    return path.with_suffix(f".partial{path.suffix}")


def writer_of(destination: str, form: str | None) -> Callable[[IO[str], Prediction | None], None]:
    """Writes one answer to a stream, or what comes before the first one for None.

    Args:
        destination: path or "-".
        form: "tsv" or "jsonl"; None goes by the suffix, and takes TSV for "-".

    Raises:
        ValueError: another format.
    """
    suffix = Path(destination).suffix
    is_named = destination != STANDARD_STREAM and not is_special(destination)
    form = form or (SUFFIXES.get(suffix.lower()) if is_named else "tsv")
    if form not in ("tsv", "jsonl"):
        got = f"format {form!r}" if form else f"the suffix {suffix!r}"
        raise ValueError(
            f"output: {destination} has {got}, but predictions are written as .tsv or .jsonl; use one of these "
            "suffixes, or pass --output-format tsv|jsonl"
        )
    return _write_tsv if form == "tsv" else _write_json


def _write_tsv(stream: IO[str], prediction: Prediction | None) -> None:
    if prediction is None:
        stream.write("label\tprobability\texit_layer\terror\n")
        return
    probability = None if prediction.probability is None else f"{prediction.probability:.6f}"
    fields = (prediction.label, probability, prediction.exit_layer, prediction.problem)
    # a label name or a problem may quote the input, whose tabs would add columns
    cells = ("" if value is None else str(value).translate(_ONE_FIELD) for value in fields)
    stream.write("\t".join(cells) + "\n")


def _write_json(stream: IO[str], prediction: Prediction | None) -> None:
    if prediction is None:
        return
    answer: dict[str, Any] = {
        "label": prediction.label,
        "probability": prediction.probability,
        "exit_layer": prediction.exit_layer,
    }
    if prediction.problem is not None:
        answer["error"] = prediction.problem
    stream.write(json.dumps(answer, ensure_ascii=False) + "\n")


def average_layers(exits: Counter[int]) -> float | None:
    """Of rows by their exit layer; None where there are none."""
    answered = exits.total()
    return sum(layer * count for layer, count in exits.items()) / answered if answered else None


def exits_in_order(exits: Counter[int]) -> dict[str, int]:
    """Rows by their exit layer, as summaries write them."""
    return {str(layer): exits[layer] for layer in sorted(exits)}
