"""What differs between the encoder families that have fast paths, as far as an early exit has to know.

Layers run from their parts, which `LayerParts` describes, where nothing is put around them. Other layers run through
their own transformers `forward`. In some families that takes hidden states and a mask in the form that the chosen
attention implementation wants; all others run by `fastkd.encoders.replay`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask

from fastkd.encoders.anatomy import NO_LIMIT, anatomy_of
from fastkd.encoders.catalogue import check_family
from fastkd.encoders.layout import NO_PADDING, TokenLayout
from fastkd.encoders.recording import same_rows
from fastkd.encoders.rotary import Rotary
from fastkd.encoders.untouched import are_untouched, has_plain_weight


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


def _modernbert_embed(
    backbone: Any,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> Tensor:
    return backbone.embeddings(input_ids, inputs_embeds)


@dataclass(frozen=True)
class LayerParts:
    """The modules of one layer, and how they are put together.

    With norms behind the residuals, as in BERT:

        a = attention_norm(x + attend(x))
        y = feed_forward_norm(a + feed_forward(a))

    With `norms_first`, as in ModernBERT, where a norm that is None changes nothing:

        a = x + attend(attention_norm(x))
        y = a + feed_forward(feed_forward_norm(a))

    In both:

        attend(x) = output(attention(query, key, value)), the three being projections(x), turned by `rotary` if any
        feed_forward(x) = contract(activation(expand(x)))
                        = contract(activation(first) * second) where `is_gated`, both halves being expand(x)

    No linear layer or norm needs a bias, but all of `projections` have one or none has, and so those of `expand`.
    """

    projections: tuple[nn.Linear, ...]
    """Of queries, keys and values; or one that gives all three, in this order."""
    output: nn.Linear
    attention_norm: nn.LayerNorm | None
    expand: tuple[nn.Linear, ...]
    """One. Where the feed-forward is gated, one for each half, or one that gives both; the first half is activated."""
    activation: Callable[[Tensor], Tensor]
    contract: nn.Linear
    feed_forward_norm: nn.LayerNorm
    norms_first: bool = False
    is_gated: bool = False
    window: int | None = None
    """A token sees those that are at most so many tokens away, on both sides; None: all of its sequence."""
    rotary: Rotary | None = None

    def fits(self, heads: int) -> bool:
        """Whether sizes, with so many attention heads, and biases are as above."""
        width, rest = divmod(sum(linear.out_features for linear in self.projections), 3)
        is_square = rest == 0 and width % heads == 0 and self.output.in_features == width
        turned = width if self.rotary is None else 2 * self.rotary.frequencies.numel() * heads
        joined = (self.projections, self.expand)
        return (
            is_square
            and turned == width
            and all(len({linear.bias is None for linear in linears}) == 1 for linears in joined)
            and len({linear.out_features for linear in self.projections}) == 1
        )

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        return (*self.projections, self.output, *self.expand, self.contract)

    @property
    def norms(self) -> tuple[nn.LayerNorm, ...]:
        return tuple(norm for norm in (self.attention_norm, self.feed_forward_norm) if norm is not None)


def _bert_parts(backbone: Any, layer: Any) -> LayerParts:
    attention, output = layer.attention.self, layer.attention.output
    return LayerParts(
        projections=(attention.query, attention.key, attention.value),
        output=output.dense,
        attention_norm=output.LayerNorm,
        expand=(layer.intermediate.dense,),
        activation=layer.intermediate.intermediate_act_fn,
        contract=layer.output.dense,
        feed_forward_norm=layer.output.LayerNorm,
    )


def _distilbert_parts(backbone: Any, layer: Any) -> LayerParts:
    attention, feed_forward = layer.attention, layer.ffn
    return LayerParts(
        projections=(attention.q_lin, attention.k_lin, attention.v_lin),
        output=attention.out_lin,
        attention_norm=layer.sa_layer_norm,
        expand=(feed_forward.lin1,),
        activation=feed_forward.activation,
        contract=feed_forward.lin2,
        feed_forward_norm=layer.output_layer_norm,
    )


def _modernbert_parts(backbone: Any, layer: Any) -> LayerParts:
    attention, feed_forward = layer.attn, layer.mlp
    is_local = layer.attention_type == "sliding_attention"
    return LayerParts(
        projections=(attention.Wqkv,),
        output=attention.Wo,
        attention_norm=None if isinstance(layer.attn_norm, nn.Identity) else layer.attn_norm,
        expand=(feed_forward.Wi,),
        activation=feed_forward.act,
        contract=feed_forward.Wo,
        feed_forward_norm=layer.mlp_norm,
        norms_first=True,
        is_gated=True,
        window=backbone.config.sliding_window if is_local else None,  # of which transformers makes its masks
        rotary=Rotary(backbone.rotary_emb, layer.attention_type),
    )


def _nomic_parts(backbone: Any, layer: Any) -> LayerParts:
    attention, feed_forward = layer.self_attn, layer.mlp
    return LayerParts(
        projections=(attention.q_proj, attention.k_proj, attention.v_proj),
        output=attention.o_proj,
        attention_norm=layer.post_attention_layernorm,
        expand=(feed_forward.gate_proj, feed_forward.up_proj),
        activation=feed_forward.act_fn,
        contract=feed_forward.down_proj,
        feed_forward_norm=layer.post_mlp_layernorm,
        is_gated=True,
        rotary=Rotary(backbone.rotary_emb),
    )


def _jina_parts(backbone: Any, layer: Any) -> LayerParts:
    attention, feed_forward = layer.self_attn, layer.mlp
    return LayerParts(
        projections=(attention.q_proj, attention.k_proj, attention.v_proj),
        output=attention.o_proj,
        attention_norm=layer.post_attention_layernorm,
        expand=(feed_forward.fc1,),
        activation=feed_forward.activation_fn,
        contract=feed_forward.fc2,
        feed_forward_norm=layer.post_mlp_layernorm,
        rotary=Rotary(backbone.rotary_emb),
    )


def _norms_first_parts(layer: Any, attention_norm: nn.LayerNorm, feed_forward_norm: nn.LayerNorm) -> LayerParts:
    """Those of a BERT layer whose norms come first."""
    attention = layer.attention
    return LayerParts(
        projections=(attention.self.query, attention.self.key, attention.self.value),
        output=attention.output.dense,
        attention_norm=attention_norm,
        expand=(layer.intermediate.dense,),
        activation=layer.intermediate.intermediate_act_fn,
        contract=layer.output.dense,
        feed_forward_norm=feed_forward_norm,
        norms_first=True,
    )


def _roberta_prelayernorm_parts(backbone: Any, layer: Any) -> LayerParts:
    return _norms_first_parts(layer, layer.attention.LayerNorm, layer.intermediate.LayerNorm)


def _megatron_parts(backbone: Any, layer: Any) -> LayerParts:
    return _norms_first_parts(layer, layer.attention.ln, layer.ln)


@dataclass(frozen=True)
class Family:
    """How to drive one encoder family layer by layer."""

    embed: Callable[..., Tensor] = _bert_embed
    """(backbone, input_ids, token_type_ids, position_ids, inputs_embeds) -> hidden states [B, T, H]."""
    layers: str = "encoder.layer"
    """Where the list of layers lies inside the encoder."""
    pads_positions: bool = False
    """Whether the positions up to that of the padding token are unused (RoBERTa and its kin)."""
    parts: Callable[[Any, Any], LayerParts] = _bert_parts
    """(backbone, layer) -> the layer's modules."""
    is_replayed: bool = False
    """Whether layers that do not run from their parts take more than hidden states and a mask: `Replay` runs them."""


