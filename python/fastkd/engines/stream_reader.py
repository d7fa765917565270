"""`StreamReader`: the rows of a stream's input, encoded, and what is wrong with those that cannot be used."""

from __future__ import annotations

import reprlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice, repeat
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastkd.data.columns import USUAL, Columns, texts_of
from fastkd.data.errors import Problem
from fastkd.data.input_format import encode
from fastkd.data.tables import Table, rows_to_stream, values_of_row
from fastkd.data.text_counts import TextCounts
from fastkd.data.texts import text_problem
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.engines.packed_encoder import PackedTokens, cumulative_lengths

_BROKEN_OFF = (
    "rows: an interrupt ended the input, as it ends any Python generator, so the rest of its rows are missing; to "
    "continue after an interrupt, pass an iterator with its own __next__"
)


class EncodedRow(NamedTuple):
    """One row on its way: `position` counts the rows of the input from 0, `since` says when it was read."""

    position: int
    line: int
    tokens: int
    input_ids: Sequence[int]
    token_type_ids: Sequence[int] | None
    since: float


def packed_rows(rows: Sequence[EncodedRow], device: torch.device) -> PackedTokens:
    """The tokens of rows, one behind the other."""

    def packed(columns: Iterable[Iterable[int]]) -> Tensor:
        # an array is filled faster than a tensor
        return torch.frombuffer(array("q", chain.from_iterable(columns)), dtype=torch.int64).to(device)

    segments = None
    if any(row.token_type_ids is not None for row in rows):
        segments = packed(row.token_type_ids or repeat(0, row.tokens) for row in rows)
    lengths = [row.tokens for row in rows]
    return PackedTokens(packed(row.input_ids for row in rows), segments, lengths, cumulative_lengths(lengths, device))


class RowProblem(NamedTuple):
    """Why a row cannot be used."""

    position: int
    line: int
    text: str


def longest_row(config: EarlyExitConfig, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None) -> int:
    """Tokens that a row may have, for a model of this configuration.

    Raises:
        ValueError: a `max_length` outside 1 to the positions of the encoder.
    """
    limit = config.longest_input
    if max_length is not None:
        if not 1 <= max_length <= limit:
            raise ValueError(f"max_length: got {max_length}, expected 1 to {limit}, the positions of this encoder")
        return max_length
    return limit if tokenizer is None else min(limit, tokenizer.model_max_length)


Text = tuple[str, str | None]


