"""Rows become tokens, and tokens become batches of like length; the orders in which training sees them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from fastkd.data.input_format import encode
from fastkd.data.rows import Rows
from fastkd.data.text_counts import TextCounts

_TOKENIZER_CHUNK = 4096


def tokenize(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> datasets.Dataset:
    """Token ids, truncated to `max_length` and not padded, with `length` and, where the rows have them, `labels`.

    Pairs are encoded together and the longer text loses tokens first, unless the tokenizer's `input_format` says
    otherwise.

    Raises:
        ValueError: `max_length` is more than the tokenizer's model takes, or leaves no room for text.

    Warns:
        TextWarning: the tokenizer does not know some of the tokens, or rows were cut.
    """
    special_tokens = tokenizer.num_special_tokens_to_add(pair=rows.is_pair)
    if not special_tokens < max_length <= tokenizer.model_max_length:
        raise ValueError(
            f"max_length is {max_length}; expected more than the {special_tokens} special tokens "
            f"and at most the tokenizer's model_max_length, {tokenizer.model_max_length}"
        )
    columns: dict[str, list[Any]] = {"length": []}
    counts = TextCounts()
    for start in range(0, len(rows), _TOKENIZER_CHUNK):
        chunk = rows.dataset[start : start + _TOKENIZER_CHUNK]
        encoded = encode(tokenizer, chunk["text_a"], chunk.get("text_b"), max_length, counts=counts)
        for name, values in encoded.items():
            columns.setdefault(name, []).extend(values)
        columns["length"].extend(map(len, encoded["input_ids"]))
    counts.warn(rows.source)
    if rows.is_labelled:
        columns["labels"] = rows.dataset["label"][:]
    return datasets.Dataset.from_dict(columns)


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
    """Pads each batch to its longest row; to a multiple of 8 where a GPU's matrix units want that."""
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if torch.cuda.is_available() else None)


class LengthSortedBatches:
    """Batches of rows of like length, longest first: little is padded, and memory runs out in the first batch or never.

    Iterating gives dicts of tensors and may be repeated. `order[i]` is the row number of the i-th sample given.
    """

    def __init__(self, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32) -> None:
        self.order = sorted(range(len(dataset)), key=dataset["length"][:].__getitem__, reverse=True)
        self.batch_size = batch_size
        self._dataset = dataset.remove_columns("length")
        self._collate = padding_collator(tokenizer)

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(self.order), self.batch_size):
            columns = self._dataset[self.order[start : start + self.batch_size]]
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            yield dict(self._collate(rows))


class ShuffledOnceSampler(torch.utils.data.Sampler[int]):
    """One order for all epochs: that of `random.Random(seed).shuffle`, as in the official FastBERT code."""

    def __init__(self, rows: int, seed: int) -> None:
        self.order = list(range(rows))
        random.Random(seed).shuffle(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """A shuffle whose consecutive rows, `group` at a time, are of like length; a function of (seed, epoch) alone.

    transformers' sampler of this name draws from the global generator, so a resumed epoch would see other rows.
    Rows are shuffled, sorted by length within pools of 50 groups, and the groups are shuffled again; a last incomplete
    group stays last.
    """

    POOL_GROUPS = 50

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        self.lengths = lengths
        self.group = group
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 16) + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = self.group * self.POOL_GROUPS
        ordered: list[int] = []
        for start in range(0, len(shuffled), pool):
            ordered += sorted(shuffled[start : start + pool], key=self.lengths.__getitem__, reverse=True)
        full = len(ordered) // self.group
        for index in torch.randperm(full, generator=generator).tolist():
            yield from ordered[index * self.group : (index + 1) * self.group]
        yield from ordered[full * self.group :]
