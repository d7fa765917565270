"""What a layer and a compaction cost on this machine, so that rows are moved only where that saves time.

Both grow with the tokens they work on:

    seconds(tokens) = fixed + slope * tokens

fitted through the fastest of a few calls at two sizes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_SIZES = (64, 512)  # tokens; a layer of a base model takes some milliseconds to tens of them
_CALLS = 3


@dataclass(frozen=True)
class Cost:
    """Seconds that something takes on a number of tokens."""

    fixed: float
    slope: float

    def __call__(self, tokens: int) -> float:
        return self.fixed + self.slope * tokens


@dataclass(frozen=True)
class CompactionCost:
    """Whether to drop the sequences that left from a packed batch."""

    layer: Cost
    compaction: Cost

    def pays(self, tokens: int, kept: int, layers: int) -> bool:
        """Whether `layers` layers on `kept` of `tokens` tokens save more than moving the kept ones takes."""
        saved = layers * (self.layer(tokens) - self.layer(kept))
        return saved > self.compaction(kept)


def fit(run: Callable[[int], object], device: torch.device) -> Cost:
    """The cost of `run(tokens)`, which is called a few times."""
    small, large = (_fastest(run, tokens, device) for tokens in _SIZES)
    slope = max(0.0, large - small) / (_SIZES[1] - _SIZES[0])
    return Cost(max(0.0, small - slope * _SIZES[0]), slope)


def _fastest(run: Callable[[int], object], tokens: int, device: torch.device) -> float:
    run(tokens)
    return min(_seconds(run, tokens, device) for _ in range(_CALLS))


def _seconds(run: Callable[[int], object], tokens: int, device: torch.device) -> float:
    _wait_for(device)
    started = time.perf_counter()
    run(tokens)
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        # not for the whole device, which may be where another thread captures a graph
        torch.cuda.current_stream(device).synchronize()