_BERT = Family()
_ROBERTA = Family(pads_positions=True)
_NOMIC = Family(layers="layers", parts=_nomic_parts, is_replayed=True)

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
    "modernbert": Family(embed=_modernbert_embed, layers="layers", parts=_modernbert_parts, is_replayed=True),
    "nomic_bert": _NOMIC,
    "gte": _NOMIC,
    "jina_embeddings_v3": Family(layers="layers", parts=_jina_parts, is_replayed=True),
    "roberta-prelayernorm": Family(pads_positions=True, parts=_roberta_prelayernorm_parts, is_replayed=True),
    "megatron-bert": Family(parts=_megatron_parts, is_replayed=True),
}


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face `model_type`.

    Raises:
        ValueError: a family that is not in `fastkd.encoders.catalogue.FAMILIES`.
    """
    check_family(model_type)
    return FAMILIES[model_type]


def has_fast_paths(config: PreTrainedConfig, layers: str | None = None) -> bool:
    """Whether the encoder of `config`, with this list of layers, is of a family in `FAMILIES`."""
    return config.model_type in FAMILIES and layers in (None, FAMILIES[config.model_type].layers)


def is_replayed(config: PreTrainedConfig, layers: str | None = None) -> bool:
    """Whether layers of the encoder of `config` that do not run from their parts are run by `Replay`."""
    return not has_fast_paths(config, layers) or FAMILIES[config.model_type].is_replayed


def first_position(config: PreTrainedConfig, layers: str | None = None) -> int:
    """The position of the first token of a sequence."""
    if not has_fast_paths(config, layers):
        return anatomy_of(config, layers).first_position
    return config.pad_token_id + 1 if family_of(config.model_type).pads_positions else 0


def longest_input(config: PreTrainedConfig, layers: str | None = None) -> int:
    """How many tokens the encoder of `config` has positions for; `NO_LIMIT` where it says none."""
    positions = getattr(config, "max_position_embeddings", None)
    return NO_LIMIT if positions is None or positions < 1 else positions - first_position(config, layers)


class EmbeddingParts(NamedTuple):
    """Tables whose rows are summed and normalised."""

    tables: tuple[nn.Embedding, ...]
    inputs: tuple[int, ...]
    """By what each table is asked: 0 the token's number, 1 its position, 2 its segment."""
    norm: nn.LayerNorm


def embedding_parts(embeddings: nn.Module) -> EmbeddingParts | None:
    """The parts of embeddings that are a table of words, perhaps of positions and of segments, and a norm; else None.

    Also None where something is hooked to them or wraps them, and where their weights are quantised.
    """
    if not are_untouched(embeddings):
        return None
    tables = {name: child for name, child in embeddings.named_children() if isinstance(child, nn.Embedding)}
    norm = next((child for name, child in embeddings.named_children() if name in ("LayerNorm", "norm")), None)
    inputs = tuple(_TABLES.get(name, -1) for name in tables)
    are_plain = all(has_plain_weight(table, nn.Embedding) and table.max_norm is None for table in tables.values())
    if type(norm) is not nn.LayerNorm or 0 not in inputs or -1 in inputs or not are_plain:
        return None
    return EmbeddingParts(tuple(tables.values()), inputs, norm)


_TABLES = {"word_embeddings": 0, "tok_embeddings": 0, "position_embeddings": 1, "token_type_embeddings": 2}


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
        return same_rows(layer, hidden_states, layer(hidden_states, layout.layer_mask))
    packed = hidden_states[None]
    given = layer(packed, None, cu_seqlens=layout.cu_seqlens, max_seqlen=layout.max_seqlen)
    return same_rows(layer, packed, given)[0]
