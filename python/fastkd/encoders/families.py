"""What differs between the encoder families that have fast paths, as far as an early exit has to know.

All others run by `fastkd.encoders.replay`. An early exit needs three things of
an encoder: the hidden states before the first layer, its list of layers, and the attention mask in the form that the
chosen attention implementation wants. The layers run through their own transformers `forward`, so a checkpoint computes
what it computes there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask

from fastkd.encoders.anatomy import NO_LIMIT, anatomy_of
from fastkd.encoders.catalogue import check_family
from fastkd.encoders.layout import NO_PADDING, TokenLayout
from fastkd.encoders.untouched import are_untouched


def _bert_embed(
    backbone: Any,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> Tensor:
    return backbone.embeddings(
        input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids, inputs_embeds=inputs_embeds
    )


def _electra_embed(
    backbone: Any,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> Tensor:
    embedded = _bert_embed(backbone, input_ids, token_type_ids, position_ids, inputs_embeds)
    # present only where the embeddings are narrower than the layers
    project = getattr(backbone, "embeddings_project", None)
    return embedded if project is None else project(embedded)


def _distilbert_embed(
    backbone: Any,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> Tensor:
    # DistilBERT has no segments: a tokenizer that still sends token_type_ids is harmless
    return backbone.embeddings(input_ids, inputs_embeds, position_ids)


@dataclass(frozen=True)
class LayerParts:
    """The modules of one layer that normalises after each residual, as every family here does.

    a = attention_norm(x + output(attention(query(x), key(x), value(x))))
    y = feed_forward_norm(a + contract(activation(expand(a))))
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    attention_norm: nn.LayerNorm
    expand: nn.Linear
    activation: Callable[[Tensor], Tensor]
    contract: nn.Linear
    feed_forward_norm: nn.LayerNorm


def _bert_parts(layer: Any) -> LayerParts:
    attention, output = layer.attention.self, layer.attention.output
    return LayerParts(
        query=attention.query,
        key=attention.key,
        value=attention.value,
        output=output.dense,
        attention_norm=output.LayerNorm,
        expand=layer.intermediate.dense,
        activation=layer.intermediate.intermediate_act_fn,
        contract=layer.output.dense,
        feed_forward_norm=layer.output.LayerNorm,
    )


def _distilbert_parts(layer: Any) -> LayerParts:
    attention, feed_forward = layer.attention, layer.ffn
    return LayerParts(
        query=attention.q_lin,
        key=attention.k_lin,
        value=attention.v_lin,
        output=attention.out_lin,
        attention_norm=layer.sa_layer_norm,
        expand=feed_forward.lin1,
        activation=feed_forward.activation,
        contract=feed_forward.lin2,
        feed_forward_norm=layer.output_layer_norm,
    )


@dataclass(frozen=True)
class Family:
    """How to drive one encoder family layer by layer."""

    embed: Callable[..., Tensor] = _bert_embed
    """(backbone, input_ids, token_type_ids, position_ids, inputs_embeds) -> hidden states [B, T, H]."""
    layers: str = "encoder.layer"
    """Where the list of layers lies inside the encoder."""
    pads_positions: bool = False
    """Whether the positions up to that of the padding token are unused (RoBERTa and its kin)."""
    parts: Callable[[Any], LayerParts] = _bert_parts
    """layer -> its modules."""


_BERT = Family()
_ROBERTA = Family(pads_positions=True)

# one for each name in `fastkd.encoders.catalogue.FAMILIES`
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "data2vec-text": _ROBERTA,
    "ernie": _BERT,
    "electra": Family(embed=_electra_embed),
    "distilbert": Family(embed=_distilbert_embed, layers="transformer.layer", parts=_distilbert_parts),
}


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face `model_type`.

    Raises:
        ValueError: a family that is not in `fastkd.encoders.catalogue.FAMILIES`.
    """
    check_family(model_type)
    return FAMILIES[model_type]


def has_own_path(config: PreTrainedConfig, layers: str | None = None) -> bool:
    """Whether the encoder of `config`, with this list of layers, is of a family in `FAMILIES`."""
    return config.model_type in FAMILIES and layers in (None, FAMILIES[config.model_type].layers)


def first_position(config: PreTrainedConfig, layers: str | None = None) -> int:
    """The position of the first token of a sequence."""
    if not has_own_path(config, layers):
        return anatomy_of(config, layers).first_position
    return config.pad_token_id + 1 if family_of(config.model_type).pads_positions else 0


def longest_input(config: PreTrainedConfig, layers: str | None = None) -> int:
    """How many tokens the encoder of `config` has positions for; `NO_LIMIT` where it says none."""
    positions = getattr(config, "max_position_embeddings", None)
    return NO_LIMIT if positions is None or positions < 1 else positions - first_position(config, layers)


def embedding_tables(embeddings: nn.Module) -> tuple[nn.Embedding, ...] | None:
    """The tables of words, positions and perhaps segments whose sum is normalised; None for other embeddings.

    Also None where something is hooked to them or wraps them.
    """
    if not are_untouched(embeddings):
        return None
    tables = {name for name, child in embeddings.named_children() if isinstance(child, nn.Embedding)}
    for names in (_TABLES, _TABLES[:2]):
        if tables == set(names) and isinstance(getattr(embeddings, "LayerNorm", None), nn.LayerNorm):
            return tuple(embeddings.get_submodule(name) for name in names)  # type: ignore[misc]
    return None


_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def padded_layout(config: PreTrainedConfig, hidden_states: Tensor, attention_mask: Tensor | None) -> TokenLayout:
    """The layout of hidden states [B, T, H], with the mask [B, T] also in the form that the layers' attention wants."""
    if attention_mask is None:
        return NO_PADDING
    return TokenLayout(attention_mask, create_bidirectional_mask(config, hidden_states, attention_mask))


def run_layer(layer: nn.Module, hidden_states: Tensor, layout: TokenLayout) -> Tensor:
    """The output of a layer of transformers, as padded or packed as its input.

    Packed sequences need an attention that takes `cu_seqlens` and `max_seqlen`.
    """
    if layout.cu_seqlens is None:
        return layer(hidden_states, layout.layer_mask)
    return layer(hidden_states[None], None, cu_seqlens=layout.cu_seqlens, max_seqlen=layout.max_seqlen)[0]
