"""Configuration of an early-exit model: the backbone's own configuration plus what was added to it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from fastkd.data.input_format import INPUT_FORMATS
from fastkd.encoders import families
from fastkd.encoders.anatomy import anatomy_of, check_is_encoder
from fastkd.encoders.int8 import INT8
from fastkd.exits.catalogue import check_criterion, default_criterion
from fastkd.exits.rule import check_speed, head_speeds

HEADS = ("fastbert", "linear")
POOLS = ("cls", "mean")


class EarlyExitConfig(PreTrainedConfig):
    """A backbone's configuration, the layers that have a head, and how inference leaves early.

    Args:
        backbone: configuration of the Hugging Face encoder, as an object or a dictionary with its `model_type`.
        head: "fastbert" (the mini-classifier of FastBERT, section 3.2) or "linear" (one linear layer on [CLS]).
        exit_layers: 1-based numbers of the layers that have a head; the last layer is always added. Default: every
            layer.
        head_width: width D of a fastbert head; a multiple of `head_attention_heads`.
        head_attention_heads: attention heads inside a fastbert head.
        head_dropout: dropout inside the heads during training; default: the backbone's hidden dropout.
        exits_trained: whether the heads below the last were distilled; leaving early is refused before that.
        speed: FastBERT's speed used where `forward` gets none, a number or one for each head (`head_speeds`); 0 runs
            the full model.
        criterion: the uncertainty used where `forward` gets none, see `fastkd.exits.criteria`; default "entropy", for
            regression "agreement".
        top_n: how many classes the "top_n" criterion looks at.
        input_format: how the texts that the model was trained on became tokens, see
            `fastkd.data.input_format`: "standard" or "uer".
        learned_exit: whether there is a learned exit (`fastkd.encoders.heads.LearnedExit`), for the criterion
            "learned".
        certificate: what `fastkd.calibrate` vouches for, as `Certificate.to_dict` writes it.
        rank_certificate: what `fastkd.calibrate_ranking` vouches for, as `RankCertificate.to_dict` writes it.
        label_scale: mean and standard deviation of the labels that a regression was fine-tuned on, see
            `fastkd.encoders.label_scale`; None: not fine-tuned, or no regression.
        training_data: fingerprints (`Rows.digest`) of the rows that the weights have seen, by their part in training
            ("finetune train", "finetune dev", "distill train"...).
        speed_table: what some speeds cost and are worth on the dev rows, as `fastkd.distill` measures it, for the model
            card.
        layers: where the backbone's list of layers lies, as in "encoder.layers"; None: found by itself.
        quantized: "int8" where the products of the layers are, see `fastkd.encoders.int8`; None: they are not.
        pool: what the heads read: "cls", the first token, or "mean", all tokens' mean, which is put in front of them.
            Default: what the backbone's own classifier reads, where its configuration says so, else "cls".
        weights_fingerprint: of the weights that `exits_trained`, `certificate`, `label_scale` and `training_data`
            describe (`fastkd.exits.fingerprints.WeightsSketch`); `save_pretrained` writes it.
        kwargs: what every Hugging Face configuration takes (`num_labels`, `id2label`, `problem_type`...).

    Raises:
        ValueError: a backbone that is no encoder of text, or an argument outside the values above.
    """

    model_type = "fastkd_early_exit"
    sub_configs = {"backbone": AutoConfig}  # noqa: RUF012  # the name and form are transformers'
    keys_to_ignore_at_inference = ["exit_layer", "uncertainty"]  # noqa: RUF012  # read by transformers.Trainer

    def __init__(
        self,
        backbone: PreTrainedConfig | dict[str, Any] | None = None,
        head: str = "fastbert",
        exit_layers: Sequence[int] | None = None,
        head_width: int = 128,
        head_attention_heads: int = 2,
        head_dropout: float | None = None,
        exits_trained: bool = False,
        speed: float | Sequence[float] = 0.0,
        criterion: str | None = None,
        top_n: int | None = None,
        input_format: str = "standard",
        learned_exit: bool = False,
        certificate: Mapping[str, Any] | None = None,
        label_scale: Sequence[float] | None = None,
        training_data: Mapping[str, str] | None = None,
        speed_table: Sequence[Mapping[str, Any]] | None = None,
        weights_fingerprint: str | None = None,
        layers: str | None = None,
        pool: str | None = None,
        rank_certificate: Mapping[str, Any] | None = None,
        quantized: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone = _backbone_config(backbone)
        self.layers = layers
        self.pool = _default_pool(self.backbone) if pool is None else pool
        if self.pool not in POOLS:
            raise ValueError(f"pool: got {pool!r}, expected one of {', '.join(POOLS)}")
        if quantized not in (None, INT8):
            raise ValueError(f"quantized: got {quantized!r}, expected {INT8!r} or None")
        if quantized is not None:
            self.check_quantisable()
        self.quantized = quantized
        if head not in HEADS:
            raise ValueError(f"head: got {head!r}, expected one of {', '.join(HEADS)}")
        if head_width < 1 or head_width % head_attention_heads:
            raise ValueError(
                f"head_width: got {head_width}, expected a multiple of head_attention_heads={head_attention_heads}"
            )
        self.head = head
        self.exit_layers = _checked_exit_layers(exit_layers, self.num_hidden_layers)
        self.head_width = head_width
        self.head_attention_heads = head_attention_heads
        self.head_dropout = self.backbone_dropout if head_dropout is None else head_dropout
        self.exits_trained = exits_trained
        head_speeds(speed, self.exit_layers)
        self.speed = check_speed(speed)
        self.top_n = top_n
        if input_format not in INPUT_FORMATS:
            raise ValueError(f"input_format: got {input_format!r}, expected one of {', '.join(INPUT_FORMATS)}")
        self.input_format = input_format
        self.learned_exit = learned_exit
        self.certificate = None if certificate is None else dict(certificate)
        self.rank_certificate = None if rank_certificate is None else dict(rank_certificate)
        self.label_scale = None if label_scale is None else _checked_label_scale(label_scale)
        self.training_data = dict(training_data or {})
        self.speed_table = None if speed_table is None else [dict(row) for row in speed_table]
        self.weights_fingerprint = weights_fingerprint
        _check_dtype("dtype", kwargs)
        super().__init__(**kwargs)
        self.criterion = criterion or default_criterion(self.num_classes)
        check_criterion(self.criterion, top_n, self.num_classes)
        if self.problem_type == "multi_label_classification":
            raise ValueError(
                "problem_type: got 'multi_label_classification'; early exit needs one answer a sentence: use "
                "'single_label_classification', or 'regression' with num_labels=1"
            )

    def last_head_was_trained(self) -> None:
        """Take back what is no longer true once the last head learned anew: the heads below it say what it said."""
        self.exits_trained = False
        self.certificate = self.rank_certificate = None
        self.speed_table = None
        # a model that leaves early where a call names no speed would refuse every such call
        self.speed = 0.0

    @property
    def has_fast_paths(self) -> bool:
        """Whether the backbone is of a family with fast paths."""
        return families.has_fast_paths(self.backbone, self.layers)

    @property
    def is_replayed(self) -> bool:
        """Whether layers of the backbone that do not run from their parts are run by `fastkd.encoders.replay`."""
        return families.is_replayed(self.backbone, self.layers)

    def check_quantisable(self) -> None:
        """Raise ValueError for a backbone whose layers transformers runs and not their parts."""
        if not self.has_fast_paths or self.is_replayed:
            raise ValueError(
                f"model: it cannot be quantised, because its encoder of family {self.backbone.model_type!r} is "
                "replayed; int8 needs layers that run from their parts, bfloat16 works with every encoder"
            )

    @property
    def weights_dtype(self) -> str:
        """What traces and certificates call the weights as they were saved: "float32", "int8"..."""
        return self.quantized or str(self.dtype or "unknown").removeprefix("torch.")

    @property
    def longest_input(self) -> int:
        """How many tokens the backbone has positions for."""
        return families.longest_input(self.backbone, self.layers)

    @property
    def linear_products(self) -> int | None:
        """Sum of in * out over the linear layers in one layer; None where it follows from the sizes, as in BERT."""
        return anatomy_of(self.backbone, self.layers).linear_products if self.is_replayed else None

    @property
    def num_hidden_layers(self) -> int:
        return int(self.backbone.num_hidden_layers)

    @property
    def num_classes(self) -> int:
        """`num_labels`, which transformers types as optional."""
        return self.num_labels or 2

    @property
    def hidden_size(self) -> int:
        return int(self.backbone.hidden_size)

    @property
    def backbone_dropout(self) -> float:
        # DistilBERT calls it `dropout`
        for name in ("hidden_dropout_prob", "hidden_dropout", "dropout"):
            if isinstance(getattr(self.backbone, name, None), int | float):
                return float(getattr(self.backbone, name))
        return 0.0

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The backbone's configuration, where transformers looks for vocabulary and embedding sizes."""
        return self.backbone


