"""Damaged files of every kind that fastkd writes and reads: each loads as it was or is refused in one clear sentence.

Bits are flipped, files are cut, emptied and joined with others, and JSON values become ones of other types. What has a
checksum must give its very content or be refused. What people edit (config.json, logs, rows) cannot be told from an
edit where it is still well formed; it must load or be refused in a sentence.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import pyarrow
import pyarrow.parquet
import safetensors.torch
import torch
from kd_worker import OPTIONS, save_teacher
from made_up_traces import population
from tiny_models import early_exit_model, one_thread, tokenizer_of  # noqa: F401  # a fixture
from training_worker import rows

from fastkd import EarlyExitForSequenceClassification
from fastkd.data.files import changed_settings, write_json
from fastkd.data.records import FORMATS
from fastkd.data.rows import load_rows
from fastkd.data.tensors import load_tensors, save_tensors
from fastkd.exits.certificate import Certificate
from fastkd.exits.trace import ExitTrace
from fastkd.inference.row_reader import read_rows
from fastkd.kd.cache import TeacherCache, example_ids
from fastkd.kd.teacher import Teacher
from fastkd.model.loading import load_config, load_model
from fastkd.model.tokenizers import load_tokenizer
from fastkd.report.sources import read_benchmark
from fastkd.tables import kd_table, table2
from fastkd.training.checks import check_outputs
from fastkd.training.log import read_log

GRID = """
tasks: {one: {data: one}}
blocks: [{student: "layers:2", methods: [kd]}]
seeds: [1]
"""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        path: of a whole one.
        load: reads it as its user does; gives its content, for comparison.
        is_vouched_for: nothing but its content may come of it; otherwise whatever is well formed.
        damages: how many bit flips and how many cuts are tried.
    """

    path: Path
    load: Callable[[], Any]
    is_vouched_for: bool
    damages: int = 40


def flips(raw: bytes, count: int, source: random.Random) -> Iterator[bytes]:
    """One bit, or one to four in one place; the head of a file, where its form is told, more often."""
    for number in range(count):
        place = source.randrange(min(len(raw), 400) if number % 2 else len(raw))
        changed = bytearray(raw)
        changed[place] ^= 1 << source.randrange(8) if number % 4 < 2 else source.randrange(1, 256)
        yield bytes(changed)


def cuts(raw: bytes, count: int, source: random.Random) -> Iterator[bytes]:
    yield b""
    yield raw + raw
    yield b"\0" * len(raw)
    for _ in range(count):
        place = source.randrange(len(raw))
        yield raw[:place]
        yield raw[:place] + raw[place + source.randrange(1, 64) :]


def other_types(raw: bytes, count: int, source: random.Random) -> Iterator[bytes]:
    """The JSON with one value of another type, or one key less."""
    whole = json.loads(raw)
    places = list(_places(whole))
    source.shuffle(places)
    for place in places[:count]:
        wrong: Any
        for wrong in source.sample([None, "text", -3, 2.5, [], {}, True, [None], {"a": []}, 10**30], 3):
            yield json.dumps(_with(whole, place, wrong)).encode()
        yield json.dumps(_with(whole, place[:-1], None, drop=place[-1])).encode()
    for wrong in (None, [], 3, "text", {}):
        yield json.dumps(wrong).encode()
    yield b"[" * 100_000
    yield b'{"a": ' + b"9" * 6000 + b"}"


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*place, key)
        yield from _places(value[key], (*place, key))


def _with(whole: Any, place: tuple[Any, ...], wrong: Any, drop: Any = None) -> Any:
    changed = copy.deepcopy(whole)
    holder = changed
    for key in place if drop is not None else place[:-1]:
        holder = holder[key]
    if drop is not None:
        del holder[drop]
    else:
        holder[place[-1]] = wrong
    return changed


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    return bool(one == other)


def tried(kind: Kind, contents: Iterator[bytes]) -> Counter[str]:
    """What came of a file with each of these contents; fails for what must not come of any."""
    whole, raw = kind.load(), kind.path.read_bytes()
    came: Counter[str] = Counter()
    for content in contents:
        if content == raw:
            continue
        kind.path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = kind.load()
        except (ValueError, OSError) as error:
            message = str(error)
            assert kind.path.name in message or str(kind.path.parent) in message, message
            assert "; " in message or "config" in message, message
            assert "Traceback" not in message, message
            came["refused"] += 1
        else:
            same = equal(whole, found)
            assert same or not kind.is_vouched_for, content[:400]
            came["loaded" if same else "loaded as edited"] += 1
    kind.path.write_bytes(raw)
    assert equal(kind.load(), whole)
    return came


