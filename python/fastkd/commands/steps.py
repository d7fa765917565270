"""The steps that commands are made of: load a model or rows, train, trace, measure, write the results."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback

from fastkd.data.batches import LengthSortedBatches, tokenize
from fastkd.data.input_format import with_input_format
from fastkd.data.rows import DataFolder, Rows, load_folder, load_rows
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.exits.sweep import Sweep
from fastkd.exits.trace import ExitTrace
from fastkd.inference import benchmark
from fastkd.inference.predict import length_limit
from fastkd.model.checkpoints import PACKAGED_CHECKPOINT as PACKAGED_CHECKPOINT
from fastkd.model.checkpoints import checkpoint_path
from fastkd.model.checkpoints import packaged_checkpoint as packaged_checkpoint
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.report import figures

if TYPE_CHECKING:
    from fastkd.commands.screen import Screen


def load_plain(
    checkpoint: str, folder: DataFolder, head: str, exit_layers: list[int] | None, seed: int
) -> tuple[EarlyExitForSequenceClassification, PreTrainedTokenizerBase]:
    """A checkpoint to be fine-tuned, with new heads for the labels of `folder`, and its tokenizer.

    The new heads are drawn from `seed`; the weights are float32, whatever the checkpoint holds, as training needs them.
    """
    quieten()
    path = checkpoint_path(checkpoint)
    names = folder.label_names
    labels: dict[str, Any] = {"id2label": dict(enumerate(names))} if names else {"num_labels": folder.num_labels}
    transformers.set_seed(seed)
    model = EarlyExitForSequenceClassification.from_pretrained(
        path, head=head, exit_layers=exit_layers, dtype=torch.float32, **labels
    )
    return model, AutoTokenizer.from_pretrained(path)


def load_model(
    checkpoint: str, device: str = "auto", dtype: str | None = None
) -> tuple[EarlyExitForSequenceClassification, PreTrainedTokenizerBase]:
    """A saved early-exit model in evaluation mode on `device`, and its tokenizer.

    `dtype` is one of `benchmark.DTYPES` or what torch calls it; default: as it was saved.

    Raises:
        ValueError: not a model of this project, or an unknown device.
        OSError: nothing to load.
    """
    target = pick_device(device)
    config = load_config(checkpoint)
    options: dict[str, Any] = {} if dtype is None else {"dtype": benchmark.DTYPES.get(dtype, dtype)}
    model = EarlyExitForSequenceClassification.from_pretrained(checkpoint, **options)
    tokenizer = with_input_format(AutoTokenizer.from_pretrained(checkpoint), config.input_format)
    return model.to(target).eval(), tokenizer  # type: ignore[arg-type]


def load_config(checkpoint: str) -> EarlyExitConfig:
    """The configuration of a saved early-exit model.

    Raises:
        ValueError: not a model of this project.
        OSError: nothing to load.
    """
    quieten()
    config = AutoConfig.from_pretrained(checkpoint)
    if not isinstance(config, EarlyExitConfig):
        raise ValueError(
            f"checkpoint: {checkpoint} is a plain {config.model_type} checkpoint without early exits; train them "
            f"first: fastkd finetune {checkpoint} --data DATA -o tuned"
        )
    return config


def pick_device(device: str) -> torch.device:
    """The torch device called `device`.

    Raises:
        ValueError: an unknown or absent device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: got {device!r}, expected cpu, cuda, cuda:1... or auto") from None
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {device!r}, but torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return target


def load_splits(
    data: Path | None,
    train: Path | None,
    dev: Path | None,
    *,
    num_labels: int | None = None,
    model: EarlyExitForSequenceClassification | None = None,
) -> DataFolder:
    """The rows to train on: a folder, or single files. With a model its labels count, and rows may have none."""
    if (data is None) == (train is None):
        raise ValueError("--data: give either --data FOLDER or --train FILE (and perhaps --dev FILE)")
    if data is not None and dev is not None:
        raise ValueError("--dev: goes with --train; with --data the dev rows come from the folder")
    labels: dict[str, Any] = {"num_labels": num_labels} if model is None else _labels_of(model)
    labels["require_labels"] = model is None
    if data is not None:
        return load_folder(data, **labels)
    assert train is not None
    rows = load_rows(train, **labels)
    if dev is None:
        return DataFolder(rows, None, None)
    if rows.num_labels is not None:
        labels |= {"label_names": rows.label_names, "num_labels": rows.num_labels}
    return DataFolder(rows, load_rows(dev, **labels), None)


def load_data(path: Path, split: str, model: EarlyExitForSequenceClassification, *, require_labels: bool) -> Rows:
    """Rows whose labels are the model's."""
    return load_rows(path, split=split if path.is_dir() else None, require_labels=require_labels, **_labels_of(model))


def _labels_of(model: EarlyExitForSequenceClassification) -> dict[str, Any]:
    names = list((model.config.id2label or {}).values())
    is_named = len(names) > 1 and names != [f"LABEL_{index}" for index in range(len(names))]
    return {"label_names": names} if is_named else {"num_labels": model.config.num_labels}


def set_length(
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    default: int | None = None,
) -> int:
    """The length to train with; the tokenizer keeps it, so that the finished model cuts texts where training did."""
    most = length_limit(model, tokenizer)
    if max_length is not None and max_length > most:
        raise ValueError(f"max_length: got {max_length}, but this model takes at most {most} tokens")
    tokenizer.model_max_length = max_length or min(default or most, most)
    return tokenizer.model_max_length


