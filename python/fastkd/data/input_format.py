"""How a text becomes tokens: as its tokenizer does, or as UER-py and with it the official FastBERT code does.

    standard   [CLS] a [SEP]           [CLS] a [SEP] b [SEP], the longer text loses tokens first
    uer        [CLS] a                 [CLS] a [SEP] b [SEP], cut from the right as a whole, a last [SEP] included

Segments are those of BERT in both: 0 for the first text and its special tokens, 1 for the second. UER numbers them 1
and 2 and keeps 0 for padding, which no token ever sees.

A model says in `config.input_format` what it was trained with. A tokenizer made by `with_input_format` is saved with
its format, so that every way of loading it tokenises alike.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

INPUT_FORMATS = ("standard", "uer")


def input_format_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The format in which `tokenizer` writes its inputs."""
    return str(tokenizer.init_kwargs.get("input_format", "standard"))


def with_input_format(tokenizer: PreTrainedTokenizerBase, input_format: str) -> PreTrainedTokenizerBase:
    """A tokenizer with the vocabulary of `tokenizer` that writes its inputs in `input_format`.

    `tokenizer` itself is left as it is, and given back where it has that format already.

    Raises:
        ValueError: an unknown format; "standard" for a tokenizer that writes another one; "uer" for a tokenizer that
            is not BERT's, or that the library `tokenizers` does not run.
    """
    if input_format not in INPUT_FORMATS:
        raise ValueError(f"input_format: got {input_format!r}, expected one of {', '.join(INPUT_FORMATS)}")
    own = input_format_of(tokenizer)
    if own == input_format:
        return tokenizer
    if input_format == "standard":
        raise ValueError(f"input_format: this tokenizer writes {own!r}; load the one of the checkpoint for 'standard'")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or (tokenizer.cls_token, tokenizer.sep_token) != ("[CLS]", "[SEP]"):
        raise ValueError(
            f"input_format: 'uer' is written by BERT's tokenizers ([CLS], [SEP]), got {type(tokenizer).__name__}"
        )
    backend = copy.deepcopy(backend)
    backend.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)],
    )
    # the classes of single models write their own special tokens anew whenever they are loaded
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        input_format=input_format,
        model_max_length=tokenizer.model_max_length,
        model_input_names=list(tokenizer.model_input_names),
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    )


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str | None] | None,
    max_length: int,
    *,
    truncate: bool = True,
    **options: Any,
) -> BatchEncoding | dict[str, list[Any]]:
    """Token ids (and what else the model takes) of each text or pair, not padded.

    Args:
        tokenizer: of the model.
        texts, pairs: first and second texts; None for single texts.
        max_length: tokens, special ones included.
        truncate: False leaves longer rows as they are.
        options: of the tokenizer.
    """
    if pairs is None or input_format_of(tokenizer) == "standard":
        return tokenizer(texts, pairs, truncation=truncate, max_length=max_length, **options)
    encoded = tokenizer(texts, pairs, **options)
    if not truncate:
        return encoded
    return {name: [values[:max_length] for values in rows] for name, rows in encoded.items()}
