"""What one call of a model costs on a CPU: the host's share of it, and how it depends on the length of the row.

    python bench/bench_call.py

The host's share is measured on a small model and 50 tokens: "plan" is `model(**row)`, "usual" the path that asks every
module and parameter, which is `engine="packed"`. What the plan spends outside of its calls into the kernels is its host
time. Then a model of the size of MiniLM is called with rows of different lengths, each once and in random order: a
length that is seen for the first time should cost what its tokens cost, which is a parabola through all second visits.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import BertConfig

import fastkd
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd_kernels import _packed_stage

_WORDS = 30522


def random_model(hidden_size: int, dtype: torch.dtype) -> fastkd.EarlyExitForSequenceClassification:
    """Random weights, six layers; at speed 1 every row leaves after the first."""
    torch.manual_seed(0)
    backbone = BertConfig(
        vocab_size=_WORDS, hidden_size=hidden_size, num_hidden_layers=6, num_attention_heads=max(1, hidden_size // 32),
        intermediate_size=4 * hidden_size,
    )  # fmt: skip
    config = EarlyExitConfig(backbone=backbone, num_labels=4, exits_trained=True)
    return fastkd.EarlyExitForSequenceClassification(config).to(dtype).eval()


def row_of(tokens: int) -> dict[str, Tensor]:
    """One random row, as a tokenizer gives it."""
    input_ids = torch.randint(1000, _WORDS, (1, tokens))
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "token_type_ids": torch.zeros_like(input_ids),
    }


def microseconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


@torch.no_grad()
def main(
    calls: Annotated[int, typer.Option(help="How often each call is measured.")] = 2000,
    lengths: Annotated[int, typer.Option(help="How many rows of different lengths.")] = 1000,
    longest: Annotated[int, typer.Option(help="Tokens of the longest of them.")] = 128,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
    hidden_size: Annotated[int, typer.Option(help="Of the model whose lengths differ.")] = 384,
    dtype: Annotated[str, typer.Option(help="Of its weights: float32 or bfloat16.")] = "bfloat16",
) -> None:
    """Print both measurements."""
    torch.set_num_threads(threads)
    host_time(calls)
    by_length(random_model(hidden_size, getattr(torch, dtype)), lengths, longest)


class KernelClock:
    """Microseconds inside the calls of a plan's stages, since the last question."""

    def __init__(self) -> None:
        self.spent = 0.0

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = run(*arguments)
            self.spent += (time.perf_counter() - start) * 1e6
            return result

        return timed

    def take(self) -> float:
        spent, self.spent = self.spent, 0.0
        return spent


def host_time(calls: int) -> None:
    """Print what a call costs, and what of it no kernel takes, in interleaved turns."""
    clock, direct = KernelClock(), _packed_stage._eager_run
    if direct is not None:
        _packed_stage._eager_run = clock.around(direct)
    model, row = random_model(32, torch.float32), row_of(50)
    print("a call, microseconds (least, median)")
    for speed in (1.0, 0.0):
        ways: dict[str, dict[str, Any]] = {"plan": {}, "usual": {"engine": "packed"}, "batch": {"engine": "batch"}}
        times: dict[str, list[float]] = {name: [] for name in ("plan", "plan's host", "usual", "batch")}
        for turn in range(calls):
            for name, options in ways.items():
                clock.take()
                taken = microseconds(partial(model, **row, speed=speed, **options))
                if turn < calls // 10:
                    continue
                times[name].append(taken)
                if name == "plan":
                    times["plan's host"].append(taken - clock.take())
        layers = 1 if speed == 1 else model.num_layers
        for name, values in times.items():
            least, median = min(values), statistics.median(values)
            print(f"  {layers} of {model.num_layers} layers, {name:11} {least:8.1f} {median:8.1f}")
    _packed_stage._eager_run = direct


def by_length(model: fastkd.EarlyExitForSequenceClassification, lengths: int, longest: int) -> None:
    """Print the quantiles of rows of different lengths, and of the first visits over what their lengths explain."""
    rows = [row_of(random.Random(number).randrange(3, longest + 1)) for number in range(lengths)]
    model(**row_of(longest), speed=0)  # what is done once for the model
    first = [microseconds(partial(model, **row, speed=0)) for row in rows]
    second = [microseconds(partial(model, **row, speed=0)) for row in rows]
    tokens = torch.tensor([row["input_ids"].shape[1] for row in rows], dtype=torch.float64)
    powers = torch.stack([tokens**0, tokens, tokens**2], 1)
    expected = powers @ torch.linalg.lstsq(powers, torch.tensor(second, dtype=torch.float64)[:, None]).solution[:, 0]
    visits = {"first visit": first, "second visit": second, "by its tokens": expected.tolist()}
    print("p50, p99 and their ratio")
    for name, values in visits.items():
        middle, late = median_and_late(values)
        print(f"{lengths} rows of 3 to {longest} tokens, {name:13} {middle:.0f}, {late:.0f} us, {late / middle:.2f}x")
    middle, late = median_and_late([time / usual for time, usual in zip(first, expected.tolist(), strict=True)])
    print(f"first visits over what their tokens cost: p50 {middle:.2f}, p99 {late:.2f}")


def median_and_late(values: Sequence[float]) -> tuple[float, float]:
    """p50 and p99."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]


if __name__ == "__main__":
    typer.run(main)
