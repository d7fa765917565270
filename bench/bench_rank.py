"""Reranking: recall of the full model's top k against the operations that leaving early saves.

    python bench/bench_rank.py CHECKPOINT DATA --output bench/results/cpu-rank.md

CHECKPOINT is an early-exit model with distilled heads for pairs, such as one fine-tuned on STS-B:

    fastkd finetune minilm --data stsb --num-labels 1 --max-steps 400 -o tuned
    fastkd distill tuned --data stsb --max-steps 250 -o model

DATA is a folder of labelled pairs with a file test. A query is a distinct first text of it; its documents are the
second texts that are nearest to it by the mean embedding of a plain encoder (--first-stage), as a retriever would give
them to a reranker. Some queries calibrate, others are measured; labels play no part: what counts is the order of the
full model. The plain speeds learn from nothing; certificates have half-widths from one half of the calibrating queries
and their guarantee from the other. Operations are counted in FastBERT's convention at the mean length;
seconds are processor seconds of one thread, passes in turns, so they hold tokenising too.
"""

from __future__ import annotations

import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoModel

import fastkd
from fastkd.data.rows import load_rows
from fastkd.exits.calibration import CalibrationError
from fastkd.exits.rank_calibration import cost, queries_of, ranked
from fastkd.exits.ranking import RankRule
from fastkd.exits.scores import score_of
from fastkd.inference.benchmark import machine_facts
from fastkd.model.checkpoints import checkpoint_path
from fastkd.model.tokenizers import load_tokenizer

SPEEDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PROMISES = ((0.05, 1.0), (0.1, 1.0), (0.05, 0.9), (0.05, 0.8))  # max_drop, recall
_HEADINGS = ("rule", "recall", "whole top k", "layers", "operations saved")


@torch.no_grad()
def embeddings(checkpoint: str, texts: list[str]) -> Tensor:
    """Mean embeddings [n, H] of length 1."""
    encoder = AutoModel.from_pretrained(checkpoint_path(checkpoint)).eval()
    tokenizer = load_tokenizer(checkpoint_path(checkpoint))
    found = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, truncation=True, max_length=64, return_tensors="pt")
        states = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def candidates(
    data: Path, first_stage: str, queries: dict[str, int], documents: int
) -> dict[str, dict[str, list[str]]]:
    """For each part, by its number of queries, the documents of its queries; all are of test."""
    rows = load_rows(data, split="test", num_labels=1).dataset
    pool, texts = (list(dict.fromkeys(rows[name][:])) for name in ("text_b", "text_a"))
    vectors = embeddings(first_stage, pool)
    order = iter(torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist())
    found = {}
    for part, count in queries.items():
        chosen = [texts[index] for index in islice(order, count)]
        nearest = (embeddings(first_stage, chosen) @ vectors.T).topk(documents).indices.tolist()
        found[part] = {text: [pool[index] for index in row] for text, row in zip(chosen, nearest, strict=True)}
    return found


def measured(name: str, trace: fastkd.ExitTrace, queries: Tensor, rule: RankRule, seq_len: int) -> tuple[str, ...]:
    got = ranked(queries, rule)
    speedup, layers = cost(trace, got.exit_layers, seq_len)
    whole = got.recall.eq(1).double().mean().item()
    return name, f"{got.recall.mean().item():.3f}", f"{whole:.3f}", f"{layers:.2f}", f"{speedup:.2f}x"


def table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seconds(model: Any, tokenizer: Any, lists: dict[str, list[str]], top_k: int, passes: int) -> list[float]:
    """Processor seconds a query of the full model and of the certificate, medians of interleaved passes."""
    found: list[list[float]] = [[], []]
    for _ in range(passes + 1):
        for times, speed in zip(found, (0.0, None), strict=True):
            started = time.process_time()
            for query, texts in lists.items():
                model.rank(query, texts, top_k, tokenizer=tokenizer, speed=speed)
            times.append((time.process_time() - started) / len(lists))
    # the first pass of each prepares what later ones reuse
    return [statistics.median(times[1:]) for times in found]


def main(
    checkpoint: str,
    data: Path,
    top_k: Annotated[int, typer.Option(min=1)] = 10,
    queries: Annotated[int, typer.Option(min=2, help="That are measured.")] = 300,
    calibrating: Annotated[int, typer.Option(min=2, help="Others, that calibrate.")] = 300,
    documents: Annotated[int, typer.Option(min=2, help="Of each query.")] = 50,
    first_stage: Annotated[str, typer.Option(help="Encoder whose embeddings choose the documents.")] = "minilm",
    timed: Annotated[int, typer.Option(min=0, help="Queries that are timed.")] = 40,
    passes: int = 3,
    output: Path | None = None,
) -> None:
    """Measure a reranker on a ranking task made of pairs."""
    torch.set_num_threads(1)
    model, tokenizer = fastkd.load_model(checkpoint, "cpu")
    lists = candidates(data, first_stage, {"calibrating": calibrating, "measured": queries}, documents)
    traces = {
        split: model.trace(
            [(query, text) for query, texts in found.items() for text in texts], tokenizer=tokenizer, batch_size=64
        )
        for split, found in lists.items()
    }
    test = traces["measured"]
    seq_len = round(test.lengths.double().mean().item())
    score = score_of(test.logits.shape[-1], None)
    scores = queries_of(test, score)
    layers = test.exit_layers
    rows = [measured(f"speed {s:g}", test, scores, RankRule.at_speed(s, top_k, layers), seq_len) for s in SPEEDS]
    promises, kept = [], None
    for max_drop, recall in PROMISES:
        name = f"recall {recall:g} or more in {1 - max_drop:.0%} of queries"
        try:
            certificate = fastkd.calibrate_ranking(
                traces["calibrating"], top_k, max_drop, recall=recall, seq_len=seq_len
            )
        except CalibrationError as error:
            promises.append((name, str(error), "", "", "", ""))
            continue
        kept = kept or certificate
        got = ranked(scores, certificate.rule)
        held = (got.recall >= recall).double().mean().item()
        promises.append((*measured(name, test, scores, certificate.rule, seq_len), f"{held:.3f}"))
    facts = ", ".join(f"{name} {value}" for name, value in machine_facts(torch.device("cpu")).items())
    parts = [
        f"{len(scores)} queries of {documents} documents, top {top_k}, {seq_len} tokens on average; "
        f"{len(lists['calibrating'])} queries calibrate. {facts}",
        table(_HEADINGS, rows),
        table((*_HEADINGS, "promise kept in"), promises),
    ]
    if kept is not None and timed:
        kept.apply(model)
        some = dict(list(lists["measured"].items())[:timed])
        full, early = seconds(model, tokenizer, some, top_k, passes)
        parts.append(
            f"{kept}: {1e3 * early:.1f} ms a query, of the full model {1e3 * full:.1f} ms ({full / early:.2f}x)"
        )
    text = "\n\n".join(parts) + "\n"
    print(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
