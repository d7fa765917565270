"""The generated corpus: the same rows for the same seed, distinct, balanced, and graded by difficulty."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastkd.data import corpus


def topics_named(text: str) -> set[str]:
    """Topics of which `text` names a thing or a subject."""
    lowered = text.lower()
    return {
        name
        for name, topic in corpus.TOPICS.items()
        if any(words.lower() in lowered for words in topic.things + topic.subjects)
    }


def test_same_seed_gives_the_same_rows() -> None:
    assert corpus.generate(300, seed=3) == corpus.generate(300, seed=3)
    assert corpus.generate(300, seed=3) != corpus.generate(300, seed=4)


def test_rows_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    # as the command line does, which spares the import of torch
    program = "import sys; sys.argv = ['fastkd']; from fastkd.data import corpus; print(corpus.generate(40, seed=5))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(corpus.__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert outputs == {f"{corpus.generate(40, seed=5)}\n"}


def test_rows_are_distinct_and_balanced() -> None:
    examples = corpus.generate(6000, seed=1)
    assert len({example.text for example in examples}) == 6000
    counts = corpus.summary(examples)
    assert set(counts["labels"].values()) == {1000}
    assert counts["difficulties"] == {name: round(share * 6000) for name, share in corpus.SHARES.items()}


def test_every_difficulty_holds_every_label() -> None:
    pairs = Counter((example.difficulty, example.label) for example in corpus.generate(2000, seed=1))
    assert set(pairs) == {(difficulty, label) for difficulty in corpus.DIFFICULTIES for label in corpus.LABELS}


def test_texts_fit_the_tsv_format() -> None:
    assert not [row.text for row in corpus.generate(3000) if set(row.text) & set("\t\n\r{}") or "  " in row.text]


def test_difficulty_grades_the_topics_named() -> None:
    for example in corpus.generate(2000, seed=2):
        named = topics_named(example.text)
        assert example.label in named
        if example.difficulty == "plain":
            assert named == {example.label}
        elif example.difficulty != "mixed":
            assert len(named) == 2


def test_word_order_decides_the_hard_rows() -> None:
    """Half of the references answer with the first topic named, half with the second: position gives nothing away."""
    firsts = Counter()
    for example in corpus.generate(4000, seed=2):
        if example.difficulty in ("reference", "coin_toss"):
            positions = {
                name: min(example.text.lower().find(words.lower()) % 10_000 for words in topic.things + topic.subjects)
                for name, topic in corpus.TOPICS.items()
            }
            firsts[example.difficulty, min(positions, key=positions.__getitem__) == example.label] += 1
    for difficulty in ("reference", "coin_toss"):
        share = firsts[difficulty, True] / (firsts[difficulty, True] + firsts[difficulty, False])
        assert 0.4 < share < 0.6


def test_written_files_share_no_row(tmp_path: Path) -> None:
    paths = corpus.write_corpus(tmp_path, seed=1, rows={"train": 500, "dev": 60, "test": 90})
    texts: list[str] = []
    for split, rows in (("train", 500), ("dev", 60), ("test", 90)):
        header, *lines = paths[split].read_text(encoding="utf-8").splitlines()
        assert header == "label\ttext_a"
        assert len(lines) == rows
        assert {line.split("\t")[0] for line in lines} == set(corpus.LABELS)
        texts += [line.split("\t")[1] for line in lines]
    assert len(set(texts)) == len(texts)
    difficulty = corpus.read_difficulty(tmp_path, "test")
    assert difficulty is not None
    assert len(difficulty) == 90
    assert set(difficulty) == set(corpus.DIFFICULTIES)


def test_folder_without_difficulty_has_none(tmp_path: Path) -> None:
    assert corpus.read_difficulty(tmp_path) is None


def test_impossible_row_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="rows: got 0"):
        corpus.generate(0)
