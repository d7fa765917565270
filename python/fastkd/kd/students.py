"""Students of a distillation: fewer layers of the teacher, a BiLSTM, a Gated-CNN, or any checkpoint of an encoder.

Importing this module registers the BiLSTM and the Gated-CNN with transformers, so that
`AutoModelForSequenceClassification` loads them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any, cast

import torch
import transformers.initialization as init
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from fastkd.encoders.anatomy import keep_layers
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.encoders.layer_list import layer_path
from fastkd.encoders.untouched import check_not_quantised_elsewhere
from fastkd.kd.probe import POOLS, encoder_layers, layer_count
from fastkd.losses.labels import label_loss

SPECS = '"layers:K", "layers:K:first", "layers:K:last", "layers:I,J,...", "bilstm", "gated-cnn", or a checkpoint folder'


class _StudentConfig(PreTrainedConfig):
    """What BiLSTM and Gated-CNN have in common."""

    def __init__(
        self,
        vocab_size: int = 30522,
        embedding_size: int = 300,
        hidden_size: int = 300,
        num_hidden_layers: int = 2,
        dropout: float = 0.1,
        pool: str = "mean",
        pad_token_id: int | None = 0,
        **kwargs: Any,
    ) -> None:
        if pool not in POOLS:
            raise ValueError(f"pool: got {pool!r}, expected one of {', '.join(POOLS)}")
        if num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers: got {num_hidden_layers}, expected at least 1")
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.dropout = dropout
        self.pool = pool
        self.pad_token_id = pad_token_id
        super().__init__(**kwargs)
        if self.problem_type == "multi_label_classification":
            raise ValueError("problem_type: got 'multi_label_classification', expected one answer a sentence")


class BiLSTMConfig(_StudentConfig):
    """Configuration of `BiLSTMForSequenceClassification`.

    Args:
        vocab_size: rows of the word embeddings.
        embedding_size: their width.
        hidden_size: width of a layer's output, half of it for either direction; even.
        num_hidden_layers: layers, each of which has an output of its own to distil.
        dropout: before every layer and before the classifier.
        pool: "mean", "max", "last" or "cls": how tokens become the vector that is classified, and that a `LayerProbe`
            shows.
        pad_token_id: the padding's row of the embeddings, which stays 0; None: no such row.
        kwargs: what every Hugging Face configuration takes (`num_labels`, `id2label`, `problem_type`...).

    Raises:
        ValueError: an odd hidden_size, an unknown pool, no layers, or a multi-label task.
    """

    model_type = "fastkd_bilstm"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size: got {self.hidden_size}, expected an even number, half a direction")


class GatedCNNConfig(_StudentConfig):
    """Configuration of `GatedCNNForSequenceClassification`.

    Args:
        kernel_size: tokens that one convolution sees, an odd number so that it is centred.
        kwargs: as `BiLSTMConfig`; `hidden_size` may be odd.

    Raises:
        ValueError: an even kernel_size, or what `BiLSTMConfig` raises.
    """

    model_type = "fastkd_gated_cnn"

    def __init__(self, kernel_size: int = 3, num_hidden_layers: int = 4, **kwargs: Any) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {kernel_size}, expected an odd number, so that it is centred")
        self.kernel_size = kernel_size
        super().__init__(num_hidden_layers=num_hidden_layers, **kwargs)


class BiLSTMLayer(nn.Module):
    """One bidirectional LSTM; padding is never read, so that the backward direction starts at the last real token."""

    def __init__(self, input_size: int, config: BiLSTMConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.lstm = nn.LSTM(input_size, config.hidden_size // 2, batch_first=True, bidirectional=True)

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, E], mask [B, T] bool or None -> [B, T, H], 0 where there is padding."""
        hidden_states = self.dropout(hidden_states)
        if mask is None:
            return self.lstm(hidden_states)[0]
        lengths = mask.sum(1).cpu()
        packed = pack_padded_sequence(hidden_states, lengths, batch_first=True, enforce_sorted=False)
        output, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=mask.shape[1])
        return output


