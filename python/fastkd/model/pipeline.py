"""`pipeline("text-classification")` of transformers, which leaves early where the model can."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers import TextClassificationPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from fastkd.data.texts import text_problem
from fastkd.model.modeling import EarlyExitForSequenceClassification

_STREAMED = {"truncation", "max_length"}  # options of a tokenizer that the stream has too


class EarlyExitPipeline(TextClassificationPipeline):
    """A `TextClassificationPipeline` that takes `speed`, `criterion`, `top_n` and `exit_layers`, here or in a call.

    Each answer of an early-exit model also has `exit_layer`. Lists, generators and data sets of texts run through
    `EarlyExitForSequenceClassification.stream`, whatever `batch_size` says, unless all scores (`top_k`), another
    `function_to_apply` or further options of the tokenizer are asked for. Other models answer as they always did.

    Raises:
        ValueError: one of these options for another model; what `forward` refuses; an input that is no text.
    """

    model: Any

    def _sanitize_parameters(  # type: ignore[override]
        self, speed: Any = None, criterion: Any = None, top_n: Any = None, exit_layers: Any = None, **rest: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocessing, forward, postprocessing = super()._sanitize_parameters(**rest)
        given = {"speed": speed, "criterion": criterion, "top_n": top_n, "exit_layers": exit_layers}
        exits = {name: value for name, value in given.items() if value is not None}
        if exits and not self._leaves_early:
            raise ValueError(
                f"{', '.join(exits)}: a {type(self.model).__name__} has no early exits; train them first: "
                "fastkd.finetune, then fastkd.distill"
            )
        if exits:
            self.model.exit_rule(**(getattr(self, "_forward_params", {}) | exits))
        return preprocessing, forward | exits, postprocessing

    @property
    def _leaves_early(self) -> bool:
        return isinstance(self.model, EarlyExitForSequenceClassification)

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As every pipeline; no texts have no answers, where transformers' own raises an IndexError."""
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, *args, **kwargs)

    def preprocess(self, inputs: Any, **tokenizer_kwargs: Any) -> Any:  # type: ignore[override]
        if self._leaves_early and (problem := _problem(inputs)):
            raise ValueError(f"inputs: {problem}")
        return super().preprocess(inputs, **tokenizer_kwargs)

    def _forward(self, model_inputs: Mapping[str, Any], **exits: Any) -> Any:  # type: ignore[override]
        return self.model(**model_inputs, **exits) if self._leaves_early else super()._forward(model_inputs)

    def postprocess(self, model_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        answer = super().postprocess(model_outputs, *args, **kwargs)
        if not self._leaves_early:
            return answer
        layer = int(model_outputs["exit_layer"][0])
        for entry in answer if isinstance(answer, list) else [answer]:
            entry["exit_layer"] = layer
        return answer

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterable[Any]:
        if not self._can_stream(preprocess_params, postprocess_params):
            return super().get_iterator(
                inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
            )
        return self._streamed(inputs, preprocess_params, forward_params, "top_k" in postprocess_params)

    def _can_stream(self, preprocess_params: Mapping[str, Any], postprocess_params: Mapping[str, Any]) -> bool:
        """Whether the best class, or the number of a regression, is all that is asked for."""
        if not self._leaves_early or postprocess_params.get("top_k", 1) != 1:
            return False
        is_usual = self.model.config.num_labels != 1 or self.model.config.problem_type == "regression"
        return is_usual and "function_to_apply" not in postprocess_params and preprocess_params.keys() <= _STREAMED

    def _streamed(
        self, inputs: Any, preprocess_params: Mapping[str, Any], exits: Mapping[str, Any], in_list: bool
    ) -> Iterator[Any]:
        names = self.model.config.id2label
        answers = self.model.stream(
            map(_row, _one_by_one(inputs)),
            self.tokenizer,
            truncate=bool(preprocess_params.get("truncation", False)),
            max_length=preprocess_params.get("max_length"),
            **exits,
        )
        for row in answers:
            if row.problem is not None:
                raise ValueError(f"inputs, row {row.line}: {row.problem}")
            answer = {"label": row.label, "score": row.score, "exit_layer": row.exit_layer}
            if row.score is None:
                answer |= {"label": names[0], "score": row.label}
            yield [answer] if in_list else answer


def _one_by_one(inputs: Any) -> Iterator[Any]:
    # a data set of torch need not end its iteration by itself
    return (inputs[index] for index in range(len(inputs))) if hasattr(inputs, "__len__") else iter(inputs)


def _row(inputs: Any) -> Any:
    """An input of the pipeline as a row of a stream."""
    if isinstance(inputs, Mapping) and "text" in inputs:
        return inputs["text"], inputs.get("text_pair")
    # transformers' older form of a pair
    if isinstance(inputs, list) and len(inputs) == 1 and isinstance(inputs[0], list) and len(inputs[0]) == 2:
        return tuple(inputs[0])
    return inputs


def _problem(inputs: Any) -> object:
    row = _row(inputs)
    if not isinstance(row, tuple):
        return text_problem(row)
    return text_problem(row[0]) or (None if row[1] is None else text_problem(row[1]))


PIPELINE_REGISTRY.supported_tasks["text-classification"]["impl"] = EarlyExitPipeline
