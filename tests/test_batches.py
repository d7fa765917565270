"""Tokens and batches: what is cut, what is padded, and in which order rows come."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import datasets
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastkd.data.batches import LengthGroupedSampler, LengthSortedBatches, padding_collator, tokenize
from fastkd.data.rows import Rows


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(30))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def _rows(texts: list[str], pairs: list[str] | None = None, labels: list[int] | None = None) -> Rows:
    columns: dict[str, Any] = {"text_a": texts}
    columns |= {"text_b": pairs} if pairs else {}
    columns |= {"label": labels} if labels else {}
    return Rows(datasets.Dataset.from_dict(columns), None, 2 if labels else None, "test")


def test_tokenize_truncates_and_leaves_padding_to_the_collator(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = _rows(["w1", "w1 w2 w3 w4 w5 w6", "w1 w2"], labels=[0, 1, 0])
    tokens = tokenize(rows, tokenizer, max_length=6)
    assert tokens["length"][:] == [3, 6, 4]
    assert tokens["input_ids"][1] == [2, 5, 6, 7, 8, 3]
    assert tokens["labels"][:] == [0, 1, 0]
    batch = padding_collator(tokenizer)([tokens.remove_columns("length")[i] for i in (0, 2)])
    assert batch["input_ids"].tolist() == [[2, 5, 3, 0], [2, 5, 6, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    pair = tokenize(_rows(["w1 w2 w3 w4"], ["w9"]), tokenizer, max_length=7)
    assert pair["input_ids"][0] == [2, 5, 6, 7, 3, 13, 3]
    assert pair["token_type_ids"][0] == [0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("max_length", [2, 33])
def test_tokenize_rejects_a_length_the_model_cannot_take(tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    with pytest.raises(ValueError, match=rf"max_length is {max_length}; .* 2 special tokens .* 32"):
        tokenize(_rows(["w1"]), tokenizer, max_length)


def test_length_sorted_batches(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [" ".join(["w1"] * count) for count in (3, 9, 1, 7, 5)]
    tokens = tokenize(_rows(texts, labels=[0, 1, 0, 1, 1]), tokenizer, 32)
    batches = LengthSortedBatches(tokens, tokenizer, batch_size=2)
    assert batches.order == [1, 3, 4, 0, 2]
    for _ in range(2):  # may be iterated again
        given = list(batches)
        assert [batch["attention_mask"].sum(1).tolist() for batch in given] == [[11, 9], [7, 5], [3]]
        assert torch.cat([batch["labels"] for batch in given]).tolist() == [1, 1, 1, 0, 0]
    assert len(batches) == 3
    assert set(given[0]) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


@given(st.lists(st.integers(1, 64), max_size=400), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_length_grouped_sampler(lengths: list[int], group: int, seed: int, epoch: int) -> None:
    sampler = LengthGroupedSampler(lengths, group, seed)
    sampler.epoch = epoch
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    torch.rand(7)  # the global generator has no say
    assert list(sampler) == order


def test_length_grouped_sampler_groups_and_shuffles() -> None:
    lengths = [i % 97 for i in range(3200)]
    sampler = LengthGroupedSampler(lengths, 32, seed=0)
    order = list(sampler)
    groups = [[lengths[i] for i in order[start : start + 32]] for start in range(0, len(order), 32)]
    assert sum(max(group) - min(group) for group in groups) / len(groups) < 5  # a random group spans about 90
    means = torch.tensor([sum(group) / 32 for group in groups])
    assert abs(torch.corrcoef(torch.stack([means, torch.arange(100.0)]))[0, 1]) < 0.3  # no drift from long to short
    sampler.epoch = 1
    assert list(sampler) != order
