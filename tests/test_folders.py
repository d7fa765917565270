"""Folders of rows, block by block: what is answered, what a kill leaves, and Ray's workers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tiny_models import early_exit_model, one_thread, tokenizer_of  # noqa: F401  # a fixture
from typer.testing import CliRunner

from fastkd.commands import app
from fastkd.data.columns import Columns
from fastkd.data.errors import DataError
from fastkd.inference.blocks import Block, input_files, plan_blocks, records_of
from fastkd.inference.folders import Answering, predict_folder

WORDS = ["the", "film", "was", "good", "bad", "dull", "boring", "great", "fun", "a", "plot", "actor"]
TEXTS = [" ".join(WORDS[(row + step) % len(WORDS)] for step in range(1 + row % 9)) for row in range(70)]
BAD = {5: b"{broken\n", 41: b"\n"}  # lines of JSON


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    early_exit_model().save_pretrained(folder)
    tokenizer_of("bert").save_pretrained(folder)
    return folder


def write_json_lines(folder: Path) -> Path:
    """Two files, of 40 and of 30 rows, two of which are bad; the last line has no end."""
    folder.mkdir()
    lines = [json.dumps({"id": f"row {row}", "text": text}).encode() + b"\n" for row, text in enumerate(TEXTS)]
    for row, line in BAD.items():
        lines[row] = line
    (folder / "a.jsonl").write_bytes(b"".join(lines[:40]))
    (folder / "b.jsonl").write_bytes(b"".join(lines[40:]).removesuffix(b"\n"))
    return folder


def write_parquet(folder: Path) -> Path:
    """Two files with small row groups; the same two rows have no text."""
    folder.mkdir()
    texts = [None if row in BAD else text for row, text in enumerate(TEXTS)]
    for name, rows in (("a", range(40)), ("b", range(40, 70))):
        table = pyarrow.table({"other": [0.0] * len(rows), "id": list(rows), "text": [texts[row] for row in rows]})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=11)
    return folder


def rows_in(folder: Path) -> list[dict[str, Any]]:
    """The output's rows, in the order of the names of its files."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("part-*")):
        if path.suffix == ".parquet":
            found += pyarrow.parquet.read_table(path).to_pylist()
        else:
            found += map(json.loads, path.read_text().splitlines())
    return found


def bad_rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("_fastkd/bad*")) for line in path.read_text().splitlines()]


def answering_of(checkpoint: Path, output: Path, **options: Any) -> Answering:
    return Answering(str(checkpoint), str(output), "cpu", key="id", options={"speed": 0.5, **options})


def expected_rows() -> list[tuple[str | None, int | None]]:
    """Label and exit layer of each row, as the model itself gives them."""
    model, tokenizer = early_exit_model(), tokenizer_of("bert")
    texts = [text for row, text in enumerate(TEXTS) if row not in BAD]
    answers = iter([(row.label, row.exit_layer) for row in model.stream(texts, tokenizer, speed=0.5)])
    return [(None, None) if row in BAD else next(answers) for row in range(len(TEXTS))]  # type: ignore[misc]


@pytest.mark.parametrize("write", [write_json_lines, write_parquet])
def test_every_row_has_one_answer_in_its_place(checkpoint: Path, tmp_path: Path, write: Callable[[Path], Path]) -> None:
    source = write(tmp_path / "in")
    done: list[dict[str, Any]] = []
    summary = predict_folder(
        answering_of(checkpoint, tmp_path / "out"), source, block_rows=16, on_block=done.append
    )  # fmt: skip
    # 40 rows are blocks of 16, 16 and 8; 30 of 16 and 14
    assert (summary.blocks, summary.found, summary.rows, summary.bad_rows) == (5, 0, 70, 2)
    assert [block["rows"] for block in done] == [16, 16, 8, 16, 14]
    rows = rows_in(tmp_path / "out")
    assert [(row["label"], row["exit_layer"]) for row in rows] == expected_rows()
    is_json = write is write_json_lines
    keys: list[Any] = [None if is_json and row in BAD else f"row {row}" if is_json else row for row in range(70)]
    assert [row["id"] for row in rows] == keys
    assert [row for row, found in enumerate(rows) if found["error"] is not None] == sorted(BAD)
    suffix = source.joinpath("x").with_suffix(".jsonl" if is_json else ".parquet").suffix
    places = [(Path(row["file"]).name, row["row"], row["id"]) for row in bad_rows_in(tmp_path / "out")]
    assert places == [(f"a{suffix}", 6, keys[5]), (f"b{suffix}", 2, keys[41])]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    if not is_json:
        # a reader of data sets takes the folder as it is
        assert pyarrow.parquet.read_table(tmp_path / "out").num_rows == 70


