"""The teacher of a distillation: a frozen classifier, and a pseudo-classifier on every layer below its last.

The pseudo-classifiers are pre-trained on the labels with the teacher's hidden states as given features: those of an
evaluation pass, detached, so that the backbone is neither changed nor noisy (DIH, arXiv:2103.00497; Universal-KD, Wu et
al., EMNLP 2021, leaves it open). As each is a linear model on fixed vectors, one pass of the teacher suffices.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from fastkd.data.labels import names_of_classes
from fastkd.data.tensors import plain_tensors, tensor_bytes
from fastkd.encoders.int8 import Int8Linear
from fastkd.encoders.label_scale import LabelScale
from fastkd.encoders.untouched import quantised_elsewhere
from fastkd.kd.probe import LayerProbe, PseudoClassifiers, check_pool, default_pool, whole_model
from fastkd.losses import label_loss
from fastkd.model.pretrained import damage_explained, saved_config
from fastkd.model.tokenizers import load_tokenizer
from fastkd.training.checks import require

LAYER_KINDS = ("layer_logits", "hidden_states", "sequence_output")
KINDS = ("logits", *LAYER_KINDS)
# what a saved and reloaded teacher may write differently without computing differently
_VOLATILE_CONFIG = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "weights_fingerprint",
)


def reads_layers(kinds: Collection[str]) -> bool:
    """Whether any of these kinds of `KINDS` needs hidden states of layers."""
    return any(kind in kinds for kind in LAYER_KINDS)


@dataclass(frozen=True)
class Signals:
    """What a teacher or student says about one batch; None where it was not asked.

    Attributes:
        logits: [B, C].
        layer_logits: [L, B, C] of the pseudo-classifiers; the last layer's are `logits`.
        hidden_states: [L, B, H], pooled.
        sequence_output: [B, T, H] of the last layer, every token.
    """

    logits: Tensor
    layer_logits: Tensor | None = None
    hidden_states: Tensor | None = None
    sequence_output: Tensor | None = None


@dataclass(frozen=True)
class PseudoClassifierOptions:
    """How pseudo-classifiers are pre-trained.

    Attributes:
        epochs: passes over the hidden states of the training rows.
        learning_rate: of AdamW, falling linearly to 0; features are standardised, so that it fits every layer.
        batch_size: rows a step.
        seed: of weights and order.
    """

    epochs: int = 10
    learning_rate: float = 3e-3
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "batch_size"):
            require(name, getattr(self, name), getattr(self, name) > 0, "a number above 0")


class Teacher:
    """A classifier in evaluation mode whose weights ask for no gradient.

    Args:
        model: any sequence classifier; it is changed in nothing but these two respects. Its layers are looked for when
            something beside its logits is first asked for.
        tokenizer: the one it was trained with; kept as a copy that pads on the right where it does not.
        pool: how a layer's hidden states become one vector, see `LayerProbe`.
        layers: where its list of layers lies, see `LayerProbe`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pool: str | None = None,
        *,
        layers: str | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = _padding_right(tokenizer)
        self.pseudo_classifiers: PseudoClassifiers | None = None
        self.pool = check_pool(default_pool(model) if pool is None else pool)
        self._names_pool = pool is not None
        self.layers = layers
        self._found: LayerProbe | None = None
        self.fingerprint = {"teacher": weights_fingerprint(model), "tokenizer": tokenizer_fingerprint(tokenizer)}
        quantised = quantised_elsewhere(model) is not None or any(isinstance(m, Int8Linear) for m in model.modules())
        self._is_quantised = quantised
        self._order: list[int] | None = None  # of the model's classes; None: its own

    @classmethod
    def load(cls, folder: str | os.PathLike[str], pool: str | None = None, layers: str | None = None) -> Teacher:
        """The classifier and tokenizer in `folder`, or of that name on the hub, in float32; see `Teacher`."""
        # the configuration is read first, so that what is wrong with it is said of it
        config = saved_config(folder, {})
        with damage_explained(folder, lambda: AutoModelForSequenceClassification.from_config(config)):
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=torch.float32, trust_remote_code=False
            )
        return cls(model, load_tokenizer(folder), pool, layers=layers)

    @property
    def _probe(self) -> LayerProbe:
        if self._found is None:
            self._found = LayerProbe(self.model, self.pool, keep_sequence=True, layers=self.layers)
        return self._found

    def in_order_of(self, label_names: Sequence[str]) -> Teacher:
        """This teacher with its answers in the order of `label_names`; `self` where they are, or it has no names.

        Raises:
            ValueError: other names than those of its classes.
        """
        own = names_of_classes(self.model.config.id2label)
        if own is None or own == tuple(label_names):
            return self
        if sorted(own) != sorted(label_names):
            raise ValueError(f"label_names: got {', '.join(label_names)}, expected the teacher's, {', '.join(own)}")
        other = copy.copy(self)
        other._order = [own.index(name) for name in label_names]
        other.fingerprint = {**self.fingerprint, "label order": ", ".join(label_names)}
        # those of this teacher were trained on labels in its own order
        other.pseudo_classifiers = None
        return other

    def pooled_by(self, pool: str | None) -> Teacher:
        """This teacher where it pools so or `pool` is None; else a copy that does.

        Raises:
            ValueError: whoever made it named another pool.
        """
        if pool is None or self.pool == pool:
            return self
        if self._names_pool:
            raise ValueError(f"teacher: it pools by {self.pool}, expected {pool}; load it with pool={pool!r}")
        other = copy.copy(self)
        other.pool, other._found, other.pseudo_classifiers = check_pool(pool), None, None
        return other

    @property
    def num_layers(self) -> int:
        return self._probe.num_layers

    @property
    def num_labels(self) -> int:
        return self.model.config.num_labels

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to(self, device: torch.device) -> Teacher:
        cast(nn.Module, self.model).to(device)
        if self.pseudo_classifiers is not None:
            self.pseudo_classifiers.to(device)
        return self

    @torch.no_grad()
    def signals(self, batch: Mapping[str, Tensor], kinds: Collection[str]) -> Signals:
        """What the teacher says about a tokenised batch, in float32 (as computed for `sequence_output`).

        Raises:
            RuntimeError: layer logits without pre-trained pseudo-classifiers.
            ValueError: padding on the left; layers that are not found.
        """
        # quantised layers take float32 only, whatever the student computes in
        with torch.autocast(self.device.type, enabled=False) if self._is_quantised else nullcontext():
            return self._signals(batch, kinds)

    def _signals(self, batch: Mapping[str, Tensor], kinds: Collection[str]) -> Signals:
        if not reads_layers(kinds):
            logits = self.model(**{**whole_model(self.model), **batch}).logits
            return Signals(self._in_order(logits.float()))
        mask = batch.get("attention_mask")
        if mask is not None and not bool(mask[:, 0].all()):
            raise ValueError(
                "attention_mask: the first token of a row is masked, but the teacher is read there; pad on the right "
                "(tokenizer.padding_side = 'right')"
            )
        output = self._probe(**batch)
        logits, hidden_states = self._in_order(output.logits.float()), output.hidden_states.float()
        return Signals(
            logits=logits,
            layer_logits=self.layer_logits(hidden_states, logits) if "layer_logits" in kinds else None,
            hidden_states=hidden_states if "hidden_states" in kinds else None,
            sequence_output=output.sequence_output if "sequence_output" in kinds else None,
        )

    def _in_order(self, logits: Tensor) -> Tensor:
        return logits if self._order is None else logits[:, self._order]

    @torch.no_grad()
    def layer_logits(self, hidden_states: Tensor, logits: Tensor) -> Tensor:
        """[N, B, C] of hidden states [N, B, H]; the last layer's are `logits` [B, C]."""
        if self.num_layers == 1:
            return logits.unsqueeze(0)
        if self.pseudo_classifiers is None:
            raise RuntimeError("this teacher has no pseudo-classifiers yet; TeacherCache.ensure trains or loads them")
        # cached and live answers are the same numbers only if neither is computed under autocast
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.pseudo_classifiers(hidden_states, logits)


