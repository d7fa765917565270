"""Engine `rank`: the documents of one query, layer by layer together, because each is judged by all others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.encoders.layout import TokenLayout
from fastkd.engines.packed_encoder import (
    MOST_ADDED,
    compact_rows,
    cumulative_lengths,
    encoder_of,
    round_up_tokens,
)
from fastkd.engines.padded_runs import PaddedRuns
from fastkd.engines.protocol import ExitModel
from fastkd.engines.stream_reader import EncodedRow, packed_rows
from fastkd.exits.ranking import RankRule
from fastkd.exits.scores import Score


class ScoredRows(NamedTuple):
    """Scores [n] float32 at the layer [n] int32 after which each document left, on the host, in the order given."""

    scores: Tensor
    exit_layers: Tensor


class RankRun:
    """The documents of one query on their way, from head to head; those that cannot reach the top k leave."""

    def __init__(
        self, model: ExitModel, rows: Sequence[EncodedRow], rule: RankRule, score: Score, tokens_per_run: int = 4096
    ) -> None:
        """Nothing is computed yet.

        Args:
            model: in evaluation mode.
            rows: query and document together; `position` counts from 0.
            rule: which documents leave after which layers.
            score: what of the logits is ranked.
            tokens_per_run: a layer runs on so many tokens at once, or on one row that has more. Beside such a run the
                hidden states of all documents that are left are kept.
        """
        self.found = ScoredRows(torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.int32))
        self.layer = 0
        """The last one that ran."""
        self._rule = rule
        self._documents = _Documents(model, sorted(rows, key=attrgetter("tokens")), score, tokens_per_run)
        self.is_done = not rows

    @property
    def left(self) -> Sequence[EncodedRow]:
        """The documents that the next step computes."""
        return self._documents.rows

    @torch.no_grad()
    def step(self, most: int | None = None) -> None:
        """Compute the documents that are left up to the next head, but no more than `most` layers."""
        documents, rule, last = self._documents, self._rule, self._rule.layers[-1]
        asked = last if len(documents.rows) <= rule.top_k else next(head for head in rule.layers if head > self.layer)
        if most is not None and asked - self.layer > most:
            documents.run(range(self.layer + 1, self.layer + most + 1))
            self.layer += most
            return
        before = documents.scores
        scores = documents.scored(range(self.layer + 1, asked + 1), keeps=asked != last)
        places = torch.tensor([row.position for row in documents.rows])
        self.found.scores[places] = scores.float().cpu()
        self.found.exit_layers[places] = asked
        self.layer, self.is_done = asked, asked == last
        if not self.is_done:
            documents.keep(rule.staying(asked, scores, before))


def run(
    model: ExitModel, rows: Sequence[EncodedRow], rule: RankRule, score: Score, tokens_per_run: int = 4096
) -> ScoredRows:
    """Score the documents of one query; those that cannot reach the top k any more are not computed further.

    Arguments are those of `RankRun`.
    """
    ranked = RankRun(model, rows, rule, score, tokens_per_run)
    while not ranked.is_done:
        ranked.step()
    return ranked.found


class _Documents:
    """The documents that are left, shortest first, with their packed hidden states and their last scores."""

    def __init__(self, model: ExitModel, rows: list[EncodedRow], score: Score, tokens_per_run: int) -> None:
        self.rows = rows
        self.scores: Tensor | None = None
        self._model, self._score, self._tokens_per_run = model, score, tokens_per_run
        packed = encoder_of(model) if model.config.has_fast_paths else None
        self._encoder = PaddedRuns(model) if packed is None or not packed.can_run else packed
        self._states: Tensor | None = None

    def scored(self, numbers: range, keeps: bool) -> Tensor:
        """Scores [n] after these layers; the hidden states are kept where documents go on."""
        scores: list[Tensor] = []
        self.run(numbers, keeps, scores)
        self.scores = torch.cat(scores)
        return self.scores

    def run(self, numbers: range, keeps: bool = True, scores: list[Tensor] | None = None) -> None:
        """Run these layers; the scores of each run go to `scores`."""
        total = sum(row.tokens for row in self.rows)
        states, start = self._states, 0
        for rows in _cut(self.rows, self._tokens_per_run):
            tokens = packed_rows(rows, self._model.device)
            count = tokens.input_ids.shape[0]
            waiting = None if self._states is None else self._states[start : start + round_up_tokens(count)]
            used = self._encoder.run(numbers, tokens, waiting, tokens.layout)[:count]
            if scores is not None:
                scores.append(self._score(self._model.logits_after(numbers[-1], used, tokens.layout)))
            if keeps:
                if states is None:
                    states = used.new_zeros(total + MOST_ADDED, used.shape[-1])
                # these tokens have been read, and no other run reads them
                states[start : start + count] = used
            start += count
        self._states = states

    def keep(self, staying: Tensor) -> None:
        """Drop the documents that are not `staying` [n]."""
        kept = staying.nonzero()[:, 0]
        if kept.shape[0] == len(self.rows):
            return
        assert self._states is not None
        assert self.scores is not None
        lengths = [row.tokens for row in self.rows]
        layout = TokenLayout(cu_seqlens=cumulative_lengths(lengths, staying.device), max_seqlen=max(lengths))
        self.rows = [self.rows[index] for index in kept.tolist()]
        self.scores = self.scores[kept]
        tokens = sum(row.tokens for row in self.rows)
        self._states, _ = compact_rows(self._states[: sum(lengths)], layout, kept.int(), tokens + MOST_ADDED)


def _cut(rows: Sequence[EncodedRow], tokens: int) -> Iterator[Sequence[EncodedRow]]:
    """Runs of at most so many tokens, of at least one row each."""
    ends = list(accumulate((row.tokens for row in rows), initial=0))
    first = 0
    for index in range(1, len(rows) + 1):
        is_full = index == len(rows) or ends[index + 1] - ends[first] > tokens
        if is_full:
            yield rows[first:index]
            first = index
