"""Checkpoints of the official FastBERT code, converted to models of this package.

    embedding.*  encoder.*  classifiers.{i}.*                 written by run_fastbert.py
    kernel.embedding.*  kernel.encoder.*  classifiers.{i}.*   written by the package `fastbert` and by FastPLM

Both are flat dictionaries of tensors in the names of UER-py. The arithmetic is BERT's but for the LayerNorm, which
divides by the unbiased deviation s = sqrt(n / (n - 1)) sigma of its n values plus 1e-6, where BERT divides by
sqrt(sigma^2 + eps). So gamma is multiplied by sqrt((n - 1) / n), and eps is chosen so that both agree exactly at the
deviation of a typical embedding, the smallest that a LayerNorm of such a model meets. What is left is a relative error
of at most 1e-6 / sigma in the output of each LayerNorm, for every sigma from half of that deviation up.

Source: https://github.com/autoliuweijie/FastBERT (run_fastbert.py, pypi/fastbert, uer/layers).
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertTokenizer, PreTrainedTokenizerBase

from fastkd.data.files import atomic_folder
from fastkd.data.input_format import with_input_format
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.model.modeling import EarlyExitForSequenceClassification

_UER_EPSILON = 1e-6
_HEAD_ATTENTION_HEADS = 2
_USUAL_HEAD_SIZE = 64
_SHOWN_KEYS = 8
_NUMBERED = re.compile(r"(?:encoder\.transformer|classifiers)\.(\d+)\.")
_SEGMENTS = 3  # padding, first text, second text

_EMBEDDINGS = {
    "word_embedding.weight": "word_embeddings.weight",
    "position_embedding.weight": "position_embeddings.weight",
    "segment_embedding.weight": "token_type_embeddings.weight",
    "layer_norm.gamma": "LayerNorm.weight",
    "layer_norm.beta": "LayerNorm.bias",
}
_LINEAR_OF_LAYER = {
    "self_attn.linear_layers.0": "attention.self.query",
    "self_attn.linear_layers.1": "attention.self.key",
    "self_attn.linear_layers.2": "attention.self.value",
    "self_attn.final_linear": "attention.output.dense",
    "feed_forward.linear_1": "intermediate.dense",
    "feed_forward.linear_2": "output.dense",
}
_NORM_OF_LAYER = {"layer_norm_1": "attention.output.LayerNorm", "layer_norm_2": "output.LayerNorm"}
_LINEAR_OF_HEAD = {
    "output_layer_0": "narrow",
    "self_atten.linear_layers.0": "query",
    "self_atten.linear_layers.1": "key",
    "self_atten.linear_layers.2": "value",
    "self_atten.final_linear": "output",
    "output_layer_1": "dense",
    "output_layer_2": "classifier",
}


@dataclass(frozen=True)
class ImportedModel:
    """What `import_fastbert` wrote.

    Attributes:
        folder: the model folder.
        config: of the model.
        has_tokenizer: whether a vocabulary was given, and so a tokenizer lies in the folder.
    """

    folder: Path
    config: EarlyExitConfig
    has_tokenizer: bool


def import_fastbert(
    checkpoint: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    vocab: str | os.PathLike[str] | None = None,
    label_names: Sequence[str] | None = None,
    num_attention_heads: int | None = None,
    max_length: int = 128,
    lower_case: bool = True,
    overwrite: bool = False,
) -> ImportedModel:
    """Convert an official FastBERT checkpoint into a model folder that `from_pretrained` and every command takes.

    Args:
        checkpoint: the file that `run_fastbert.py --output_model_path` or `FastBERT.save_model` wrote.
        output_dir: made at the end, under a temporary name first.
        vocab: the vocab.txt that the model was trained with, one token a line; without it no tokenizer is saved.
        label_names: the classes in the order of their numbers.
        num_attention_heads: of the encoder; the file does not say. Default: one for every 64 of the hidden size, as in
            all official configurations.
        max_length: tokens after which a text is cut; the official default is 128.
        lower_case: whether the tokenizer lowers case, as the official one always does.
        overwrite: replace `output_dir`.

    Raises:
        FileNotFoundError: no such checkpoint or vocabulary.
        FileExistsError: `output_dir` exists.
        ValueError: what `convert` and `read_checkpoint` raise; a vocabulary of another size.
    """
    target = Path(output_dir)
    if target.exists() and not overwrite:
        raise FileExistsError(f"output_dir: {target} already exists; choose another, or pass overwrite=True")
    model = convert(read_checkpoint(checkpoint), label_names=label_names, num_attention_heads=num_attention_heads)
    positions = model.config.backbone.max_position_embeddings
    if not 1 < max_length <= positions:
        raise ValueError(f"max_length: got {max_length}, expected 2 to the {positions} positions of the checkpoint")
    tokenizer = None if vocab is None else _tokenizer(Path(vocab), model, max_length, lower_case)
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return ImportedModel(target, model.config, tokenizer is not None)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no PyTorch file, a damaged one, or one that holds something else than named tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}; expected the .bin file of the official code")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"checkpoint: {path} is no readable PyTorch file of tensors ({str(error).splitlines()[0]}); copy it again"
        ) from error
    is_flat = isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())
    if not is_flat or not state:
        raise ValueError(
            f"checkpoint: {path} holds {type(state).__name__}, expected a dictionary of tensors, as torch.save of a "
            "state_dict writes"
        )
    return dict(state)


def convert(
    state: Mapping[str, Tensor], *, label_names: Sequence[str] | None = None, num_attention_heads: int | None = None
) -> EarlyExitForSequenceClassification:
    """The early-exit model, in evaluation mode, that computes what the official code computes with `state`.

    Args:
        state: the official tensors by name, with either prefix.
        label_names, num_attention_heads: as in `import_fastbert`.

    Raises:
        ValueError: missing or unexpected keys, a tensor of another shape, or a number of labels or attention heads
            that does not fit.
    """
    state = _without_prefix(state)
    layers = _number_of_layers(state)
    names = _names(layers)
    _check_keys(state, names)
    _check_embeddings(state)
    words, positions, classes = (
        state[name].shape[0]
        for name in (
            "embedding.word_embedding.weight",
            "embedding.position_embedding.weight",
            "classifiers.0.output_layer_2.weight",
        )
    )
    hidden_size = state["embedding.word_embedding.weight"].shape[-1]
    backbone = BertConfig(
        vocab_size=words,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=_attention_heads(num_attention_heads, hidden_size),
        intermediate_size=state["encoder.transformer.0.feed_forward.linear_1.weight"].shape[0],
        max_position_embeddings=positions,
        type_vocab_size=_SEGMENTS - 1,
        layer_norm_eps=_layer_norm_eps(state),
    )
    config = EarlyExitConfig(
        backbone,
        head_width=state["classifiers.0.output_layer_0.weight"].shape[0],
        head_attention_heads=_HEAD_ATTENTION_HEADS,
        exits_trained=True,
        input_format="uer",
        **_labels(label_names, classes),
    )
    model = EarlyExitForSequenceClassification(config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    converted = {names[name]: _converted(name, value) for name, value in state.items()}
    _check_shapes(converted, shapes, names)
    model.load_state_dict(converted)
    return model.eval()


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as run_fastbert.py writes them, without the heads of the pretraining, which both codes leave unused."""
    plain = {name.removeprefix("kernel."): value for name, value in state.items()}
    return {name: value for name, value in plain.items() if not name.startswith("target.")}


