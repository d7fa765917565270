"""A tiny random encoder of every text family that the installed transformers has, and what fastkd makes of it.

`python tests/every_encoder.py` writes docs/models.md anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tiny_models import clear_speed
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig
from transformers.models.auto import modeling_auto

import fastkd
from fastkd.encoders.catalogue import FAMILIES
from fastkd.encoders.layout import TokenLayout

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
_MARK = "<!-- written by tests/every_encoder.py -->"
LAYERS = 3
_MOST_PARAMETERS = 3_000_000

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "rotary_dim"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_inner"), 64),
    **dict.fromkeys(("hidden_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), 4),
    "max_position_embeddings": 66,
    "n_positions": 66,
    "embedding_size": 16,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.3,
}
"""Small values for whatever of these a configuration has."""

_EXTRAS: dict[str, dict[str, Any]] = {
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
    },
    "lilt": {"hidden_size": 48},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "roc_bert": {
        "pronunciation_vocab_size": 9,
        "shape_vocab_size": 9,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "squeezebert": {"embedding_size": 32},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
}
"""What a family asks for beside small sizes, or has to be told for its own sake to be tested."""


class Outcome(NamedTuple):
    """What fastkd makes of one family."""

    title: str
    """Of its model, in transformers."""
    status: str
    """"exact", "refused", or "not built" where no small one can be made."""
    note: str
    """How it runs, or why not."""


def text_families() -> list[str]:
    """Every `model_type` that transformers fills masks, classifies texts or encodes texts with."""
    tasks = (
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    )
    return sorted(set().union(*tasks) & set(modeling_auto.MODEL_MAPPING_NAMES))


def tiny_config(family: str) -> PreTrainedConfig:
    """A configuration of few parameters; raises whatever its class does where the sizes do not fit together."""
    cls = CONFIG_MAPPING[family]
    fields = {**cls().to_dict(), **dict.fromkeys(cls.attribute_map)}
    small = {name: size for name, size in _SIZES.items() if name in fields}
    small |= {name: 99 for name, size in fields.items() if name.endswith("vocab_size") and (size is None or size > 99)}
    config: PreTrainedConfig = cls(**{**small, **_EXTRAS.get(family, {})})
    return config


def random_inputs(vocabulary: int) -> dict[str, Tensor]:
    """Six rows of 4 to 20 tokens; six is also a size that no table of the tiny models has."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([20, 7, 13, 20, 4, 16])
    mask = (torch.arange(20) < lengths[:, None]).long()
    ids = torch.randint(5, vocabulary, (6, 20), generator=generator) * mask + (1 - mask)
    return {"input_ids": ids, "attention_mask": mask}


def outcome_of(family: str) -> Outcome:
    """Build it, and hold every engine that runs it against transformers' own forward."""
    title = modeling_auto.MODEL_MAPPING_NAMES[family]
    title = title if isinstance(title, str) else title[0]
    try:
        config = tiny_config(family)
    except Exception as error:
        return Outcome(title, "not built", _short(error))
    try:
        config = fastkd.EarlyExitConfig(config, num_labels=3, head_width=16, exits_trained=True)
    except ValueError as error:
        return Outcome(title, "refused", _short(error))
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModel.from_config(config.backbone).parameters())
    except Exception as error:
        return Outcome(title, "not built", _short(error))
    if size > _MOST_PARAMETERS:
        return Outcome(title, "not built", "no small one comes of small sizes")
    torch.manual_seed(3)
    inputs = random_inputs(min(99, getattr(config.backbone, "vocab_size", 99)))
    try:
        AutoModel.from_config(config.backbone).eval()(**inputs)
    except Exception as error:
        return Outcome(title, "not built", _short(error))
    try:
        model = fastkd.EarlyExitForSequenceClassification(config).eval()
        with torch.no_grad():
            for head in model.heads.values():
                for parameter in head.parameters():
                    parameter.normal_(std=0.4)
            model(**inputs, speed=0.0)
    except ValueError as error:
        return Outcome(title, "refused", _short(error))
    check_exact(model, inputs)
    if model.reads_padding:
        return Outcome(title, "exact", "layer by layer; it reads padding")
    return Outcome(title, "exact", "fast paths" if family in FAMILIES else "layer by layer")


