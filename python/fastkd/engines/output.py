"""`EarlyExitOutput`: what a model answers to a batch, whatever engine ran it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

import fastkd_kernels as fk


@dataclass
class EarlyExitOutput(SequenceClassifierOutput):
    """A `SequenceClassifierOutput` that also says where each sequence left.

    Attributes:
        loss: [] cross-entropy (mean squared error for one label) of the answers, where labels were given.
        logits: [B, C] float32, of the head that answered.
        exit_layer: [B] int32, 1 after the first layer; None in training.
        uncertainty: [B] float32 at that layer; None in training and for regression.
    """

    exit_layer: Tensor | None = None
    uncertainty: Tensor | None = None


def fields_of(record: fk.ExitRecord) -> dict[str, Any]:
    """What an engine recorded, as fields of `EarlyExitOutput`; a regression knows no uncertainty."""
    uncertainty = None if record.logits.shape[1] == 1 else record.uncertainty
    return {"logits": record.logits, "exit_layer": record.exit_layer, "uncertainty": uncertainty}