def _padding_right(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that leaves the first place of a row to its first token."""
    if tokenizer.padding_side == "right":
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    return tokenizer


def train_pseudo_classifiers(
    hidden_states: Tensor, labels: Tensor, num_labels: int, options: PseudoClassifierOptions
) -> PseudoClassifiers:
    """Linear classifiers of fixed features, trained on labels with cross-entropy (squared error for `num_labels` 1).

    The features of each layer are standardised for the training, and scores too; the scaling is folded into the weights
    afterwards.
    The same arguments give the same weights; the global random state is not touched.

    Args:
        hidden_states: [n, L, H] float32, of L layers.
        labels: [n].
        num_labels: C.

    Returns:
        Pseudo-classifiers of L layers, on the device of the features.
    """
    rows, layers, width = hidden_states.shape
    mean = hidden_states.mean(0)
    scale = hidden_states.std(0, correction=0).clamp(min=1e-6)
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        classifiers = PseudoClassifiers(layers, width, num_labels)
    bias = cast(nn.Parameter, classifiers.bias)
    unit = LabelScale.of_values(labels) if num_labels == 1 else LabelScale()
    if num_labels == 1:
        labels = unit.standardised(labels.float())
    classifiers.to(hidden_states.device)
    steps = options.epochs * -(-rows // options.batch_size)
    optimizer = torch.optim.AdamW(classifiers.parameters(), lr=options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.epochs):
        for chosen in torch.randperm(rows, generator=generator).split(options.batch_size):
            chosen = chosen.to(hidden_states.device)
            features = (hidden_states[chosen] - mean) / scale
            loss = label_loss(classifiers(features.transpose(0, 1)), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        classifiers.weight.div_(scale.unsqueeze(1))
        bias.sub_(torch.einsum("lch,lh->lc", classifiers.weight, mean).unsqueeze(1))
        classifiers.weight.mul_(unit.std)
        bias.mul_(unit.std).add_(unit.mean)
    return classifiers.requires_grad_(False)


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Equal for models that compute the same: a digest of configuration and weights."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _VOLATILE_CONFIG}
    sha = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in sorted(plain_tensors(model.state_dict())):
        if not isinstance(value, Tensor):
            sha.update(f"{name} {value}".encode())
            continue
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        sha.update(tensor_bytes(value))
    return sha.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that split and number alike; how they last padded or truncated does not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    state |= {"truncation": None, "padding": None, "inputs": list(tokenizer.model_input_names)}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
