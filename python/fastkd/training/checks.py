"""What a training checks before it works: its options, rows, model, tokenizer and folders."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkd.data.errors import DataError
from fastkd.data.files import check_fields, check_output_folder, read_json, write_json
from fastkd.data.labels import label_rule, names_of_classes
from fastkd.data.own_files import foreign_in_work, remove_own
from fastkd.data.rows import Rows, RowSource, load_splits
from fastkd.encoders.int8 import Int8Linear
from fastkd.encoders.untouched import check_not_quantised_elsewhere
from fastkd.exits.merged_state import is_adapter
from fastkd.model.adapters import adapter_base, check_adapter, is_peft_model
from fastkd.model.modeling import EarlyExitForSequenceClassification

_RUN_FILE = "run.json"
# what may differ between a killed run and its continuation without changing the weights; the batch is that of a process
_FREE_OPTIONS = ("resume", "overwrite", "progress", "logging_steps", "batch_size", "fsdp")


def require(name: str, value: Any, is_right: bool, expected: str) -> None:
    """Raise ValueError about the argument `name` unless `is_right`; an infinite or undefined float never is."""
    if not is_right or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def rows_for(
    model: PreTrainedModel, train: RowSource, dev: RowSource | None, *, require_labels: bool
) -> tuple[Rows, Rows | None]:
    """Rows to train `model` on, read and checked; labels mean the same in both.

    Raises:
        DataError: rows that cannot be used, or labels that are missing or not the model's.
    """
    given = {"train": train, "dev": dev}
    rows = load_splits(given, require_labels=require_labels, **label_rule(model.config))
    for argument in given:
        check_labels(model, rows.get(argument), argument, required=require_labels)
    return rows["train"], rows.get("dev")


def check_labels(model: PreTrainedModel, rows: Rows | None, argument: str, *, required: bool) -> None:
    """Raise DataError where the labels of `rows` are missing or not the model's."""
    if rows is None:
        return
    if rows.num_labels is None:
        if required:
            raise DataError(f"{argument}: {rows.source} has no labels; fine-tuning needs them (distill does not)")
        return
    classes = int(model.config.num_labels or 2)
    # unnamed integer labels may lack the last classes; everything else must agree in number
    may_lack_classes = rows.label_names is None and 1 < rows.num_labels < classes
    if rows.num_labels != classes and not may_lack_classes:
        raise DataError(
            f"{argument}: {rows.source} has {_described(rows.num_labels)}, the model has "
            f"{_described(classes)}; load the model with num_labels={rows.num_labels}, or the rows with "
            f"num_labels={classes}"
        )
    model_names = names_of_classes(model.config.id2label)
    if rows.label_names is not None and model_names not in (None, rows.label_names):
        raise DataError(
            f"{argument}: {rows.source} has the labels {', '.join(rows.label_names)}, the model has "
            f"{', '.join(model_names or ())}; load the rows with label_names={list(model_names or ())}"
        )


def _described(num_labels: int) -> str:
    return "a number as its label (regression)" if num_labels == 1 else f"{num_labels} labels"