# The kinds


def _trace(folder: Path) -> Kind:
    trace = replace(population(rows=40), certainty=torch.rand(40, 4), rows=torch.arange(40))
    path = folder / "dev.safetensors"
    trace.save(path)

    def load() -> Any:
        found = vars(ExitTrace.load(path))
        return {**found, "shape": str(found["shape"]), "source": str(found["source"])}

    return Kind(path, load, True, 150)


def _cache(folder: Path, name: str) -> Kind:
    given = rows(12)
    place = folder / "cache"
    teacher = Teacher.load(save_teacher(folder / "teacher"))

    def opened() -> TeacherCache:
        return TeacherCache(place, teacher, 16, pseudo_classifiers=OPTIONS.pseudo_classifiers)

    kinds = ("logits", "layer_logits", "hidden_states")
    opened().ensure(given, kinds)

    def load() -> Any:
        cache = opened()
        cache.ensure_pseudo_classifiers(given)
        answers = cache.answers(example_ids(given), kinds)
        return {**answers, "classifiers": teacher.pseudo_classifiers.weight.clone()}  # type: ignore[union-attr]

    return Kind(place / name, load, True, 30)


def _cell(folder: Path) -> Kind:
    (folder / "grid.yaml").write_text(GRID)
    grid = kd_table.load_grid(folder / "grid.yaml")
    (cell,) = grid.cells()
    runner = kd_table._Runner(grid, folder)
    result = {"settings": runner._settings(cell), "metrics": {"accuracy": 0.8125, "loss": 0.4}, "steps": 9}
    path = kd_table._cell_path(folder, cell)
    kd_table.write_result(path, result)
    return Kind(path, lambda: [runner.is_finished(cell), str(kd_table.table_rows(grid, folder))], True)


def _run_file(folder: Path) -> Kind:
    record = {
        "stage": "kd", "processes": 1, "rows_a_step": 8, "options": {"seed": 1, "epochs": 3.0, "resume": True},
        "train": {"source": "a", "rows": 5, "digest": "d" * 64}, "dev": None,
    }  # fmt: skip
    write_json(folder / "out.checkpoints" / "run.json", record)
    checkpoints = folder / "out.checkpoints"
    return Kind(
        checkpoints / "run.json",
        lambda: check_outputs(folder / "out", checkpoints, record, resume=True, overwrite=False),
        True,  # nothing is loaded: either it is the same run, or it is refused
    )


def _table2_result(folder: Path) -> Kind:
    cell = {
        "dataset": "d", "model": "m", "accuracy": 0.9, "average_layers": 3.0, "flops": 1.0, "flops_speedup": 2.0,
        "seconds": 0.5, "speedup": 2.0, "timed_rows": 8, "engine": "ours",
    }  # fmt: skip
    options = table2.Table2Options()
    value = {"options": table2._as_json(options), "machine": {}, "facts": {}, "cells": [cell]}
    table2.write_result(folder / table2._RESULT, value)
    return Kind(folder / table2._RESULT, lambda: table2._kept_result(folder, options, False, {}), True)


def _log(folder: Path) -> Kind:
    history = [{"epoch": 1.0, "step": 5, "eval_loss": 0.5, "eval_accuracy": 0.75}, {"loss": 1.0, "epoch": 0.5}]
    write_json(folder / "trainer_log.json", {"stage": "finetune", "steps": 5, "log_history": history})
    return Kind(folder / "trainer_log.json", lambda: read_log(folder), False)


def _bench(folder: Path) -> Kind:
    numbers = dict.fromkeys(("batch_size", "speed", "rows", "flops_speedup", "speedup", "seconds", "full_seconds"), 2)
    write_json(folder / "bench.json", {"rows": [{"dtype": "fp32", **numbers}], "machine": {}})
    return Kind(folder / "bench.json", lambda: read_benchmark(folder / "bench.json"), False)


def _settings(folder: Path) -> Kind:
    write_json(folder / "settings.json", {"seed": 1, "data": None})
    return Kind(
        folder / "settings.json", lambda: changed_settings(folder / "settings.json", {"seed": 1, "data": None}), False
    )


def _saved_model(folder: Path) -> None:
    early_exit_model(num_labels=2, id2label={0: "bad", 1: "good"}).save_pretrained(folder)
    tokenizer_of("bert").save_pretrained(folder)


