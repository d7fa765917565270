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
    PackedEncoder,
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


@torch.no_grad()
def run(
    model: ExitModel, rows: Sequence[EncodedRow], rule: RankRule, score: Score, tokens_per_run: int = 4096
) -> ScoredRows:
    """Score the documents of one query; those that cannot reach the top k any more are not computed further.

    Args:
        model: in evaluation mode.
        rows: query and document together; `position` counts from 0.
        rule: which documents leave after which layers.
        score: what of the logits is ranked.
        tokens_per_run: a layer runs on so many tokens at once, or on one row that has more. Beside such a run the
            hidden states of all documents that are left are kept.
    """
    found = ScoredRows(torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.int32))
    documents = _Documents(model, sorted(rows, key=attrgetter("tokens")), score, tokens_per_run)
    done, last = 0, rule.layers[-1]
    while documents.rows:
        asked = last if len(documents.rows) <= rule.top_k else next(layer for layer in rule.layers if layer > done)
        before = documents.scores
        scores = documents.run(range(done + 1, asked + 1), keeps=asked != last)
        places = torch.tensor([row.position for row in documents.rows])
        found.scores[places] = scores.float().cpu()
        found.exit_layers[places] = asked
        if asked == last:
            break
        documents.keep(rule.staying(asked, scores, before))
        done = asked
    return found


class _Documents:
    """The documents that are left, shortest first, with their packed hidden states and their last scores."""

    def __init__(self, model: ExitModel, rows: list[EncodedRow], score: Score, tokens_per_run: int) -> None:
        self.rows = rows
        self.scores: Tensor | None = None
        self._model, self._score, self._tokens_per_run = model, score, tokens_per_run
        self._encoder: PackedEncoder | PaddedRuns = (
            encoder_of(model) if model.config.has_fast_paths else PaddedRuns(model)
        )
        self._states: Tensor | None = None

    def run(self, numbers: range, keeps: bool) -> Tensor:
        """Scores [n] after these layers; the hidden states are kept where documents go on."""
        scores = []
        total = sum(row.tokens for row in self.rows)
        states, start = self._states, 0
        for rows in _cut(self.rows, self._tokens_per_run):
            tokens = packed_rows(rows, self._model.device)
            count = tokens.input_ids.shape[0]
            waiting = None if self._states is None else self._states[start : start + round_up_tokens(count)]
            used = self._encoder.run(numbers, tokens, waiting, tokens.layout)[:count]
            scores.append(self._score(self._model.logits_after(numbers[-1], used, tokens.layout)))
            if keeps:
                if states is None:
                    states = used.new_zeros(total + MOST_ADDED, used.shape[-1])
                # these tokens have been read, and no other run reads them
                states[start : start + count] = used
            start += count
        self._states, self.scores = states, torch.cat(scores)
        return self.scores

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