def check_dtypes(trained: Iterable[nn.Parameter]) -> None:
    """Raise ValueError unless all weights to be trained are float32."""
    wrong = {parameter.dtype for parameter in trained} - {torch.float32}
    if wrong:
        raise ValueError(
            f"model: the weights to be trained are {', '.join(map(str, wrong))}, expected torch.float32; load the "
            "model with dtype=torch.float32 (bf16=True still computes in bfloat16)"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise ValueError for a tokenizer with more tokens than the model embeds."""
    embedded = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > embedded:
        raise ValueError(
            f"tokenizer: it has {len(tokenizer)} tokens, the model embeds {embedded}; pass the tokenizer that was "
            "saved with the model"
        )
    if tokenizer.padding_side != "right":
        raise ValueError(
            f"tokenizer: it pads on the {tokenizer.padding_side}, where [CLS] is read; set tokenizer.padding_side = "
            "'right'"
        )


def check_trainable(model: object, argument: str = "model") -> None:
    """Raise TypeError or ValueError for a model with adapters, whose frozen weights would train, or with layers that
    PyTorch or torchao quantised.
    """
    remedy = "merge the adapter first (model.merge_and_unload()), or train it with fastkd.finetune or fastkd.KDTrainer"
    if is_adapter(model):
        raise TypeError(f"{argument}: got a {type(model).__name__} of peft, whose frozen weights would train; {remedy}")
    if not isinstance(model, nn.Module):
        return
    check_not_quantised_elsewhere(model, argument, "train the unquantised model, then quantise it")
    for name, module in model.named_modules():
        if is_adapter(module):
            raise ValueError(
                f"{argument}: {name} is a peft adapter, whose frozen weights would train; pass the PeftModel that "
                f"get_peft_model gave, or {remedy}"
            )


def opened(model: Any) -> tuple[EarlyExitForSequenceClassification, Any]:
    """The early-exit model to train, and the `PeftModel` around it, or None.

    Raises:
        TypeError, ValueError: adapters that cannot be trained so, see `check_adapter`.
    """
    if is_peft_model(model):
        check_adapter(model)
        return model.get_base_model(), model
    check_trainable(model)
    return model, None


def opened_student(student: Any) -> tuple[Any, Any]:
    """The student of a KD training, whatever kind it is, and the `PeftModel` around it, or None.

    Raises:
        TypeError, ValueError: adapters that cannot be trained so, see `check_adapter`.
    """
    if is_peft_model(student):
        check_adapter(student, "student", takes_any=True)
        return student.get_base_model(), student
    is_folder = isinstance(student, str | os.PathLike)
    if is_folder and adapter_base(student) and not (Path(student) / "config.json").is_file():
        raise ValueError(
            f"student: {student} holds an adapter; load it with PeftModel.from_pretrained and pass that to "
            "fastkd.KDTrainer, or merge it into its base (merge_and_unload) and save that"
        )
    check_trainable(student, "student")
    return student, None


def parameters_to_train(trained: Sequence[nn.Module], adapter: Any, remedy: str) -> list[nn.Parameter]:
    """All parameters of these modules; around an adapter those that peft trains.

    Raises:
        ValueError: none, or other than float32, or quantised layers.
    """
    if any(isinstance(part, Int8Linear) for module in trained for part in module.modules()):
        raise ValueError(
            "model: its layers are quantised to int8, which has no gradients; train the unquantised model, then "
            "quantise it"
        )
    everything = dict.fromkeys(parameter for module in trained for parameter in module.parameters())
    chosen = [parameter for parameter in everything if adapter is None or parameter.requires_grad]
    if not chosen:
        raise ValueError(f"model: its adapter trains none of the weights that are trained here; {remedy}")
    check_dtypes(chosen)
    return chosen


def check_evaluation(early_stopping_patience: int | None, dev: Rows | None) -> None:
    """Raise ValueError where a training is to stop early by an evaluation that it does not have."""
    if early_stopping_patience is not None and dev is None:
        raise ValueError("early_stopping_patience: it needs an evaluation; pass dev rows")


def check_outputs(
    output_dir: Path, checkpoints: Path, record: dict[str, Any], *, resume: bool, overwrite: bool
) -> None:
    """Refuse to lose anything; put the folder of the checkpoints in order, with the record of this run in it.

    Raises:
        FileExistsError: `output_dir`, or the checkpoints of an unfinished run, would be lost.
        ValueError: a resumed run was started with other rows or options.
    """
    check_output_folder(output_dir, overwrite=overwrite)
    started = None if overwrite and not resume else _started_run(checkpoints)
    if started is not None and not resume:
        raise FileExistsError(
            f"output_dir: {checkpoints} holds the checkpoints of an unfinished run; continue it with resume=True, "
            "or discard it with overwrite=True"
        )
    if started is None:
        _check_checkpoints(checkpoints)
        remove_own(checkpoints)
        write_json(checkpoints / _RUN_FILE, record)
        return
    differences = _differences(started, record)
    if differences:
        raise ValueError(
            f"resume: the run in {checkpoints} was started differently ({'; '.join(differences)}); resume it as it was "
            "started, or start over with overwrite=True and resume=False"
        )


def clear_failed_start(checkpoints: Path) -> None:
    """Remove the folder of a run that failed unless a continuation could begin with something it trained."""
    kept = (_RUN_FILE, "teacher")
    trained = [path for path in checkpoints.glob("*") if path.name not in kept]
    if not any(path.is_file() or any(part.is_file() for part in path.rglob("*")) for path in trained):
        remove_own(checkpoints)


def _check_checkpoints(checkpoints: Path) -> None:
    """Raise FileExistsError where a folder of this name holds what no training left."""
    if not checkpoints.is_dir():
        return
    is_of_run = (checkpoints / _RUN_FILE).exists() or any(checkpoints.glob("checkpoint-*"))
    found = foreign_in_work(checkpoints) if is_of_run else next(checkpoints.iterdir(), None)
    if found is not None:
        raise FileExistsError(
            f"output_dir: {checkpoints} is needed for the checkpoints, but holds {found.relative_to(checkpoints)}, "
            "which training did not write; move it away, or choose another output_dir"
        )


def _started_run(checkpoints: Path) -> dict[str, Any] | None:
    path, remedy = checkpoints / _RUN_FILE, "discard the run with overwrite=True, without resume=True"
    if not path.is_file():
        return None
    found = read_json(path, "output_dir", remedy)
    check_fields(
        found,
        {"stage": str, "rows_a_step": int, "options": dict, "train": (dict, NoneType), "dev": (dict, NoneType)},
        path, "output_dir", remedy,
    )  # fmt: skip
    return found


def _differences(started: dict[str, Any], record: dict[str, Any]) -> list[str]:
    def flat(run: dict[str, Any]) -> dict[str, Any]:
        rows = {name: (run[name] or {}).get("digest") for name in ("train", "dev")}
        options = {name: value for name, value in run["options"].items() if name not in _FREE_OPTIONS}
        return {"stage": run["stage"], "batch_size times processes": run["rows_a_step"], **options, **rows}

    before, now = flat(started), flat(record)
    return [
        f"other {name} rows" if name in ("train", "dev") else f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