def _number_of_layers(state: Iterable[str]) -> int:
    """The number that layers and heads ask for; whichever of them is incomplete is missed later."""
    numbered = (_NUMBERED.match(name) for name in state)
    return 1 + max((int(match[1]) for match in numbered if match), default=0)


def _names(layers: int) -> dict[str, str]:
    """Official name -> name in the converted model, of every tensor of a model with so many layers."""
    names = {f"embedding.{theirs}": f"bert.embeddings.{ours}" for theirs, ours in _EMBEDDINGS.items()}
    for layer in range(layers):
        uer, bert = f"encoder.transformer.{layer}", f"bert.encoder.layer.{layer}"
        for theirs, ours in _NORM_OF_LAYER.items():
            names[f"{uer}.{theirs}.gamma"] = f"{bert}.{ours}.weight"
            names[f"{uer}.{theirs}.beta"] = f"{bert}.{ours}.bias"
        for parameter in ("weight", "bias"):
            for theirs, ours in _LINEAR_OF_LAYER.items():
                names[f"{uer}.{theirs}.{parameter}"] = f"{bert}.{ours}.{parameter}"
            for theirs, ours in _LINEAR_OF_HEAD.items():
                names[f"classifiers.{layer}.{theirs}.{parameter}"] = f"heads.{layer}.{ours}.{parameter}"
    return names


def _converted(name: str, value: Tensor) -> Tensor:
    value = value.float()
    if name.endswith(".gamma"):
        size = value.numel()
        return value * math.sqrt((size - 1) / size)
    # its first row is the segment of the padding
    return value[1:] if name == "embedding.segment_embedding.weight" else value


