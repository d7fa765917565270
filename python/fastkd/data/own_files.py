"""Which files in a folder fastkd may have written. All others are the user's, and are never removed.

A name decides, because folders of every version must be told apart, and commands add files to finished folders. Only
README.md is also read: a card without fastkd's mark is somebody's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

CARD = "README.md"
CARD_MARK = (
    "<!-- fastkd-kernels writes this card whenever the model is saved; without this line it leaves the card alone. -->"
)
# how the cards begin that transformers and peft write where there is none
_CARD_TEMPLATES = (
    "This is the model card of a 🤗 transformers model",
    "<!-- Provide a quick summary of what the model is/does",
)
_MODEL = (
    r"(adapter_)?config\.json",
    r"generation_config\.json",
    r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors",
    r"model\.safetensors\.index\.json",
    r"training_rows\.safetensors",
    r"(trainer_log|tuning)\.json",
    r"(finetune|distill|kd|tune)\.yaml",
)
# a test holds these against every tokenizer of the installed transformers
_TOKENIZER = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template|normalizer|emoji|byte_maps)\.json",
    r"chat_template\.jinja",
    r"((entity_|target_)?vocab|vocab-(src|tgt)|word_shape|word_pronunciation)\.json",
    r"(vocab|merges|dict)\.txt",
    r"bpe\.codes",
    r"(spiece|spm|spm_char|sentencepiece|sentencepiece\.bpe|tokenizer)\.model",
    r"(source|target)\.spm",
    r"prophetnet\.tokenizer",
)
_CHECKPOINTS = (
    r"(optimizer|scheduler|scaler)\.pt",
    r"rng_state(_\d+)?\.pth",
    r"training_args\.bin",
    r"(trainer_state|run|fastkd|settings|trials)\.json",
    r"\d+-[\w-]+\.(json|safetensors)",  # what a stage of KD ended with
    r"(cache|pseudo_classifiers)\.json",
    r"pseudo_classifiers\.safetensors",
    r"(logits|layer_logits|hidden_states)-\d+\.safetensors",
)
_IN_A_MODEL = re.compile("|".join((*_MODEL, *_TOKENIZER)))
_IN_WORK = re.compile("|".join((*_MODEL, *_TOKENIZER, *_CHECKPOINTS)))
_CORPUS = re.compile(r"(train|dev|test|difficulty)\.tsv")
_TEMPORARY = re.compile(r"\.(?P<name>.+)-fastkd-(?P<here>[0-9a-f]{8})-(?P<process>\d+)-[^-]*")


def temporary(path: Path) -> re.Match[str] | None:
    """The parts of the name of a file or folder that `atomic_path` or `atomic_folder` has, or a killed run left."""
    return _TEMPORARY.fullmatch(path.name)


def is_own_card(path: Path) -> bool:
    """Whether fastkd, transformers or peft wrote a card, so that fastkd may write it anew."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return CARD_MARK in text or any(template in text for template in _CARD_TEMPLATES)


def foreign_in_model(folder: Path) -> Path | None:
    """A file or folder in the folder of a model that fastkd did not write; None where there is none."""
    found = (path for path in sorted(folder.iterdir()) if temporary(path) is None)
    return next((path for path in found if path.is_dir() or not _is_own(path, _IN_A_MODEL)), None)


def foreign_in_work(folder: Path) -> Path | None:
    """A file at any depth in a folder that a command works in, which fastkd did not write; None where there is none."""
    return next((path for path in _files(folder) if not _is_own_in_work(path, folder)), None)


def remove_own(folder: Path) -> None:
    """Remove a folder that a command worked in; what fastkd did not write stays, and the folders around it."""
    if not folder.is_dir():
        return
    for path in list(_files(folder)):
        if _is_own_in_work(path, folder):
            path.unlink(missing_ok=True)
    folders = [path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()]
    for path in (*sorted(folders, reverse=True), folder):
        if not any(path.iterdir()):
            path.rmdir()


def _files(folder: Path) -> Iterator[Path]:
    """All but folders; a link to a folder is not looked into."""
    if not folder.is_dir():
        return iter(())
    return (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())


def _is_own(path: Path, names: re.Pattern[str]) -> bool:
    if path.name == CARD:
        return is_own_card(path)
    return names.fullmatch(path.name) is not None


def _is_own_in_work(path: Path, folder: Path) -> bool:
    if path.is_dir():  # through a link
        return False
    is_temporary = any(_TEMPORARY.fullmatch(name) for name in path.relative_to(folder).parts)
    is_of_corpus = path.parent.name == "corpus" and _CORPUS.fullmatch(path.name) is not None
    return is_temporary or is_of_corpus or _is_own(path, _IN_WORK)
