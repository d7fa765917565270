"""What the examples run on: a small corpus and a small BERT with random weights, made on the spot."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from fastkd.data import corpus

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def columns(rows: int, seed: int) -> dict[str, list[str]]:
    """Texts on six topics, easy to hard, with their labels: what every training here takes."""
    examples = corpus.generate(rows, seed=seed)
    return {"text": [example.text for example in examples], "label": [example.label for example in examples]}


def small_bert(folder: Path, texts: list[str], layers: int = 3) -> Path:
    """Save a BERT of random weights, with every word of the texts in its vocabulary."""
    torch.manual_seed(0)
    found = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *found])}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=128,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return folder
