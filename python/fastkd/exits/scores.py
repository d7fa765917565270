"""What of the logits ranks documents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]
"""From logits [B, C] to what is ranked, [B] float32."""


def score_of(num_labels: int, label: int | None) -> Score:
    """The number of a regression, or the log-odds of a class, which do not saturate as its probability does.

    Raises:
        ValueError: a label of a regression, none of a classifier, or one that it does not have.
    """
    if num_labels == 1:
        if label is not None:
            raise ValueError(f"label: got {label!r}, but this model is a regression and ranks by its only number")
        return lambda logits: logits[:, 0].float()
    if label is None or isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_labels:
        raise ValueError(
            f"label: got {label!r}, expected the class whose probability ranks documents, 0 to {num_labels - 1}"
        )

    def log_odds(logits: Tensor) -> Tensor:
        logits = logits.float()
        others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
        return logits[:, label] - others.logsumexp(dim=1)

    return log_odds
