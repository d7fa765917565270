"""Half-widths with a guarantee: the top k of a query is the full model's, in all but a bounded share of queries.

What is promised is about queries with their lists of documents, drawn like those of the calibration. Documents of one
query are judged by each other, so they are not exchangeable, and nothing is counted by document.

    failure    a query fails where less than `recall` of the full model's k best are among the k best that it gets.
               What reaches the top has the full model's scores, so with recall 1 the k best are the full model's with
               their scores and in its order, and so are the best of any smaller number
    path       the half-width that a query needs after layer l is the smallest with which none of its k best leaves
               there; with more it loses none, whatever left before. Each head has its own measure: the mean of the
               largest needs, a share `max_drop` of them, among the queries of one half of the trace. On the path all
               heads have the same multiple of it
    choice     the multiples, widest first, are held against the failures of the other half, by the methods of
               `fastkd.exits.guarantees`
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fastkd_kernels as fk
from fastkd.exits.calibration import CalibrationError, aim, check_choices, part_that_saw
from fastkd.exits.certificate import CertifiedConfig, KeptCertificate, percent
from fastkd.exits.flops import flops
from fastkd.exits.guarantees import METHODS, failure_bounds, holding, smallest_sample
from fastkd.exits.ranking import RankRule
from fastkd.exits.scores import Score, score_of
from fastkd.exits.trace import ExitTrace, check_trace

FACTORS = tuple(step / 20 for step in range(80, 0, -1))
"""The multiples that are tried, widest half-widths first."""


@dataclass(frozen=True)
class RankCertificate(KeptCertificate):
    """How early documents may leave so that the top k stays the full model's, and on what grounds."""

    KEY: ClassVar[str] = "rank_certificate"
    top_k: int
    recall: float
    """The share of the full model's k best that a query must get."""
    method: str
    """One of `fastkd.exits.guarantees.METHODS`."""
    max_drop: float
    """The share of queries that may fail."""
    confidence: float | None
    """With which that holds; None where the method has none."""
    half_widths: list[float]
    """One for each head below the last, in the unit of the scores."""
    factor: float
    """The multiple of what other queries need that they are."""
    label: int | None
    """The class whose log-odds rank; None for a regression."""
    exit_layers: list[int]
    dtype: str
    """Of the weights, as torch calls it: "float32"; empty if the trace did not say."""
    n: int
    """Queries that the choice was held against."""
    failures: int
    """How many of them failed."""
    bound: float
    """On the share of failures, by `method`; at most `max_drop`."""
    mean_recall: float
    """Of the full model's k best, over these queries."""
    documents: float
    """Mean number a query."""
    speedup: float
    """Operations of the full model divided by those with these half-widths (`fastkd.flops`, convention fastbert)."""
    average_layers: float
    seq_len: int
    """Length for which operations were counted."""
    data: str
    """Fingerprint of the rows."""
    seen_as: str | None
    """The part in training that these rows had, which voids the guarantee; None if none is known."""
    date: str
    """ISO 8601, UTC."""
    version: str
    """Of fastkd-kernels."""

    @property
    def rule(self) -> RankRule:
        return RankRule.within(self.half_widths, self.top_k, self.exit_layers)

    def mismatches(self, config: CertifiedConfig, dtype: torch.dtype | str, label: int | None) -> list[str]:
        """One sentence for each difference between use and certificate."""
        compared: dict[str, tuple[object, object]] = {
            "dtype": (self.dtype or "unknown", str(dtype).removeprefix("torch.")),
            "class": (self.label, label),
            "exit layers": (self.exit_layers, list(config.exit_layers)),
        }
        return [
            f"it is for {name} {certified}, but {used} is in use"
            for name, (certified, used) in compared.items()
            if certified != used
        ]

    def __str__(self) -> str:
        top = f"top {self.top_k}"
        what = f"less than {percent(self.recall)} of the full model's {top}"
        if self.recall == 1:
            what = f"a different {top} from the full model's"
        share = f"at most {percent(self.max_drop)} of queries get {what}"
        counted = f"{self.failures} of {self.n:,} did"
        if self.method == "fixed-sequence":
            assert self.confidence is not None
            return (
                f"with {percent(self.confidence)} confidence {share} ({counted}; exact binomial upper bound "
                f"{percent(self.bound)})"
            )
        if self.method == "conformal":
            return f"on average over calibration sets {share} ({counted}; conformal bound {percent(self.bound)})"
        return f"on the calibration queries {share} ({counted}); measured, not guaranteed"

    @classmethod
    def _check(cls, value: Any) -> None:
        is_known = value["method"] in METHODS and (value["method"] != "fixed-sequence" or value["confidence"])
        widths, layers = value["half_widths"], value["exit_layers"]
        if not is_known or len(widths) != len(layers) - 1 or not all(0 <= w < math.inf for w in widths):
            raise ValueError(
                f"certificate: got {value['method']}, confidence {value['confidence']}, "
                f"half-widths {widths}, which is not a guarantee; calibrate again"
            )


