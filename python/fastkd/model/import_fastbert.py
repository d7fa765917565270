"""Checkpoints of the official FastBERT code, converted to models of this package.

    embedding.*  encoder.*  classifiers.{i}.*                 written by run_fastbert.py
    kernel.embedding.*  kernel.encoder.*  classifiers.{i}.*   written by the package `fastbert` and by FastPLM

Both are flat dictionaries of tensors in the names of UER-py. What trainings leave beside or around them is taken away:
the counters of thop, which run_fastbert.py measures FLOPs with, the heads of the pretraining, and the names that
DataParallel, torch.compile and trainers put before those of the model.

The arithmetic is BERT's but for the LayerNorm, which divides by the unbiased deviation s = sqrt(n / (n - 1)) sigma of
its n values plus 1e-6, where BERT divides by sqrt(sigma^2 + eps). So gamma is multiplied by sqrt((n - 1) / n), and eps
is chosen so that both agree exactly at the deviation of a typical embedding, the smallest that a LayerNorm of such a
model meets. What is left is a relative error of at most 1e-6 / sigma in the output of each LayerNorm, for every sigma
from half of that deviation up.

Source: https://github.com/autoliuweijie/FastBERT (run_fastbert.py, pypi/fastbert, uer/layers).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertTokenizer, PreTrainedTokenizerBase

from fastkd.data.files import atomic_folder, check_output_folder
from fastkd.data.input_format import with_input_format
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.model.modeling import EarlyExitForSequenceClassification
from fastkd.model.torch_files import load_torch_file

_UER_EPSILON = 1e-6
_HEAD_ATTENTION_HEADS = 2
_USUAL_HEAD_SIZE = 64
_USUAL_LENGTH = 128
_SHOWN_KEYS = 8
# no more digits, or one damaged name would ask for a billion layers
_NUMBERED = re.compile(r"(?:encoder\.transformer|classifiers)\.(\d{1,4})\.")
_SEGMENTS = 3  # padding, first text, second text
_RESERVED_NUMBERS = {100: "[UNK]", 101: "[CLS]", 102: "[SEP]"}  # constants in run_fastbert.py, whatever the vocabulary

POOLINGS = ("first", "last", "max", "mean")
_OTHER_POOLINGS = {
    "last": "the last of seq_length positions, which is padding wherever a text is shorter",
    "max": "the largest values over all seq_length positions, padding included",
    "mean": "the mean over the features of every one of seq_length positions, padding included",
}

# what trainings keep a state_dict under, and what they put before or between the names in it
_STATES = ("model", "state_dict", "model_state_dict", "module")
_WRAPPERS = {"module", "model", "kernel", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_COUNTERS_OF_THOP = {"total_ops", "total_params"}

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
    "output_layer_2": "out_proj",
}
_LINEAR_THAT_SIZE = (
    "encoder.transformer.0.feed_forward.linear_1.weight",
    "classifiers.0.output_layer_0.weight",
    "classifiers.0.output_layer_2.weight",
)


@dataclass(frozen=True)
class ImportedModel:
    """What `import_fastbert` wrote.

    Attributes:
        folder: the model folder.
        config: of the model.
        has_tokenizer: whether a vocabulary was given, and so a tokenizer lies in the folder.
        assumed: what was not said, and which no checkpoint records: argument -> the value that was taken.
    """

    folder: Path
    config: EarlyExitConfig
    has_tokenizer: bool
    assumed: Mapping[str, str | int] = field(default_factory=dict)


def import_fastbert(
    checkpoint: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    vocab: str | os.PathLike[str] | None = None,
    label_names: Sequence[str] | None = None,
    num_attention_heads: int | None = None,
    pooling: str | None = None,
    max_length: int | None = None,
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
        pooling: --pooling of its training, one of `POOLINGS`; the file does not say. Default: "first", the official
            one and the only one that the heads here can compute.
        max_length: --seq_length of its training; tokens after which a text is cut. Default: 128, the official one.
        lower_case: whether the tokenizer lowers case, as the official one always does.
        overwrite: replace `output_dir`.

    Raises:
        FileNotFoundError: no such checkpoint or vocabulary.
        FileExistsError: `output_dir` exists.
        ValueError: what `convert` and `read_checkpoint` raise; a vocabulary of another size; another pooling.
    """
    _check_pooling(pooling)
    target = Path(output_dir)
    check_output_folder(target, overwrite=overwrite)
    state = read_checkpoint(checkpoint)
    model = convert(state, label_names=label_names, num_attention_heads=num_attention_heads)
    backbone = model.config.backbone
    positions = backbone.max_position_embeddings
    length = _USUAL_LENGTH if max_length is None else max_length
    if not 1 < length <= positions:
        raise ValueError(f"max_length: got {length}, expected 2 to the {positions} positions of the checkpoint")
    is_of_script = not any("kernel" in name.split(".") for name in state)
    tokenizer = (
        None if vocab is None else _tokenizer(Path(vocab), backbone.vocab_size, length, lower_case, is_of_script)
    )
    said = {"pooling": pooling, "num_attention_heads": num_attention_heads, "max_length": max_length}
    taken = {"pooling": POOLINGS[0], "num_attention_heads": backbone.num_attention_heads, "max_length": length}
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    assumed = {name: value for name, value in taken.items() if said[name] is None}
    return ImportedModel(target, model.config, tokenizer is not None, assumed)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, on the CPU; those of its model, where a trainer saved more.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no PyTorch file, a damaged one, or one that holds something else than named tensors.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"checkpoint: {path} {what}; expected the .bin file of the official code")
    state = _state_of_model(load_torch_file(path, "checkpoint"), path)
    if not isinstance(state, Mapping) or not state or _others(state):
        raise ValueError(
            f"checkpoint: {path} holds {_described(state)}, expected a dictionary of named tensors, as torch.save of a "
            "state_dict writes"
        )
    return dict(state)


