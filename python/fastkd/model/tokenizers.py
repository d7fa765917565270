"""What a model's tokenizer does to texts: the format it writes and the length at which it cuts."""

from __future__ import annotations

import os
from typing import Protocol

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastkd.data.input_format import with_input_format
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.engines.stream_reader import longest_row


class Configured(Protocol):
    """A model with the configuration of one that leaves early."""

    config: EarlyExitConfig


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        OSError: nothing to load.
        ValueError: its files are damaged.
    """
    try:
        # else transformers would ask whoever sits before the terminal
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except OSError:
        raise  # it names the file, or the network
    except Exception as error:  # the library tokenizers raises nothing more special
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"tokenizer: tokenizer.json or tokenizer_config.json of {path} is damaged ({reason}); copy or download it "
            "again"
        ) from error


def length_limit(model: Configured, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens a text may have: the tokenizer's limit, and never more than the model has positions for."""
    return longest_row(model.config, tokenizer, None)


def set_length(
    model: Configured,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    default: int | None = None,
) -> int:
    """The length to train with; the tokenizer keeps it, so that the finished model cuts texts where training did.

    Raises:
        ValueError: more tokens than `length_limit`.
    """
    most = length_limit(model, tokenizer)
    if max_length is not None and max_length > most:
        raise ValueError(f"max_length: got {max_length}, but this model takes at most {most} tokens")
    tokenizer.model_max_length = max_length or min(default or most, most)
    return tokenizer.model_max_length


def set_input_format(
    model: Configured, tokenizer: PreTrainedTokenizerBase, input_format: str
) -> PreTrainedTokenizerBase:
    """The tokenizer to train with; the model remembers the format.

    Raises:
        ValueError: an unknown format, or a tokenizer that cannot write it.
    """
    tokenizer = with_input_format(tokenizer, input_format)
    model.config.input_format = input_format
    return tokenizer
