"""`TextCounts`: how much of the texts a tokenizer could not read, and how many rows it cut."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_MANY_UNKNOWN = 0.1


class TextWarning(UserWarning):
    """The texts and the tokenizer do not fit."""


@dataclass
class TextCounts:
    """What became of some texts.

    Attributes:
        rows: texts and pairs.
        cut: rows that had more tokens than were kept.
        tokens: of the texts that were kept, without special ones.
        unknown: those of them that the vocabulary does not have.
        max_length: tokens after which a row is cut.
    """

    rows: int = 0
    cut: int = 0
    tokens: int = 0
    unknown: int = 0
    max_length: int = 0

    def add(self, tokenizer: Any, ids: Sequence[Sequence[int]], cut: int, max_length: int, *, is_pair: bool) -> None:
        """Count the rows of one call of the tokenizer, of which `cut` were cut."""
        # a function that tokenises is a tokenizer too, and may know neither
        count_special = getattr(tokenizer, "num_special_tokens_to_add", None)
        special = 0 if count_special is None else count_special(pair=is_pair)
        unknown = getattr(tokenizer, "unk_token_id", None)
        self.rows += len(ids)
        self.cut += cut
        self.tokens += sum(max(len(row) - special, 0) for row in ids)
        if unknown is not None:
            self.unknown += sum(list(row).count(unknown) for row in ids)
        self.max_length = max_length

    @property
    def unknown_share(self) -> float:
        return self.unknown / self.tokens if self.tokens else 0.0

    def sentences(self) -> list[str]:
        """What should be known about these texts; empty where all is well."""
        said = []
        if self.unknown_share > _MANY_UNKNOWN:
            said.append(
                f"THE TOKENIZER CANNOT READ THESE TEXTS: {self.unknown_share:.1%} of their tokens are unknown to its "
                "vocabulary; use a checkpoint that was trained on their language"
            )
        elif self.unknown:
            said.append(f"{self.unknown_share:.2%} of the tokens are unknown to the vocabulary ({self.unknown})")
        if self.cut:
            share = self.cut / self.rows
            said.append(f"{self.cut} of {self.rows} rows ({share:.1%}) were cut at {self.max_length} tokens")
        return said

    def warn(self, source: str) -> None:
        """Tell what `sentences` has to say.

        Warns:
            TextWarning: each sentence.
        """
        for sentence in self.sentences():
            warnings.warn(f"{source}: {sentence}", TextWarning, stacklevel=3)

    def to_dict(self) -> dict[str, float]:
        return {"tokens": self.tokens, "unknown_tokens": self.unknown, "rows_cut": self.cut}