@torch.no_grad()
def check_exact(model: Any, inputs: dict[str, Tensor]) -> None:
    """Speed 0 is transformers' own forward and the last head, bit by bit; above, rows leave where its layers say."""
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, output: seen.append(_states(output))) for layer in model.layers]
    own = model.backbone(**inputs)[0]
    for hook in hooks:
        hook.remove()
    assert len(seen) == LAYERS
    layout = TokenLayout(inputs["attention_mask"].bool())

    def ask(layer: int, states: Tensor) -> Tensor:
        read = layout.with_mean_first(states) if model.config.pool == "mean" else (states, layout)
        return model.heads[str(layer - 1)](*read)

    full = model(**inputs, speed=0.0, engine="batch")
    assert torch.equal(full.logits, ask(LAYERS, own)), "speed 0 differs from transformers' own forward"
    # what comes after the last layer is the encoder's own
    tail = [model.backbone.get_submodule(path) for path in getattr(model._driver.check(model.backbone), "tail", ())]
    logits = torch.stack([ask(layer, _through(tail, states)) for layer, states in enumerate(seen, start=1)], dim=1)
    assert torch.equal(logits[:, -1], full.logits), "the final norm is not the encoder's own"

    probabilities = logits.softmax(-1)
    uncertainty = torch.special.entr(probabilities).sum(-1) / math.log(probabilities.shape[-1])
    speed = clear_speed(uncertainty[:, :-1])
    leaves = (uncertainty < speed).index_fill(1, torch.tensor([LAYERS - 1]), True)
    exit_layer = leaves.int().argmax(1) + 1
    expected = logits[torch.arange(len(logits)), exit_layer - 1]
    answered = model(**inputs, speed=speed, engine="batch")
    assert answered.exit_layer.tolist() == exit_layer.tolist(), "rows left elsewhere than layer by layer"
    torch.testing.assert_close(answered.logits, expected, rtol=1e-3, atol=1e-3)
    rows = [{"input_ids": ids[keep.bool()].tolist()} for ids, keep in zip(*inputs.values(), strict=True)]
    streamed = list(model.stream(rows, speed=speed, tokens_per_run=40))
    if model.reads_padding:
        # the stream pads nothing
        alone = [model(input_ids=torch.tensor([row["input_ids"]]), speed=speed, engine="batch") for row in rows]
        exit_layer = torch.cat([row.exit_layer for row in alone])
        expected = torch.cat([row.logits for row in alone])
    assert [row.exit_layer for row in streamed] == exit_layer.tolist(), "the stream's rows left elsewhere"
    names = model.config.id2label
    assert [row.label for row in streamed] == [names[number] for number in expected.argmax(-1).tolist()]


def _states(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _through(modules: Sequence[Any], states: Tensor) -> Tensor:
    for module in modules:
        states = module(states)
    return states


def tables(outcomes: dict[str, Outcome]) -> str:
    """The part of docs/models.md behind `_MARK`."""
    lines = [f"With transformers {transformers.__version__}:", ""]
    for status, heading in (
        ("exact", "| family | encoder | exact, and how it runs |"),
        ("refused", "| family | model | refused, because |"),
        ("not built", "| family | model | not tested: no small model comes of small sizes alone |"),
    ):
        rows = [row_of_table(family, found) for family, found in outcomes.items() if found.status == status]
        lines += [heading, "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def row_of_table(family: str, found: Outcome) -> str:
    return f"| `{family}` | {found.title} | {_cell(found.note)} |"


def rows_of_page() -> dict[str, str]:
    """The rows of the tables by their family."""
    lines = PAGE.read_text(encoding="utf-8").partition(_MARK)[2].splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def _short(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.removeprefix("backbone: ").removeprefix("layers: ")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    found = {}
    for family in text_families():
        start = time.monotonic()
        found[family] = outcome_of(family)
        print(
            f"{family:22} {time.monotonic() - start:5.2f} s  {found[family].status:10} {found[family].note[:150]}",
            flush=True,
        )
    prose, mark, _ = PAGE.read_text(encoding="utf-8").partition(_MARK)
    PAGE.write_text(f"{prose}{mark}\n\n{tables(found)}", encoding="utf-8")
