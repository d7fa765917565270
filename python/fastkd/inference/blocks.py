"""Blocks of rows: what of a folder is answered, written and, after a kill, begun again as one piece.

A block is a run of rows of one input file, and one output file holds its answers, in the order of its rows. That file
is whole or absent, so a block is done exactly if its file is there, whoever worked on it and how often.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.data.columns import Columns, text_columns
from fastkd.data.errors import DataError
from fastkd.data.files import atomic_path, write_text
from fastkd.data.records import LONGEST_RECORD, Record, format_of, open_records, read_json_lines, read_parquet_rows
from fastkd.inference.answers import Prediction

FOLDER_FORMATS = ("parquet", "jsonl")
WORK = "_fastkd"
"""The folder inside an output that holds what is no answer; readers of a dataset pass over names with such a start."""
BAD_ROWS = "bad-rows"


@dataclass(frozen=True)
class Block:
    """Rows of one input file.

    Attributes:
        number: its place among all blocks; the names of output files have it.
        path: of the input file.
        form: one of `FOLDER_FORMATS`.
        first: rows of the file before it.
        rows: how many it has.
        offset: bytes of the file before it; JSON lines only.
        columns: those of the texts; None where every row brings its own.
    """

    number: int
    path: str
    form: str
    first: int
    rows: int
    offset: int
    columns: tuple[str | None, str | None] = (None, None)

    def output(self, folder: str | os.PathLike[str]) -> Path:
        return Path(folder) / f"part-{self.number:06d}.{self.form}"

    def bad_rows(self, folder: str | os.PathLike[str]) -> Path:
        return Path(folder) / WORK / f"{BAD_ROWS}-{self.number:06d}.jsonl"


def input_files(folder: str | os.PathLike[str]) -> tuple[list[Path], str]:
    """The files of a folder in the order of their names, without those that begin with . or _; and their format.

    Raises:
        DataError: no file of `FOLDER_FORMATS`, or both kinds.
        NotADirectoryError: no folder.
    """
    place = Path(folder).absolute()
    if not place.is_dir():
        raise NotADirectoryError(f"input: {place} is not a folder; name the folder that holds the files")
    files = sorted(path for path in place.iterdir() if path.is_file() and not path.name.startswith(("_", ".")))
    forms = {format_of(path) for path in files}
    if len(forms) != 1 or not forms <= set(FOLDER_FORMATS):
        found = ", ".join(sorted(forms)) or "no file"
        raise DataError(f"input: {place} holds {found}; expected files of one kind, .parquet or .jsonl")
    return files, forms.pop()


def plan_blocks(files: Sequence[Path], form: str, rows: int, chosen: Columns, key: str | None = None) -> list[Block]:
    """Cut files into blocks of at most so many rows. JSON lines are read once for that, to count them.

    Raises:
        DataError: a damaged or empty file, or one without a column of text or without the key.
    """
    blocks: list[Block] = []
    for path in files:
        cut = _parquet_cuts if form == "parquet" else _line_cuts
        columns, cuts = cut(path, rows, chosen, key)
        for first, count, offset in cuts:
            blocks.append(Block(len(blocks), str(path), form, first, count, offset, columns))
    return blocks


_Cuts = tuple[tuple[str | None, str | None], list[tuple[int, int, int]]]


def _parquet_cuts(path: Path, rows: int, chosen: Columns, key: str | None) -> _Cuts:
    import pyarrow.parquet

    with path.open("rb") as stream:
        names = open_records(stream, "parquet", str(path)).columns or []
    if key is not None and key not in names:
        raise DataError(f"{path}: no column '{key}' (key=); the columns are {', '.join(names)}")
    total = pyarrow.parquet.read_metadata(path).num_rows
    cuts = [(first, min(rows, total - first), 0) for first in range(0, total, rows)]
    return text_columns(names, chosen, str(path)), cuts


def _line_cuts(path: Path, rows: int, chosen: Columns, key: str | None) -> _Cuts:
    cuts: list[tuple[int, int, int]] = []
    with path.open("rb") as stream:
        open_records(stream, "jsonl", str(path))
        stream.seek(0)
        first, count, start, end, is_open = 0, 0, 0, 0, False
        while raw := stream.readline(LONGEST_RECORD):
            end += len(raw)
            count += not is_open
            is_open = not raw.endswith(b"\n")
            if count == rows and not is_open:
                cuts.append((first, count, start))
                first, count, start = first + count, 0, end
        if count:
            cuts.append((first, count, start))
    return (chosen.text_a, chosen.text_b), cuts


def records_of(block: Block, key: str | None = None) -> Iterator[Record]:
    """The records of a block, with their line or row numbers in the file."""
    if block.form == "parquet":
        wanted = [name for name in dict.fromkeys((*block.columns, key)) if name is not None]
        yield from read_parquet_rows(block.path, block.first, block.rows, wanted)
        return
    with open(block.path, "rb") as stream:
        stream.seek(block.offset)
        records = read_json_lines(stream, block.first)
        for _ in range(block.rows):
            yield next(records)


def write_answers(
    block: Block, folder: str | os.PathLike[str], key: str | None, keys: Sequence[Any], answers: Sequence[Prediction]
) -> int:
    """Write the answers of a block and, in a file of their own, its rows without one; how many these are.

    Args:
        block: whose answers they are.
        folder: of the output.
        key: name of the column that comes first; None for none.
        keys: its values, one for each answer.
        answers: one for each row, in their order.
    """
    bad = [
        {"file": block.path, "row": answer.line, **({} if key is None else {key: value}), "error": answer.problem}
        for answer, value in zip(answers, keys, strict=True)
        if answer.problem is not None
    ]
    if bad:
        write_text(block.bad_rows(folder), _json_lines(bad))
    columns: dict[str, list[Any]] = {} if key is None else {key: list(keys)}
    columns["label"] = [answer.label for answer in answers]
    columns["probability"] = [answer.probability for answer in answers]
    columns["exit_layer"] = [answer.exit_layer for answer in answers]
    columns["error"] = [answer.problem for answer in answers]
    # the part comes last: it says that the block is done
    if block.form == "parquet":
        _write_parquet(block, folder, key, columns)
    else:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        write_text(block.output(folder), _json_lines(rows))
    return len(bad)


def _json_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def _write_parquet(
    block: Block, folder: str | os.PathLike[str], key: str | None, columns: dict[str, list[Any]]
) -> None:
    import pyarrow
    import pyarrow.parquet

    # a block whose rows are all bad must have the types of the others
    is_number = any(isinstance(label, float) for label in columns["label"])
    types = {
        "label": pyarrow.float64() if is_number else pyarrow.string(),
        "probability": pyarrow.float64(),
        "exit_layer": pyarrow.int32(),
        "error": pyarrow.string(),
    }
    if key is not None:
        types[key] = pyarrow.parquet.read_schema(block.path).field(key).type
    table = pyarrow.table({name: pyarrow.array(values, types[name]) for name, values in columns.items()})
    with atomic_path(block.output(folder)) as temporary:
        pyarrow.parquet.write_table(table, temporary)
