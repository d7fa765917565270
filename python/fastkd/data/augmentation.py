"""More text from the same rows, for trainings without labels: copies in which some tokens are others."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy
import pyarrow

_IDS = "input_ids"


def with_altered_copies(
    tokens: datasets.Dataset, special_ids: Sequence[int], copies: int, rate: float, seed: int
) -> datasets.Dataset:
    """The rows, and after them `copies` of each with every token replaced with probability `rate`.

    A new token is drawn from all tokens of the rows, so that frequent ones come often; special tokens stay, and are
    never drawn. Everything else of a row is repeated. The result depends on the arguments alone.

    Args:
        tokens: with `input_ids` and whatever else.
        special_ids: of the tokenizer.
    """
    table = tokens.with_format("arrow")[:]
    column = table.column(_IDS).combine_chunks()
    ids = column.flatten().to_numpy()  # [N] of all rows
    ordinary = ~numpy.isin(ids, special_ids)
    generator = numpy.random.default_rng(seed)
    replaced = ordinary & (generator.random((copies, len(ids))) < rate)
    altered = numpy.tile(ids, (copies, 1))
    altered[replaced] = generator.choice(ids[ordinary], int(replaced.sum())) if ordinary.any() else []
    ends = numpy.tile(column.value_lengths().to_numpy(), copies + 1).cumsum()
    rows = pyarrow.LargeListArray.from_arrays(numpy.concatenate([[0], ends]), numpy.concatenate([ids, altered.ravel()]))
    whole = pyarrow.concat_tables([table] * (copies + 1))
    whole = whole.set_column(table.column_names.index(_IDS), _IDS, rows.cast(column.type))
    return datasets.Dataset(whole, info=tokens.info)
