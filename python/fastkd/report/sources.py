"""What a report is made from: an exit trace, and what lies beside it in the folder that a demo or a training left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkd.data.files import check_fields, read_json
from fastkd.data.rows import Rows, load_rows
from fastkd.exits.trace import ExitTrace
from fastkd.training.log import LOG_FILE, read_log

TRACE_FILE = "trace.safetensors"
BENCH_FILE = "bench.json"


@dataclass(frozen=True)
class Source:
    """One model on one data set.

    Attributes:
        name: how the page calls it.
        trace: every head's logits.
        benchmark: what `Benchmark.to_dict` gives, or None.
        logs: of fine-tuning and distillation, as `fastkd.training.log.read_log` gives them.
        certificate: of a calibration, as the model's configuration holds it; None where there is none.
        examples: the rows that were traced, in the order of their file; None shows no texts.
        label_names: of the classes; None takes those that the trace carries, and else calls them by number.
    """

    name: str
    trace: ExitTrace
    benchmark: Mapping[str, Any] | None = None
    logs: Sequence[Mapping[str, Any]] = ()
    certificate: Mapping[str, Any] | None = None
    examples: Rows | None = None
    label_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.examples is not None:
            _check_examples(self.trace, self.examples)


@dataclass(frozen=True)
class Extras:
    """Files that a command names itself; they win over those found beside the trace."""

    bench: Path | None = None
    logs: Sequence[Path] = field(default_factory=list)
    examples: Path | None = None
    certificate: Path | None = None
    reading: Mapping[str, str] = field(default_factory=dict)
    """Arguments of `fastkd.load_rows` about the columns and labels of `examples`."""

    def __bool__(self) -> bool:
        return bool(self.bench or self.logs or self.examples or self.certificate)


def read_source(path: Path, name: str, extras: Extras | None = None) -> Source:
    """A trace file, or a folder with `trace.safetensors` as `fastkd demo` leaves it.

    Beside the trace are looked for: `bench.json`; `finetuned` and `model` with their logs, label names and certificate;
    the generated corpus of a demo. Rows of a data set are taken only where a user names them.

    Raises:
        FileNotFoundError, ValueError: a file that is named is missing or is not what it should be.
    """
    extras = extras or Extras()
    folder = path if path.is_dir() else path.parent
    trace = ExitTrace.load(path / TRACE_FILE if path.is_dir() else path)
    # a lone trace file says nothing about the files around it
    beside = folder if path.is_dir() else None
    model = None if beside is None else beside / "model"
    config = _read_config(model)
    labels = _label_names(config) or trace.source.label_names or None
    examples = _examples(extras.examples or _generated_corpus(beside, trace), labels, trace, extras.reading)
    certificate = config.get("certificate") if extras.certificate is None else read_certificate(extras.certificate)
    return Source(
        name=name,
        trace=trace,
        benchmark=_benchmark(extras.bench, beside),
        logs=[read_log(log) for log in extras.logs] or _found_logs(beside),
        certificate=certificate,
        examples=examples,
        label_names=labels or (None if examples is None else examples.label_names),
    )


def read_benchmark(path: Path) -> dict[str, Any]:
    """What `fastkd bench` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is something else.
    """
    measured = read_json(path, "bench", "write one with `fastkd bench`")
    remedy = "name the bench.json that `fastkd bench` wrote"
    fields: dict[str, type | tuple[type, ...]] = {"dtype": str, "batch_size": (int, type(None))}
    numbers = ("speed", "rows", "flops_speedup", "speedup", "seconds", "full_seconds")
    rows = measured.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"bench: {path} holds no measurements; {remedy}")
    for row in rows:
        check_fields(row, {**fields, **dict.fromkeys(numbers, (int, float))}, path, "bench", remedy)
    return measured


def measured_with(benchmark: Mapping[str, Any] | None) -> str:
    """The criterion behind a measurement; files of versions that did not write it were made with entropy."""
    return str((benchmark or {}).get("criterion", "entropy"))


def read_certificate(path: Path) -> dict[str, Any]:
    """The certificate in a JSON file, or in the configuration of a model folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the model was not calibrated, or the file holds no object.
    """
    remedy = "write one with `fastkd calibrate`"
    if not path.is_dir():
        return read_json(path, "certificate", remedy)
    certificate = read_json(path / "config.json", "certificate", remedy).get("certificate")
    if not certificate:
        raise ValueError(f"certificate: the model in {path} was not calibrated; {remedy}")
    return certificate


def _read_config(model: Path | None) -> dict[str, Any]:
    if model is None or not (model / "config.json").is_file():
        return {}
    return read_json(model / "config.json", "model", "it is damaged; save the model again")


def _label_names(config: Mapping[str, Any]) -> list[str] | None:
    named = config.get("id2label")
    if not named:
        return None
    names = [named[key] for key in sorted(named, key=int)]
    return None if names == [f"LABEL_{index}" for index in range(len(names))] else names


def _benchmark(named: Path | None, beside: Path | None) -> dict[str, Any] | None:
    if named is not None:
        return read_benchmark(named / BENCH_FILE if named.is_dir() else named)
    if beside is None or not (beside / BENCH_FILE).is_file():
        return None
    return read_benchmark(beside / BENCH_FILE)


def _found_logs(beside: Path | None) -> list[dict[str, Any]]:
    if beside is None:
        return []
    return [read_log(beside / name) for name in ("finetuned", "model") if (beside / name / LOG_FILE).is_file()]


def _generated_corpus(beside: Path | None, trace: ExitTrace) -> Path | None:
    """The test rows that a demo without data generated; traces of earlier versions do not name their rows."""
    if beside is None or trace.rows is None or not (beside / "corpus" / "test.tsv").is_file():
        return None
    return beside / "corpus" / "test.tsv"


def _examples(
    path: Path | None, label_names: Sequence[str] | None, trace: ExitTrace, reading: Mapping[str, str]
) -> Rows | None:
    if path is None:
        return None
    labels: dict[str, Any] = {"num_labels": 1} if trace.is_regression else {"label_names": label_names}
    if not trace.is_regression and label_names is None:
        labels = {"num_labels": trace.logits.shape[-1]}
    return load_rows(path, require_labels=False, **labels, **dict[str, Any](reading))


def _check_examples(trace: ExitTrace, examples: Rows) -> None:
    if trace.rows is None:
        raise ValueError(
            "examples: this trace does not say which rows it was made from; write it again with `fastkd trace`"
        )
    if int(trace.rows.max()) >= len(examples):
        raise ValueError(
            f"examples: {examples.source} has {len(examples)} rows, but row {int(trace.rows.max()) + 1} was traced; "
            "name the file that the trace was made from"
        )
    if trace.labels is None or not examples.is_labelled:
        return
    labels = examples.dataset["label"][:]
    if [labels[row] for row in trace.rows.tolist()] != trace.labels.tolist():
        raise ValueError(
            f"examples: the labels in {examples.source} are not those of the trace; name the file that the trace was "
            "made from"
        )