class StreamReader:
    """Pulls rows from the input and encodes them."""

    def __init__(
        self,
        rows: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        limit: int,
        truncate: bool,
        columns: Columns = USUAL,
    ) -> None:
        rows = rows_to_stream(rows, columns, "rows")
        self._rows = iter(rows)
        self._tokenizer = tokenizer
        self._limit = limit
        self._truncate = truncate
        self._text_columns = columns
        # in one attribute, which changes in one step: where the pulled rows begin, and those rows
        self._pulled: tuple[int, list[Any]] = 0, []
        self._error: Exception | None = None
        self._input_ended = False
        self._is_pulling = False
        self.counts = TextCounts()
        # these go on after an interrupt; a generator, and what may hold one, ends there
        self._goes_on = isinstance(rows, (list, tuple, Table)) or isinstance(
            getattr(type(self._rows), "__next__", None), FunctionType
        )

    @property
    def position(self) -> int:
        """How many rows were read and taken care of."""
        return self._pulled[0]

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return self._input_ended and not self._pulled[1]

    def raise_error(self) -> None:
        """Raise what the input raised, once everything before it was answered."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def read(self, count: int, now: float) -> tuple[list[EncodedRow], list[RowProblem]]:
        """Up to `count` more rows, and those that cannot be used.

        There are fewer where the input ends or has nothing right now (gives None).

        The same rows are read again until `forget` is called: what breaks this off in between loses none.
        """
        self._pull(count)
        first, rows = self._pulled
        texts: list[tuple[int, int, Text]] = []
        encoded: list[EncodedRow] = []
        problems: list[RowProblem] = []
        for position, row in enumerate(rows, start=first):
            line = getattr(row, "line", position + 1)
            try:
                if isinstance(row, Mapping) and "input_ids" in row:
                    encoded.append(self._checked(position, line, *_tokens_of(row), now))
                else:
                    texts.append((position, line, _texts(row, self._text_columns)))
            except ValueError as error:
                problems.append(RowProblem(position, line, str(error)))
        self._encode(texts, encoded, problems, now)
        return encoded, problems

    def forget(self) -> None:
        """The rows of the last `read` are taken care of."""
        first, rows = self._pulled
        self._pulled = first + len(rows), []

    def _pull(self, count: int) -> None:
        _, pulled = self._pulled
        while not self._input_ended:
            if pulled and pulled[-1] is None:
                pulled.pop()
                return
            if len(pulled) == count:
                return
            before = len(pulled)
            was_broken_off, self._is_pulling = self._is_pulling, True
            try:
                # a row goes from the input into the list without a step in between, where an interrupt would lose it
                pulled.extend(islice(self._rows, 1))
            except Exception as error:
                self._error, self._input_ended = error, True
                return
            if len(pulled) == before:
                if was_broken_off and not self._goes_on:
                    self._error = RuntimeError(_BROKEN_OFF)
                self._input_ended = True
                return
            self._is_pulling = False

    def _encode(
        self,
        texts: list[tuple[int, int, Text]],
        encoded: list[EncodedRow],
        problems: list[RowProblem],
        now: float,
    ) -> None:
        for is_pair in (False, True):
            group = [text for text in texts if (text[2][1] is not None) == is_pair]
            if not group:
                continue
            for (position, line, text), columns in zip(
                group, self._columns([g[2] for g in group], is_pair), strict=True
            ):
                try:
                    ids, segments = columns if columns is not None else self._single(text)
                    encoded.append(self._checked(position, line, ids, segments, now))
                except Exception as error:  # a tokenizer may raise anything for one strange text
                    problems.append(RowProblem(position, line, str(error) or type(error).__name__))

    def _columns(self, texts: list[Text], is_pair: bool) -> list[Any]:
        """(input_ids, token_type_ids or None) of each text; None for each where the tokenizer fails for one of them."""
        if self._tokenizer is None:
            raise ValueError("tokenizer: got None, but the rows are texts; pass tokenizer=, or rows with input_ids")
        second = [text[1] for text in texts] if is_pair else None
        try:
            batch = self._tokenize([text[0] for text in texts], second)
        except Exception:
            return [None] * len(texts)
        ids = batch["input_ids"]
        # single texts have one segment, which is what a missing column means
        segments = batch.get("token_type_ids") if is_pair else None
        return list(zip(ids, segments or [None] * len(ids), strict=True))

    def _single(self, text: Text) -> Any:
        batch = self._tokenize([text[0]], None if text[1] is None else [text[1]])
        segments = batch.get("token_type_ids") if text[1] is not None else None
        return batch["input_ids"][0], segments[0] if segments else None

    def _tokenize(self, first: list[str], second: list[str | None] | None) -> Any:
        assert self._tokenizer is not None
        return encode(
            self._tokenizer, first, second, self._limit, truncate=self._truncate, counts=self.counts,
            return_attention_mask=False,
            verbose=False,
        )  # fmt: skip

    def _checked(
        self, position: int, line: int, ids: Sequence[int], segments: Sequence[int] | None, now: float
    ) -> EncodedRow:
        if not 1 <= len(ids) <= self._limit:
            raise ValueError(f"{len(ids)} tokens, expected 1 to {self._limit}")
        # segment 0 throughout is what no segments mean
        return EncodedRow(position, line, len(ids), ids, segments if segments and any(segments) else None, now)


def _tokens_of(row: Mapping[str, Any]) -> tuple[Sequence[int], Sequence[int] | None]:
    """The `input_ids` and perhaps `token_type_ids` of a row: lists, arrays or tensors.

    Raises:
        ValueError: other values than whole numbers; not as many of both.
    """
    ids, segments = _whole_numbers(row, "input_ids"), None
    if row.get("token_type_ids") is not None:
        segments = _whole_numbers(row, "token_type_ids")
        if len(segments) != len(ids):
            raise ValueError(f"{len(segments)} token_type_ids for {len(ids)} input_ids; expected one for each")
    return ids, segments


def _whole_numbers(row: Mapping[str, Any], name: str) -> Sequence[int]:
    values = row[name]
    try:
        return array("q", values.tolist() if hasattr(values, "tolist") else values)
    except (TypeError, OverflowError):
        raise ValueError(f"{name} {reprlib.repr(values)}; expected whole numbers, one for each token") from None


def _texts(row: Any, columns: Columns) -> Text:
    """The one or two texts of a row.

    Raises:
        ValueError: the problem that the row itself reports, or no text in it.
    """
    problem = getattr(row, "problem", None)
    if problem is not None:
        raise ValueError(problem)
    found = _found_texts(row, columns)
    if isinstance(found, Problem):
        raise ValueError(str(found))
    return found


def _found_texts(row: Any, columns: Columns) -> Text | Problem:
    if isinstance(row, Mapping):
        return texts_of(row, columns)
    if hasattr(row, "text_a"):
        first, second = row.text_a, row.text_b
    else:
        values = values_of_row(row)
        if isinstance(values, Problem):
            return values
        first, second = values["text_a"], values.get("text_b")
    for text in (first,) if second is None else (first, second):
        if wrong := text_problem(text):
            return wrong
    return first, second
