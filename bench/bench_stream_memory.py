"""The memory of a stream over its rows: resident memory every so many rows, of a tiny model on short rows.

    python bench/bench_stream_memory.py --rows 1000000

It should be flat once every size of run has been seen. Lengths are random, so runs have many sizes.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import BertConfig

import fastkd
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.engines.allocator import keep_freed_memory


def resident_mebibytes() -> float:
    """Resident memory of this process; Linux only."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096 / 2**20


def tiny_model(hidden_size: int) -> fastkd.EarlyExitForSequenceClassification:
    """Random weights, four layers."""
    torch.manual_seed(0)
    backbone = BertConfig(
        vocab_size=1000, hidden_size=hidden_size, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=2 * hidden_size, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return fastkd.EarlyExitForSequenceClassification(
        EarlyExitConfig(backbone=backbone, num_labels=2, exits_trained=True)
    ).eval()


def rows_of(count: int, longest: int) -> Iterator[dict[str, Any]]:
    """Encoded rows of random length."""
    drawn = random.Random(0)
    for _ in range(count):
        yield {"input_ids": [2, *(drawn.randrange(5, 1000) for _ in range(drawn.randrange(1, longest - 1))), 3]}


def main(
    rows: Annotated[int, typer.Option(help="How many to stream.")] = 1_000_000,
    every: Annotated[int, typer.Option(help="Rows between two measurements.")] = 25_000,
    longest: Annotated[int, typer.Option(help="Tokens of the longest row.")] = 12,
    hidden_size: Annotated[int, typer.Option(help="Of the encoder.")] = 32,
    speed: Annotated[float, typer.Option(help="Of the early exit.")] = 0.05,
) -> None:
    """Print the resident memory, and how much it grew over the second half."""
    torch.set_num_threads(1)
    keep_freed_memory()
    seen: list[float] = []
    stream = tiny_model(hidden_size).stream(rows_of(rows, longest), speed=speed)
    for number, _ in enumerate(stream, start=1):
        if number % every == 0:
            gc.collect()
            seen.append(resident_mebibytes())
            print(f"{number:>9} rows  {seen[-1]:8.1f} MiB", flush=True)
    half = seen[len(seen) // 2 :]
    growth = (half[-1] - half[0]) / max(len(half) - 1, 1)
    print(f"second half: {growth:+.3f} MiB for every {every} rows")


if __name__ == "__main__":
    typer.run(main)