def _state_of_model(loaded: Any, path: Path) -> Any:
    """The state_dict in what a training saved: `loaded` itself, or its entry of a usual name."""
    if not isinstance(loaded, Mapping):
        return loaded
    states = [name for name in _STATES if isinstance(loaded.get(name), Mapping)]
    if len(states) > 1:
        raise ValueError(f"checkpoint: {path} holds several models, {_listed(states)}; save only the one to convert")
    return loaded[states[0]] if states else loaded


def _described(state: Any) -> str:
    if not isinstance(state, Mapping):
        return f"one {type(state).__name__}"
    return f"other things than tensors: {_listed(_others(state))}" if state else "an empty dictionary"


def _others(state: Mapping[Any, Any]) -> list[str]:
    """The entries that are no named tensors."""
    return [str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]


def convert(
    state: Mapping[str, Tensor], *, label_names: Sequence[str] | None = None, num_attention_heads: int | None = None
) -> EarlyExitForSequenceClassification:
    """The early-exit model, in evaluation mode, that computes what the official code computes with `state`.

    Args:
        state: the official tensors by name, with either prefix.
        label_names, num_attention_heads: as in `import_fastbert`.

    Raises:
        ValueError: missing or unexpected keys, a tensor of another shape or dtype or with values that are not finite,
            or a number of labels or attention heads that does not fit.
    """
    state = _of_model(state)
    layers = _number_of_layers(state)
    names = _names(layers)
    _check_keys(state, names)
    _check_tensors(state)
    _check_embeddings(state)
    words, positions, classes = (
        state[name].shape[0]
        for name in (
            "embedding.word_embedding.weight",
            "embedding.position_embedding.weight",
            "classifiers.0.output_layer_2.weight",
        )
    )
    if classes < 2:
        raise ValueError(
            "checkpoint: its classifiers have only one class, so there is nothing to decide; train on two labels or "
            "more"
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
    converted = {names[name]: _converted(name, value) for name, value in state.items()}
    with torch.device("meta"):
        # sizes that do not fit together may ask for more memory than there is
        shapes = {name: value.shape for name, value in EarlyExitForSequenceClassification(config).state_dict().items()}
    _check_shapes(converted, shapes, names)
    model = EarlyExitForSequenceClassification(config)
    model.load_state_dict(converted)
    return model.eval()


def _of_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that answer, by the names of run_fastbert.py.

    Left out are thop's counters, which may hang on every module, and the heads of the pretraining, which both codes
    leave unused.
    """
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        if not parts or parts[0] == "target" or parts[-1] in _COUNTERS_OF_THOP:
            continue
        plain = ".".join(parts)
        if plain in named:
            raise ValueError(f"checkpoint: {plain} is there twice, once as {name}; save only the model to convert")
        named[plain] = value
    return named


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
            f"num_attention_heads: got {chosen}, expected a divisor of the checkpoint's hidden size, {hidden_size}; "
            "pass heads_num of the configuration it was trained with"
        )
    return heads


def _labels(names: Sequence[str] | None, classes: int) -> dict[str, Any]:
    if names is None:
        return {"num_labels": classes}
    if len(names) != classes or len(set(names)) < classes:
        raise ValueError(f"label_names: got {list(names)}, expected {classes} different names, one per class")
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


# Checks


def _check_pooling(pooling: str | None) -> None:
    if pooling is None or pooling == POOLINGS[0]:
        return
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: got {pooling!r}, expected one of {', '.join(POOLINGS)}")
    raise ValueError(
        f"pooling: with {pooling!r} the official heads read {_OTHER_POOLINGS[pooling]}; those here read [CLS] and "
        "never see padding, so they cannot give its answers. Train it with 'first', or convert it as 'first' to keep "
        "its encoder, and retrain its heads with finetune and distill"
    )


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


def _check_tensors(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for what no trained weight is: empty, of whole numbers or complex, sparse, NaN or infinite."""
    for name, value in state.items():
        if not value.is_floating_point() or value.layout is not torch.strided or value.is_quantized:
            raise ValueError(
                f"checkpoint: {name} is {value.dtype} and {value.layout}, expected dense floating-point weights; save "
                "the model before it is quantised or converted"
            )
        if value.device.type == "meta" or not value.numel():
            raise ValueError(f"checkpoint: {name} of shape {tuple(value.shape)} has no values; save the whole model")
        wrong = int((~value.isfinite()).sum())
        if wrong:
            raise ValueError(
                f"checkpoint: {wrong} of {value.numel()} values of {name} are NaN or infinite; the training diverged "
                "or the file is damaged: take another checkpoint"
            )


def _check_embeddings(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError where the sizes of the model cannot be read off its embeddings and first linear layers."""
    for name in _LINEAR_THAT_SIZE:
        if state[name].dim() != 2:
            raise ValueError(f"checkpoint: {name} has shape {tuple(state[name].shape)}, expected [outputs, inputs]")
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
    vocab: Path, embedded: int, max_length: int, lower_case: bool, is_of_script: bool
) -> PreTrainedTokenizerBase:
    """The official tokenizer for `embedded` tokens; `is_of_script`: of run_fastbert.py, not of the package."""
    if not vocab.is_file():
        raise FileNotFoundError(f"vocab: there is no file {vocab}; expected the vocab.txt of the checkpoint")
    tokens = _read_vocabulary(vocab)
    if len(tokens) != embedded:
        raise ValueError(f"vocab: {vocab} has {len(tokens)} tokens, the checkpoint embeds {embedded}; pass its own one")
    absent = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in tokens]
    if absent:
        raise ValueError(f"vocab: {vocab} lacks {', '.join(absent)}; expected the vocab.txt of a BERT")
    moved = [token for number, token in _RESERVED_NUMBERS.items() if tokens[token] != number]
    if is_of_script and moved and embedded > max(_RESERVED_NUMBERS):
        raise ValueError(
            f"vocab: {vocab} has {', '.join(moved)} on other lines than run_fastbert.py, which writes the numbers 100, "
            "101 and 102 for [UNK], [CLS] and [SEP] whatever the vocabulary; pass the one that it was trained with"
        )
    # a mask token that the vocabulary lacks would be added to it
    mask: dict[str, Any] = {} if "[MASK]" in tokens else {"mask_token": None}
    tokenizer = BertTokenizer(vocab=tokens, do_lower_case=lower_case, model_max_length=max_length, **mask)
    return with_input_format(tokenizer, "uer")


def _read_vocabulary(path: Path) -> dict[str, int]:
    """Token -> number; as in UER a line counts up to its first blank, and one without a token keeps its number."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"vocab: {path} is not UTF-8 text ({error}); expected one token a line") from None
    tokens: dict[str, int] = {}
    # splitlines() would also break at the rarer line ends that are tokens of BERT's vocabularies
    for number, line in enumerate(text.removesuffix("\n").split("\n")):
        words = line.split()
        token = words[0] if words else f"???{number}"
        if token in tokens:
            raise ValueError(f"vocab: {path} has {token} on the lines {tokens[token] + 1} and {number + 1}")
        tokens[token] = number
    return tokens
