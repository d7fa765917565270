"""`EarlyExitForSequenceClassification`: any encoder with a classifier after each layer."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

import fastkd_kernels as fk
from fastkd.data.columns import Columns
from fastkd.data.row_hashes import Hashes
from fastkd.encoders import anatomy, int8
from fastkd.encoders.catalogue import check_family
from fastkd.encoders.configuration import EarlyExitConfig
from fastkd.encoders.driver import driver_of
from fastkd.encoders.heads import ExitHead, ExitHeads, LearnedExit
from fastkd.encoders.layout import TokenLayout
from fastkd.encoders.recording import EncoderInputs
from fastkd.encoders.untouched import check_not_quantised_elsewhere
from fastkd.engines import batch, graphs, packed, packed_encoder, plan, stream, stream_batches
from fastkd.engines.output import EarlyExitOutput, fields_of
from fastkd.engines.stream_reader import longest_row
from fastkd.exits import calibration, comparison, criteria, rank_calibration
from fastkd.exits.fingerprints import WeightsSketch
from fastkd.exits.merged_state import is_adapter, merged_state
from fastkd.exits.rule import ExitRule, stages_of
from fastkd.exits.sweep import Sweep
from fastkd.exits.trace import ExitTrace
from fastkd.model import card, ranking
from fastkd.model.adapters import adapter_base, merge_adapter
from fastkd.model.claims import WeightsClaims, asks_about_weights
from fastkd.model.inputs import check_tokens, checked_mask
from fastkd.model.pretrained import (
    check_complete,
    check_loaded_dtype,
    config_to_load,
    damage_explained,
    local_folder,
    saved_config,
    weights_fingerprint,
)
from fastkd.model.seen_rows import SEEN_ROWS, load_seen_rows, save_seen_rows
from fastkd.model.tracing import OnBatch, record_rows, record_trace

if TYPE_CHECKING:
    from fastkd.data.rows import Rows


class EarlyExitForSequenceClassification(PreTrainedModel):
    """An encoder whose sentences leave at the first classifier that is certain enough (FastBERT, ACL 2020).

    The encoder keeps its Hugging Face parameter names under its own prefix (`bert.`, `roberta.`...); the heads are
    `heads.{i}`, i = 0 after the first layer.
    """

    config: EarlyExitConfig
    config_class = EarlyExitConfig
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    model_tags: ClassVar[list[str] | None] = list(card.TAGS)  # type: ignore[misc]
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
        self._claims = WeightsClaims()
        self.seen_rows: dict[str, Hashes] = {}
        backbone = anatomy.build(config.backbone)
        self._driver = driver_of(config, backbone)
        # at every call it would be asked of the configuration anew
        self._longest_input = config.longest_input
        # transformers maps the keys of plain checkpoints by this prefix
        self.base_model_prefix = backbone.base_model_prefix
        setattr(self, self.base_model_prefix, backbone)
        if config.quantized is not None:
            int8.replace_linears(self.layers, int8.empty_like)
            # no gradient goes through it, so none is asked for
            backbone.requires_grad_(False)
        self.heads = ExitHeads(config)
        self.learned_exit = LearnedExit(config) if config.learned_exit else None
        if heads_are_new and config.is_replayed:
            # whatever a plain checkpoint carries for its own task
            others = [re.escape(name) for name in (self.base_model_prefix, "heads", "learned_exit")]
            self._keys_to_ignore_on_load_unexpected = [rf"^(?!({'|'.join(others)})\.)", r"pooler\."]
        if heads_are_new:
            self._keys_to_ignore_on_load_missing = [r"^heads\.", r"^learned_exit\."]
        self.post_init()

    @property
    def backbone(self) -> PreTrainedModel:
        return getattr(self, self.base_model_prefix)

    @property
    def layers(self) -> nn.ModuleList:
        return self._driver.layers(self.backbone)

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def exit_layers(self) -> list[int]:
        """1-based numbers of the layers that have a head, ascending; the last one is the encoder's last layer."""
        return self.config.exit_layers

    @property
    def weights_dtype(self) -> str:
        """What traces and certificates call the weights: "int8" where they are quantised, else as torch: "float32"."""
        return self.config.quantized or str(self.dtype).removeprefix("torch.")

    @property
    def last_head(self) -> ExitHead:
        """The head after the last layer, which answers every row that is left."""
        return self._head(self.num_layers)

    @property
    def early_heads(self) -> list[ExitHead]:
        """Every head below the last, in layer order."""
        return [self._head(layer) for layer in self.exit_layers[:-1]]

    def _head(self, layer: int) -> ExitHead:
        return self.heads.after(layer)

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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> EarlyExitOutput | tuple[Tensor, ...]:
        """Classify a batch, leaving early where `speed` > 0.

        Args:
            input_ids, token_type_ids, position_ids: [B, T]; or `inputs_embeds` [B, T, E] instead of `input_ids`.
            attention_mask: [B, T], non-zero where a token counts; padding on the right.
            labels: [B] class numbers, or numbers for regression (one label).
            speed: 0 (the full model; only the last head runs) to 1 (every row leaves at the first head); one number
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
            output_hidden_states: also give the hidden states before the first layer and after each, [B, T, H], padding
                included; of the full model only (speed 0, engine "batch"). Default: the configuration's.
            output_attentions: refused; `model.backbone` gives them.
            return_dict: False for a plain tuple.

        Returns:
            EarlyExitOutput. Where rows may leave early, nothing in it has a gradient.

        Raises:
            ValueError: a speed outside [0, 1], or another number of them than heads below the last; a speed above 0 for
                a model whose heads were never distilled; a criterion that this model cannot run; neither or both of
                `input_ids` and `inputs_embeds`, or more tokens than the encoder has positions; a mask of another shape
                or whose first token is masked; another number of labels than rows; `exit_layers` without a head; an
                unknown engine, or "packed" where it cannot run; hidden states of rows that leave early; attentions.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions: got True, but the early-exit model keeps none; ask its encoder, loaded with "
                "attn_implementation='eager': model.backbone(**batch, output_attentions=True).attentions"
            )
        others = (position_ids, inputs_embeds, labels, engine, output_hidden_states, return_dict)
        if all(argument is None for argument in others):
            output = self._planned_answer(
                input_ids, attention_mask, token_type_ids, (speed, criterion, top_n, exit_layers)
            )
            if output is not None:
                return output
        rule = self.exit_rule(speed, criterion, top_n, exit_layers)
        mask = self.check_input(input_ids, attention_mask, inputs_embeds)
        rows = (input_ids if inputs_embeds is None else inputs_embeds).shape[0]  # type: ignore[union-attr]
        if labels is not None and labels.numel() != rows:
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected [{rows}], one per row")
        states: list[Tensor] | None = None
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            engine, states = self._engine_with_states(engine, rule), []
        answers = self._run(engine, rule, mask, input_ids, token_type_ids, position_ids, inputs_embeds, states)
        loss = None if labels is None else self._loss(answers["logits"], labels)
        output = EarlyExitOutput(loss=loss, hidden_states=None if states is None else tuple(states), **answers)
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
        mask = self.check_input(input_ids, attention_mask, inputs_embeds)
        hidden_states, layout = self.start(EncoderInputs(input_ids, mask, token_type_ids, position_ids, inputs_embeds))
        logits, log_odds = [], []
        for stage in stages_of(self.exit_layers):
            hidden_states = self.run_layers(stage, hidden_states, layout)
            found, odds = self.exit_after(stage[-1], hidden_states, layout)
            logits.append(found)
            if odds is not None:
                log_odds.append(odds)
        return torch.stack(logits, dim=1), torch.stack(log_odds, dim=1) if log_odds else None

    def exit_after(self, layer: int, hidden_states: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor | None]:
        """What the head after `layer` says of hidden states [B, T, H]: logits [B, C], log-odds [B] as `all_exits`."""
        read, where = self._read(hidden_states, layout)
        logits = self._head(layer)(read, where)
        return logits, None if self.learned_exit is None else self.learned_exit(where.first_tokens(read), logits)

    def add_learned_exit(self) -> None:
        """Give the model a learned exit that knows the margin only, unless it has one; `fastkd.distill` trains it."""
        if self.learned_exit is not None:
            return
        self.config.learned_exit = True
        self.learned_exit = LearnedExit(self.config).to(self.device, self.dtype)
        self.learned_exit.start()

    def first_layers(self, layer: int) -> EarlyExitForSequenceClassification:
        """A model of the first layers alone, whose last head is the one after `layer`; its weights are copies.

        Its full model answers what this one answers to rows that leave after `layer`, and can be exported. Certificate
        and measurements stay behind.

        Raises:
            ValueError: no head after `layer`; layers that PyTorch or torchao quantised.
        """
        if layer not in self.exit_layers:
            raise ValueError(f"layer: got {layer!r}, but this model has heads after the layers {self.exit_layers}")
        check_not_quantised_elsewhere(
            self, "model", "take the first layers of the unquantised model, then quantise those"
        )
        config = copy.deepcopy(self.config)
        anatomy.keep_layers(config.backbone, range(layer))
        config.exit_layers = [number for number in self.exit_layers if number <= layer]
        config.certificate = config.rank_certificate = config.speed_table = config.weights_fingerprint = None
        config.speed = 0.0
        part = EarlyExitForSequenceClassification(config)
        cast(nn.Module, part).to(self.device, self.dtype)
        weights = merged_state(self)
        part.load_state_dict({name: weights[name] for name in part.state_dict()})
        part.seen_rows = dict(self.seen_rows)
        part.name_or_path = ""
        return part.train(self.training)

    def quantize(self, dtype: str = int8.INT8) -> EarlyExitForSequenceClassification:
        """Put the products of all layers into int8, in place; `save_pretrained` then saves the quantised weights.

        Weights get one scale for each channel, activations one for each token, and no rows are needed. Everything
        else, embeddings and heads among it, is float32, and stays where it is. Rows leave as the quantised model
        decides: a certificate for other weights promises nothing, so trace and calibrate again. No gradient goes
        through the encoder; its heads can be distilled anew.

        Args:
            dtype: "int8".

        Returns:
            The model itself.

        Raises:
            ValueError: another dtype; a model that is not on a CPU, that fastkd has no fast path for, that is
                quantised already, or whose linear layers hold adapters, hooks or weights that are not finite.
        """
        if dtype != int8.INT8:
            raise ValueError(f"dtype: got {dtype!r}, expected {int8.INT8!r}; for others use model.to(torch.bfloat16)")
        self.config.check_quantisable()
        reason = int8.why_not(self.layers, self.device)
        if reason is not None:
            raise ValueError(f"model: it cannot be quantised, because {reason}")
        problem = self.changed_weights()
        cast(nn.Module, self).float()
        int8.replace_linears(self.layers, int8.Int8Linear.of)
        self.backbone.requires_grad_(False)
        self.config.quantized = dtype
        self.config.speed_table = None
        self._claims.carry_over(self, problem)
        return self

    def confirm_weights(self) -> None:
        """Say that the configuration (`exits_trained`, `certificate`...) describes the weights as they are now.

        Loading, saving a model that was just built, and the trainings of fastkd say so by themselves. Whoever changes
        the weights otherwise and answers for what the configuration says calls this; all others are warned.
        """
        self._claims.confirm(self)

    def changed_weights(self) -> str | None:
        """How the weights differ from those that the configuration describes; None where they do not.

        A few values of each tensor are compared; other dtypes and devices make no difference.
        """
        return self._claims.problem(self)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, with a model card, and the fingerprint of the weights in config.json.

        Adapters of peft are merged into what is saved; `PeftModel.save_pretrained` saves them alone.

        Raises:
            ValueError: PyTorch or torchao quantised layers of the model.
        """
        check_not_quantised_elsewhere(
            self,
            "model",
            "save the unquantised model and quantise it after loading, or use model.quantize(), whose int8 weights are "
            "saved",
        )
        weights = merged_state(self) if state_dict is None else state_dict
        self.describe_weights(weights)
        if is_main_process:
            save_seen_rows(self.seen_rows, save_directory)
            self.write_card(save_directory)
        # some families have other names in older files; those of the modules are what the fingerprint names
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, is_main_process, cast(Any, weights), **kwargs)
        if not self.name_or_path and not any(map(is_adapter, self.modules())):
            self.name_or_path = os.fspath(save_directory)  # where an adapter finds its base again

    def write_card(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Write the model card of `folder`, unless somebody else wrote one; options of `fastkd.model.card`."""
        seen = {part: len(hashes) for part, hashes in load_seen_rows(folder).items()}
        options |= {"prefix": self.base_model_prefix, "changed": self.changed_weights()}
        card.write_card(folder, self.config, seen, **options)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        # just before, push_to_hub has put the card of transformers in the place of ours
        self.write_card(working_dir, name=repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def describe_weights(self, weights: Mapping[str, Any] | None = None) -> None:
        """Write the fingerprint of `weights`, default its own, into the configuration, unless that describes others."""
        weights = merged_state(self) if weights is None else weights
        if self._claims.problem(self, weights) is not None:
            return
        if self._claims.is_open:
            self.confirm_weights()
        sketch = WeightsSketch.of(weights)
        self.config.weights_fingerprint = sketch.fingerprint

    def check_encoder(self) -> None:
        """Raise ValueError where the encoder cannot be run layer by layer; asked by the first call at the latest."""
        self._driver.check(self.backbone)

    # What engines ask, see `fastkd.engines.protocol.ExitModel`

    def start(self, inputs: EncoderInputs) -> tuple[Tensor, TokenLayout]:
        """Hidden states [B, T, H] before the first layer, and their layout."""
        return self._driver.start(self.backbone, inputs)

    @property
    def reads_padding(self) -> bool:
        """Whether a row's answer depends on how far it is padded, in transformers as here."""
        return self._driver.reads_padding(self.backbone)

    def narrowed(
        self, layout: TokenLayout, survivors: Tensor, hidden_states: Tensor, attention_mask: Tensor | None
    ) -> TokenLayout:
        """The layout of some rows of a batch; arguments as in `ExitModel.narrowed`."""
        return self._driver.narrowed(self.backbone, layout, survivors, hidden_states, attention_mask)

    def run_layers(self, numbers: range, hidden_states: Tensor, layout: TokenLayout) -> Tensor:
        """Hidden states after these layers (1 is the first), [B, T, H]; differentiable."""
        return self._driver.run_layers(self.backbone, numbers, hidden_states, layout)

    def _read(self, hidden_states: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        """What the heads read: the first token, in hidden states that the encoder's final norm, if any, has seen."""
        hidden_states = self._driver.before_heads(self.backbone, hidden_states)
        return layout.with_mean_first(hidden_states) if self.config.pool == "mean" else (hidden_states, layout)

    def logits_after(self, layer: int, hidden_states: Tensor, layout: TokenLayout) -> Tensor:
        """Logits [B, C] of the head after `layer`, of hidden states [B, T, H] or packed [N, H]."""
        return self._head(layer)(*self._read(hidden_states, layout))

    @property
    def parts(self) -> tuple[nn.Module, nn.Module]:
        """`backbone` and `heads`, past the search of `nn.Module` for attributes."""
        modules: dict[str, Any] = self._modules
        return modules[self.base_model_prefix], modules["heads"]

    @property
    def is_replica(self) -> bool:
        """Whether it lives for one call, as the copies of DataParallel do."""
        return getattr(self, "_is_replica", False)

    @property
    def claims_version(self) -> int:
        """Another number after each change of what is known of the weights."""
        return self._claims.version

    def prepared_head(self, layer: int) -> fk.PreparedStudentHead | None:
        """What answers packed rows after `layer`, with the weights as they are now; None: `decide` and `answer` do."""
        if self.config.pool != "cls" or self.config.num_classes == 1 or self._driver.has_final_norm(self.backbone):
            return None
        return self._head(layer).prepared()

    def decide(
        self,
        layer: int,
        hidden_states: Tensor,
        layout: TokenLayout,
        rule: ExitRule,
        *,
        record: fk.ExitRecord,
        row_ids: Tensor | None = None,
        thresholds: Tensor | None = None,
    ) -> fk.ExitGateOutput:
        """Logits of the head after `layer` and which rows leave there; arguments as in `ExitModel.decide`."""
        head = self._head(layer)
        hidden_states, layout = self._read(hidden_states, layout)
        if rule.criterion in fk.CRITERIA:
            return head.decide(
                hidden_states, layout, rule, layer=layer, record=record, row_ids=row_ids, thresholds=thresholds
            )
        logits = head(hidden_states, layout)
        certainty = self._certainty(layout.first_tokens(hidden_states), logits, rule.criterion)
        return criteria.decide(
            logits, rule, layer=layer, record=record, row_ids=row_ids, thresholds=thresholds, certainty=certainty
        )

    def answer(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        rule: ExitRule,
        *,
        record: fk.ExitRecord,
        row_ids: Tensor,
    ) -> Tensor:
        """Write the last head's answer to every row; uncertainties [B]. Arguments as in `ExitModel.answer`."""
        if self.config.num_classes == 1:
            logits = self.logits_after(self.num_layers, hidden_states, layout)
            uncertainty = logits.new_zeros(logits.shape[0]).masked_fill_(logits[:, 0].isnan(), torch.nan)
        else:
            decided = self.decide(rule.last_layer, hidden_states, layout, rule, record=record, row_ids=row_ids)
            assert decided.logits is not None
            logits, uncertainty = decided.logits, decided.uncertainty
        record.write(row_ids, logits, uncertainty, rule.last_layer)
        return uncertainty

    def _certainty(self, cls_states: Tensor, logits: Tensor, criterion: str) -> Tensor | None:
        """[B] of the learned exit, where `criterion` asks for it."""
        if criterion != "learned":
            return None
        assert self.learned_exit is not None
        return self.learned_exit(cls_states, logits).sigmoid()

    def trace(
        self,
        batches: Any,
        fingerprint: str | None = None,
        rows: Rows | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
        on_batch: OnBatch = lambda done, total: None,
    ) -> ExitTrace:
        """Run every head on every row once, see `ExitTrace`.

        Args:
            batches: keyword arguments of `forward`, with or without `labels`, moved to the model's device; with
                `tokenizer` rows of any kind that `fastkd.load_rows` takes: their order is in `ExitTrace.rows`.
            fingerprint: of the rows (`Rows.digest`), so that a calibration can tell whether training has seen just
                them; default: that of `rows`, or one of the tokens.
            rows: those in the batches, in any order, so that a calibration can tell how many of them training saw.
            tokenizer: of the model, where rows are given.
            max_length, batch_size: of rows: tokens after which a text is cut (default what tokenizer and encoder take),
                and how many run together.
            on_batch: called after each batch of rows with how many are done, and how many there are.

        Raises:
            DataError: rows that cannot be used, or with labels that are not the model's.
            TypeError: batches that are no dictionaries.
            ValueError: no batches, or labels in some batches only.
        """
        if tokenizer is None:
            return record_trace(self, batches, fingerprint, rows)
        length = max_length or longest_row(self.config, tokenizer, None)
        return record_rows(
            self, batches, tokenizer, fingerprint, max_length=length, batch_size=batch_size, on_batch=on_batch
        )

    def calibrate(
        self, rows: Any, *, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
    ) -> calibration.Certificate:
        """`fastkd.calibrate` on the trace of rows of any kind that `fastkd.load_rows` takes.

        Args:
            rows: drawn like those to come, and not seen by training.
            tokenizer: of the model; default: the one beside the weights that it was loaded from.
            options: of `fastkd.calibrate`, and `max_length`, `batch_size` and `on_batch` of `trace`.

        Raises:
            CalibrationError, DataError, ValueError: as `fastkd.calibrate` and `trace`.
        """
        trace = self._trace_of(rows, tokenizer, options)
        return calibration.calibrate(trace, **options)

    def calibrate_ranking(
        self, rows: Any, top_k: int, *, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
    ) -> rank_calibration.RankCertificate:
        """`fastkd.calibrate_ranking` on the trace of pairs (query, document); rows with one query need not be together.

        Args:
            rows: pairs of any kind that `fastkd.load_rows` takes; labels are not needed.
            top_k: see `fastkd.calibrate_ranking`.
            tokenizer: of the model; default: the one beside the weights that it was loaded from.
            options: of `fastkd.calibrate_ranking`, where `label` may be a name and `reliability` rows; and
                `max_length`, `batch_size` and `on_batch` of `trace`.

        Raises:
            CalibrationError, DataError, ValueError: as `fastkd.calibrate_ranking` and `trace`.
        """
        options["label"] = ranking.label_number(self.config, options.get("label"))
        trace = self._trace_of(rows, tokenizer, options)
        return rank_calibration.calibrate_ranking(trace, top_k, **options)

    def compare(
        self, rows: Any, *, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
    ) -> dict[str, Sweep]:
        """`fastkd.compare` on the trace of labelled rows of any kind that `fastkd.load_rows` takes.

        Args:
            rows: labelled.
            tokenizer: of the model; default: the one beside the weights that it was loaded from.
            options: of `fastkd.compare`, where `reliability` may be rows, and `max_length`, `batch_size` and `on_batch`
                of `trace`.

        Raises:
            DataError, ValueError: as `fastkd.compare` and `trace`.
        """
        trace = self._trace_of(rows, tokenizer, options)
        return comparison.compare(trace, **options)

    def _trace_of(self, rows: Any, tokenizer: PreTrainedTokenizerBase | None, options: dict[str, Any]) -> ExitTrace:
        """The trace of `rows`; takes its own options out of `options`, and traces their rows for `reliability`."""
        tokenizer = ranking.tokenizer_of(self) if tokenizer is None else tokenizer
        own = {name: options.pop(name) for name in ("max_length", "batch_size", "on_batch") if name in options}
        others = options.get("reliability")
        if others is not None and not isinstance(others, ExitTrace):
            options["reliability"] = self.trace(others, tokenizer=tokenizer, **own)
        return self.trace(rows, tokenizer=tokenizer, **own)

    def stream(
        self,
        rows: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        text_a: str | None = None,
        text_b: str | None = None,
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
        """Answer rows one by one in their order; the survivors of each layer share runs across the whole input.

        Args:
            rows: texts, tuples (text, text) or with a label as in `fastkd.load_rows`, dictionaries as
                `fastkd.data.columns` names their columns, or dictionaries with `input_ids`; one by one from a list or a
                generator, or in a `datasets.Dataset` or `IterableDataset`, a DataFrame of pandas or polars, an Arrow
                table, a dictionary of columns, `Rows`. None is read whole; labels are passed over. An input that has
                nothing right now may give None after a while, so that what waits can run.
            tokenizer: of the model; not needed where the rows have `input_ids`.
            text_a, text_b: names of the columns of the texts; default: the usual ones.
            speed, criterion, top_n: as in `forward`.
            exit_layers: after which layers to decide, a choice of those that have a head; default all.
            max_length: tokens after which a text is cut; default what tokenizer and encoder take.
            truncate: False reports a text that is too long as a problem instead of cutting it.
            tokens_per_run: a layer runs when as many tokens wait for it, on as many rows as have no more together.
            max_tokens_in_flight: input is read only while fewer tokens than this wait; one window may exceed it. Memory
                is this times the hidden size, and the activations of one run.
            look_ahead: rows that are read, tokenised and sorted by length together.
            deadline: seconds after which a row runs on even where its layer's queue is not full.

        Returns:
            An iterator of `StreamRow` (`.label`, `.score`, `.exit_layer`), one a row, in input order.

        Raises:
            DataError: a table without a column of texts.
            TypeError: rows that are none, such as a single text.
            ValueError: as `forward`; bounds that cannot be kept.
        """
        return stream.Stream(
            self,
            rows,
            tokenizer,
            columns=Columns(text_a, text_b),
            rule=self.exit_rule(speed, criterion, top_n, exit_layers),
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
        """Answer batches in their order; the survivors of each layer share runs across them; made for GPUs.

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
            RuntimeError: the weights of a model whose runs are CUDA graphs were moved before the stream ended.
        """
        return stream_batches.BatchStream(
            self,
            batches,
            rule=self.exit_rule(speed, criterion, top_n, exit_layers),
            tokens_per_run=tokens_per_run,
            max_rows_waiting=max_rows_waiting,
        )

    def rank(
        self,
        query: str | None,
        documents: Iterable[str | Mapping[str, Any]],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        speed: float | None = None,
        label: str | int | None = None,
        max_length: int | None = None,
        tokens_per_run: int = 4096,
    ) -> ranking.Ranking:
        """The documents that answer a query best, as a cross-encoder ranks them.

        A document leaves early where it cannot reach the top k any more (`fastkd.exits.ranking`), and is not computed
        further. Those that are returned went through all layers.

        Args:
            query: the first text of every pair; None where all documents are tokenised.
            documents: the second texts; or dictionaries with `input_ids`, and perhaps `token_type_ids`, of query and
                document together.
            top_k: how many to return; default: all of them, for which the full model runs.
            return_documents: also give the `text` of each.
            tokenizer: of the model; default: the one beside the weights that it was loaded from.
            speed: 0 (the full model for every document) to 1 (all but the top k leave at the first head). Default: the
                half-widths of the model's rank certificate, where that is for as many documents or more, else 0.
            label: the class whose probability ranks, by name or number; not for a regression.
            max_length: tokens after which a pair is cut; default what tokenizer and encoder take.
            tokens_per_run: a layer runs on so many tokens at once.

        Returns:
            A list of dictionaries, best first: `corpus_id` (number of the document, from 0), `score` (the number of a
            regression, in the unit of its labels, or a probability) and perhaps `text`. Its `exit_layers` say after
            which layer each document left.

        Raises:
            TypeError: documents that are no list.
            ValueError: an empty text; `top_k`, `speed` or `label` that this model cannot follow; a score that is not
                finite.
        """
        return ranking.rank(
            self,
            query,
            documents,
            top_k,
            return_documents,
            tokenizer=tokenizer,
            speed=speed,
            label=label,
            max_length=max_length,
            tokens_per_run=tokens_per_run,
        )

    def _planned_answer(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        options: tuple[Any, ...],
    ) -> EarlyExitOutput | None:
        """The answer on a CPU, where the plan of the model has it; `_run` has all the others.

        `options` are those of `exit_rule`.
        """
        if self.training or input_ids is None or input_ids.dim() != 2 or not input_ids.is_cpu:
            return None
        planned = plan.plan_of(self) if input_ids.shape[1] <= self._longest_input else None
        if planned is None or not planned.gives_usual_output:
            return None
        rule = planned.rule(self, options)
        if rule is not None:
            if torch.is_grad_enabled() and not rule.leaves_early:
                return None
            with torch.no_grad():
                tokens = planned.pack(input_ids, attention_mask, token_type_ids)
                if tokens is None:
                    return None
                answers = planned.answer(self, tokens, rule)
            if answers is not None:
                return EarlyExitOutput.of(answers)
        plan.forget_plan(self)
        return None

    def _run(
        self,
        engine: str | None,
        rule: ExitRule,
        mask: Tensor | None,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        states: list[Tensor] | None,
    ) -> dict[str, Any]:
        """What the engine that was asked for, or is fastest, answers; as fields of EarlyExitOutput.

        The hidden states go to `states`, where that is a list.
        """
        leaves_early = rule.leaves_early and not self.training
        encoder = self._packed_encoder(engine, input_ids, position_ids, mask, leaves_early)
        if engine == "graphs":
            if not leaves_early or input_ids is None or position_ids is not None or input_ids.shape[0] == 0:
                raise ValueError(
                    "engine: got 'graphs', which needs a speed above 0, evaluation mode, at least one row of input_ids "
                    "and no position_ids; use engine='batch'"
                )
            if rule.criterion not in fk.CRITERIA:
                raise ValueError(
                    f"engine: got 'graphs', which does not support criterion {rule.criterion!r}; use engine='batch' or "
                    f"one of {', '.join(fk.CRITERIA)}"
                )
            return fields_of(graphs.engine_of(self).run(input_ids, mask, rule, token_type_ids=token_type_ids))
        if encoder is not None:
            assert input_ids is not None
            return fields_of(packed.run(self, encoder, input_ids, mask, token_type_ids, rule))
        inputs = EncoderInputs(input_ids, mask, token_type_ids, position_ids, inputs_embeds)
        if leaves_early:
            return fields_of(batch.run(self, inputs, rule))
        return self._full(inputs, rule, states)

    def _engine_with_states(self, engine: str | None, rule: ExitRule) -> str:
        """The engine that keeps hidden states; ValueError where it cannot answer."""
        if engine not in (None, "batch") or (rule.leaves_early and not self.training):
            raise ValueError(
                "output_hidden_states: got True, but rows that leave early have no states after that, and only engine "
                "'batch' keeps them; use speed=0 without another engine, or output_hidden_states=False"
            )
        return "batch"

    def _packed_encoder(
        self,
        engine: str | None,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        mask: Tensor | None,
        leaves_early: bool,
    ) -> packed_encoder.PackedEncoder | None:
        """What the packed engine runs on; None where padding is kept; ValueError where it was asked for and cannot."""
        if engine not in (None, "batch", "packed", "graphs"):
            raise ValueError(
                f"engine: got {engine!r}, expected 'batch', 'packed' or 'graphs', or call model.stream(rows)"
            )
        if not self.config.has_fast_paths:
            if engine in ("packed", "graphs"):
                check_family(self.config.backbone.model_type)
            return None
        if engine == "graphs" and self.config.is_replayed:
            raise ValueError(
                f"engine: got 'graphs', but {self.config.backbone.model_type!r} has no padded layers for it; use "
                "engine='packed', or model.stream_batches(batches)"
            )
        # asked first, because a compiler cannot trace the question for oneDNN
        if engine is None and torch.compiler.is_compiling():
            return None
        if engine in ("batch", "graphs") or (engine is None and not packed_encoder.supports(self)):
            return None
        wants_grad = self.training or (torch.is_grad_enabled() and not leaves_early)
        can_pack = not (wants_grad or input_ids is None or position_ids is not None or torch.compiler.is_compiling())
        can_pack = can_pack and (mask is None or packed.is_right_padded(mask))
        if not can_pack and engine == "packed":
            raise ValueError(
                "engine: got 'packed', which needs input_ids padded on the right, no position_ids and no gradient "
                "(torch.no_grad() at speed 0)"
            )
        encoder = packed_encoder.encoder_of(self) if can_pack else None
        if encoder is not None and engine == "packed":
            encoder.check()
        return encoder if encoder is not None and (engine == "packed" or encoder.is_faster) else None

    def _full(self, inputs: EncoderInputs, rule: ExitRule, states: list[Tensor] | None) -> dict[str, Any]:
        """What the last head says after all layers, as fields of EarlyExitOutput; differentiable."""
        hidden_states, layout = self.start(inputs)
        if states is None:
            hidden_states = self.run_layers(range(1, self.num_layers + 1), hidden_states, layout)
        else:
            states.append(hidden_states)
            for number in range(1, self.num_layers + 1):
                hidden_states = self.run_layers(range(number, number + 1), hidden_states, layout)
                states.append(hidden_states)
            # the last one is what the encoder gives, with its final norm
            states[-1] = self._driver.before_heads(self.backbone, hidden_states)
        hidden_states, layout = self._read(hidden_states, layout)
        logits = self.last_head(hidden_states, layout)
        # what is exported runs where fastkd_kernels is not, and has one answer a row
        if self.training or torch.compiler.is_exporting():
            return {"logits": logits}
        rows, num_labels = logits.shape
        exit_layer = torch.full((rows,), self.num_layers, dtype=torch.int32, device=logits.device)
        if num_labels == 1:
            return {"logits": logits, "exit_layer": exit_layer}
        record = fk.ExitRecord.allocate(rows, num_labels, logits.device)
        certainty = self._certainty(layout.first_tokens(hidden_states).detach(), logits, rule.criterion)
        gate = criteria.decide(logits.detach(), rule, layer=self.num_layers, record=record, certainty=certainty)
        return {"logits": logits, "exit_layer": exit_layer, "uncertainty": gate.uncertainty}

    def check_input(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None = None
    ) -> Tensor | None:
        """The mask as [B, T] bool, None where nothing is padded; ValueError for what `forward` cannot take."""
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("input_ids: pass exactly one of input_ids and inputs_embeds")
        check_tokens(tokens, inputs_embeds is not None, self._longest_input)
        return checked_mask(attention_mask, tokens)

    def exit_rule(
        self,
        speed: float | Sequence[float] | None = None,
        criterion: str | None = None,
        top_n: int | None = None,
        exit_layers: Sequence[int] | None = None,
    ) -> ExitRule:
        """Where rows leave with these options of `forward`; the configuration's where nothing was said.

        Raises:
            ValueError: options that `forward` refuses.
        """
        config = self.config
        rule = ExitRule.resolve(
            config.speed if speed is None else speed,
            config.criterion if criterion is None else criterion,
            config.top_n if top_n is None else top_n,
            exit_layers=self.exit_layers,
            num_labels=config.num_classes,
            asked_layers=exit_layers,
        )
        self._check_rule(rule)
        return rule

    def _check_rule(self, rule: ExitRule) -> None:
        """Raise ValueError for a rule that this model cannot follow."""
        if rule.criterion == "learned" and self.learned_exit is None:
            raise ValueError(
                "criterion: got 'learned', but this model has no learned exit; distil it with one (`fastkd distill "
                "--learned-exit`, or DistillOptions(learned_exit=True)), or use another criterion"
            )
        if self.training or not rule.leaves_early:
            return
        if self.config.num_classes == 1 and rule.criterion in fk.CRITERIA:
            raise ValueError(
                f"criterion: {rule.criterion!r} needs class probabilities, but this model is a regression "
                "(num_labels=1); use 'agreement', or speed=0"
            )
        self.check_exits()

    def check_exits(self) -> None:
        """Raise ValueError where the heads below the last were never trained; warn where the weights changed since."""
        if not self.config.exits_trained:
            raise ValueError(
                "speed: got a value above 0, but the heads below the last layer were never trained, so early answers "
                "would be random; distil them first (`fastkd distill`, or fastkd.distill), or use speed=0"
            )
        if asks_about_weights():
            self._claims.warn_if_changed(self)

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
        layers: str | None = None,
        **kwargs: Any,
    ) -> EarlyExitForSequenceClassification:
        """Load a plain encoder checkpoint and add heads to it, or load a saved early-exit model.

        Args:
            pretrained_model_name_or_path: a folder or hub name; a checkpoint of any task of an encoder of
                transformers, or one that `save_pretrained` of this class wrote; or a folder with an adapter of peft,
                which is loaded upon its base and merged.
            config: used as it is; the five arguments below must then be left out.
            head: "fastbert" (default) or "linear".
            exit_layers: 1-based numbers of the layers that get a head; the last one always does. Default: every layer.
            num_labels: number of classes, 1 for regression. Default: that of `id2label`, else of the checkpoint.
            id2label: label names by class number.
            layers: where the encoder's list of layers lies, as in "encoder.layers"; default: found by itself.
            kwargs: what `PreTrainedModel.from_pretrained` takes (`dtype`, `attn_implementation`, `device_map`...).

        Raises:
            ValueError: an encoder that cannot be run layer by layer; a checkpoint with code of its own; a label set,
                head or exit layers that differ from those of a saved early-exit model; an incomplete or damaged
                weights file.
            OSError: no such folder, no config.json in it, or no weights.
        """
        path = pretrained_model_name_or_path
        added = {
            "head": head, "exit_layers": exit_layers, "num_labels": num_labels, "id2label": id2label, "layers": layers,
        }  # fmt: skip
        base = None if path is None else adapter_base(path)
        if base is not None:
            return cls._load_merged(path, base, *model_args, config=config, added=added, **kwargs)
        saved = None if path is None else saved_config(path, kwargs)
        config = config_to_load(saved, path, config, added, kwargs)
        check_loaded_dtype(config, path, kwargs)
        heads_are_new = saved is not None and not isinstance(saved, EarlyExitConfig)
        loaded = cls._load(path, *model_args, config=config, heads_are_new=heads_are_new, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if config.quantized is not None:
            model.backbone.requires_grad_(False)  # loading makes new parameters
        if model.device.type != "meta":
            model.check_encoder()
        if not heads_are_new and path is not None:
            folder = local_folder(path, kwargs, besides=SEEN_ROWS)
            model.seen_rows = {} if folder is None else load_seen_rows(folder)
            model._claims.loaded(model, None if folder is None else weights_fingerprint(folder, kwargs))
        return loaded

    @classmethod
    def _load_merged(
        cls,
        folder: str | os.PathLike[str],
        base: str,
        *model_args: Any,
        config: EarlyExitConfig | None,
        added: Mapping[str, Any],
        **kwargs: Any,
    ) -> Any:
        """The model of an adapter folder: the base that it names, with the adapter merged into it."""
        wants_info = kwargs.pop("output_loading_info", False)
        plain = saved_config(base, {})
        saved = saved_config(folder, {}) if (Path(folder) / "config.json").is_file() else plain
        config = config_to_load(saved, folder, config, added, kwargs)
        heads_are_new = not isinstance(plain, EarlyExitConfig)
        model, info = cls._load(
            base, *model_args, config=config, heads_are_new=heads_are_new, output_loading_info=True, **kwargs
        )
        model = merge_adapter(model, folder, heads_are_new=heads_are_new)
        model.name_or_path = str(folder)
        model.seen_rows = load_seen_rows(folder)
        is_as_saved = "dtype" not in kwargs and "torch_dtype" not in kwargs
        model._claims.loaded(model, WeightsSketch.of(model.state_dict()).fingerprint if is_as_saved else None)
        return (model, info) if wants_info else model

    @classmethod
    def _load(cls, path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any) -> Any:
        wants_info = kwargs.pop("output_loading_info", False)
        strict = not kwargs.pop("ignore_mismatched_sizes", False)
        with damage_explained(path, lambda: cls(kwargs["config"])):
            loaded: Any = super().from_pretrained(
                path, *model_args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        model, info = loaded
        if strict:
            check_complete(path, info)
        return (model, info) if wants_info else model


AutoConfig.register(EarlyExitConfig.model_type, EarlyExitConfig)
AutoModelForSequenceClassification.register(EarlyExitConfig, EarlyExitForSequenceClassification)
