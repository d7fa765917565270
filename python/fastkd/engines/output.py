"""`EarlyExitOutput`: what a model answers to a batch, whatever engine ran it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields
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

    @classmethod
    def of(cls, answers: Mapping[str, Tensor | None]) -> EarlyExitOutput:
        """`cls(**answers)` of answers in the order of the fields, without the time that its checks take."""
        output = cls.__new__(cls)
        OrderedDict.__init__(output, {name: value for name, value in answers.items() if value is not None})
        output.__dict__.update(_NO_FIELDS, **answers)
        return output


_NO_FIELDS = {field.name: None for field in fields(EarlyExitOutput)}


def fields_of(record: fk.ExitRecord) -> dict[str, Any]:
    """What an engine recorded, as fields of `EarlyExitOutput`; a regression knows no uncertainty."""
    uncertainty = None if record.logits.shape[1] == 1 else record.uncertainty
    return {"logits": record.logits, "exit_layer": record.exit_layer, "uncertainty": uncertainty}
