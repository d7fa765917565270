"""Reads what a command is given: splits to train on, rows for a model, traces."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fastkd.commands.options import RowReading
from fastkd.commands.screen import Screen
from fastkd.data.labels import names_of_classes
from fastkd.data.row_hashes import DuplicateRowsWarning, warn_about_duplicates
from fastkd.data.rows import DataFolder, Rows, load_folder, load_rows
from fastkd.exits.trace import ExitTrace
from fastkd.inference.trace_rows import trace_rows
from fastkd.model.loading import load_model


def load_splits(
    data: Path | None,
    train: Path | None,
    dev: Path | None,
    reading: RowReading,
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    model: PreTrainedModel | None = None,
) -> DataFolder:
    """The rows to train on: a folder, or single files. With a model its labels count, and rows may have none.

    Raises:
        ValueError: both --data and files, or neither.
        DataError: anything wrong with the rows.
    """
    if (data is None) == (train is None):
        raise ValueError("--data: give either --data FOLDER or --train FILE (and perhaps --dev FILE)")
    if data is not None and dev is not None:
        raise ValueError("--dev: needs --train; with --data the dev rows come from the folder")
    labels: dict[str, Any] = {"num_labels": num_labels, "label_names": label_names}
    if model is not None:
        labels = _labels_of(model)
    options = {**reading.given(), **labels, "require_labels": model is None}
    if data is not None:
        return load_folder(data, **options)
    assert train is not None
    rows = load_rows(train, **options)
    if dev is None:
        return DataFolder(rows, None, None)
    if rows.num_labels is not None:
        options |= {"label_names": rows.label_names, "num_labels": rows.num_labels, "labels_are": rows.labels_are}
    return DataFolder(rows, load_rows(dev, **options), None)


def tell_duplicates(screen: Screen, folder: DataFolder) -> None:
    """One line for each two splits that share rows."""
    with screen.warnings():
        warn_about_duplicates({"train": folder.train, "dev": folder.dev, "test": folder.test})
    # the training would say it again
    warnings.simplefilter("ignore", DuplicateRowsWarning)


def load_data(path: Path, split: str, model: PreTrainedModel, reading: RowReading) -> Rows:
    """Rows of a file, or of one split of a folder; their labels, where they have some, are the model's."""
    options = {**reading.given(), **_labels_of(model)}
    return load_rows(path, split=split if path.is_dir() else None, require_labels=False, **options)


@dataclass(frozen=True)
class TraceOptions:
    """Which rows are traced, and how.

    Attributes:
        split: of a data folder.
        limit: at most so many rows, drawn at random; None: all.
        max_length: tokens after which a text is cut; None: what the model was trained with.
        batch_size: rows run together.
        seed: of the draw.
        device: as for `fastkd.model.loading.pick_device`.
        dtype: of the weights, as for `fastkd.model.loading.load_model`.
        reading: the columns of the rows.
    """

    split: str
    limit: int | None
    max_length: int | None
    batch_size: int
    seed: int
    device: str
    dtype: str = "fp32"
    reading: RowReading = field(default_factory=RowReading)


def make_trace(screen: Screen, checkpoint: str, data: Path, options: TraceOptions) -> ExitTrace:
    """The trace of a model folder on the rows of a file or of one split of a folder."""
    model, tokenizer = load_model(checkpoint, options.device, options.dtype, on_choice=screen.say)
    rows = load_data(data, options.split, model, options.reading)
    with screen.progress("tracing", None) as update:
        return trace_rows(
            model, tokenizer, rows, limit=options.limit, seed=options.seed, max_length=options.max_length,
            batch_size=options.batch_size, on_batch=lambda done, total: update(done, "", total),
        )  # fmt: skip


def load_or_make_trace(screen: Screen, source: str, data: Path | None, options: TraceOptions) -> ExitTrace:
    """The trace in the file `source`, or that of the model folder `source` on `data`.

    Raises:
        ValueError: a model folder without `data`.
    """
    if not Path(source).is_dir():
        return ExitTrace.load(source)
    if data is None:
        raise ValueError(f"--data: {source} is a model folder; add rows with --data FILE, or name a trace file")
    return make_trace(screen, source, data, options)


def _labels_of(model: PreTrainedModel) -> dict[str, Any]:
    names = names_of_classes(model.config.id2label)
    return {"num_labels": model.config.num_labels} if names is None else {"label_names": names}