class GatedCNNLayer(nn.Module):
    """x + (x * W + b) sigmoid(x * V + c), a gated convolution with a residual connection (Dauphin et al., ICML 2017).

    Theirs is a language model that sees the past only; a classifier's convolution is centred. Padding counts as 0, as
    what lies beyond the ends of the sentence does.
    """

    def __init__(self, input_size: int, config: GatedCNNConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.residual = input_size == config.hidden_size
        self.convolution = nn.Conv1d(
            input_size, 2 * config.hidden_size, config.kernel_size, padding=config.kernel_size // 2
        )

    def forward(self, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, E], mask [B, T] bool or None -> [B, T, H], 0 where there is padding."""
        gated = F.glu(self.convolution(self.dropout(hidden_states).transpose(1, 2)), dim=1).transpose(1, 2)
        output = hidden_states + gated if self.residual else gated
        return output if mask is None else output.masked_fill(~mask.unsqueeze(-1), 0)


class _StudentForSequenceClassification(PreTrainedModel):
    """Word embeddings, a list of layers, pooling and one linear classifier."""

    accepts_loss_kwargs = False
    layer_class: type[BiLSTMLayer] | type[GatedCNNLayer]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        self.embeddings_norm = nn.LayerNorm(config.embedding_size)
        widths = [config.embedding_size] + [config.hidden_size] * (config.num_hidden_layers - 1)
        self.layers = nn.ModuleList(self.layer_class(width, config) for width in widths)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            init.kaiming_normal_(module.weight, nonlinearity="linear")

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = cast(nn.Embedding, value)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Classify a batch.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], non-zero where a token counts; padding on the right.
            token_type_ids: taken because tokenizers send them, and ignored.
            labels: [B] class numbers, or numbers for regression (one label).
            return_dict: False for a plain tuple.

        Raises:
            ValueError: a mask of another shape, with padding on the left, or of a row without tokens.
        """
        mask = _checked_mask(attention_mask, input_ids)
        hidden_states = self.embeddings_norm(self.embeddings(input_ids))
        if mask is not None:
            hidden_states = hidden_states.masked_fill(~mask.unsqueeze(-1), 0)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask)
        pooled = POOLS[self.config.pool](hidden_states, mask)
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else label_loss(logits, labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        as_tuple = not (self.config.return_dict if return_dict is None else return_dict)
        return output.to_tuple() if as_tuple else output


class BiLSTMForSequenceClassification(_StudentForSequenceClassification):
    """A bidirectional LSTM over word embeddings: a student of the cross-architecture setting of Universal-KD."""

    config: BiLSTMConfig
    config_class = BiLSTMConfig
    layer_class = BiLSTMLayer


class GatedCNNForSequenceClassification(_StudentForSequenceClassification):
    """Gated convolutions over word embeddings: a student of the cross-architecture setting of Universal-KD."""

    config: GatedCNNConfig
    config_class = GatedCNNConfig
    layer_class = GatedCNNLayer


def _checked_mask(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """The mask as [B, T] bool, None where nothing is padded."""
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, expected {tuple(input_ids.shape)} as input_ids"
        )
    mask = attention_mask.bool()
    # one read for all questions, because on a GPU it waits for the device
    questions = [mask.all(), mask[:, :1].all(), (mask[:, 1:] <= mask[:, :-1]).all()]
    all_real, no_empty_rows, right_padded = torch.stack(questions).tolist()
    if not (no_empty_rows and right_padded):
        raise ValueError(
            "attention_mask: a row has no tokens, or padding before a token; pad on the right "
            "(tokenizer.padding_side = 'right') and drop empty rows"
        )
    return None if all_real else mask


def is_made_of_teacher(spec: str) -> bool:
    """Whether a student spec needs a teacher, rather than naming a checkpoint of its own."""
    return spec in ("bilstm", "gated-cnn") or spec.startswith("layers:")


def student_from_teacher(
    teacher: PreTrainedModel,
    spec: str,
    *,
    layers: str | None = None,
    copy_classifier: bool = True,
    copy_embeddings: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """A student for the task of `teacher`, with its labels.

    Args:
        teacher: a sequence classifier; for "layers:..." one whose list of layers is found or named.
        spec: which student:
            "layers:K": K evenly spaced layers of the teacher, the last one among them (2, 4 and 6 of 6 for K = 3, as
            PKD-Skip pairs them), with its embeddings, pooler and classifier;
            "layers:K:first" and "layers:K:last": the first (PKD's own initialisation) and the last K layers;
            "layers:0,2,4": those layers, numbered from 0 as in the teacher's parameter names;
            "bilstm", "gated-cnn": new layers on the teacher's vocabulary;
            anything else: the folder of a checkpoint that `AutoModelForSequenceClassification` loads, whose tokenizer
            has to be the teacher's for the two to see the same tokens.
        layers: where the teacher's list of layers lies, see `LayerProbe`.
        copy_classifier: for "layers:...": False leaves the classifier and what lies before it outside the encoder
            new, as for a teacher that is a pretrained checkpoint.
        copy_embeddings: for "bilstm" and "gated-cnn": start with the teacher's word embeddings, projected to the
            student's width by their singular vectors.
        options: for "bilstm" and "gated-cnn": their configuration (`embedding_size`, `hidden_size`,
            `num_hidden_layers`, `dropout`, `pool`, `kernel_size`).

    Returns:
        The student, on the teacher's device, in its dtype and, as from `from_pretrained`, in evaluation mode; nothing
        is shared with the teacher.

    Raises:
        ValueError: a spec of none of these forms, layers the teacher does not have, options that the spec has no use
            for, embeddings narrower than the student's.
    """
    if spec in _NEW_STUDENTS:
        return _new_student(teacher, spec, copy_embeddings, options)
    if options:
        raise ValueError(f"{', '.join(options)}: {spec!r} takes no options, only bilstm and gated-cnn do")
    if spec.startswith("layers:"):
        _check_has_own_layers(teacher, spec, layers)
        chosen = chosen_layers(spec, len(encoder_layers(teacher, layers)))
        return _with_layers(teacher, chosen, copy_classifier, layers)
    if not os.path.isdir(spec):
        raise ValueError(f"spec: got {spec!r}, expected {SPECS}")
    labels = {name: getattr(teacher.config, name) for name in ("id2label", "label2id", "problem_type")}
    student = AutoModelForSequenceClassification.from_pretrained(
        spec, num_labels=teacher.config.num_labels, trust_remote_code=False, **labels
    )
    return _like(student, teacher)


def _check_has_own_layers(teacher: PreTrainedModel, spec: str, layers: str | None) -> None:
    """Raise ValueError where a teacher's layers cannot be taken out one by one."""
    kind, why = type(teacher).__name__, None
    if teacher.base_model is teacher:
        why = "has no encoder of its own to take layers from"
    elif layer_count(teacher, layers) > len(encoder_layers(teacher, layers)):
        why = "has layers that share weights"
    if why is not None:
        raise ValueError(f"spec: got {spec!r}, but {kind} {why}; use another student")


def chosen_layers(spec: str, teacher_layers: int) -> tuple[int, ...]:
    """The teacher layers, from 0, that a spec "layers:..." names.

    Raises:
        ValueError: another form, or layers the teacher does not have.
    """
    numbers, _, which = spec.removeprefix("layers:").partition(":")
    try:
        values = [int(number) for number in numbers.split(",")]
    except ValueError:
        values = []
    if not values or which not in ("", "first", "last") or (which and len(values) > 1):
        raise ValueError(f"spec: got {spec!r}, expected {SPECS}")
    if len(values) > 1:
        return _explicit_layers(spec, values, teacher_layers)
    count = values[0]
    if not 1 <= count <= teacher_layers:
        raise ValueError(f"spec: got {spec!r}, expected 1 to {teacher_layers} layers, as many as the teacher has")
    if which == "first":
        return tuple(range(count))
    if which == "last":
        return tuple(range(teacher_layers - count, teacher_layers))
    return tuple((position + 1) * teacher_layers // count - 1 for position in range(count))


def _explicit_layers(spec: str, layers: Sequence[int], teacher_layers: int) -> tuple[int, ...]:
    if not all(0 <= layer < teacher_layers for layer in layers):
        raise ValueError(f"spec: got {spec!r}, expected layers from 0 to {teacher_layers - 1}")
    return tuple(layers)


def _with_layers(
    teacher: PreTrainedModel, layers: Sequence[int], copy_classifier: bool, path: str | None
) -> PreTrainedModel:
    check_not_quantised_elsewhere(
        teacher, "teacher", "a student of its layers copies their weights; make it from the unquantised teacher"
    )
    config = copy.deepcopy(teacher.config)
    has_exits = isinstance(config, EarlyExitConfig)
    heads: dict[int, int] = {}
    if isinstance(config, EarlyExitConfig):
        # a layer that is kept keeps its head, and the last one answers with the teacher's last
        heads = {place: layer for place, layer in enumerate(layers) if layer + 1 in config.exit_layers}
        heads[len(layers) - 1] = teacher.config.num_hidden_layers - 1
        config.exit_layers = sorted(place + 1 for place in heads)
        config.last_head_was_trained()
        config.training_data, config.weights_fingerprint = {}, None
    if teacher.config.num_labels == 1:
        # a copied classifier answers in the labels' unit, whoever trained it
        known = getattr(config, "label_scale", None) or [0.0, 1.0]
        config.label_scale = known if copy_classifier else None
    keep_layers(config.backbone if isinstance(config, EarlyExitConfig) else config, layers)
    config.name_or_path = ""  # the student is no longer what lies there
    student = cast(PreTrainedModel, type(teacher)(cast(Any, config)))
    encoder = f"{teacher.base_model_prefix}."
    depth = teacher.config.num_hidden_layers
    prefix = f"{encoder}{layer_path(teacher.base_model, path or getattr(config, 'layers', None), depth)}."
    positions: dict[int, list[int]] = {}
    for position, layer in enumerate(layers):
        positions.setdefault(layer, []).append(position)
    weights = student.state_dict()
    for name, weight in teacher.state_dict().items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            for position in positions.get(int(number), []):
                weights[f"{prefix}{position}.{rest}"] = weight
        elif name.startswith(encoder):
            weights[name] = weight
        elif copy_classifier and has_exits and name.startswith("heads."):
            number, _, rest = name.removeprefix("heads.").partition(".")
            for place in (place for place, layer in heads.items() if layer == int(number)):
                weights[f"heads.{place}.{rest}"] = weight
        elif copy_classifier:
            weights[name] = weight
    try:
        student.load_state_dict(weights)
    except RuntimeError as error:
        # layer 0 of ModernBERT has no first norm
        raise ValueError(
            f"spec: the layers {', '.join(map(str, layers))} of {type(teacher).__name__} have other weights than the "
            "places they would take; begin with layer 0, as in layers:0,2 or layers:2:first"
        ) from error
    return _like(student, teacher)


_NEW_STUDENTS: dict[str, tuple[type[_StudentConfig], type[_StudentForSequenceClassification]]] = {
    "bilstm": (BiLSTMConfig, BiLSTMForSequenceClassification),
    "gated-cnn": (GatedCNNConfig, GatedCNNForSequenceClassification),
}


def _new_student(
    teacher: PreTrainedModel, spec: str, copy_embeddings: bool, options: dict[str, Any]
) -> PreTrainedModel:
    config_class, model_class = _NEW_STUDENTS[spec]
    table = cast(Tensor, teacher.get_input_embeddings().weight).detach()
    task = {name: getattr(teacher.config, name) for name in ("id2label", "label2id", "problem_type")}
    # an early-exit model keeps its vocabulary in the configuration of its encoder
    vocabulary = {"vocab_size": table.shape[0], "pad_token_id": teacher.config.get_text_config().pad_token_id}
    width = min(table.shape[1], 300)
    config = config_class(**{"embedding_size": width, **vocabulary, **task, **options})
    if copy_embeddings and config.embedding_size > table.shape[1]:
        raise ValueError(
            f"embedding_size: got {config.embedding_size}, expected at most the {table.shape[1]} of the teacher's "
            "embeddings; or pass copy_embeddings=False"
        )
    student = model_class(config)
    if copy_embeddings:
        with torch.no_grad():
            student.embeddings.weight.copy_(projected_embeddings(table, config.embedding_size))
            if config.pad_token_id is not None:
                student.embeddings.weight[config.pad_token_id] = 0
    return _like(student, teacher)


def _like(student: Any, teacher: PreTrainedModel) -> PreTrainedModel:
    return student.to(device=teacher.device, dtype=teacher.dtype).eval()


def projected_embeddings(table: Tensor, width: int) -> Tensor:
    """The rows of [V, E] in the coordinates of their `width` strongest right singular vectors, [V, width].

    No other projection to this width keeps the dot products of words as well (Eckart and Young, 1936).
    """
    if width == table.shape[1]:
        return table.clone()
    rows = table.double()
    # eigenvectors of the small E x E matrix are the right singular vectors of the tall one, weakest first
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    return (rows @ vectors[:, -width:].flip(1)).to(table.dtype)


for _config, _model in _NEW_STUDENTS.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForSequenceClassification.register(_config, _model)