def test_finished_blocks_are_not_done_again(checkpoint: Path, tmp_path: Path) -> None:
    source, answering = write_json_lines(tmp_path / "in"), answering_of(checkpoint, tmp_path / "out")

    class Killed(Exception):
        pass

    def kill(done: dict[str, Any]) -> None:
        if done["block"] == 2:
            raise Killed

    with pytest.raises(Killed):
        predict_folder(answering, source, block_rows=16, on_block=kill)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    assert len(kept) == 3
    summary = predict_folder(answering, source, block_rows=16)
    assert (summary.found, summary.rows) == (3, 30)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [(row["label"], row["exit_layer"]) for row in rows_in(tmp_path / "out")] == expected_rows()
    again = predict_folder(answering, source, block_rows=16)
    assert (again.found, again.rows) == (5, 0)
    with pytest.raises(ValueError, match=r"was started with another speed; run the command as it was"):
        predict_folder(replace(answering, options={"speed": 0.1}), source, block_rows=16)
    with pytest.raises(ValueError, match=r"was started with another block_rows"):
        predict_folder(answering, source, block_rows=17)
    (source / "c.jsonl").write_text('{"text": "good"}\n')
    with pytest.raises(ValueError, match=r"was started with another input files"):
        predict_folder(answering, source, block_rows=16)


def test_blocks_have_the_rows_and_numbers_of_their_file(tmp_path: Path) -> None:
    for write in (write_json_lines, write_parquet):
        folder = write(tmp_path / write.__name__)
        files, form = input_files(folder)
        for rows in (1, 7, 11, 40, 1000):
            blocks = plan_blocks(files, form, rows, Columns())
            found = [(Path(block.path).stem, record.position) for block in blocks for record in records_of(block)]
            assert found == [("a", row) for row in range(1, 41)] + [("b", row) for row in range(1, 31)]
            assert max(block.rows for block in blocks) == min(rows, 40)


def test_what_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    answering = answering_of(checkpoint, tmp_path / "out")
    with pytest.raises(NotADirectoryError, match="absent is not a folder"):
        predict_folder(answering, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no file; expected files of one kind, \.parquet or \.jsonl"):
        predict_folder(answering, tmp_path / "empty")
    source = write_parquet(tmp_path / "in")
    with pytest.raises(ValueError, match="engine: got 'spark', expected one of local, ray"):
        predict_folder(answering, source, engine="spark")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'key' \(key=\)"):
        predict_folder(replace(answering, key="key"), source)
    with pytest.raises(ValueError, match="speed"):
        predict_folder(replace(answering, options={"speed": 2.0}), source)
    with pytest.raises((ValueError, FileExistsError), match=r"output: .* holds"):
        predict_folder(replace(answering, output=str(source)), source)
    assert not (tmp_path / "out").exists()
    (source / "c.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"c\.parquet: not a readable Parquet file"):
        predict_folder(answering, source)


def test_the_command(checkpoint: Path, tmp_path: Path) -> None:
    source = write_json_lines(tmp_path / "in")
    common = ["predict", str(checkpoint), str(source)]
    refused = CliRunner().invoke(app.app, [*common])
    assert refused.exit_code == 2
    assert "the answers to a folder go into a folder; name one with --output" in refused.stderr
    refused = CliRunner().invoke(app.app, [*common, "-o", str(tmp_path / "out"), "--monitor", "1%"])
    assert "--monitor: works for one file, but the input is a folder" in refused.stderr
    done = CliRunner().invoke(app.app, [*common, "-o", str(tmp_path / "out"), "--key", "id", "--json"])
    assert done.exit_code == 1, done.stderr  # of the bad rows
    shown = json.loads(done.stdout)
    assert (shown["rows"], shown["bad_rows"], shown["blocks"]) == (70, 2, 2)
    assert len(rows_in(tmp_path / "out")) == 70


def test_a_block_is_plain_data() -> None:
    """What goes to a worker as JSON comes back as it was."""
    from dataclasses import asdict

    from fastkd.inference.folders import _block_of

    block = Block(3, "a.jsonl", "jsonl", 5, 2, 100, ("text", None))
    assert _block_of(json.dumps(asdict(block))) == block
    assert block.output("out").name == "part-000003.jsonl"


def test_ray_loses_and_repeats_no_row_when_a_worker_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fastkd-kernels[ray]'")
    source = write_parquet(tmp_path / "in")
    ray.init(num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
    workers: list[int] = []

    def kill_one(done: dict[str, Any]) -> None:
        workers.append(done["process"])
        if len(workers) == 2:
            os.kill(done["process"], signal.SIGKILL)

    try:
        summary = predict_folder(
            answering_of(checkpoint, tmp_path / "out"), source, engine="ray", workers=2, block_rows=5, on_block=kill_one
        )
        assert (summary.blocks, summary.rows, summary.bad_rows) == (14, 70, 2)
        assert os.getpid() not in workers
        rows = rows_in(tmp_path / "out")
        assert [(row["label"], row["exit_layer"]) for row in rows] == expected_rows()
        assert [row["id"] for row in rows] == list(range(70))
        assert len(bad_rows_in(tmp_path / "out")) == 2
        # a worker took the place of the one that was killed
        assert len(set(workers)) >= 2
        # what is wrong with the rows is said as without Ray
        answering = answering_of(checkpoint, tmp_path / "other", max_length=10_000)
        with pytest.raises(ValueError, match="max_length"):
            predict_folder(answering, source, engine="ray", workers=1, block_rows=40)
    finally:
        ray.shutdown()
