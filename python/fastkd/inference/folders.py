"""Answers for folders of Parquet or JSON lines, block by block: in this process, or by Ray Data on many.

Whoever answers a block writes its file, whole or not at all; a block that is tried again, because its worker died,
replaces the same file by the same answers. So every row has one answer whatever dies, and a run that was killed goes
on with the blocks that have no file yet. The names of the output files sort in the order of the input.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd.data.columns import Columns
from fastkd.data.files import changed_settings, holds_input, reading, write_json
from fastkd.inference.answers import average_layers, exits_in_order
from fastkd.inference.blocks import WORK, Block, input_files, plan_blocks, records_of, write_answers
from fastkd.inference.predict import predict
from fastkd.inference.row_reader import InputRow, row_of
from fastkd.model.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastkd.model.modeling import EarlyExitForSequenceClassification

ENGINES = ("local", "ray")
BLOCK_ROWS = 16_384
_RUN_FILE = "run.json"


@dataclass(frozen=True)
class Answering:
    """How a folder is answered; every worker gets it.

    Attributes:
        checkpoint: folder of the model, which every worker reads.
        output: folder of the answers, which every worker writes to.
        device, dtype: see `load_model`.
        text_a, text_b: names of the columns of the texts; None takes the usual ones.
        key: column that is copied into the answers.
        options: of `predict`.
    """

    checkpoint: str
    output: str
    device: str = "auto"
    dtype: str | None = None
    text_a: str | None = None
    text_b: str | None = None
    key: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class FolderSummary:
    """What a run of `predict_folder` did.

    Attributes:
        blocks: of all rows.
        found: blocks that an earlier run had finished.
        rows, bad_rows, exits: of the blocks of this run.
    """

    blocks: int = 0
    found: int = 0
    rows: int = 0
    bad_rows: int = 0
    exits: Counter[int] = field(default_factory=Counter)

    @property
    def average_layers(self) -> float | None:
        return average_layers(self.exits)

    def to_dict(self) -> dict[str, Any]:
        return {
            "blocks": self.blocks,
            "blocks_found": self.found,
            "rows": self.rows,
            "bad_rows": self.bad_rows,
            "average_layers": self.average_layers,
            "exits_per_layer": exits_in_order(self.exits),
        }


def predict_folder(
    answering: Answering,
    source: str | os.PathLike[str],
    *,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    block_rows: int = BLOCK_ROWS,
    on_block: Callable[[dict[str, Any]], None] = lambda done: None,
) -> FolderSummary:
    """Answer the files of a folder into another, one row for each row and one file for each block.

    The files are called `part-000000.parquet`, or .jsonl as those that are read. Output rows have the key where one is
    named, then `label`, `probability`, `exit_layer` and `error`. Rows without an answer are listed in
    `_fastkd/bad-rows-000000.jsonl` too, with file and row. A run that was killed is continued by the same call; its
    finished blocks are not done again.

    Args:
        answering: model, output folder and options.
        source: folder of .parquet or of .jsonl files.
        engine: "local" answers in this process, "ray" by Ray Data.
        workers: of Ray; default: as many as it has GPUs, or else CPUs.
        address: of a Ray cluster; default: a local one, which is shut down afterwards.
        block_rows: rows of a block; what a worker that dies loses.
        on_block: called with what each finished block gave: `block`, `rows`, `bad_rows`, `exits`, `process`.

    Raises:
        DataError: files that cannot be read, or without a column of text or without the key.
        FileExistsError: the output folder holds something else.
        ModuleNotFoundError: Ray is asked for and not installed.
        ValueError: an unknown engine; a run that was begun with other rows or options.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: got {engine!r}, expected one of {', '.join(ENGINES)}")
    for argument, value in (("block_rows", block_rows), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{argument}: got {value}, expected at least 1")
    if engine == "ray":
        _import_ray()
    place = Path(answering.checkpoint)
    answering = replace(
        answering,
        output=str(Path(answering.output).absolute()),
        checkpoint=str(place.absolute()) if place.exists() else answering.checkpoint,
    )
    files, form = input_files(source)
    with reading(source, *files):
        model, tokenizer = load_model(answering.checkpoint, answering.device, answering.dtype)
        model.exit_rule(
            **{name: answering.options.get(name) for name in ("speed", "criterion", "top_n", "exit_layers")}
        )
        blocks = plan_blocks(files, form, block_rows, Columns(answering.text_a, answering.text_b), answering.key)
        _begin(answering, files, block_rows, model.config.weights_fingerprint)
    todo = [block for block in blocks if not block.output(answering.output).exists()]
    summary = FolderSummary(blocks=len(blocks), found=len(blocks) - len(todo))
    done = (
        (answer_block(answering, model, tokenizer, block) for block in todo)
        if engine == "local"
        else _by_ray(answering, todo, workers, address)
    )
    for block in done if todo else ():
        summary.rows += block["rows"]
        summary.bad_rows += block["bad_rows"]
        summary.exits.update({int(layer): count for layer, count in block["exits"].items()})
        on_block(block)
    lacking = [block.output(answering.output).name for block in blocks if not block.output(answering.output).exists()]
    if lacking:
        raise RuntimeError(
            f"output: {len(lacking)} of {len(blocks)} parts are not in {answering.output}, the first is {lacking[0]}; "
            "every worker must write to that folder: name one that all machines share, and run the command again"
        )
    return summary


def answer_block(
    answering: Answering,
    model: EarlyExitForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    block: Block,
) -> dict[str, Any]:
    """Answer a block by the stream engine and write its file; what `on_block` of `predict_folder` gets."""
    chosen, keys = Columns(*block.columns), list[Any]()

    def rows() -> Iterator[InputRow]:
        for record in records_of(block, answering.key):
            keys.append(None if answering.key is None else record.values.get(answering.key))
            yield row_of(record, chosen)

    answers = list(predict(model, tokenizer, rows(), **answering.options))
    bad = write_answers(block, answering.output, answering.key, keys, answers)
    exits = Counter(str(answer.exit_layer) for answer in answers if answer.exit_layer is not None)
    return {
        "block": block.number, "rows": len(answers), "bad_rows": bad, "exits": dict(exits), "process": os.getpid()
    }  # fmt: skip


class Answerer:
    """What an actor of Ray Data runs: a model that stays loaded, and answers one block after the other."""

    def __init__(self, answering: Answering) -> None:
        self.answering = answering
        self.model, self.tokenizer = load_model(answering.checkpoint, answering.device, answering.dtype)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        blocks = [_block_of(text) for text in batch["block"]]
        return {"done": [json.dumps(self._done(block)) for block in blocks]}

    def _done(self, block: Block) -> dict[str, Any]:
        try:
            return answer_block(self.answering, self.model, self.tokenizer, block)
        except (ValueError, OSError) as error:
            # Ray would wrap it in an account of its own, in which the sentence is lost
            return {"problem": str(error), "is_of_system": isinstance(error, OSError)}


def _block_of(text: Any) -> Block:
    found = json.loads(str(text))
    return Block(**{**found, "columns": tuple(found["columns"])})


def _by_ray(
    answering: Answering, todo: Sequence[Block], workers: int | None, address: str | None
) -> Iterator[dict[str, Any]]:
    """What each block gave, as blocks are finished; actors that die are started anew, and their blocks done again."""
    ray = _import_ray()
    is_own = not ray.is_initialized()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if is_own:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        resources = ray.cluster_resources()
        gpus = 0 if answering.device == "cpu" else int(resources.get("GPU", 0))
        size = min(workers or gpus or int(resources.get("CPU", 1)), len(todo))
        ray.data.DataContext.get_current().enable_progress_bars = False
        given = ray.data.from_items(
            [{"block": json.dumps(asdict(block))} for block in todo], override_num_blocks=len(todo)
        )
        done = given.map_batches(
            Answerer,
            fn_constructor_args=(answering,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size),
            num_cpus=0 if gpus else 1,
            num_gpus=1 if gpus else 0,
        )
        for row in done.iter_rows():
            told = json.loads(row["done"])
            if "problem" in told:
                raise (OSError if told["is_of_system"] else ValueError)(told["problem"])
            yield told
    finally:
        if is_own:
            ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ModuleNotFoundError(
            "engine: Ray is not installed; run: pip install 'fastkd-kernels[ray]', or pass --engine local"
        ) from error
    return ray


def _begin(answering: Answering, files: Sequence[Path], block_rows: int, weights: str | None) -> None:
    """Take the output folder, or go on in it; what a continuation must agree with stands in a file there."""
    folder = Path(answering.output)
    run_file = folder / WORK / _RUN_FILE
    settings: dict[str, Any] = {
        "model": weights or answering.checkpoint,
        "dtype": answering.dtype,
        "columns": [answering.text_a, answering.text_b],
        "key": answering.key,
        "block_rows": block_rows,
        "input files": {path.name: path.stat().st_size for path in files},
        **answering.options,
    }
    settings = json.loads(json.dumps(settings))
    if run_file.exists():
        changed = changed_settings(run_file, settings)
        if changed:
            raise ValueError(
                f"output: {folder} was started with another {', '.join(changed)}; run the command "
                "as it was, or choose another --output"
            )
        return
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output: {folder} is not a folder; choose another --output")
    if folder.exists() and holds_input(folder) is not None:
        raise ValueError(f"output: {folder} holds the input; choose another --output")
    found = next(folder.iterdir(), None) if folder.exists() else None
    if found is not None:
        raise FileExistsError(
            f"output: {folder} holds {found.name}, which fastkd predict did not leave there; choose another --output"
        )
    write_json(run_file, settings)
