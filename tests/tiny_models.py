"""Tiny random encoders of every supported family, saved as plain checkpoints with their tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertTokenizer,
    CamembertConfig,
    Data2VecTextConfig,
    DistilBertConfig,
    DistilBertTokenizer,
    ElectraConfig,
    ErnieConfig,
    JinaEmbeddingsV3Config,
    MegatronBertConfig,
    ModernBertConfig,
    NomicBertConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaPreLayerNormConfig,
    RobertaTokenizer,
    XLMRobertaConfig,
)

import fastkd
import fastkd_kernels as fk

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CRITERIA = [(name, 2 if name == "top_n" else None) for name in fk.CRITERIA]
"""Every criterion that the gate computes, with its `top_n`."""
LAYERS = 4
HIDDEN = 32
WORDS = ["the", "a", "film", "plot", "actor", "was", "is", "not", "very", "good", "bad", "dull", "great", "boring"]
WORDS += ["fun", "and", "but", "who", "what", "cold", "warm"]

_BERT_LIKE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
    # far above the usual 0.02, so that random layers do not all say the same
    "initializer_range": 0.3,
}
_ROBERTA_LIKE = {**_BERT_LIKE, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}


class _Configs(dict[str, Any]):
    """A test of a family that this transformers lacks is skipped."""

    def __missing__(self, family: str) -> Any:
        if family == "gte":
            pytest.skip(f"transformers {transformers.__version__} has no {family}")
        raise KeyError(family)


CONFIGS: dict[str, PreTrainedConfig] = _Configs(
    {
        "bert": BertConfig(**_BERT_LIKE),
        "roberta": RobertaConfig(**_ROBERTA_LIKE),
        "distilbert": DistilBertConfig(
            vocab_size=320,
            dim=HIDDEN,
            n_layers=LAYERS,
            n_heads=4,
            hidden_dim=48,
            max_position_embeddings=66,
            initializer_range=0.3,
        ),
        "electra": ElectraConfig(**_BERT_LIKE, embedding_size=16),
        "xlm-roberta": XLMRobertaConfig(**_ROBERTA_LIKE),
        "camembert": CamembertConfig(**_ROBERTA_LIKE),
        "data2vec-text": Data2VecTextConfig(**_ROBERTA_LIKE),
        "ernie": ErnieConfig(**_BERT_LIKE),
        # a window of two tokens on each side, in the second and third layer
        "modernbert": ModernBertConfig(
            **_BERT_LIKE,
            local_attention=4,
            global_attn_every_n_layers=3,
            pad_token_id=0,
            cls_token_id=2,
            sep_token_id=3,
        ),
        "nomic_bert": NomicBertConfig(**_BERT_LIKE, pad_token_id=0),
        # the oldest transformers lack it
        **({"gte": transformers.GteConfig(**_BERT_LIKE, pad_token_id=0)} if hasattr(transformers, "GteConfig") else {}),
        "jina_embeddings_v3": JinaEmbeddingsV3Config(**_BERT_LIKE, pad_token_id=0),
        "roberta-prelayernorm": RobertaPreLayerNormConfig(**_ROBERTA_LIKE),
        "megatron-bert": MegatronBertConfig(**_BERT_LIKE),
    }
)

MAIN_FAMILIES = ("bert", "roberta", "distilbert", "electra")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For modules that import it: models this small run many times slower on two threads of a busy machine.

    Worker processes have one thread too, so sums add up in the same order there.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokenizer_of(family: str) -> PreTrainedTokenizerBase:
    """A word-piece tokenizer of `WORDS`, or for RoBERTa a byte tokenizer."""
    if family == "roberta":
        byte_symbols = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 324)]]
        symbols = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *byte_symbols]
        return RobertaTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[])
    pieces = {piece: index for index, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    return DistilBertTokenizer(vocab=pieces) if family == "distilbert" else BertTokenizer(vocab=pieces)


def save_plain_checkpoint(folder: Path, family: str) -> Path:
    """A pretrained checkpoint as the hub has it: encoder, language-model head and tokenizer, no classifier."""
    torch.manual_seed(11)
    AutoModelForMaskedLM.from_config(CONFIGS[family]).save_pretrained(folder)
    if family in MAIN_FAMILIES:
        tokenizer_of(family).save_pretrained(folder)
    return folder


QUANTISABLE = [
    family for family, config in CONFIGS.items() if not fastkd.EarlyExitConfig(config, num_labels=2).is_replayed
]
"""The families that run in int8."""


def early_exit_model(
    family: str = "bert", *, num_labels: int = 3, **options: Any
) -> fastkd.EarlyExitForSequenceClassification:
    """A random model in evaluation mode whose heads disagree and differ in certainty."""
    torch.manual_seed(12)
    config = fastkd.EarlyExitConfig(
        CONFIGS[family], num_labels=num_labels, **{"head_width": 16, "exits_trained": True, **options}
    )
    model = fastkd.EarlyExitForSequenceClassification(config).eval()
    common = [torch.randn_like(parameter) for parameter in model.last_head.parameters()]
    with torch.no_grad():
        for head in model.heads.values():
            for parameter, base in zip(head.parameters(), common, strict=True):
                # related heads, so that a label is sometimes repeated and sometimes not
                parameter.copy_(0.3 * base + 0.15 * torch.randn_like(base))
            head.out_proj.weight.mul_(4 if config.head == "fastbert" else 1)
    return model


def random_batch(family: str = "bert", rows: int = 13, longest: int = 11, seed: int = 5) -> dict[str, Tensor]:
    """Right-padded sequences of 2 to `longest` tokens; the first one has `longest`, so that the width is known."""
    generator = torch.Generator().manual_seed(seed)
    config = CONFIGS[family]
    lengths = torch.randint(2, longest + 1, (rows,), generator=generator)
    lengths[:1] = longest
    attention_mask = (torch.arange(longest) < lengths[:, None]).long()
    input_ids = torch.randint(5, config.vocab_size, (rows, longest), generator=generator)
    input_ids = torch.where(attention_mask.bool(), input_ids, config.pad_token_id)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if getattr(config, "type_vocab_size", 1) > 1:
        batch["token_type_ids"] = torch.randint(0, 2, (rows, longest), generator=generator)
    return batch


def row_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sequence without its padding."""
    length = int(batch["attention_mask"][row].sum())
    return {name: values[row : row + 1, :length] for name, values in batch.items()}


def clear_speed(uncertainty: Tensor, share: float = 0.5) -> float:
    """A speed near the quantile `share` of [n, K] uncertainties with the widest margin to all of them.

    Rounding may then move every uncertainty a little without moving the exit of any row.
    """
    values = torch.cat([uncertainty.double().flatten().cpu(), torch.tensor([0.0, 1.0])]).unique()
    middles = (values[1:] + values[:-1]) / 2
    target = int(share * (len(middles) - 1))
    window = slice(max(0, target - 4), target + 5)
    gaps = values.diff()[window]
    return float(middles[window][gaps.argmax()])
