"""Full models of families with fast paths, random and of any size: ours at speed 0 against transformers' own forward.

    python bench/bench_families.py modernbert nomic_bert --dtype bfloat16 --rows 256

Rows have as many tokens as news in AG News have, about: log-normal, 52 on average. Contestants, in turns:

    transformers          its forward on batches in the order of the rows, padded to their longest row
    transformers sorted   the same on batches sorted by length
    packed                `model(...)` on the first one's batches
    stream                `model.stream`

A pass counts processor seconds; the table shows medians, and how many times faster than the first two each one is: the
median over the turns. Answers are compared before anything is timed.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoConfig

import fastkd
from fastkd.encoders.layout import TokenLayout
from fastkd.engines.allocator import keep_freed_memory
from fastkd.inference.benchmark import machine_facts
from fastkd.inference.interleaved import interleaved

Batch = dict[str, Tensor]


def random_model(
    family: str, hidden_size: int, layers: int, heads: int, intermediate: int, dtype: torch.dtype
) -> fastkd.EarlyExitForSequenceClassification:
    torch.manual_seed(0)
    backbone = AutoConfig.for_model(
        family,
        vocab_size=30000,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        pad_token_id=0,
    )
    config = fastkd.EarlyExitConfig(backbone, num_labels=4, exits_trained=True)
    return fastkd.EarlyExitForSequenceClassification(config).eval().to(dtype)


def random_rows(count: int) -> list[dict[str, list[int]]]:
    drawn = torch.Generator().manual_seed(0)
    lengths = torch.randn(count, generator=drawn).mul(0.3).add(3.9).exp().clamp(12, 250).int().tolist()
    return [{"input_ids": torch.randint(5, 30000, (length,), generator=drawn).tolist()} for length in lengths]


def batches_of(rows: list[dict[str, list[int]]], size: int) -> list[Batch]:
    batches = []
    for at in range(0, len(rows), size):
        ids = [torch.tensor(row["input_ids"]) for row in rows[at : at + size]]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        lengths = torch.tensor([len(row) for row in ids])
        batches.append(
            {"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long()}
        )
    return batches


def transformers_logits(model: Any, batches: list[Batch]) -> Tensor:
    logits = []
    for batch in batches:
        hidden_states = model.backbone(**batch).last_hidden_state
        logits.append(model.last_head(hidden_states, TokenLayout(batch["attention_mask"].bool())))
    return torch.cat(logits)


def packed_logits(model: Any, batches: list[Batch]) -> Tensor:
    return torch.cat([model(**batch, speed=0.0).logits for batch in batches])


def main(
    families: Annotated[list[str], typer.Argument(help="Names of families, as transformers calls them.")],
    rows: Annotated[int, typer.Option(help="How many.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Rows of a padded batch.")] = 32,
    hidden_size: Annotated[int, typer.Option(help="Of the encoder.")] = 768,
    layers: Annotated[int, typer.Option(help="Of the encoder.")] = 6,
    heads: Annotated[int, typer.Option(help="Of the encoder.")] = 12,
    intermediate: Annotated[int, typer.Option(help="Width of the feed-forward.")] = 1152,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(help="Passes of each contestant.")] = 7,
) -> None:
    """Print a table for each family."""
    torch.set_num_threads(1)
    keep_freed_memory()
    print("  ".join(f"{name}: {value}" for name, value in machine_facts(torch.device("cpu")).items()))
    encoded = random_rows(rows)
    in_order, by_length = batches_of(encoded, batch_size), batches_of(sorted(encoded, key=_tokens), batch_size)
    for family in families:
        model = random_model(family, hidden_size, layers, heads, intermediate, getattr(torch, dtype))
        with torch.inference_mode():
            found, expected = packed_logits(model, in_order).float(), transformers_logits(model, in_order).float()
            print(f"{family}: largest difference of a logit {float((found - expected).abs().max()):.1e}")
            seconds, _ = interleaved(
                {
                    "transformers": lambda model=model: transformers_logits(model, in_order),
                    "transformers sorted": lambda model=model: transformers_logits(model, by_length),
                    "packed": lambda model=model: packed_logits(model, in_order),
                    "stream": lambda model=model: list(model.stream(encoded, speed=0.0)),
                },
                repeats,
                lambda name: None,
                synchronise=lambda: None,
                clock=time.process_time,
            )
        for name, times in seconds.items():
            ratios = [
                statistics.median(other / own for other, own in zip(seconds[baseline], times, strict=True))
                for baseline in ("transformers", "transformers sorted")
            ]
            print(f"{name:22}{statistics.median(times):8.3f} s   {ratios[0]:5.2f}x padded   {ratios[1]:5.2f}x sorted")


def _tokens(row: dict[str, list[int]]) -> int:
    return len(row["input_ids"])


if __name__ == "__main__":
    typer.run(main)