def _config(folder: Path) -> Kind:
    _saved_model(folder)

    def load() -> Any:
        config = load_config(str(folder))
        EarlyExitForSequenceClassification.from_pretrained(folder)
        return config.to_dict()

    return Kind(folder / "config.json", load, False, 12)


def _certificate(folder: Path) -> Kind:
    certificate = Certificate(
        guarantee="consistency", method="fixed-sequence", max_drop=0.01, confidence=0.95, speed=0.5, position=0.5,
        criterion="entropy", top_n=None, exit_layers=[1, 2, 3, 4], dtype="float32", tolerance=None, n=1000, failures=2,
        bound=0.009, disagreements=2, speedup=2.0, average_layers=2.0, accuracy=None, full_accuracy=None, seq_len=64,
        data="d", model="m", seen_as=None, date="2026-01-01", version="0",
    )  # fmt: skip
    path = folder / "certificate.json"
    write_json(path, certificate.to_dict())

    def load() -> Any:
        from fastkd.report.sources import read_certificate

        try:
            found = Certificate.from_dict(read_certificate(path))
            str(found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return found.to_dict()

    return Kind(path, load, False)


def _tokenizer(folder: Path) -> Kind:
    _saved_model(folder)
    return Kind(folder / "tokenizer.json", lambda: load_tokenizer(folder)("a good film")["input_ids"], False, 15)


def _weights(folder: Path) -> Kind:
    _saved_model(folder)
    return Kind(folder / "model.safetensors", lambda: dict(load_model(str(folder), "cpu")[0].state_dict()), False, 3)


TEXTS = ["a good film", 'naïve, "quoted"', "two\nlines", "plain"]


def _rows_of(form: str) -> Callable[[Path], Kind]:
    def make(folder: Path) -> Kind:
        suffix = ".txt" if form == "text" else f".{form}"
        path = folder / f"rows{suffix}"
        labels, texts = ["bad", "good", "bad", "good"], [text.replace("\n", " ") for text in TEXTS]
        if form == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"label": labels, "text": TEXTS}), path)
        elif form == "jsonl":
            lines = (json.dumps({"label": label, "text": text}) for label, text in zip(labels, TEXTS, strict=True))
            path.write_text("\n".join(lines), encoding="utf-8")
        elif form == "csv":
            quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
            lines = (f"{label},{text}" for label, text in zip(labels, quoted, strict=True))
            path.write_text("label,text\n" + "\n".join(lines), encoding="utf-8")
        elif form == "tsv":
            lines = (f"{label}\t{text}" for label, text in zip(labels, texts, strict=True))
            path.write_text("label\ttext\n" + "\n".join(lines), encoding="utf-8")
        else:
            path.write_text("\n".join(texts), encoding="utf-8")

        def load() -> Any:
            content = path.read_bytes()
            with contextlib.suppress(ValueError):  # each bad row says why; only a whole file is refused
                for row in read_rows(io.BytesIO(content), form, str(path)):
                    assert (row.problem is None) == bool(row.text_a.strip())
                    (row.text_a + (row.text_b or "")).encode()
            found = load_rows(path, require_labels=False)
            return [found.dataset[:], found.label_names]

        return Kind(path, load, False, 100)

    return make


