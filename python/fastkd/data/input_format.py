"""How a text becomes tokens: as its tokenizer does, or as UER-py and with it the official FastBERT code does.

    standard   [CLS] a [SEP]           [CLS] a [SEP] b [SEP], the longer text loses tokens first
    uer        [CLS] a                 [CLS] a [SEP] b [SEP], cut from the right as a whole, a last [SEP] included

Segments are those of BERT in both: 0 for the first text and its special tokens, 1 for the second. UER numbers them 1
and 2 and keeps 0 for padding, which no token ever sees.

A special token that is written out in a text, as in "foo [SEP] bar", is that token in both. "standard" finds it
anywhere, "uer" only where it stands alone between blanks, or beside Chinese characters, each of which is a word of its
own: "foo[SEP]bar" is the five pieces foo [ sep ] bar.

A model says in `config.input_format` what it was trained with. A tokenizer made by `with_input_format` is saved with
its format, so that every way of loading it tokenises alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.processors import TemplateProcessing
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastkd.data.text_counts import TextCounts

INPUT_FORMATS = ("standard", "uer")

# What stands for UER's whole words while the text is lower-cased: characters that its cleaning takes out of every text.
_WHOLE_WORDS = {"[UNK]": "\ue000", "[SEP]": "\ue001", "[PAD]": "\ue002", "[CLS]": "\ue003", "[MASK]": "\ue004"}


def input_format_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The format in which `tokenizer` writes its inputs."""
    return str(tokenizer.init_kwargs.get("input_format", "standard"))


def with_input_format(tokenizer: PreTrainedTokenizerBase, input_format: str) -> PreTrainedTokenizerBase:
    """A tokenizer with the vocabulary of `tokenizer` that writes its inputs in `input_format`.

    `tokenizer` itself is left as it is, and given back where it has that format already.

    Raises:
        ValueError: an unknown format; "standard" for a tokenizer that writes another one; "uer" for a tokenizer that
            is not BERT's.
    """
    if input_format not in INPUT_FORMATS:
        raise ValueError(f"input_format: got {input_format!r}, expected one of {', '.join(INPUT_FORMATS)}")
    own = input_format_of(tokenizer)
    if own == input_format:
        return tokenizer
    if input_format == "standard":
        raise ValueError(
            f"input_format: this tokenizer writes {own!r}; load the checkpoint's own tokenizer for 'standard'"
        )
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = getattr(backend, "normalizer", None)
    named = (tokenizer.cls_token, tokenizer.sep_token) == ("[CLS]", "[SEP]")
    if not named or not isinstance(normalizer, BertNormalizer):
        raise ValueError(
            f"input_format: 'uer' is written by BERT's tokenizers ([CLS], [SEP], BertNormalizer), got "
            f"{type(tokenizer).__name__} with {type(normalizer).__name__}; use the format 'standard'"
        )
    backend = _matching_whole_words(backend)
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


def _matching_whole_words(backend: Tokenizer) -> Tokenizer:
    """A copy of `backend` that takes a special token in a text for one only where it is a word, as UER does."""
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        # such a token is looked for after the normaliser, which leaves it in the text where it is a word
        token["normalized"] |= token["content"] in _WHOLE_WORDS
    own = state["normalizer"]
    cleaning = {**own, "clean_text": True, "handle_chinese_chars": True, "strip_accents": False, "lowercase": False}
    lower_casing = {**own, "clean_text": False, "handle_chinese_chars": False}
    words = _WHOLE_WORDS.items()
    put_aside = [_replace({"Regex": rf"(?<!\S){re.escape(word)}(?!\S)"}, stand_in) for word, stand_in in words]
    # split at its brackets as any other text would be
    broken_up = [_replace({"String": word}, f"[ {word[1:-1]} ]") for word in _WHOLE_WORDS]
    # one that the vocabulary lacks stays aside, and is unknown
    known = {token["content"] for token in state["added_tokens"]}
    put_back = [_replace({"String": stand_in}, word) for word, stand_in in words if word in known]
    steps = [cleaning, *put_aside, *broken_up, lower_casing, *put_back]
    state["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return Tokenizer.from_str(json.dumps(state))


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str | None] | None,
    max_length: int,
    *,
    truncate: bool = True,
    counts: TextCounts | None = None,
    **options: Any,
) -> BatchEncoding | dict[str, list[Any]]:
    """Token ids (and what else the model takes) of each text or pair, not padded.

    Args:
        tokenizer: of the model.
        texts, pairs: first and second texts; None for single texts.
        max_length: tokens, special ones included.
        truncate: False leaves longer rows as they are.
        counts: counts these rows, where given.
        options: of the tokenizer.
    """
    if pairs is None or input_format_of(tokenizer) == "standard":
        encoded = tokenizer(texts, pairs, truncation=truncate, max_length=max_length, **options)
        cut = _cut(encoded, max_length) if truncate and counts is not None else 0
    else:
        encoded = tokenizer(texts, pairs, **options)
        cut = sum(len(ids) > max_length for ids in encoded["input_ids"]) if truncate else 0
        if truncate:
            encoded = {name: [values[:max_length] for values in rows] for name, rows in encoded.items()}
    if counts is not None:
        counts.add(tokenizer, encoded["input_ids"], cut, max_length, is_pair=pairs is not None)
    return encoded


def _cut(encoded: BatchEncoding, max_length: int) -> int:
    """How many rows were cut; a tokenizer without a record of it is taken to have cut those of the full length."""
    if encoded.encodings is None:
        return sum(len(ids) == max_length for ids in encoded["input_ids"])
    return sum(bool(row.overflowing) for row in encoded.encodings)