class RankedQueries(NamedTuple):
    """What queries cost and get."""

    exit_layers: Tensor
    """[Q, N] int64, after which layer each document leaves; 0 where there is none."""
    recall: Tensor
    """[Q] float64, the share of the full model's k best that are among a query's own k best."""


def calibrate_ranking(
    trace: ExitTrace,
    top_k: int,
    max_drop: float = 0.05,
    confidence: float = 0.95,
    *,
    recall: float = 1.0,
    method: str = "fixed-sequence",
    label: int | None = None,
    reliability: ExitTrace | None = None,
    seq_len: int | None = None,
    allow_seen: bool = False,
) -> RankCertificate:
    """The half-widths that save most operations among those with which the top k stays the full model's.

    Args:
        trace: of pairs (query, document), whose queries are drawn like those to come, each with the documents that it
            will be ranked with. `ExitTrace.queries` says which rows are of one query.
        top_k: how many documents the full model is to rank; the guarantee is for the best of any smaller number too.
        max_drop: the share of queries that may fail, in (0, 1).
        confidence: with which the fixed-sequence guarantee holds, in (0, 1).
        recall: a query fails that gets less than this share of the full model's k best, in (0, 1].
        method: "fixed-sequence", "conformal" or "empirical".
        label: the class whose log-odds rank; None for a regression.
        reliability: pairs of other queries, from which half-widths are learned; default: a random half of the queries
            of `trace`, and the choice is held against the other half.
        seq_len: length for which operations are counted; default that of the trace.
        allow_seen: also certify on rows of which training has seen more than 1 %; the guarantee is void for them.

    Warns:
        CalibrationWarning: training has seen some of these rows.

    Raises:
        CalibrationError: training has seen more than 1 % of the rows; too few queries for this guarantee (it says how
            many are needed), or nothing keeps it and saves operations.
        TypeError: no trace; `model.calibrate_ranking` takes rows.
        ValueError: a trace without queries, none with more than `top_k` documents, numbers outside their range.
    """
    check_trace(trace, "calibrate_ranking")
    check_choices(max_drop, confidence, method)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k: got {top_k!r}, expected a whole number, at least 1")
    if not 0 < recall <= 1:
        raise ValueError(f"recall: got {recall!r}, expected a share above 0 and up to 1")
    score = score_of(trace.logits.shape[-1], label)
    seen_as = part_that_saw(trace, allow_seen)
    held = queries_of(trace, score)
    if reliability is None:
        order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
        learned_from, held = held[order[: len(held) // 2]], held[order[len(held) // 2 :]]
    elif reliability.source.data and reliability.source.data == trace.source.data:
        raise ValueError("reliability: these are the rows of the trace, which voids the guarantee; use other queries")
    else:
        learned_from = queries_of(reliability, score)
    needed = smallest_sample(max_drop, confidence, method)
    if len(held) < needed or not len(learned_from):
        halves = "" if reliability is not None else ", plus as many again to learn half-widths from"
        raise CalibrationError(
            f"trace: got {len(held)} queries, but {aim(max_drop, confidence, method)} takes at least {needed}{halves}, "
            "even if none of them fails; calibrate on more queries, or allow a larger max_drop"
        )
    documents = int((held[..., -1] != -torch.inf).sum())
    if held.shape[1] <= top_k:
        raise ValueError(f"trace: no query has more than top_k={top_k} documents, so there is nothing to leave out")
    paths = half_width_path(learned_from, top_k, max_drop)
    seq_len = trace.max_length if seq_len is None else seq_len
    tried = [ranked(held, RankRule.within(widths, top_k, trace.exit_layers)) for widths in paths]
    failures = np.array([int((queries.recall < recall).sum()) for queries in tried])
    allowed = holding(failures, len(held), max_drop, confidence, method)
    costs = [cost(trace, queries.exit_layers, seq_len) for queries in tried]
    holds = [index for index in range(len(tried)) if allowed[index] and costs[index][0] > 1]
    if not holds:
        raise CalibrationError(
            f"trace: with the widest half-widths {failures[0]} of {len(held):,} queries fail and "
            f"{costs[0][0]:.2f}x fewer operations are needed; allow a larger max_drop or less recall, or use more "
            "queries"
        )
    best = max(holds, key=lambda index: costs[index][0])
    return RankCertificate(
        model=trace.source.model,
        top_k=top_k,
        recall=float(recall),
        method=method,
        max_drop=max_drop,
        confidence=confidence if method == "fixed-sequence" else None,
        half_widths=paths[best],
        factor=FACTORS[best],
        label=label,
        exit_layers=list(trace.exit_layers),
        dtype=trace.source.dtype,
        n=len(held),
        failures=int(failures[best]),
        bound=float(failure_bounds(failures[best], len(held), confidence, method)),
        mean_recall=tried[best].recall.mean().item(),
        documents=documents / len(held),
        speedup=costs[best][0],
        average_layers=costs[best][1],
        seq_len=seq_len,
        data=trace.source.data,
        seen_as=seen_as,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        version=fk.__version__,
    )


def queries_of(trace: ExitTrace, score: Score) -> Tensor:
    """The scores of the documents of each query at every head, [Q, N, K] float32; -inf where a query has fewer than N.

    Raises:
        ValueError: a trace that does not say which rows are of one query.
    """
    if trace.queries is None:
        raise ValueError(
            "trace: it does not say which rows belong to the same query; trace pairs (query, document) again with "
            "this version"
        )
    heads = torch.stack([score(trace.logits[:, head]) for head in range(trace.logits.shape[1])], dim=1)
    order = trace.queries.argsort(stable=True)
    counts = trace.queries.unique(return_counts=True)[1].tolist()
    return pad_sequence(heads[order].split(counts), batch_first=True, padding_value=-torch.inf)


def needed_half_widths(scores: Tensor, top_k: int) -> Tensor:
    """[Q, K - 1], for each head the smallest half-width with which a query loses none of the full model's k best.

    `scores` [Q, N, K] are those of `queries_of`.
    """
    if scores.shape[1] <= top_k:
        return scores.new_zeros(scores.shape[0], scores.shape[2] - 1)
    early, best = scores[..., :-1], scores[..., -1].topk(top_k).indices
    of_best = early.gather(1, best[..., None].expand(-1, -1, early.shape[-1]))
    needed = (early.topk(top_k, dim=1).values[:, -1] - of_best.amin(1)) / 2
    # a query with fewer documents needs none
    return needed.nan_to_num(0).clamp(min=0)


def half_width_path(queries: Tensor, top_k: int, max_drop: float) -> list[list[float]]:
    """For each of `FACTORS` a half-width for each head below the last, learned from these queries [Q, N, K]."""
    needed = needed_half_widths(queries, top_k).double().sort(dim=0, descending=True).values
    largest = needed[: math.ceil(max_drop * len(needed))].mean(dim=0)
    return [(factor * largest).tolist() for factor in FACTORS]


def ranked(scores: Tensor, rule: RankRule) -> RankedQueries:
    """What becomes of queries whose documents have these scores [Q, N, K] at all heads."""
    is_there = scores[..., -1] != -torch.inf
    stays = is_there.clone()
    exit_layers = torch.where(is_there, rule.layers[-1], 0)
    before = None
    for head, layer in enumerate(rule.layers[:-1]):
        here = scores[..., head].masked_fill(~stays, -torch.inf)
        left = stays & ~rule.staying(layer, here, before)
        exit_layers[left] = layer
        stays &= ~left
        before = scores[..., head]
    full = scores[..., -1]
    wanted = is_there.sum(1).clamp(max=rule.top_k)
    bar = full.sort(descending=True).values.gather(1, wanted[:, None] - 1)
    # of equal scores any may be among the best
    found = (stays & (full >= bar)).sum(1).minimum(wanted)
    return RankedQueries(exit_layers, found.double() / wanted)


def cost(trace: ExitTrace, exit_layers: Tensor, seq_len: int) -> tuple[float, float]:
    """How many times fewer operations than the full model's documents take that leave so, and their mean of layers."""
    layers = exit_layers[exit_layers > 0]
    spent = sum(
        count * flops(trace.shape, seq_len, layers=layer, heads=sum(head <= layer for head in trace.exit_layers))
        for layer, count in enumerate(layers.bincount().tolist())
        if count
    )
    return flops(trace.shape, seq_len) * len(layers) / spent, layers.double().mean().item()
