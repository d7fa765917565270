"""Regression heads learn labels of mean 0 and standard deviation 1, and answer in the labels' own unit.

New heads answer 0, and a bias that grows by a learning rate a step is late at a mean of 2.6 or 500: what depends on the
sentence is learned afterwards, if ever. So that the last linear layer W h + b needs no other form than a classifier's,
the scaling is in its weights, and taken out of them only while they are trained:

    std * (W h + b) + mean = (std W) h + (std b + mean)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastkd.data.rows import Rows


@dataclass(frozen=True)
class LabelScale:
    """The unit of the labels: `mean + std * standardised`. The default one changes nothing.

    Attributes:
        mean: of the labels that the model was fine-tuned on.
        std: their standard deviation, above 0.
    """

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, rows: Rows) -> LabelScale:
        """That of the labels of `rows`; labels that are all the same have the standard deviation 1."""
        return cls.of_values(torch.tensor(rows.dataset["label"][:], dtype=torch.float64))

    @classmethod
    def of_values(cls, labels: Tensor) -> LabelScale:
        """The same of labels [n]."""
        labels = labels.double()
        std = labels.std(correction=0).item()
        return cls(labels.mean().item(), std if std > 0 else 1.0)

    def standardised(self, answers: Tensor) -> Tensor:
        """`answers` in the labels' unit, of any shape, with mean 0 and standard deviation 1."""
        return (answers - self.mean) / self.std

    def restored(self, answers: Tensor) -> Tensor:
        """The inverse of `standardised`."""
        return answers * self.std + self.mean

    @torch.no_grad()
    def put_into(self, head: nn.Module) -> None:
        """Make `head`, which answers in standardised units, answer in the labels' unit."""
        linear = _last_linear(head)
        linear.weight.mul_(self.std)
        linear.bias.mul_(self.std).add_(self.mean)

    @torch.no_grad()
    def take_out_of(self, head: nn.Module) -> None:
        """The inverse of `put_into`."""
        linear = _last_linear(head)
        linear.weight.div_(self.std)
        linear.bias.sub_(self.mean).div_(self.std)

    @contextmanager
    def taken_out_of(self, heads: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, `heads` answer in standardised units; afterwards again in the labels' unit."""
        for head in heads:
            self.take_out_of(head)
        try:
            yield
        finally:
            for head in heads:
                self.put_into(head)


def _last_linear(head: nn.Module) -> nn.Linear:
    """Of an exit head, or of a plain classifier that is a linear layer itself."""
    return head if isinstance(head, nn.Linear) else cast(nn.Linear, head.out_proj)
