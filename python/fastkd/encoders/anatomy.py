"""What of an encoder's size its configuration does not say: read off its modules, built without memory."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from fastkd.encoders.layer_list import layer_path

NO_LIMIT = 1 << 20
"""Tokens that an encoder takes whose configuration names no limit."""


class Anatomy(NamedTuple):
    """Facts about the modules of one encoder."""

    first_position: int
    """The position of a sequence's first token; those below belong to padding."""
    linear_products: int
    """Sum of in * out over the linear layers that a token meets in one layer, on average."""

    @classmethod
    def of(cls, encoder: nn.Module, layers: str) -> Anatomy:
        """Those of an encoder whose list of layers is called `layers`."""
        tables = (
            module
            for name, module in encoder.named_modules()
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        )
        padded = [table.padding_idx + 1 for table in tables if table.padding_idx is not None]
        inner = encoder.get_submodule(layers)
        products = sum(m.in_features * m.out_features for m in inner.modules() if isinstance(m, nn.Linear))
        return cls(max(padded, default=0), products // len(inner))  # type: ignore[arg-type]


def anatomy_of(config: PreTrainedConfig, layers: str | None) -> Anatomy:
    """The anatomy of the encoder of `config`; `layers` as in `fastkd.encoders.layer_list.layer_path`.

    Raises:
        ValueError: its layers are not found.
    """
    return _anatomy(config.to_json_string(use_diff=False), config.model_type, layers)


@lru_cache(maxsize=16)
def _anatomy(config: str, model_type: str, layers: str | None) -> Anatomy:
    fields = {name: value for name, value in json.loads(config).items() if name not in ("model_type", "dtype")}
    own = AutoConfig.for_model(model_type, **fields)
    with torch.device("meta"):
        encoder = build(own)
    return Anatomy.of(encoder, layer_path(encoder, layers, own.num_hidden_layers))


def keep_layers(config: PreTrainedConfig, layers: Sequence[int]) -> None:
    """Make `config` that of an encoder with these of its layers, from 0, in this order."""
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(layers)
    if kinds is not None:
        config.layer_types = [kinds[layer] for layer in layers]


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """The randomly initialised encoder of `config`, without a pooler where it can be left out."""
    kind: Any = MODEL_MAPPING[type(config)]
    if isinstance(kind, tuple):  # of which AutoModel chooses by a checkpoint's name for its class
        return kind[0]._from_config(config)
    has_pooler = inspect.isclass(kind) and "add_pooling_layer" in inspect.signature(kind).parameters
    return AutoModel.from_config(config, **({"add_pooling_layer": False} if has_pooler else {}))


def check_is_encoder(config: PreTrainedConfig) -> None:
    """Raise ValueError for a configuration that is not of an encoder of text in transformers."""
    kind = config.model_type
    if type(config) not in MODEL_MAPPING:
        raise ValueError(
            f"backbone: transformers has no encoder of family {kind!r}; use one that AutoModel loads without the "
            "checkpoint's own code"
        )
    if config.is_encoder_decoder:
        raise ValueError(
            f"backbone: {kind!r} is an encoder-decoder, expected an encoder only; use one such as bert, modernbert or "
            "deberta-v2"
        )
    if config.get_text_config() is not config:
        raise ValueError(f"backbone: {kind!r} reads more than text; use its text encoder, or another encoder")
    for name in ("num_hidden_layers", "hidden_size"):
        if not isinstance(getattr(config, name, None), int):
            raise ValueError(f"backbone: the configuration of {kind!r} has no {name}; use another encoder")
