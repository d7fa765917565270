"""`EarlyExitForSequenceClassification`: any supported encoder with a classifier after each layer."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import fastkd_kernels as fk
from fastkd.encoders import families
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.encoders.heads import LearnedExit, LinearHead, StudentHead, build_head
from fastkd.engines import batch, graphs, packed, stream, stream_batches
from fastkd.exits import criteria
from fastkd.exits.catalogue import check_criterion
from fastkd.exits.rule import head_speeds
from fastkd.exits.trace import ExitTrace
from fastkd.model.tracing import record_trace


@dataclass
class EarlyExitOutput(SequenceClassifierOutput):
    """A `SequenceClassifierOutput` that also says where each sequence left.

    Attributes:
        loss: [] cross-entropy (mean squared error for one label) of the answers, where labels were given.
        logits: [B, C] float32, of the head that answered.
        exit_layer: [B] int32, 1 after the first layer; None in training.
        uncertainty: [B] float32 at that layer; None in training and for regression.
    """

    exit_layer: Tensor | None = None
    uncertainty: Tensor | None = None


class EarlyExitForSequenceClassification(PreTrainedModel):
    """An encoder whose sentences leave at the first classifier that is certain enough (FastBERT, ACL 2020).

    The encoder keeps its Hugging Face parameter names under its own prefix (`bert.`, `roberta.`...); the heads are
    `heads.{i}`, i = 0 after the first layer. The last head is the teacher.
    """

    config: EarlyExitConfig
    config_class = EarlyExitConfig
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # what plain checkpoints carry for their own tasks
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012  # the name and form are transformers'
        r"pooler\.",
        r"^cls\.",
        r"^lm_head\.",
        r"^classifier\.",
        r"^pre_classifier\.",
        r"^vocab_(transform|layer_norm|projector)\.",
        r"^(discriminator|generator)_(predictions|lm_head)\.",
        r"position_ids$",
    ]

    def __init__(self, config: EarlyExitConfig, *, heads_are_new: bool = False) -> None:
        """Random weights for `config`; `heads_are_new` keeps transformers from reporting them as missing."""
        super().__init__(config)
        self._family = families.family_of(config.backbone.model_type)
        backbone = families.build(config.backbone)
        # transformers maps the keys of plain checkpoints by this prefix
        self.base_model_prefix = backbone.base_model_prefix
        setattr(self, self.base_model_prefix, backbone)
        self.heads = nn.ModuleDict({str(layer - 1): build_head(config) for layer in config.exit_layers})
        self.learned_exit = LearnedExit(config) if config.learned_exit else None
        if heads_are_new:
            self._keys_to_ignore_on_load_missing = [r"^heads\.", r"^learned_exit\."]
        self.post_init()

    @property
    def backbone(self) -> PreTrainedModel:
        return getattr(self, self.base_model_prefix)

    @property
    def layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.backbone.get_submodule(self._family.layers))

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def exit_layers(self) -> list[int]:
        """1-based numbers of the layers that have a head, ascending; the last one is the teacher's."""
        return self.config.exit_layers

    @property
    def teacher_head(self) -> StudentHead | LinearHead:
        return self.heads_by_layer[self.num_layers]

    @property
    def student_heads(self) -> list[StudentHead | LinearHead]:
        """Every head below the last, in layer order."""
        return list(self.heads_by_layer.values())[:-1]

    @property
    def heads_by_layer(self) -> dict[int, StudentHead | LinearHead]:
        """The heads by the 1-based number of their layer, in layer order."""
        return {int(name) + 1: cast("StudentHead | LinearHead", head) for name, head in self.heads.items()}

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        speed: float | Sequence[float] | None = None,
        criterion: str | None = None,
        top_n: int | None = None,
        exit_layers: Sequence[int] | None = None,
        engine: str | None = None,
        return_dict: bool | None = None,
    ) -> EarlyExitOutput | tuple[Tensor, ...]:
        """Classify a batch, leaving early where `speed` > 0.

        Args:
            input_ids, token_type_ids, position_ids: [B, T]; or `inputs_embeds` [B, T, E] instead of `input_ids`.
            attention_mask: [B, T], non-zero where a token counts; padding on the right.
            labels: [B] class numbers, or numbers for regression (one label).
            speed: 0 (the full model; only the last head runs) to 1 (everybody leaves at the first head); one number
                for all heads, or one for each head below the last, where 0 skips that head. Default: `config.speed`.
                In training mode the full model runs whatever the speed.
            criterion: see `fastkd_kernels.exit_gate` and `fastkd.exits.criteria`; default `config.criterion`.
            top_n: for the "top_n" criterion; default `config.top_n`.
            exit_layers: after which layers to decide, a choice of those that have a head; default all. The last layer
                always answers.
            engine: "batch" keeps the padding and calls the layers as they are, "packed" takes the padding out, "graphs"
                replays CUDA graphs of everything between two decisions (first calls capture them); default:
                packed where that is faster, on a CPU where nothing is hooked to the layers or wraps them.
                Where a gradient is wanted, padding is kept.
            return_dict: False for a plain tuple.

        Returns:
            EarlyExitOutput. With a speed above 0 nothing in it has a gradient.

        Raises:
            ValueError: a speed outside [0, 1], or another number of them than heads below the last; a speed above 0 for
                a model whose heads were never distilled; a criterion that this model cannot run; neither or both of
                `input_ids` and `inputs_embeds`, or more tokens than the encoder has positions; a mask of another shape
                or whose first token is masked; another number of labels than rows; `exit_layers` without a head; an
                unknown engine, or "packed" where it cannot run.
        """
        exits = self.exit_options(speed, criterion, top_n, exit_layers)
        speed, criterion, top_n, _ = exits
        leaves_early = bool(head_speeds(speed, self.exit_layers)) and not self.training
        mask = self.check_input(input_ids, attention_mask, inputs_embeds)
        rows = (input_ids if inputs_embeds is None else inputs_embeds).shape[0]  # type: ignore[union-attr]
        if labels is not None and labels.numel() != rows:
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected [{rows}], one a row")
        encoder = self._packed_encoder(engine, input_ids, position_ids, mask, leaves_early)
        if engine == "graphs":
            if not leaves_early or input_ids is None or position_ids is not None or rows == 0:
                raise ValueError(
                    "engine: got 'graphs', which needs a speed above 0, evaluation mode, at least one row of input_ids "
                    "and no position_ids; use engine='batch'"
                )
            if criterion not in fk.CRITERIA:
                raise ValueError(
                    f"engine: got 'graphs', which has no criterion {criterion!r}; use engine='batch', or one of "
                    f"{', '.join(fk.CRITERIA)}"
                )
            answers = self._answers(graphs.engine_of(self).run(input_ids, mask, *exits, token_type_ids))
        elif encoder is not None:
            assert input_ids is not None
            answers = self._answers(packed.run(self, encoder, input_ids, mask, token_type_ids, *exits))
        else:
            hidden_states = self._family.embed(self.backbone, input_ids, token_type_ids, position_ids, inputs_embeds)
            if leaves_early:
                answers = self._answers(batch.run(self, hidden_states, mask, *exits))
            else:
                answers = self._full(hidden_states, mask, criterion, top_n)
        loss = None if labels is None else self._loss(answers["logits"], labels)
        output = EarlyExitOutput(loss=loss, **answers)
        as_tuple = not (self.config.return_dict if return_dict is None else return_dict)
        return output.to_tuple() if as_tuple else output

    def all_exit_logits(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits of every head in layer order, [B, K, C] float32, differentiable; `labels` are ignored."""
        return self.all_exits(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)[0]

    def all_exits(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`all_exit_logits`, and the log-odds [B, K] float32 of the learned exit; None where there is none."""
        hidden_states, mask = self._embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        layer_mask = self.layer_mask(hidden_states, mask)
        heads = self.heads_by_layer
        logits, log_odds = [], []
        for number, layer in enumerate(self.layers, start=1):
            hidden_states = layer(hidden_states, layer_mask)
            if number not in heads:
                continue
            logits.append(heads[number](hidden_states, mask))
            if self.learned_exit is not None:
                log_odds.append(self.learned_exit(hidden_states[:, 0], logits[-1]))
        return torch.stack(logits, dim=1), torch.stack(log_odds, dim=1) if log_odds else None

    def add_learned_exit(self) -> None:
        """Give the model a learned exit that knows the margin only, unless it has one; `fastkd.distill` trains it."""
        if self.learned_exit is not None:
            return
        self.config.learned_exit = True
        self.learned_exit = LearnedExit(self.config).to(self.device, self.dtype)
        self.learned_exit.start()

    def decide(
        self,
        head: StudentHead | LinearHead,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        speed: float | Tensor,
        criterion: str,
        top_n: int | None,
        *,
        row_ids: Tensor | None,
        record: fk.ExitRecord,
        layer: int,
        cu_seqlens: Tensor | None = None,
    ) -> fk.ExitGateOutput:
        """Logits and exit decision of `head` after `layer`; engines ask this.

        Args:
            head: of this model.
            hidden_states: [B, T, H] after `layer`, or packed [N, H] with `cu_seqlens`.
            attention_mask: [B, T] bool, or None where nothing is padded.
            speed, criterion, top_n, row_ids, record, layer: as in `fastkd.exits.criteria.decide`.
            cu_seqlens: [B + 1], where each packed sequence begins.
        """
        if criterion in fk.CRITERIA:
            return head.decide(
                hidden_states, attention_mask, speed, criterion, top_n,
                row_ids=row_ids, record=record, layer=layer, cu_seqlens=cu_seqlens,
            )  # fmt: skip
        if cu_seqlens is None:
            logits, cls_states = head(hidden_states, attention_mask), hidden_states[:, 0]
        else:
            logits = head.packed(hidden_states, cu_seqlens)
            cls_states = hidden_states.index_select(0, cu_seqlens[:-1])
        certainty = self._certainty(cls_states, logits, criterion)
        return criteria.decide(
            logits, speed, criterion, row_ids, top_n, record=record, layer=layer, certainty=certainty
        )

    def _certainty(self, cls_states: Tensor, logits: Tensor, criterion: str) -> Tensor | None:
        """[B] of the learned exit, where `criterion` asks for it."""
        if criterion != "learned":
            return None
        assert self.learned_exit is not None
        return self.learned_exit(cls_states, logits).sigmoid()

    def trace(self, batches: Iterable[Mapping[str, Tensor]], fingerprint: str | None = None) -> ExitTrace:
        """Run every head on every batch once, see `ExitTrace`.

        Args:
            batches: keyword arguments of `forward`, with or without `labels`; moved to the model's device.
            fingerprint: of the rows (`Rows.digest`), so that a calibration can tell whether training has seen them;
                default: one of the tokens.

        Raises:
            ValueError: no batches, or labels in some batches only.
        """
        return record_trace(self, batches, fingerprint)

    def stream(
        self,
        rows: Iterable[Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        speed: float | Sequence[float] | None = None,
        criterion: str | None = None,
        top_n: int | None = None,
        exit_layers: Sequence[int] | None = None,
        max_length: int | None = None,
        truncate: bool = True,
        tokens_per_run: int = 4096,
        max_tokens_in_flight: int = 65536,
        look_ahead: int = 256,
        deadline: float | None = None,
    ) -> stream.Stream:
        """Answer rows one by one in their order, rebatching the survivors of each layer across the whole input.

        Args:
            rows: texts, pairs of texts, dictionaries as `fastkd.data.columns` names their columns, or dictionaries with
                `input_ids`; a list, a generator or a `datasets.Dataset`. An input that has nothing right now may give
                None after a while, so that what waits can run.
            tokenizer: of the model; not needed where the rows have `input_ids`.
            speed, criterion, top_n: as in `forward`.
            exit_layers: after which layers to decide, a choice of those that have a head; default all.
            max_length: tokens after which a text is cut; default what tokenizer and encoder take.
            truncate: False reports a text that is too long as a problem instead of cutting it.
            tokens_per_run: a layer runs when as many tokens wait for it.
            max_tokens_in_flight: input is read only while fewer tokens than this wait; one window may exceed it. Memory
                is this times the hidden size, and the activations of one run.
            look_ahead: rows that are read, tokenised and sorted by length together.
            deadline: seconds after which a row runs on even where its layer's queue is not full.

        Returns:
            An iterator of `StreamRow` (`.label`, `.score`, `.exit_layer`), one a row, in input order.

        Raises:
            ValueError: as `forward`; bounds that cannot be kept.
        """
        return stream.Stream(
            self,
            rows,
            tokenizer,
            speed=speed,
            criterion=criterion,
            top_n=top_n,
            exit_layers=exit_layers,
            max_length=max_length,
            truncate=truncate,
            tokens_per_run=tokens_per_run,
            max_tokens_in_flight=max_tokens_in_flight,
            look_ahead=look_ahead,
            deadline=deadline,
        )

    def stream_batches(
        self,
        batches: Iterable[Mapping[str, Tensor] | None],
        *,
        speed: float | Sequence[float] | None = None,
        criterion: str | None = None,
        top_n: int | None = None,
        exit_layers: Sequence[int] | None = None,
        tokens_per_run: int | None = None,
        max_rows_waiting: int = 16384,
    ) -> stream_batches.BatchStream:
        """Answer batches in their order, rebatching the survivors of each layer across them; made for GPUs.

        Where `stream` takes texts and gives rows, this takes tensors and gives tensors, and nothing on the host is done
        row by row. On a GPU the host prepares one run while the device is busy with another, and each run of a bfloat16
        or float16 model is a CUDA graph (the first runs capture them). Weights must not change before the stream ends.

        Args:
            batches: mappings with `input_ids` [B, T], perhaps `attention_mask` (padding on the right) and
                `token_type_ids`, on any device: a list, a `DataLoader`, a generator. B and T may differ from batch to
                batch. A mask on a GPU costs a wait for the device. An input that has nothing right now may give None,
                so that the oldest rows run on, a stage for each None.
            speed, exit_layers: as in `forward`.
            criterion, top_n: of `fastkd_kernels.exit_gate`; default those of the configuration.
            tokens_per_run: a layer runs when as many tokens wait for it; default 4,096, on a GPU 16,384. Memory is
                three times this, times the hidden size, for each layer with a head.
            max_rows_waiting: rows that were read and not given back yet; more are read only when the oldest are
                answered, however empty their run. A batch may not have more.

        Returns:
            An iterator of EarlyExitOutput, one a batch, in memory of their own on the device of the model.

        Raises:
            ValueError: as `forward`, at the batch concerned; bounds that cannot be kept; a criterion that only
                `stream` has.
        """
        return stream_batches.BatchStream(
            self,
            batches,
            speed=speed,
            criterion=criterion,
            top_n=top_n,
            exit_layers=exit_layers,
            tokens_per_run=tokens_per_run,
            max_rows_waiting=max_rows_waiting,
        )

    def layer_mask(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Any:
        """`attention_mask` [B, T] or None in the form that the layers take."""
        return families.layer_mask(self.config.backbone, hidden_states, attention_mask)

    def _packed_encoder(
        self,
        engine: str | None,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        mask: Tensor | None,
        leaves_early: bool,
    ) -> packed.PackedEncoder | None:
        """What the packed engine runs on; None where padding is kept; ValueError where it was asked for and cannot."""
        if engine not in (None, "batch", "packed", "graphs"):
            raise ValueError(
                f"engine: got {engine!r}, expected 'batch', 'packed' or 'graphs', or call model.stream(rows)"
            )
        if engine in ("batch", "graphs") or (engine is None and not packed.supports(self)):
            return None
        wants_grad = self.training or (torch.is_grad_enabled() and not leaves_early)
        can_pack = not (wants_grad or input_ids is None or position_ids is not None or torch.compiler.is_compiling())
        can_pack = can_pack and (mask is None or packed.is_right_padded(mask))
        if not can_pack and engine == "packed":
            raise ValueError(
                "engine: got 'packed', which needs input_ids padded on the right, no position_ids, and that no "
                "gradient is wanted (torch.no_grad() at speed 0)"
            )
        encoder = packed.encoder_of(self) if can_pack else None
        return encoder if encoder is not None and (engine == "packed" or encoder.is_faster) else None

    def output_of(self, record: fk.ExitRecord) -> EarlyExitOutput:
        """What an engine recorded."""
        return EarlyExitOutput(**self._answers(record))

    def _answers(self, record: fk.ExitRecord) -> dict[str, Any]:
        """What an engine recorded, as fields of EarlyExitOutput; a regression knows no uncertainty."""
        uncertainty = None if self.config.num_labels == 1 else record.uncertainty
        return {"logits": record.logits, "exit_layer": record.exit_layer, "uncertainty": uncertainty}

    def _full(self, hidden_states: Tensor, mask: Tensor | None, criterion: str, top_n: int | None) -> dict[str, Any]:
        """What the last head says after all layers, as fields of EarlyExitOutput."""
        layer_mask = self.layer_mask(hidden_states, mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, layer_mask)
        logits = self.teacher_head(hidden_states, mask)
        if self.training:
            return {"logits": logits}
        rows, num_labels = logits.shape
        exit_layer = torch.full((rows,), self.num_layers, dtype=torch.int32, device=logits.device)
        if num_labels == 1:
            return {"logits": logits, "exit_layer": exit_layer}
        record = fk.ExitRecord.allocate(rows, num_labels, logits.device)
        certainty = self._certainty(hidden_states[:, 0].detach(), logits, criterion)
        gate = criteria.decide(
            logits.detach(), 0.0, criterion, None, top_n, record=record, layer=self.num_layers, certainty=certainty
        )
        return {"logits": logits, "exit_layer": exit_layer, "uncertainty": gate.uncertainty}

    def _embed(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states before the first layer, and the mask as [B, T] bool, None where nothing is padded."""
        mask = self.check_input(input_ids, attention_mask, inputs_embeds)
        return self._family.embed(self.backbone, input_ids, token_type_ids, position_ids, inputs_embeds), mask

    def check_input(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> Tensor | None:
        """The mask as [B, T] bool, None where nothing is padded; ValueError for what `forward` cannot take."""
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("input_ids: pass exactly one of input_ids and inputs_embeds")
        _check_tokens(tokens, inputs_embeds is not None, families.longest_input(self.config.backbone))
        return _checked_mask(attention_mask, tokens)

    def exit_options(
        self,
        speed: float | Sequence[float] | None,
        criterion: str | None,
        top_n: int | None,
        exit_layers: Sequence[int] | None = None,
    ) -> tuple[float | Sequence[float], str, int | None, list[int]]:
        """Speed, criterion, top_n and `decision_layers` of a call; the configuration's where nothing was said.

        Raises:
            ValueError: options that `forward` refuses.
        """
        speed = self.config.speed if speed is None else speed
        criterion = self.config.criterion if criterion is None else criterion
        top_n = self.config.top_n if top_n is None else top_n
        self.check_criterion(criterion, top_n)
        if head_speeds(speed, self.exit_layers) and not self.training:
            self.check_exits(criterion)
        return speed, criterion, top_n, self.decision_layers(speed, exit_layers)

    def check_criterion(self, criterion: str, top_n: int | None) -> None:
        """Raise ValueError for a criterion that this model cannot run."""
        check_criterion(criterion, top_n, self.config.num_classes)
        if criterion == "learned" and self.learned_exit is None:
            raise ValueError(
                "criterion: got 'learned', but this model has no learned exit; distil it with one (`fastkd distill "
                "--learned-exit`, or DistillOptions(learned_exit=True)), or use another criterion"
            )

    def decision_layers(self, speed: float | Sequence[float], exit_layers: Sequence[int] | None = None) -> list[int]:
        """The layers whose heads run at `speed`: those of `exit_layers` (default all) and the last; ascending.

        Raises:
            ValueError: a layer without a head; a bad speed.
        """
        unknown = [layer for layer in exit_layers or () if layer not in self.exit_layers]
        if unknown:
            raise ValueError(f"exit_layers: got {unknown[0]}, but this model has heads after {self.exit_layers}")
        speeds = head_speeds(speed, self.exit_layers)
        chosen = [layer for layer in speeds if exit_layers is None or layer in exit_layers]
        return [*chosen, self.num_layers]

    def check_exits(self, criterion: str) -> None:
        """Raise ValueError where this model cannot leave early by `criterion`."""
        if self.config.num_classes == 1 and criterion in fk.CRITERIA:
            raise ValueError(
                f"criterion: {criterion!r} needs class probabilities, but this model is a regression (num_labels=1); "
                "use 'agreement', or speed=0"
            )
        if not self.config.exits_trained:
            raise ValueError(
                "speed: got a value above 0, but the heads below the last layer were never trained, so early answers "
                "would be random; distil them first (`fastkd distill`, or fastkd.distill), or use speed=0"
            )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.num_labels == 1:
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).reshape(-1))
        return F.cross_entropy(logits, labels.reshape(-1))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: EarlyExitConfig | None = None,
        head: str | None = None,
        exit_layers: list[int] | None = None,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | None = None,
        **kwargs: Any,
    ) -> EarlyExitForSequenceClassification:
        """Load a plain encoder checkpoint and add heads to it, or load a saved early-exit model.

        Args:
            pretrained_model_name_or_path: a folder or hub name; a checkpoint of any task of a supported family, or
                one that `save_pretrained` of this class wrote.
            config: used as it is; the four arguments below must then be left out.
            head: "fastbert" (default) or "linear".
            exit_layers: 1-based numbers of the layers that get a head; the last one always does. Default: every layer.
            num_labels: number of classes, 1 for regression. Default: that of `id2label`, else of the checkpoint.
            id2label: label names by class number.
            kwargs: what `PreTrainedModel.from_pretrained` takes (`dtype`, `attn_implementation`, `device_map`...).

        Raises:
            ValueError: an unsupported family; a label set, head or exit layers that differ from those of a saved
                early-exit model; an incomplete or damaged weights file.
            OSError: no such folder, no config.json in it, or no weights.
        """
        path = pretrained_model_name_or_path
        added = {"head": head, "exit_layers": exit_layers, "num_labels": num_labels, "id2label": id2label}
        added = {name: value for name, value in added.items() if value is not None}
        saved = None if path is None else _saved_config(path, kwargs)
        options = {name: kwargs.pop(name) for name in _CONFIG_OPTIONS if name in kwargs}
        if config is None:
            config = _config_of(saved, path, added, options)
        elif not isinstance(config, EarlyExitConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected an EarlyExitConfig")
        elif added or options:
            given = ", ".join([*added, *options])
            raise ValueError(f"{given}: both this and config were given; put it into the EarlyExitConfig instead")
        elif isinstance(saved, EarlyExitConfig):
            _check_same_heads(saved, path, {"num_labels": config.num_labels, "head": config.head})
        heads_are_new = saved is not None and not isinstance(saved, EarlyExitConfig)
        return cls._load(path, *model_args, config=config, heads_are_new=heads_are_new, **kwargs)

    @classmethod
    def _load(cls, path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any) -> Any:
        wants_info = kwargs.pop("output_loading_info", False)
        strict = not kwargs.pop("ignore_mismatched_sizes", False)
        try:
            loaded: Any = super().from_pretrained(
                path, *model_args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except (SafetensorError, EOFError, pickle.UnpicklingError, RuntimeError) as error:
            if type(error) is RuntimeError and "PytorchStreamReader" not in str(error):
                raise
            raise ValueError(
                f"pretrained_model_name_or_path: the weights in {path} are damaged or were cut off ({error}); copy or "
                "download the checkpoint again"
            ) from error
        model, info = loaded
        if strict:
            _check_complete(path, info)
        return (model, info) if wants_info else model


_CONFIG_OPTIONS = (
    "head_width",
    "head_attention_heads",
    "head_dropout",
    "exits_trained",
    "speed",
    "criterion",
    "top_n",
    "input_format",
    "label2id",
    "problem_type",
)
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


def _saved_config(path: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration beside the weights, of an encoder or of an early-exit model."""
    folder = Path(path) / kwargs.get("subfolder", "")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"pretrained_model_name_or_path: no config.json in {folder}; expected a folder that save_pretrained wrote"
        )
    return AutoConfig.from_pretrained(path, **{name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs})


def _check_complete(path: str | os.PathLike[str] | None, info: Mapping[str, Any]) -> None:
    """Raise ValueError where a checkpoint lacks tensors of the model or has them in other shapes."""
    remedy = "the checkpoint is incomplete or belongs to another config.json"
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        raise ValueError(
            f"pretrained_model_name_or_path: {name} in {path} has shape {tuple(found)}, but the configuration asks for "
            f"{tuple(expected)}; {remedy}"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"pretrained_model_name_or_path: the weights in {path} lack {len(missing)} tensors of this model, among "
            f"them {missing[0]}; {remedy}"
        )


def _config_of(
    saved: PreTrainedConfig | None,
    path: str | os.PathLike[str],
    added: Mapping[str, Any],
    options: Mapping[str, Any],
) -> EarlyExitConfig:
    """The configuration of the model to load: that of a saved early-exit model, or a new one around `saved`."""
    if saved is None:
        raise ValueError("pretrained_model_name_or_path: got None without a config; pass a folder or a config")
    if isinstance(saved, EarlyExitConfig):
        _check_same_heads(saved, path, added)
        for name, value in options.items():
            setattr(saved, name, value)
        if "id2label" in added:
            saved.id2label = dict(added["id2label"])
            saved.label2id = {label: index for index, label in added["id2label"].items()}
        return saved
    labels = dict(_labels_of(saved, added))
    return EarlyExitConfig(
        backbone=saved, head=added.get("head", "fastbert"), exit_layers=added.get("exit_layers"), **labels, **options
    )


def _labels_of(saved: PreTrainedConfig, added: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    names = added.get("id2label")
    count = added.get("num_labels")
    if names is None:
        names = saved.id2label if count in (None, saved.num_labels) else None
    elif count is not None and len(names) != count:
        raise ValueError(f"num_labels: got {count}, but id2label names {len(names)} classes; leave one of them out")
    if names is None:
        return [("num_labels", count)]
    if sorted(names) != list(range(len(names))):
        raise ValueError(
            f"id2label: got the class numbers {sorted(names)}, expected 0 to {len(names) - 1} without gaps"
        )
    return [("id2label", dict(names)), ("label2id", {label: index for index, label in names.items()})]


def _check_same_heads(saved: EarlyExitConfig, path: str | os.PathLike[str], wanted: Mapping[str, Any]) -> None:
    """Raise where the heads of a saved model are not the ones asked for."""
    remedy = "leave the argument out, or start from the plain checkpoint to get new heads"
    if "id2label" in wanted:
        names = {int(index): name for index, name in wanted["id2label"].items()}
        generic = {index: f"LABEL_{index}" for index in range(saved.num_labels or 0)}
        if names.keys() != generic.keys() or (saved.id2label != generic and names != saved.id2label):
            raise ValueError(
                f"id2label: got {list(names.values())}, but the model in {path} was trained with the labels "
                f"{list((saved.id2label or {}).values())}; {remedy}"
            )
    if wanted.get("num_labels", saved.num_labels) != saved.num_labels:
        raise ValueError(
            f"num_labels: got {wanted['num_labels']}, but the model in {path} was trained with {saved.num_labels} "
            f"classes; {remedy}"
        )
    if wanted.get("head", saved.head) != saved.head:
        raise ValueError(f"head: got {wanted['head']!r}, but the model in {path} has {saved.head} heads; {remedy}")
    if "exit_layers" in wanted and sorted({*wanted["exit_layers"], saved.num_hidden_layers}) != saved.exit_layers:
        raise ValueError(
            f"exit_layers: got {wanted['exit_layers']}, but the model in {path} has heads after {saved.exit_layers}; "
            f"{remedy}"
        )


def _check_tokens(tokens: Tensor, embedded: bool, longest: int) -> None:
    """Raise for input_ids that are no [B, T] integers, inputs_embeds that are no [B, T, E], or too many tokens."""
    name, form = ("inputs_embeds", "[B, T, E] floats") if embedded else ("input_ids", "[B, T] integers")
    if tokens.dim() != 2 + embedded or tokens.is_floating_point() != embedded:
        raise ValueError(f"{name}: got shape {tuple(tokens.shape)} of {tokens.dtype}, expected {form}")
    if tokens.shape[1] > longest:
        raise ValueError(
            f"{name}: got {tokens.shape[1]} tokens a row, but this encoder takes at most {longest}; truncate the "
            f"texts (tokenizer(..., truncation=True, max_length={longest}))"
        )


def _checked_mask(attention_mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """`attention_mask` as [B, T] bool, None where nothing is padded.

    Raises:
        ValueError: another shape than the tokens', or a row whose first token is masked.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, expected {tuple(tokens.shape[:2])}, one value a "
            "token"
        )
    mask = attention_mask.bool()
    if torch.compiler.is_compiling():
        return mask
    # one read for both questions, because on a GPU it waits for the device
    nothing_padded, first_tokens_count = torch.stack([mask.all(), mask[:, :1].all()]).tolist()
    if not first_tokens_count:
        raise ValueError(
            "attention_mask: the first token of a row is masked, but the heads read it; pad on the right "
            "(tokenizer.padding_side = 'right') and drop empty rows"
        )
    return None if nothing_padded else mask


AutoConfig.register(EarlyExitConfig.model_type, EarlyExitConfig)
AutoModelForSequenceClassification.register(EarlyExitConfig, EarlyExitForSequenceClassification)