def _checked_label_scale(label_scale: Sequence[float]) -> list[float]:
    """Raise ValueError unless these are a mean and a standard deviation."""
    is_right = len(label_scale) == 2 and all(math.isfinite(value) for value in label_scale) and label_scale[1] > 0
    if not is_right:
        raise ValueError(f"label_scale: got {label_scale!r}, expected a mean and a standard deviation above 0")
    return [float(value) for value in label_scale]


def _backbone_config(backbone: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    if backbone is None:
        backbone = {"model_type": "bert"}  # transformers needs every configuration to have a default
    if isinstance(backbone, dict):
        fields = dict(backbone)
        model_type = fields.pop("model_type", None)
        if model_type is None:
            raise ValueError("backbone: the dictionary has no 'model_type'; pass the encoder's whole configuration")
        _check_dtype("backbone", fields)
        own = AutoConfig.for_model(model_type, **fields)
    else:
        own = copy.deepcopy(backbone)
    if getattr(own, "is_decoder", False):
        raise ValueError("backbone: got a decoder (is_decoder=True), expected an encoder that sees the whole sentence")
    check_is_encoder(own)
    own.name_or_path = ""  # where the plain checkpoint lay on this machine is private
    return own


def _check_dtype(argument: str, fields: Mapping[str, Any]) -> None:
    """transformers takes anything for a dtype, and fails where it is used."""
    for name in ("dtype", "torch_dtype"):
        given = fields.get(name)
        named = getattr(torch, given, None) if isinstance(given, str) else given
        if given not in (None, "auto") and not (isinstance(named, torch.dtype) and named.is_floating_point):
            raise ValueError(
                f"{argument}: got {name}={given!r}, expected a dtype of floating-point numbers, such as 'float32'"
            )


def _default_pool(backbone: PreTrainedConfig) -> str:
    """ModernBERT and EuroBERT say how their classifiers pool; "late" takes the mean of every token's logits."""
    return "mean" if getattr(backbone, "classifier_pooling", None) in ("mean", "late") else "cls"


def _checked_exit_layers(exit_layers: Sequence[int] | None, num_layers: int) -> list[int]:
    if exit_layers is None:
        return list(range(1, num_layers + 1))
    for layer in exit_layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= num_layers:
            raise ValueError(
                f"exit_layers: got {layer!r}, expected whole numbers from 1 to {num_layers}, the backbone's depth"
            )
    return sorted({*exit_layers, num_layers})