def _layer_norm_eps(state: Mapping[str, Tensor]) -> float:
    """The eps with which sqrt(sigma^2 + eps) is UER's divisor at the median deviation of the embeddings."""
    words, positions, segments = (
        state[f"embedding.{name}_embedding.weight"].float() for name in ("word", "position", "segment")
    )
    sample = words + positions[torch.arange(len(words)) % len(positions)] + segments[1]
    typical = sample.std(dim=-1, correction=0).median().item()
    size = words.shape[-1]
    added = _UER_EPSILON * math.sqrt((size - 1) / size)
    return 2 * added * typical + added**2


def _attention_heads(chosen: int | None, hidden_size: int) -> int:
    heads = chosen or hidden_size // _USUAL_HEAD_SIZE
    if heads < 1 or hidden_size % heads:
        raise ValueError(
            f"num_attention_heads: got {chosen}, which the hidden size {hidden_size} of the checkpoint is no multiple "
            "of; pass heads_num of the configuration that it was trained with"
        )
    return heads


def _labels(names: Sequence[str] | None, classes: int) -> dict[str, Any]:
    if names is None:
        return {"num_labels": classes}
    if len(names) != classes or len(set(names)) < classes:
        raise ValueError(f"label_names: got {list(names)}, expected {classes} different names, one a class")
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


# Checks


def _check_keys(state: Iterable[str], names: Iterable[str]) -> None:
    expected, found = set(names), set(state)
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if not missing and not unexpected:
        return
    complaints = [
        f"{what} {_listed(keys)}" for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys
    ]
    remedy = "expected the file that the official FastBERT code saves after self-distillation"
    if missing and all(key.startswith("classifiers.") for key in missing) and not unexpected:
        remedy = "a pretrained UER checkpoint has no classifiers; " + remedy
    raise ValueError(f"checkpoint: {'; '.join(complaints)}; {remedy}")


def _check_embeddings(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the sizes of the model cannot be read off its embeddings."""
    tables = {name: state[name] for name in (f"embedding.{kind}_embedding.weight" for kind in ("word", "position"))}
    for name, table in tables.items():
        if table.dim() != 2:
            raise ValueError(f"checkpoint: {name} has shape {tuple(table.shape)}, expected [entries, hidden size]")
    segments = state["embedding.segment_embedding.weight"]
    widths = {table.shape[1] for table in tables.values()}
    if len(widths) > 1 or segments.shape != (_SEGMENTS, *widths):
        shapes = ", ".join(str(tuple(table.shape)) for table in (*tables.values(), segments))
        raise ValueError(
            f"checkpoint: the embeddings of words, positions and segments have the shapes {shapes}, expected one width "
            f"and {_SEGMENTS} segments"
        )


def _check_shapes(converted: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], names: Mapping[str, str]) -> None:
    official = {ours: theirs for theirs, ours in names.items()}
    wrong = [
        f"{official[name]} has shape {tuple(value.shape)}, expected {tuple(shapes[name])}"
        for name, value in converted.items()
        if value.shape != shapes[name]
    ]
    if wrong:
        raise ValueError(f"checkpoint: {_listed(wrong)}; its tensors belong to models of different sizes")


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN_KEYS} more" if len(items) > _SHOWN_KEYS else ""
    return ", ".join(items[:_SHOWN_KEYS]) + more


def _tokenizer(
    vocab: Path, model: EarlyExitForSequenceClassification, max_length: int, lower_case: bool
) -> PreTrainedTokenizerBase:
    if not vocab.is_file():
        raise FileNotFoundError(f"vocab: there is no file {vocab}; expected the vocab.txt of the checkpoint")
    tokens = _read_vocabulary(vocab)
    expected = model.config.backbone.vocab_size
    if len(tokens) != expected:
        raise ValueError(f"vocab: {vocab} has {len(tokens)} tokens, the checkpoint embeds {expected}; pass its own one")
    absent = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in tokens]
    if absent:
        raise ValueError(f"vocab: {vocab} lacks {', '.join(absent)}; expected the vocab.txt of a BERT")
    # a mask token that the vocabulary lacks would be added to it
    mask: dict[str, Any] = {} if "[MASK]" in tokens else {"mask_token": None}
    tokenizer = BertTokenizer(vocab=tokens, do_lower_case=lower_case, model_max_length=max_length, **mask)
    return with_input_format(tokenizer, "uer")


def _read_vocabulary(path: Path) -> dict[str, int]:
    """Token -> number; as in UER a line counts up to its first blank, and one without a token keeps its number."""
    tokens = {}
    # splitlines() would also break at the rarer line ends that are tokens of BERT's vocabularies
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n")):
        words = line.split()
        tokens[words[0] if words else f"???{number}"] = number
    return tokens
