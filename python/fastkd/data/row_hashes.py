"""Rows as a set of hashes of their texts: how many of some rows are among others, whatever the order."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from fastkd.data.rows import Rows

Hashes = npt.NDArray[np.int64]


class DuplicateRowsWarning(UserWarning):
    """Rows of one split are in another too."""


def row_hashes(rows: Rows) -> Hashes:
    """One number for each row, in their order; labels do not count."""
    texts = rows.dataset["text_a"][:]
    seconds: list[Any] = rows.dataset["text_b"][:] if rows.is_pair else [None] * len(rows)
    digests = [
        # repr keeps ("a b", "c") and ("a", "b c") apart, and takes what is no valid UTF-8
        hashlib.blake2b(repr((first, second)).encode(), digest_size=8).digest()
        for first, second in zip(texts, seconds, strict=True)
    ]
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)


def count_shared(rows: Hashes, others: Hashes) -> int:
    """How many of `rows` are among the others."""
    return int(np.isin(rows, others).sum())


def warn_about_duplicates(splits: Mapping[str, Rows | None]) -> None:
    """Tell of rows that are in two of these splits.

    Warns:
        DuplicateRowsWarning: there are some.
    """
    hashes = {name: row_hashes(rows) for name, rows in splits.items() if rows is not None}
    names = list(hashes)
    for place, later in enumerate(names):
        for earlier in names[:place]:
            shared = count_shared(hashes[later], hashes[earlier])
            if shared:
                warnings.warn(
                    f"{later}: {shared:,} of its {len(hashes[later]):,} rows are in {earlier} too, so results on "
                    f"{later} look better than they are; drop them from one of the two",
                    DuplicateRowsWarning,
                    stacklevel=3,
                )
