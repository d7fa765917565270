"""Which documents of a query can still reach its top k: the mathematics of ranking with early exits.

The document j of a query has the score s_j(l) at the head after layer l, and f_j at the last one. All documents of a
query that are left stand at the same layer, so what moves all their scores alike changes no order. With half-widths
w(l) such that f_j lies within s_j(l) - w(l) .. s_j(l) + w(l), up to a number that the documents of a query share,

    j leaves after layer l where  s_j(l) + w(l) < the k-th largest of s_i(l) - w(l)

because k others are then above it, whatever the further layers say. What stays reaches the last layer: the k best have
the full model's scores, in its order.

Two ways to half-widths:

    speed      from the query itself: (1 - speed) / speed times how far its scores moved since the head before, as the
               standard deviation over the documents that are left; before the first head all of them score the mean.
               At speed 0 nothing leaves, at 1 all but the k best at the first head
    learned    one number a head, from other queries: see `fastkd.exits.rank_calibration`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.exits.rule import check_speed


@dataclass(frozen=True)
class RankRule:
    """After which layers documents may leave, and which.

    Attributes:
        top_k: how many documents are to be ranked by the full model.
        layers: 1-based numbers of the layers whose heads are asked, ascending; the last one scores what is left.
        half_widths: for each of `layers` but the last; None: by `speed`.
        speed: above 0 and up to 1 where there are no half-widths and any layer but the last.
    """

    top_k: int
    layers: tuple[int, ...]
    half_widths: tuple[float, ...] | None = None
    speed: float = 0.0

    @classmethod
    def at_speed(cls, speed: float, top_k: int, exit_layers: Sequence[int]) -> RankRule:
        """The rule of a speed in [0, 1].

        Raises:
            ValueError: another speed, or one for each head, which have no meaning here.
        """
        number = check_speed(speed)
        if not isinstance(number, float):
            raise ValueError(f"speed: got {speed!r}, but documents are ranked at one speed for all heads, from 0 to 1")
        return cls(top_k, tuple(exit_layers) if number else tuple(exit_layers[-1:]), None, number)

    @classmethod
    def within(cls, half_widths: Sequence[float], top_k: int, exit_layers: Sequence[int]) -> RankRule:
        """The rule of a half-width for each head below the last."""
        return cls(top_k, tuple(exit_layers), tuple(half_widths))

    @property
    def leaves_early(self) -> bool:
        """Whether any document may leave before the last layer."""
        return len(self.layers) > 1

    def staying(self, layer: int, scores: Tensor, before: Tensor | None) -> Tensor:
        """[..., n] bool: which documents go on after `layer`, one of `layers` but the last.

        Args:
            layer: after which the scores were read.
            scores: [..., n] float32 of the documents of each query; -inf stands for none, and one that is NaN stays.
            before: [..., n], of the same documents at the head that was asked before; None at the first.
        """
        if scores.shape[-1] <= self.top_k:
            return torch.ones_like(scores, dtype=torch.bool)
        if self.half_widths is not None:
            width = torch.tensor(self.half_widths[self.layers.index(layer)], device=scores.device)
        else:
            moved = scores if before is None else scores - before
            width = (1 - self.speed) / self.speed * _deviation(moved, scores != -torch.inf)
        reached = scores.topk(self.top_k).values[..., -1:] - width
        return (scores + width < reached).logical_not()


def _deviation(values: Tensor, counts: Tensor) -> Tensor:
    """[..., 1], the standard deviation of the `values` [..., n] that count."""
    number = counts.sum(-1, keepdim=True)
    values = values.masked_fill(~counts, 0)
    from_mean = (values - values.sum(-1, keepdim=True) / number).masked_fill(~counts, 0)
    return (from_mean.square().sum(-1, keepdim=True) / number).sqrt()