KINDS: dict[str, Callable[[Path], Kind]] = {
    "trace": _trace,
    **{
        f"cache: {name}": lambda folder, name=name: _cache(folder, name)  # type: ignore[misc]
        for name in (
            "logits-00000.safetensors", "layer_logits-00000.safetensors", "hidden_states-00000.safetensors",
            "cache.json", "pseudo_classifiers.json", "pseudo_classifiers.safetensors",
        )
    },
    "cell of kd-table": _cell,
    "run.json": _run_file,
    "result of table2": _table2_result,
    "trainer_log.json": _log,
    "bench.json": _bench,
    "settings": _settings,
    "config.json": _config,
    "certificate": _certificate,
    "tokenizer.json": _tokenizer,
    "weights": _weights,
    **{f"rows: {form}": _rows_of(form) for form in FORMATS},
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_loads_as_it_was_or_is_refused_in_one_sentence(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    kind = KINDS[name](tmp_path)
    raw, source = kind.path.read_bytes(), random.Random(name)
    came = tried(kind, cuts(raw, kind.damages // 2, source))
    # a flipped bit of a weight is another weight: what a configuration says of weights is held against them elsewhere
    if name != "weights":
        came += tried(kind, flips(raw, kind.damages, source))
    if kind.path.suffix == ".json":
        came += tried(kind, other_types(raw, kind.damages // 2, source))
    assert came["refused"] or name == "rows: text"
    record_property("came of it", dict(came))
    print(name, dict(came))


# Files without a checksum, as earlier versions wrote them, and what a checksum cannot see


def _rewritten(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    """Change a file as its writer would have, without a checksum."""
    tensors, metadata, _ = load_tensors(path, "file", "")
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata=metadata)


TRACE_FAULTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, str]], Any], str]] = {
    "no exit layers": (lambda tensors, metadata: metadata.pop("exit_layers"), "it lacks 'exit_layers'"),
    "no logits": (lambda tensors, metadata: tensors.pop("logits"), "it lacks 'logits'"),
    "shape of another form": (lambda tensors, metadata: metadata.update(shape='{"width": 3}'), "width"),
    "layers of another type": (lambda tensors, metadata: metadata.update(exit_layers='["a"]'), "expected"),
    "source of another type": (lambda tensors, metadata: metadata.update(source='{"model": 3}'), "source"),
    "NaN logits": (lambda tensors, metadata: tensors["logits"][3].fill_(torch.nan), "logits are not all finite"),
    "labels of no class": (lambda tensors, metadata: tensors["labels"][:1].fill_(99), "labels go from 0 to 99"),
    "negative rows": (lambda tensors, metadata: tensors["rows"][:1].fill_(-1), "rows go from -1"),
    "certainty above 1": (lambda tensors, metadata: tensors["certainty"][:1].fill_(2), "certainty go"),
}


@pytest.mark.parametrize("fault", TRACE_FAULTS)
def test_traces_of_another_form_are_refused(fault: str, tmp_path: Path) -> None:
    kind = _trace(tmp_path)
    change, expected = TRACE_FAULTS[fault]
    _rewritten(kind.path, lambda tensors, metadata: None)
    kind.load()
    _rewritten(kind.path, change)
    with pytest.raises(ValueError, match=r"trace: .*dev\.safetensors is damaged .*; write it again") as caught:
        kind.load()
    assert expected in str(caught.value)


def test_weights_that_are_tied_are_saved(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    save_tensors(tmp_path / "file", {"one": weight, "other": weight, "part": weight[1:]})
    found = load_tensors(tmp_path / "file", "argument", "remedy")[0]
    assert all(map(torch.equal, found.values(), (weight, weight, weight[1:])))


def test_shards_without_a_checksum_are_read_and_nan_in_them_is_refused(tmp_path: Path) -> None:
    kind = _cache(tmp_path, "logits-00000.safetensors")
    whole = kind.load()
    _rewritten(kind.path, lambda tensors, metadata: None)
    assert equal(kind.load(), whole)
    _rewritten(kind.path, lambda tensors, metadata: tensors["logits"][2].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"logits-00000\.safetensors is damaged .*not finite.*delete this file"):
        kind.load()


def test_a_deleted_shard_is_asked_for_again_and_no_other_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "numbers-00000.safetensors"
    from fastkd.kd.cache import _Store

    store = _Store(tmp_path, "numbers")
    ids = [bytes([number]) * 16 for number in range(3)]
    for number, identity in enumerate(ids):
        store.append([identity], torch.tensor([[float(number)]]))
    path.unlink()
    fresh = _Store(tmp_path, "numbers")
    assert fresh.missing(ids) == [0]
    fresh.append(ids[:1], torch.tensor([[0.0]]))
    assert _Store(tmp_path, "numbers").gather(ids).flatten().tolist() == [0.0, 1.0, 2.0]


def test_answers_that_are_no_numbers_are_never_kept(tmp_path: Path) -> None:
    from fastkd.kd.cache import _Store

    with pytest.raises(ValueError, match="teacher: its numbers are not all finite"):
        _Store(tmp_path, "numbers").append([b"0" * 16], torch.tensor([[torch.nan]]))
    assert list(tmp_path.iterdir()) == []


def test_a_checksum_covers_names_types_shapes_bytes_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.arange(4.0), "b": torch.arange(4)}, {"note": "x"})
    tensors, metadata, is_vouched_for = load_tensors(path, "file", "make it again")
    assert (sorted(tensors), metadata, is_vouched_for) == (["a", "b"], {"note": "x"}, True)
    raw = path.read_bytes()
    for old, new in ((b'"note":"x"', b'"note":"y"'), (b'"I64"', b'"U64"'), (b'"a":{', b'"c":{'), (b"[4]", b"[2]")):
        assert old in raw
        path.write_bytes(raw.replace(old, new, 1))
        with pytest.raises(ValueError, match=r"file: .*t\.safetensors is damaged .*; make it again"):
            load_tensors(path, "file", "make it again")
