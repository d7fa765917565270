"""Files of the user are told from those that fastkd, transformers and peft write, and are never removed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import transformers

from fastkd.data.own_files import CARD_MARK, foreign_in_model, foreign_in_work, remove_own

TOKENIZERS = sorted(Path(transformers.__file__).parent.rglob("tokenization*.py"))


def tokenizer_files() -> set[str]:
    """Every file that a tokenizer of the installed transformers names as its own."""
    names: set[str] = set()
    for path in TOKENIZERS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_table = isinstance(node, ast.Assign) and "VOCAB_FILES_NAMES" in ast.dump(node.targets[0])
            if is_table and isinstance(node.value, ast.Dict):
                names |= {value.value for value in node.value.values if isinstance(value, ast.Constant)}
    return names


def test_every_file_of_a_tokenizer_is_known(tmp_path: Path) -> None:
    names = tokenizer_files()
    assert {"tokenizer.json", "vocab.txt", "sentencepiece.bpe.model"} <= names
    for name in (*names, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
        (tmp_path / name).touch()
    assert foreign_in_model(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "is_ours"),
    [
        ("config.json", True),
        ("model-00001-of-00002.safetensors", True),
        ("distill.yaml", True),
        ("notes.txt", False),
        ("my-config.json", False),
        ("model.safetensors.bak", False),
        ("model.onnx", False),
        ("report.html", False),
        ("train.tsv", False),
    ],
)
def test_a_name_decides(tmp_path: Path, name: str, is_ours: bool) -> None:
    (tmp_path / name).touch()
    expected = None if is_ours else tmp_path / name
    assert foreign_in_model(tmp_path) == foreign_in_work(tmp_path) == expected


@pytest.mark.parametrize(("text", "is_ours"), [(f"# Model\n{CARD_MARK}\n", True), ("# Mine\n", False)])
def test_a_card_is_read(tmp_path: Path, text: str, is_ours: bool) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert foreign_in_model(tmp_path) == (None if is_ours else tmp_path / "README.md")


def test_only_own_files_are_removed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").touch()
    work = tmp_path / "work"
    for path in ("run.json", "checkpoint-1/model.safetensors", "checkpoint-2/optimizer.pt", "checkpoint-2/plot.png"):
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).touch()
    (work / "link").symlink_to(elsewhere)
    assert foreign_in_work(work) == work / "checkpoint-2" / "plot.png"
    remove_own(work)
    assert sorted(str(path.relative_to(work)) for path in work.rglob("*")) == [
        "checkpoint-2",
        "checkpoint-2/plot.png",
        "link",
    ]
    assert (elsewhere / "config.json").exists()
    (work / "link").unlink()
    (work / "checkpoint-2" / "plot.png").unlink()
    remove_own(work)
    assert not work.exists()
    remove_own(work)
