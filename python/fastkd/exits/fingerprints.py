"""Fingerprints of weights and tensors, by which a certificate knows the model and the rows that it was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class HasWeights(Protocol):
    """Every `torch.nn.Module`."""

    def state_dict(self) -> Mapping[str, Tensor]: ...


def model_fingerprint(model: HasWeights) -> str:
    """A SHA-256 of all weights, whatever device they are on: another dtype is another model."""
    sha = hashlib.sha256()
    for name, parameter in model.state_dict().items():
        sha.update(name.encode())
        sha.update(tensor_bytes(parameter))
    return sha.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """The memory of a tensor of any dtype, without a copy where it lies on the host in one piece."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
