"""Looking into a model with forward hooks: pooled hidden states of every layer, and pseudo-classifiers on them.

Nothing of the model is edited, wrapped or copied, so a saved student is a plain checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.encoders.layer_list import layer_path
from fastkd.encoders.recording import hidden_states_of

Pool = Callable[[Tensor, "Tensor | None"], Tensor]
"""(hidden states [B, T, H], attention mask [B, T] or None) -> [B, H]."""


def pool_cls(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The first token, [CLS] or <s>."""
    return hidden_states[:, 0]


def pool_mean(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mean over the tokens that are not padding."""
    if attention_mask is None:
        return hidden_states.mean(1)
    kept = attention_mask.bool().unsqueeze(-1)
    return hidden_states.masked_fill(~kept, 0).sum(1) / kept.sum(1).clamp(min=1)


def pool_max(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The maximum over the tokens that are not padding, feature by feature."""
    if attention_mask is not None:
        hidden_states = hidden_states.masked_fill(~attention_mask.bool().unsqueeze(-1), -torch.inf)
    return hidden_states.amax(1)


def pool_last(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The last token that is not padding."""
    if attention_mask is None:
        return hidden_states[:, -1]
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    last = (attention_mask.bool() * positions).argmax(1)
    return hidden_states[torch.arange(len(last), device=last.device), last]


POOLS: dict[str, Pool] = {"cls": pool_cls, "mean": pool_mean, "max": pool_max, "last": pool_last}


def check_pool(pool: str) -> str:
    """Raise ValueError for a pool that is not in `POOLS`; else `pool`."""
    if pool not in POOLS:
        raise ValueError(f"pool: got {pool!r}, expected one of {', '.join(POOLS)}, or a function")
    return pool


def encoder_layers(model: nn.Module, layers: str | None = None) -> nn.ModuleList:
    """The list of layers of a Hugging Face classifier, a student or an early-exit model.

    Args:
        model: any of them.
        layers: where the list lies inside the model's encoder, as in "encoder.layers"; None: found by itself.

    Raises:
        ValueError: no list of that name, or none that is found.
    """
    own = getattr(model, "layers", None)
    if isinstance(own, nn.ModuleList) and layers is None:
        return own
    encoder: nn.Module = getattr(model, "base_model", model)
    return cast(nn.ModuleList, encoder.get_submodule(layer_path(encoder, layers, _depth(model))))


def layer_count(model: nn.Module, layers: str | None = None) -> int:
    """How many layers run; more than `encoder_layers` has where modules are called again, as ALBERT's are."""
    modules = len(encoder_layers(model, layers))
    return max(_depth(model) or modules, modules) if layers is None else modules


def _depth(model: nn.Module) -> int | None:
    """How many layers the configuration of `model` says it has; None where it says nothing."""
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return depth if isinstance(depth, int) else None


def default_pool(model: nn.Module) -> str:
    """How a layer of `model` is pooled where nobody says so.

    What its configuration names as `pool`; "last" for a model of language, whose first token sees no other; else "cls".
    """
    config = getattr(model, "config", None)
    named = getattr(config, "pool", None)
    if isinstance(named, str):
        return named
    kind = getattr(config, "model_type", None)
    is_causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "last" if is_causal else "cls"


def whole_model(model: nn.Module) -> dict[str, Any]:
    """What `forward` has to be told so that every layer runs: an early-exit model may leave early by default."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {"speed": 0.0} if isinstance(getattr(inner, "config", None), EarlyExitConfig) else {}


class ProbeOutput(NamedTuple):
    """What one forward pass showed.

    Attributes:
        logits: [B, C] of the model's own classifier.
        hidden_states: [L, B, H], the pooled output of every layer (before a pooler), first layer first.
        sequence_output: [B, T, H] of the last layer where it was asked for, else None.
    """

    logits: Tensor
    hidden_states: Tensor
    sequence_output: Tensor | None


class LayerProbe:
    """Runs a classifier and gives the pooled hidden states of its layers beside its logits.

    The hooks listen only while the probe itself runs the model, pool at once (so that whole sequences are not kept
    alive without a gradient), and let gradients flow. The probe is no `nn.Module`: it may be an attribute of the module
    that a caller wraps for distributed training, or be given a model that is wrapped already.

    Args:
        model: any sequence classifier of transformers, a student of `fastkd.kd.students`, or an early-exit model; also
            wrapped in `DistributedDataParallel`.
        pool: "cls", "mean", "max", "last" (padding never counts), or a function of hidden states [B, T, H] and
            attention mask [B, T] or None. Default: what the model's configuration names as `pool`, else "cls":
            PKD and ALP-KD take [CLS] of an encoder; a BiLSTM or Gated-CNN has none, so its students name "mean". For a
            model of language, whose first token sees no other, "last".
        keep_sequence: also give the last layer's hidden states of all tokens.
        layers: where the list of layers lies inside the model's encoder, as in "encoder.layers"; default: found.

    Raises:
        ValueError: an unknown pool, or a model whose layers are not found.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: str | Pool | None = None,
        *,
        keep_sequence: bool = False,
        layers: str | None = None,
    ) -> None:
        self.model = model
        self.keep_sequence = keep_sequence
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        if pool is None:
            pool = default_pool(inner)
        self._pool: Pool = POOLS[check_pool(pool)] if isinstance(pool, str) else pool
        self._whole = whole_model(inner)
        if self._whole:
            inner.check_encoder()  # type: ignore[operator]  # before hooks listen, because it runs the layers
        modules = encoder_layers(inner, layers)
        self.num_layers = layer_count(inner, layers)
        # layers are then counted by their calls
        self._is_shared = self.num_layers > len(modules)
        self._listening = False
        self._wants_gradient = False
        self._mask: Tensor | None = None
        self._pooled: dict[int, Tensor] = {}
        self._sequence: Tensor | None = None
        self._hooks = [layer.register_forward_hook(self._hook_of(index)) for index, layer in enumerate(modules)]

    def _hook_of(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not self._listening:
                return
            if self._wants_gradient and not torch.is_grad_enabled():
                raise RuntimeError(
                    "the model's layers run without gradients, as reentrant activation checkpointing makes them; "
                    "switch to use_reentrant=False, or call the probe under torch.no_grad()"
                )
            hidden_states = hidden_states_of(output)
            number = len(self._pooled) if self._is_shared else index
            self._pooled[number] = self._pool(hidden_states, self._mask)
            if self.keep_sequence and number == self.num_layers - 1:
                self._sequence = hidden_states

        return hook

    def __call__(self, **batch: Any) -> ProbeOutput:
        """Run the model on `batch`, the keyword arguments of its own forward pass.

        Raises:
            RuntimeError: after `remove()`, if a layer did not run, or under reentrant activation checkpointing (of
                versions of transformers whose hooks it cuts off from the gradient).
        """
        if not self._hooks:
            raise RuntimeError("this LayerProbe was removed; make a new one")
        self._mask = batch.get("attention_mask")
        self._wants_gradient = torch.is_grad_enabled()
        self._listening = True
        try:
            logits = self.model(**{**self._whole, **batch}).logits
            missing = sorted(set(range(self.num_layers)) - set(self._pooled))
            if missing:
                raise RuntimeError(f"layers {missing} (0-based) did not run, so they have no hidden states")
            hidden_states = torch.stack([self._pooled[index] for index in range(self.num_layers)])
            return ProbeOutput(logits, hidden_states, self._sequence)
        finally:
            self._listening = False
            self._mask = self._sequence = None
            self._pooled = {}

    def remove(self) -> None:
        """Take the hooks off the model; calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class PseudoClassifiers(nn.Module):
    """One linear classifier on the pooled hidden state of each layer, all in one batched product.

    These are the W_i of Universal-KD (Wu et al., EMNLP 2021: f_i = W_i h_i), the auxiliary heads of MHKD
    (arXiv:2012.02911) and the mounted heads of DIH (arXiv:2103.00497).

    Args:
        num_layers: how many layers have a pseudo-classifier.
        hidden_size: H of those layers.
        num_labels: C.
        bias: the paper's formula has none (kd point 13 of `UniversalKDLoss`); a bias is what every classifier has.
        tied: one classifier for all layers.
    """

    def __init__(
        self, num_layers: int, hidden_size: int, num_labels: int, *, bias: bool = True, tied: bool = False
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers: got {num_layers}, expected at least 1")
        self.num_layers = num_layers
        matrices = 1 if tied else num_layers
        self.weight = nn.Parameter(torch.empty(matrices, num_labels, hidden_size))
        self.bias = nn.Parameter(torch.empty(matrices, 1, num_labels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As BERT initialises a classifier."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden_states: Tensor, logits: Tensor | None = None) -> Tensor:
        """Logits of every layer.

        Args:
            hidden_states: [num_layers, B, H]; with `logits`, [num_layers + 1, B, H].
            logits: [B, C] of the model's own classifier, which then stands for the pseudo-classifier of its last layer.

        Returns:
            [num_layers, B, C], with `logits` [num_layers + 1, B, C].

        Raises:
            ValueError: another number of layers.
        """
        expected = self.num_layers + (logits is not None)
        if hidden_states.shape[0] != expected:
            raise ValueError(
                f"hidden_states: got {hidden_states.shape[0]} layers, expected {expected} for {self.num_layers} "
                f"pseudo-classifiers {'and the logits of the last layer' if logits is not None else 'without logits'}"
            )
        inner = torch.matmul(hidden_states[: self.num_layers], self.weight.transpose(1, 2))
        if self.bias is not None:
            inner = inner + self.bias
        return inner if logits is None else torch.cat([inner, logits.unsqueeze(0)])
