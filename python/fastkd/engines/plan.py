"""`Plan`: what is decided once for a model and a version of its weights, so that a call costs little but its kernels.

Whether its encoder runs from its parts, rearranged weights, folded heads, rules: all this follows from what the modules
and the configuration hold. A plan keeps a `fastkd_kernels.ModuleStamp` of them, which tells in one call whether it is
still true; where it is not, or anything is put around the modules, the usual path asks all questions anew. There is one
stamp for each layer and head, so that a row which leaves early asks only about what it has run through.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import fastkd_kernels as fk
from fastkd.encoders import families
from fastkd.encoders.layout import TokenLayout
from fastkd.encoders.untouched import are_untouched
from fastkd.engines import packed, packed_encoder
from fastkd.engines.batch import warn_that_logits_are_nan
from fastkd.engines.output import fields_of
from fastkd.engines.packed_encoder import PackedEncoder, round_up_tokens
from fastkd.engines.packed_layers import Layer, LayerFromParts, run_layers
from fastkd.engines.protocol import ExitModel
from fastkd.exits.rule import ExitRule

_MOST_RULES = 64


class Plan:
    """Made by `plan_of`, which keeps it; nothing in it changes but what it remembers of rules."""

    def __init__(self, model: ExitModel) -> None:
        # before anything is read, so that a change from now on is noticed
        self._watched = model.parts
        self._config = model.config
        self._layer_stamps = {number: fk.ModuleStamp([layer]) for number, layer in enumerate(model.layers, 1)}
        self._head_stamps = {number: fk.ModuleStamp([model.heads.after(number)]) for number in model.exit_layers}
        self._frame = fk.ModuleStamp(_around_layers(model), [model.config, model.config.backbone], inside=False)
        self._last = model.exit_layers[-1]
        self._onednn = torch.backends.mkldnn.enabled
        self._encoder: PackedEncoder = packed_encoder.encoder_of(model)
        self._layers: Sequence[Layer] = self._encoder.layers_now
        self._heads = {layer: head for layer in model.exit_layers if (head := model.prepared_head(layer)) is not None}
        self._embedding = self._encoder.prepared_embedding()
        self._first_position = families.first_position(model.config.backbone)
        self._stages: dict[range, fk.PreparedStage | None] = {}
        self._rules: dict[Any, ExitRule] = {}
        self._runs: dict[ExitRule, fk.PreparedRun | None] = {}
        config = model.config
        self.gives_usual_output = bool(
            config.return_dict and not config.output_hidden_states and not config.output_attentions
        )
        """Whether calls without further arguments are answered by an `EarlyExitOutput` of the answers alone."""

    @property
    def is_faster(self) -> bool:
        """Whether packed tokens beat padded batches."""
        return self._encoder.is_faster

    def is_current(self, model: ExitModel) -> bool:
        """Whether all of the model is as it was when the plan was made."""
        return self.frame_is_current(model) and self._are_current(range(1, self._last + 1), *self._head_stamps)

    def frame_is_current(self, model: ExitModel) -> bool:
        """Whether all but its layers and heads are: embeddings, configuration, and which layers and heads there are."""
        return (
            model.config is self._config
            and all(map(_is, model.parts, self._watched))
            and self._onednn == torch.backends.mkldnn.enabled
            and self._frame.is_current()
        )

    def stage_is_current(self, stage: range) -> bool:
        """Whether its layers and the head behind them are as they were."""
        return self._are_current(stage, stage[-1])

    def _are_current(self, layers: range, *heads: int) -> bool:
        return all(self._layer_stamps[layer].is_current() for layer in layers) and all(
            self._head_stamps[head].is_current() for head in heads
        )

    def rule(self, model: ExitModel, options: tuple[Any, ...]) -> ExitRule | None:
        """`model.exit_rule(*options)`, asked once; ValueError as there. None where it has to be asked again.

        That is where the last head changed: the model then warns of early heads that were trained for another.
        """
        if not self._head_stamps[self._last].is_current():
            return None
        # a bool is equal to a number, and refused where that is taken
        key = (model.claims_version, *options, *map(type, options)) if all(map(_is_simple, options)) else None
        known = None if key is None else self._rules.get(key)
        if known is None:
            known = model.exit_rule(*options)
            if key is not None:
                _remember(self._rules, key, known)
        return known

    def answer(self, model: ExitModel, tokens: fk.PackedInput, rule: ExitRule) -> dict[str, Any] | None:
        """The fields of `EarlyExitOutput`, of any number of rows and by any rule; without a gradient.

        None where one of the layers and heads on the way has changed.
        """
        run = self._run(rule)
        if run is None:
            return self._answer_by_stages(model, tokens, rule)
        answers = run(self.rows_for(None, tokens), tokens.cu_seqlens)
        # asked afterwards, when it is known how far the rows went; a plan runs on copies of its own, whatever changed
        deepest = max(answers.exit_layer.tolist())
        if not self._are_current(range(1, deepest + 1), *(layer for layer in rule.layers if layer <= deepest)):
            return None
        if answers.has_nan:
            warn_that_logits_are_nan()
        return {"logits": answers.logits, "exit_layer": answers.exit_layer, "uncertainty": answers.uncertainty}

    def answers_at_once(self, rule: ExitRule) -> bool:
        """Whether `answer` is one call."""
        return self._run(rule) is not None

    def _run(self, rule: ExitRule) -> fk.PreparedRun | None:
        """All stages of a rule as one call, made once; None where one of them is more than a call."""
        if rule not in self._runs:
            stages = [self.stage(layers) for layers in rule.stages] if rule.criterion in fk.CRITERIA else []
            direct = [stage for stage in stages if stage is not None and stage.is_direct]
            is_direct = len(direct) == len(rule.stages)
            run = (
                fk.PreparedRun(direct, rule.layers, rule.thresholds, rule.criterion, rule.top_n) if is_direct else None
            )
            _remember(self._runs, rule, run)
        return self._runs[rule]

    def _answer_by_stages(self, model: ExitModel, tokens: fk.PackedInput, rule: ExitRule) -> dict[str, Any] | None:
        stages = _PlannedStages(self, _PlannedHeads(model, self._heads), tokens)
        try:
            return fields_of(packed.run_packed(stages, None, tokens.lengths, tokens.cu_seqlens, rule))
        except _OutdatedError:
            return None

    def stage(self, layers: range) -> fk.PreparedStage | None:
        """These layers and the head behind them as one call, and before the first layer what embeds; made once.

        None where a layer runs product by product, or the head is not prepared.
        """
        if layers not in self._stages:
            run = self._layers[layers.start - 1 : layers.stop - 1]
            whole = [layer.whole for layer in run if isinstance(layer, LayerFromParts) and layer.whole is not None]
            head = self._heads.get(layers[-1])
            embedding = self._embedding if layers.start == 1 else None
            is_whole = head is not None and len(whole) == len(run)
            self._stages[layers] = fk.PreparedStage(whole, head, embedding) if head is not None and is_whole else None
        return self._stages[layers]

    def rows_for(self, hidden_states: Tensor | None, tokens: fk.PackedInput) -> Tensor | Sequence[Tensor]:
        """What a stage takes: hidden states, or what the embedding is asked for."""
        if hidden_states is not None:
            return hidden_states
        return self.embed(tokens) if self._embedding is None else self._embedded(tokens)

    def _embedded(self, tokens: fk.PackedInput) -> list[Tensor]:
        """What each table of the prepared embedding is asked for."""
        columns = tokens.input_ids, tokens.positions, tokens.token_type_ids
        return [columns[kind] for kind in self._encoder.embedded]

    @property
    def encoder(self) -> PackedEncoder:
        """That of the model, with the layers of the plan."""
        self._encoder.use(self._layers)
        return self._encoder

    def heads_of(self, model: ExitModel, layer: int) -> packed.PackedHeads:
        """What decides after `layer`: the prepared heads, or where that one has changed those of the model."""
        return _PlannedHeads(model, self._heads if self._are_current(range(0), layer) else {})

    def compaction_pays(self, tokens: int, kept: int, layers: int) -> bool:
        """As `PackedEncoder.compaction_pays`."""
        return self._encoder.compaction_pays(tokens, kept, layers)

    def pack(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> fk.PackedInput | None:
        """The tokens of a batch [B, T] that count; None where the model has to look at the arguments itself."""
        if input_ids.dtype != torch.int64 or not input_ids.numel():
            return None
        for tensor in (attention_mask, token_type_ids):
            if tensor is not None and (tensor.shape != input_ids.shape or not tensor.is_cpu):
                return None
        if token_type_ids is not None and token_type_ids.dtype != torch.int64:
            return None
        return fk.pack_tokens(input_ids, attention_mask, token_type_ids, self._first_position)

    def embed(self, tokens: fk.PackedInput) -> Tensor:
        """Hidden states before the first layer, [R, H]; R is N rounded up, and the rows added are finite."""
        used = tokens.input_ids.shape[0]
        rows = round_up_tokens(used)
        if self._embedding is not None:
            hidden_states = self._embedding(self._embedded(tokens), rows)
        else:
            hidden_states = torch.empty(rows, self._config.hidden_size, dtype=self._encoder.dtype)
            self._encoder.embed_rows(
                tokens.input_ids, tokens.positions, tokens.token_type_ids, out=hidden_states[:used]
            )
        if rows != used:
            hidden_states[used:].zero_()
        return hidden_states

    def run_layers(self, numbers: range, hidden_states: Tensor, layout: TokenLayout) -> Tensor:
        """The output of the last of these layers, packed [R, H]."""
        return run_layers(self._layers[numbers.start - 1 : numbers.stop - 1], hidden_states, layout)


class _OutdatedError(Exception):
    """A layer or head is no longer what the plan was made of."""


class _PlannedStages:
    """The stages of a model as its plan has them, each one call where it can be; `_OutdatedError` of what changed."""

    def __init__(self, plan: Plan, heads: _PlannedHeads, tokens: fk.PackedInput) -> None:
        self.config = heads.config
        self.compaction_pays = plan.compaction_pays
        self._plan, self._tokens = plan, tokens
        self._one_by_one = packed.ModelStages(heads, plan)

    def run_stage(
        self,
        stage: range,
        hidden_states: Tensor | None,
        layout: TokenLayout,
        rule: ExitRule,
        *,
        used: int,
        record: fk.ExitRecord,
        row_ids: Tensor,
        thresholds: Tensor | None = None,
    ) -> packed.StageRun:
        """As in `packed.PackedStages`."""
        if not self._plan.stage_is_current(stage):
            raise _OutdatedError
        prepared = self._plan.stage(stage) if rule.criterion in fk.CRITERIA else None
        if prepared is None:
            given = self._plan.embed(self._tokens) if hidden_states is None else hidden_states
            return self._one_by_one.run_stage(
                stage, given, layout, rule, used=used, record=record, row_ids=row_ids, thresholds=thresholds
            )
        assert layout.cu_seqlens is not None
        layer = stage[-1]
        speed = rule.threshold(layer) if thresholds is None else thresholds
        rows = self._plan.rows_for(hidden_states, self._tokens)
        left = prepared(rows, layout.cu_seqlens, speed, rule.criterion, row_ids, rule.top_n, record=record, layer=layer)
        if layer == rule.last_layer:
            record.write(row_ids, left.logits, left.uncertainty, layer)
        return packed.StageRun(left.hidden_states, left.uncertainty, left.staying)


class _PlannedHeads:
    """The heads of a model, those of them that are prepared in their place."""

    def __init__(self, model: ExitModel, heads: dict[int, fk.PreparedStudentHead]) -> None:
        self.config = model.config
        self._model, self._heads = model, heads

    def decide(
        self,
        layer: int,
        hidden_states: Tensor,
        layout: TokenLayout,
        rule: ExitRule,
        *,
        record: fk.ExitRecord,
        row_ids: Tensor,
        thresholds: Tensor | None = None,
    ) -> fk.ExitGateOutput:
        head = self._heads.get(layer)
        if head is None or rule.criterion not in fk.CRITERIA:
            return self._model.decide(
                layer, hidden_states, layout, rule, record=record, row_ids=row_ids, thresholds=thresholds
            )
        assert layout.cu_seqlens is not None
        logits = head(hidden_states, layout.cu_seqlens)
        speed = rule.threshold(layer) if thresholds is None else thresholds
        decided = fk.exit_gate(logits, speed, rule.criterion, row_ids, rule.top_n, record=record, layer=layer)
        return decided._replace(logits=logits)

    def answer(
        self, hidden_states: Tensor, layout: TokenLayout, rule: ExitRule, *, record: fk.ExitRecord, row_ids: Tensor
    ) -> Tensor:
        last = rule.last_layer
        if last not in self._heads or rule.criterion not in fk.CRITERIA:
            return self._model.answer(hidden_states, layout, rule, record=record, row_ids=row_ids)
        decided = self.decide(last, hidden_states, layout, rule, record=record, row_ids=row_ids)
        assert decided.logits is not None
        record.write(row_ids, decided.logits, decided.uncertainty, last)
        return decided.uncertainty


def _remember(known: dict[Any, Any], key: object, value: object) -> None:
    if len(known) >= _MOST_RULES:
        known.clear()
    known[key] = value


def _is(one: object, other: object) -> bool:
    return one is other


def _is_simple(option: object) -> bool:
    return option is None or type(option) in (float, int, str)


def _around_layers(model: ExitModel) -> list[nn.Module]:
    inside = {module for layer in model.layers for module in layer.modules()}
    return [*(module for module in model.backbone.modules() if module not in inside), model.heads]


_plans: weakref.WeakKeyDictionary[Any, Plan] = weakref.WeakKeyDictionary()


def plan_of(model: ExitModel) -> Plan | None:
    """The plan of a model in evaluation mode, made anew where something changed.

    None where packed tokens are not the fastest way to run it on the CPU, and where skipping PyTorch's dispatcher would
    be seen: by hooks, torch.compile, autocast, transforms, a forced backend.
    """
    if not fk.is_unwatched() or torch.is_autocast_enabled("cpu") or torch_module._has_any_global_hook():
        return None
    plan = _plans.get(model)
    if plan is None or not plan.frame_is_current(model):
        _plans.pop(model, None)
        if not _can_be_planned(model):
            return None
        # copies made in inference mode could not be used outside of it
        with torch.inference_mode(False), torch.no_grad():
            plan = _plans[model] = Plan(model)
    return plan if plan.is_faster else None


def current_plan_of(model: ExitModel) -> Plan | None:
    """`plan_of`, made anew where a layer or a head changed."""
    plan = plan_of(model)
    if plan is None or plan.is_current(model):
        return plan
    forget_plan(model)
    return plan_of(model)


def forget_plan(model: ExitModel) -> None:
    """Make a new one the next time; of a model that a part of its plan is no longer true for."""
    _plans.pop(model, None)


def _can_be_planned(model: ExitModel) -> bool:
    return (
        not model.is_replica
        and model.config.has_fast_paths
        and packed_encoder.supports(model)
        and all(map(are_untouched, model.parts))
    )