def set_input_format(
    model: EarlyExitForSequenceClassification, tokenizer: PreTrainedTokenizerBase, input_format: str
) -> PreTrainedTokenizerBase:
    """The tokenizer to train with; the model remembers the format."""
    tokenizer = with_input_format(tokenizer, input_format)
    model.config.input_format = input_format
    return tokenizer


@contextlib.contextmanager
def training_progress(screen: Screen, what: str) -> Iterator[Any]:
    """A `TrainerCallback` that moves a progress bar of its own."""
    with screen.progress(what, None) as update:
        yield progress_callback(update, what)


def progress_callback(update: Callable[..., None], what: str) -> TrainerCallback:
    """Moves the progress bar that `update` belongs to."""

    class Bar(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            update(state.global_step, what, state.max_steps)

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            update(state.global_step, what, state.max_steps)

    return Bar()


def run_trace(
    screen: Screen,
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    fingerprint: str | None = None,
) -> tuple[ExitTrace, list[int]]:
    """The trace, and for each of its rows the row of the data that it belongs to.

    `fingerprint` is that of the rows that these were drawn from; default: of these.
    """
    encoded = tokenize(rows, tokenizer, max_length or length_limit(model, tokenizer))
    batches = LengthSortedBatches(encoded, tokenizer, batch_size)
    with screen.progress("tracing", len(batches)) as update:
        trace = model.trace(_counted(batches, update), fingerprint or rows.digest())
    return replace(trace, rows=torch.tensor(batches.order)), batches.order


def make_trace(
    screen: Screen, checkpoint: str, data: Path, split: str, limit: int | None, max_length: int | None,
    batch_size: int, seed: int, device: str, dtype: str,
) -> ExitTrace:  # fmt: skip
    """The trace of a model folder on the rows of a file or of one split of a folder."""
    model, tokenizer = load_model(checkpoint, device, dtype)
    rows = load_data(data, split, model, require_labels=False)
    numbers = torch.arange(len(rows))
    fingerprint = rows.digest()
    if limit is not None:
        # the numbers are drawn as the rows are, so that the trace names rows of the whole file
        drawn = datasets.Dataset.from_dict({"row": numbers.tolist()})
        numbers = torch.tensor(replace(rows, dataset=drawn).sample(limit, seed).dataset["row"][:])
        rows = rows.sample(limit, seed)
    trace, order = run_trace(
        screen, model, tokenizer, rows, max_length=max_length, batch_size=batch_size, fingerprint=fingerprint
    )
    return replace(trace, rows=numbers[order])


def load_or_make_trace(
    screen: Screen, source: str, data: Path | None, split: str, limit: int | None, max_length: int | None,
    batch_size: int, seed: int, device: str, dtype: str = "fp32",
) -> ExitTrace:  # fmt: skip
    """The trace in the file `source`, or the one that the model folder `source` makes on `data`.

    Raises:
        ValueError: a model folder without `data`.
    """
    if not Path(source).is_dir():
        return ExitTrace.load(source)
    if data is None:
        raise ValueError(f"--data: {source} is a model folder, so say on which rows: --data FILE, or name a trace file")
    return make_trace(screen, source, data, split, limit, max_length, batch_size, seed, device, dtype)


def _counted(batches: Any, update: Callable[..., None]) -> Iterator[Any]:
    for number, batch in enumerate(batches, start=1):
        yield batch
        update(number)


def run_benchmark(
    screen: Screen,
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    speeds: Sequence[float],
    batch_sizes: Sequence[int],
    dtypes: Sequence[str],
    repeats: int,
    max_length: int | None = None,
    criterion: str | None = None,
    top_n: int | None = None,
) -> benchmark.Benchmark:
    """`fastkd.inference.benchmark.benchmark` on tokenised rows, with a progress bar."""
    encoded = tokenize(rows, tokenizer, max_length or length_limit(model, tokenizer))
    total = benchmark.passes(speeds, batch_sizes, dtypes, repeats)
    done = 0
    with screen.progress("measuring", total) as update:

        def on_progress(what: str) -> None:
            nonlocal done
            done += 1
            update(done, what)

        return benchmark.benchmark(
            model, lambda size: LengthSortedBatches(encoded, tokenizer, size), speeds=speeds,
            batch_sizes=batch_sizes, dtypes=dtypes, repeats=repeats, criterion=criterion, top_n=top_n,
            on_progress=on_progress,
        )  # fmt: skip


def write_sweeps(sweeps: dict[str, Sweep], folder: Path) -> list[Path]:
    """CSV and pictures of the sweeps; the paths written."""
    files = []
    for name, table in sweeps.items():
        stem = "sweep" if len(sweeps) == 1 else f"sweep-{name.replace(', ', '-').replace(' ', '-')}"
        files.append(folder / f"{stem}.csv")
        table.to_csv(files[-1])
        files.append(folder / f"{stem.replace('sweep', 'exits_per_layer')}.png")
        figures.exits_per_layer(table, files[-1])
    files.append(folder / "speed_speedup.png")
    figures.speed_speedup(sweeps, files[-1])
    if all(row.quality is not None for table in sweeps.values() for row in table):
        for draw in (figures.speed_accuracy, figures.speedup_accuracy, figures.figure3):
            files.append(folder / f"{draw.__name__}.png")
            draw(sweeps, files[-1])
    return files


def write_benchmark(measured: benchmark.Benchmark, folder: Path) -> list[Path]:
    """JSON, CSV and picture of the measurements; the paths written."""
    files = [folder / "bench.json", folder / "bench.csv", folder / "wall_clock.png"]
    measured.to_json(files[0])
    measured.to_csv(files[1])
    figures.wall_clock(measured.rows, files[2])
    return files


def quieten() -> None:
    """Libraries keep their progress bars and hints to themselves; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
